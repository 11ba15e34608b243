"""``mpillm doctor``: what this launch is, and what is wrong with it."""

import ctypes
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter

import click

from mpillm import __version__
from mpillm.config import Config
from mpillm.errors import FAILURE, OK, LaunchError, MpillmError
from mpillm.files import to_json

ODD_MODEL = {"hidden_size": 40, "num_layers": 1, "num_heads": 5, "ffn_size": 54, "vocab_size": 257}
SHM_BYTES = 1 << 26  # a rank; less than any model worth a node needs
CUDA_SWITCHES = ("MPICH_GPU_SUPPORT_ENABLED", "MPIR_CVAR_ENABLE_GPU", "OMPI_MCA_opal_cuda_support")
LAUNCHER_PREFIXES = ("PMI_", "PMIX_", "PRTE_", "OMPI_COMM_", "HYDI_", "HYDRA_", "SLURM_")
# A library that only says that it takes device memory may end the process: hence one of its own.
CUDA_TEST = """
import torch
from mpi4py import MPI
x, y = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
torch.cuda.synchronize()
MPI.COMM_SELF.Sendrecv(x, 0, recvbuf=y, source=0)
torch.cuda.synchronize()
raise SystemExit(not torch.equal(x, y))
"""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def command(as_json):
    """Say what this launch is; exit 0 if it is sound, 1 with a remedy for each fault if not."""
    from mpillm.comm.single import SingleComm
    from mpillm.comm.world import comm_world, launch, refuse

    try:
        comm = comm_world()
    except LaunchError as error:
        fault = {"fault": "a launch that is refused", "remedy": str(error)}
        refuse(error, lambda: report([describe_rank(SingleComm())], [fault], as_json))
    launch(lambda: examine(comm, as_json), comm)


def examine(comm, as_json):
    """Report what all ranks see; return the exit code. Collective over ``comm``."""
    seen = sees_folder_of_rank_0(comm)
    ranks = comm.allgather({**describe_rank(comm), "shares_folder": seen})
    faults, fast, exact = find_faults(ranks), fast_ways(comm), exact_ways(comm)
    if comm.rank == 0:
        report(ranks, faults, as_json, fast, exact)
    return FAILURE if faults else OK


def fast_ways(comm):
    """Return by which library fast numerics multiply here on CPUs, by dtype. Collective over ``comm``."""
    import torch

    from mpillm.nn.products import fast_product, plain

    found = {}
    for dtype in ("float32", "float64"):
        multiply = fast_product(comm, torch.device("cpu"), getattr(torch, dtype))
        found[dtype] = "plain" if multiply is plain else "onednn where it gains"
    return found


def exact_ways(comm):
    """Return by which way of products exact numerics go here, for each dtype ``{"way", "refused"}``.

    Collective over ``comm``. Tried on sizes that nothing divides; a run tries its own.
    """
    from mpillm.train.selftest import check_exact

    found = {}
    for dtype in ("float32", "float64"):
        config = Config.from_dict({"model": ODD_MODEL, "train": {
            "numerics": "exact", "dtype": dtype, "seq_len": 12, "global_batch": 9, "microbatch": 2}})
        try:
            found[dtype] = {"way": check_exact(config.resolve(1), comm), "refused": None}
        except MpillmError as error:
            found[dtype] = {"way": None, "refused": str(error)}
    return found


def report(ranks, faults, as_json, fast=None, exact=None):
    """Print ranks and faults."""
    if as_json:
        click.echo(to_json({"sound": not faults, "faults": faults, "fast": fast, "exact": exact, "ranks": ranks}, indent=1))
    else:
        click.echo(to_text(ranks, faults, fast, exact))


def sees_folder_of_rank_0(comm):
    """Tell whether this rank finds a file that rank 0 makes where it was started; None if it could not make one.

    Collective over ``comm``.
    """
    name = None
    if comm.rank == 0:
        try:
            handle, name = tempfile.mkstemp(prefix=".mpillm-", dir=os.getcwd())
            os.close(handle)
        except OSError:
            pass
    name = comm.bcast(name)
    found = None if name is None else os.path.exists(name)
    comm.Barrier()
    if comm.rank == 0 and name:
        os.unlink(name)
    return found


def describe_rank(comm):
    """Return what this rank sees, as plain values. Local but for placing threads."""
    import h5py
    import mpi4py
    import numpy
    import torch

    from mpillm.comm import limits
    from mpillm.comm.single import SingleComm
    from mpillm.comm.world import launched_size, set_threads, user_threads

    threads, bounds, (quota, _) = set_threads(comm), limits.memory_bounds(), limits.core_quota()
    memory_bytes, memory_limit = limits.memory_of_rank(comm, bounds)
    library, level, versions = "none: one rank without MPI", "serialized", None
    if not isinstance(comm, SingleComm):
        from mpi4py import MPI

        library = MPI.Get_library_version().split("\n")[0].strip(" \0")
        names = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled", MPI.THREAD_SERIALIZED: "serialized",
                 MPI.THREAD_MULTIPLE: "multiple"}
        level = names[MPI.Query_thread()]
        versions = {"compiled_for": MPI.__file__.split("MPI.")[-1].split(".")[0],  # of a wheel: openmpi, mpich, impi
                    "compiled_standard": [MPI.VERSION, MPI.SUBVERSION], "standard": list(MPI.Get_version())}
    variable, announced = launched_size()
    return {
        "rank": comm.rank, "size": comm.size, "node": os.uname().nodename, "launcher": variable or "none",
        "launched": announced, "mpi": library, "mpi_versions": versions, "thread_level": level,
        "cores": sorted(os.sched_getaffinity(0)), "core_quota": quota if quota < math.inf else None, "threads": threads,
        "cpu": platform.machine(), "memory_bytes": memory_bytes, "memory_limit": memory_limit,
        "threads_set_by_user": bool(user_threads()),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda_aware": cuda_aware(versions),
        "shm_free_bytes": limits.shared_memory_bytes("/dev/shm", bounds) if os.path.isdir("/dev/shm") else 0,
        "hdf5": h5py.version.hdf5_version, "hdf5_is_parallel": bool(h5py.get_config().mpi),
        "versions": {"mpillm": __version__, "python": platform.python_version(), "torch": torch.__version__,
                     "mpi4py": mpi4py.__version__, "numpy": numpy.__version__, "h5py": h5py.__version__},
    }


def cuda_aware(versions):
    """Tell whether the MPI library takes memory of a GPU; None if it does not claim to, or there is no GPU. Local."""
    import torch

    if versions is None or not torch.cuda.is_available():
        return None
    query = getattr(ctypes.CDLL(None), "MPIX_Query_cuda_support", None)
    is_asked_for = any(os.environ.get(name, "0").lower() in ("1", "true") for name in CUDA_SWITCHES)
    if not is_asked_for and not (query and query()):
        return None
    alone = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    try:
        return subprocess.run([sys.executable, "-c", CUDA_TEST], env=alone, capture_output=True,
                              timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def find_faults(ranks):
    """Return a list of ``{"fault", "remedy"}`` for what all ranks reported."""
    from mpillm.comm.limits import SHM_REMEDY

    faults = []
    for node in dict.fromkeys(rank["node"] for rank in ranks):
        here = [rank for rank in ranks if rank["node"] == node]
        quotas = [rank["core_quota"] for rank in here if rank["core_quota"]]
        cores = min([len(set().union(*(rank["cores"] for rank in here))), *quotas])
        threads = sum(rank["threads"] for rank in here)
        if threads > cores:
            unset = "" if all(rank["threads_set_by_user"] for rank in here) else "; OMP_NUM_THREADS is not set"
            faults.append({
                "fault": f"node {node}: {len(here)} ranks with {threads} threads together share {cores:g} cores"
                         f"{unset}",
                "remedy": "start fewer ranks a node, or set OMP_NUM_THREADS so that ranks x threads fits the cores",
            })
        crowded = [core for core, users in Counter(c for r in here if len(r["cores"]) == 1 for c in r["cores"]).items()
                   if users > 1]
        if crowded:
            faults.append({
                "fault": f"node {node}: several ranks are bound to core {crowded[0]} alone",
                "remedy": "bind ranks to different cores: mpirun --bind-to core, srun --cpu-bind=cores -c CORES",
            })
        if len(here) > 1 and here[0]["shm_free_bytes"] < SHM_BYTES * len(here):
            faults.append({
                "fault": f"node {node}: /dev/shm has {here[0]['shm_free_bytes'] / 2**20:.0f} MiB free for {len(here)} "
                         "ranks, whose gradients and weights it holds",
                "remedy": f"{SHM_REMEDY}; mpillm goes over messages where it does not fit",
            })
    lost = [rank["rank"] for rank in ranks if rank["shares_folder"] is False]
    if lost or ranks[0]["shares_folder"] is None:
        text = f"ranks {lost} do not see" if lost else "rank 0 cannot write to"
        faults.append({"fault": f"{text} the folder that rank 0 was started in",
                       "remedy": "start the job, and keep train.run_dir, on a file system that all nodes share"})
    for key, what in (("mpi", "MPI libraries"), ("versions", "package versions")):
        seen = {json.dumps(rank[key], sort_keys=True) for rank in ranks}
        if len(seen) > 1:
            faults.append({"fault": f"ranks use different {what}: {' / '.join(sorted(seen))}",
                           "remedy": "start all ranks from one environment on a file system that all nodes share"})
    versions = ranks[0]["mpi_versions"]
    if versions and is_other_mpi(ranks[0]["mpi"], **versions):
        compiled = ".".join(map(str, versions["compiled_standard"]))
        faults.append({"fault": f"mpi4py was compiled for {versions['compiled_for']}, MPI {compiled}, and runs on "
                                f"{ranks[0]['mpi']}, MPI {'.'.join(map(str, versions['standard']))}",
                       "remedy": "build mpi4py with this library's mpicc (pip install --no-binary mpi4py mpi4py), or "
                                 "point MPI4PY_LIBMPI at the library it was compiled for"})
    failing = [rank["rank"] for rank in ranks if rank["cuda_aware"] is False]
    if failing:
        faults.append({"fault": f"ranks {failing}: the MPI library says that it takes memory of GPUs, and fails to",
                       "remedy": "unset " + ", ".join(CUDA_SWITCHES) + ", or load the CUDA-aware library of this "
                                 "machine; mpillm itself hands MPI memory of the host alone"})
    if ranks[0]["thread_level"] not in ("serialized", "multiple"):
        faults.append({"fault": f"MPI was started with thread level {ranks[0]['thread_level']}",
                       "remedy": "let mpillm start MPI, or ask for MPI_THREAD_SERIALIZED"})
    return faults


def is_other_mpi(library, compiled_for, compiled_standard, standard):
    """Tell whether a library is not of the kind, or older than the standard, that mpi4py was compiled for."""
    is_open_mpi = "Open MPI" in library
    known = {"openmpi": not is_open_mpi, "mpich": is_open_mpi, "impi": is_open_mpi}
    return known.get(compiled_for, False) or standard < compiled_standard


def to_text(ranks, faults, fast=None, exact=None):
    """Lay the report out for people."""
    first, nodes = ranks[0], Counter(rank["node"] for rank in ranks)
    lines = [
        "mpillm     {mpillm}, Python {python}, torch {torch}, mpi4py {mpi4py}".format(**first["versions"]),
        f"MPI        {first['mpi']}, thread level {first['thread_level']}",
        f"launch     {len(ranks)} ranks on {len(nodes)} nodes; launcher says {first['launched']} ({first['launcher']})",
        f"HDF5       {first['hdf5']}, parallel: {'yes' if first['hdf5_is_parallel'] else 'no (not needed)'}",
        f"GPUs       {', '.join(first['gpus']) or 'none'}",
        f"memory     {first['memory_bytes'] / 2**30:.1f} GiB a rank, by {first['memory_limit']}",
        f"/dev/shm   {first['shm_free_bytes'] / 2**30:.1f} GiB free",
    ]
    for dtype, way in (fast or {}).items():
        lines.append(f"fast       {dtype}: products {way}")
    for dtype, found in (exact or {}).items():
        lines.append(f"exact      {dtype}: " + (f"products {found['way']}" if found["way"] else f"no: {found['refused']}"))
    for rank in ranks:
        lines.append(
            f"rank {rank['rank']:<5} node {rank['node']}, cores {_spans(rank['cores'])}, {rank['threads']} threads"
        )
    for fault in faults:
        lines += [f"FAULT      {fault['fault']}", f"  remedy   {fault['remedy']}"]
    return "\n".join([*lines, "not sound" if faults else "sound"])


def _spans(cores):
    """Write ``[0, 1, 2, 5]`` as ``0-2,5``."""
    spans = []
    for core in cores:
        if spans and core == spans[-1][1] + 1:
            spans[-1][1] = core
        else:
            spans.append([core, core])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
