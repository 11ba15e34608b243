"""Which processor or GPU a rank computes on, and what it is called."""

import os
import platform
from pathlib import Path

import torch

from mpillm.comm.limits import node_id
from mpillm.errors import ConfigError


def pick_device(name, comm):
    """Return the device of this rank: GPUs are dealt out by the rank's place on its node.

    Collective over ``comm``. A GPU becomes the one that torch uses unless told otherwise: pinned memory, too, belongs to
    a device, and would give every rank a context on the first GPU.

    Parameters
    ----------
    name : {"auto", "cpu", "cuda"}
        ``"auto"`` is a GPU on the ranks where torch sees one.
    comm : Comm

    Returns
    -------
    torch.device

    Raises
    ------
    ConfigError
        On every rank, if ``"cuda"`` is asked for and some rank sees no GPU.
    """
    names, gpus, nodes = zip(*comm.allgather((os.uname().nodename, torch.cuda.device_count(), node_id())))
    if name == "cuda" and not all(gpus):
        without = sorted({node for node, count in zip(names, gpus) if not count})
        raise ConfigError(f"train.device = cuda: torch sees no GPU on {', '.join(without)}: ask for nodes with GPUs, "
                          "install torch with CUDA, or set train.device = auto or cpu")
    if name == "cpu" or not gpus[comm.rank]:
        return torch.device("cpu")
    device = torch.device("cuda", nodes[:comm.rank].count(nodes[comm.rank]) % gpus[comm.rank])
    torch.cuda.set_device(device)
    return device


def device_name(device):
    """Return the name of this rank's processor, or GPU. Local."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor("model name") or platform.processor()


def onednn_gains(comm, device, dtype):
    """Tell whether products of ``fast`` are oneDNN's: where PyTorch's own leave instructions of every rank's processor unused.

    Collective over ``comm``. The processors decide, not a measurement, by which a run that goes on might get other bits.
    """
    return all(comm.allgather(leaves_instructions_unused(device, dtype)))


def leaves_instructions_unused(device, dtype):
    """Tell whether products of PyTorch's own library do without the widest instructions of this processor. Local.

    Intel's library does so on processors of other makers. oneDNN, which comes with PyTorch as well, does not. Whoever keeps
    PyTorch from these instructions (``ATEN_CPU_CAPABILITY=avx2``) has none of them unused.
    """
    return (device.type == "cpu" and dtype == torch.float32 and torch.backends.mkl.is_available()
            and torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()
            and _processor("vendor_id") not in ("", "GenuineIntel"))


def _processor(field):
    """Return what the system says of this processor, or ""."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
