"""What a process may use of its node: the cores and the memory that its job was given, not all that the node has.

Four places tell of memory, and the one that allows least holds: what the node has left; the process's control group and
those around it (versions 1 and 2); the limits of the process (``ulimit``; Grid Engine and LSF set them); and what Slurm
was asked for, because not every cluster makes a control group of that. Local but for the shares of ranks.
"""

import ctypes
import math
import os
import re
import resource
from pathlib import Path, PurePosixPath
from typing import NamedTuple

SHM_REMEDY = ("give it more (mount -o remount,size=..., docker run --shm-size=...), or clear what is left there, or ask for "
              "more memory, of which it is a part")
_NODE = "the node"
# Parameters of the C library's mallopt() by number: what is free at the end of its heap before any of it goes back to the
# system, and the size from which a block is the system's own. Both are at their limits.
_MALLOC_LIMITS = {-1: (1 << 31) - 1, -3: 32 << 20}
UNLIMITED_BYTES = 1 << 60  # what version 1 of control groups writes in place of no limit, less what it rounds off
_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
_USED = ("memory.current", "memory.usage_in_bytes")
_CACHED = (("total_inactive_file", "inactive_file"), ("total_active_file", "active_file"))
_PER = {"SLURM_MEM_PER_NODE": None, "SLURM_MEM_PER_CPU": "SLURM_CPUS_ON_NODE", "SLURM_MEM_PER_GPU": "SLURM_GPUS_ON_NODE"}


class MemoryLimit(NamedTuple):
    """What is left of one limit of memory.

    ``is_shared`` tells whether all processes of a node that name the same ``source`` share it; ``taken_bytes`` of it this
    process has, where ``left_bytes`` still counts them.
    """

    source: str
    left_bytes: float
    is_shared: bool = True
    taken_bytes: float = 0.0


def keep_freed_memory():
    """Let this process keep memory that it frees, because a step frees what the next one takes again, and have large tensors in
    large pages.

    Local; before PyTorch makes its first tensor. The system would have to fill every page with zeros first, up to 5 % of a
    step. Blocks of more than 32 MiB go back to it. Of the GNU C library, whose own limits move with what a process happens to
    free; others stay as they are. Reading weights through pages of 4 KiB takes up to 1.3 times as long, because a processor
    finds few of them at a time; the system gives large ones where it has some (Linux, "transparent huge pages").
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # which PyTorch reads
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter, limit in _MALLOC_LIMITS.items() if mallopt else ():
        mallopt(parameter, limit)


def memory_bounds(root="/", environ=os.environ):
    """Return every :class:`MemoryLimit` on the memory of this process, files that are kept in memory counted as free. Local.

    ``root`` is the folder below which ``proc`` and the control groups are found.
    """
    root = Path(root)
    status, found = _values(root / "proc/self/status"), []
    meminfo = _values(root / "proc/meminfo")
    if "MemAvailable" in meminfo:
        found.append(MemoryLimit(_NODE, 1024 * meminfo["MemAvailable"]))
    for folder, name in _groups(root, "memory"):
        limits = [n for limit in _LIMITS if (n := _number(folder / limit)) is not None and n < UNLIMITED_BYTES]
        if limits:
            used = next((n for file in _USED if (n := _number(folder / file)) is not None), 0)
            stat = _values(folder / "memory.stat")
            cached = sum(next((stat[key] for key in keys if key in stat), 0) for keys in _CACHED)
            found.append(MemoryLimit(f"control group {name}", max(0, min(limits) - used + min(cached, used))))
    for kind, key in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        limit = resource.getrlimit(getattr(resource, kind))[0]
        if limit != resource.RLIM_INFINITY:
            found.append(MemoryLimit(kind, max(0, limit - 1024 * status.get(key, 0)), is_shared=False))
    asked = slurm_bytes(environ, _text(root / "proc/self/cgroup"))
    if asked:
        found.append(MemoryLimit(*asked, taken_bytes=1024 * status.get("VmRSS", 0)))
    return found


def node_id(root="/"):
    """Return what tells this node from others: processes of one kernel have the same, whatever their containers call them,
    and no two nodes do, though many be called localhost. Local."""
    return _text(Path(root) / "proc/sys/kernel/random/boot_id").strip() or os.uname().nodename


def memory_of_rank(comm, bounds):
    """Return the bytes that this rank may have, and what limits it: its share of each bound, of the one that allows least.

    Collective over ``comm``; the result is this rank's own.
    """
    node, name = node_id(), os.uname().nodename  # containers of one node have control groups of their own, of one name
    mine = [(node if bound.source == _NODE else f"{node} {name}", bound.source) for bound in bounds]
    sharing = comm.allgather(mine)
    shares = [(bound.left_bytes / (sum(source in others for others in sharing) if bound.is_shared else 1)
               - bound.taken_bytes, bound.source) for bound, source in zip(bounds, mine)]
    least, source = min(shares, default=(math.inf, "nothing"))
    return max(0.0, least), source


def shared_memory_bytes(folder, bounds):
    """Return what processes of this node may still put into shared memory at ``folder``: a job's memory counts it. Local."""
    free = os.statvfs(folder)
    return min([free.f_bavail * free.f_frsize, *(bound.left_bytes - bound.taken_bytes for bound in bounds)])


def core_quota(root="/"):
    """Return how many cores control groups let their processes keep busy together, and which: ``inf`` without one. Local."""
    found = [(math.inf, "")]
    for folder, name in _groups(Path(root), "cpu"):
        quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
        if not quota:
            quota, period = (_text(folder / f"cpu.cfs_{file}_us").strip() for file in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period):
            found.append((int(quota) / int(period), name))
    return min(found)


def usable_cores(root="/"):
    """Return how many cores this process could keep busy, had it no neighbours. Local."""
    return max(1, int(min(len(os.sched_getaffinity(0)), core_quota(root)[0])))


def cores_of_rank(comm, root="/"):
    """Return the number of cores that are this rank's share, at least one.

    Collective over ``comm``. Those that it may run on it shares with ranks that may run on the same; a quota with all
    ranks of its control group.
    """
    quota, group = core_quota(root)
    mine = _, cores, _ = node_id(root), sorted(os.sched_getaffinity(0)), (os.uname().nodename, group)
    ranks = comm.allgather(mine)
    sharing, together = (sum(rank[part] == mine[part] for rank in ranks) for part in (slice(2), slice(None, None, 2)))
    return max(1, int(min(len(cores) // sharing, quota / together)))


def slurm_bytes(environ, membership=""):
    """Return which variable of Slurm grants memory on this node, and how much; None where none does, or the variables are
    what an ended job left in a shell.

    Local.

    Parameters
    ----------
    environ : dict
    membership : str
        What ``/proc/self/cgroup`` holds: a process in the control group of another job has the variables from elsewhere.
    """
    job, nodes = environ.get("SLURM_JOB_ID"), environ.get("SLURM_JOB_NODELIST")
    of_jobs = set(re.findall(r"/job_(\d+)", membership))
    here = {os.uname().nodename.partition(".")[0], environ.get("SLURMD_NODENAME", "")}
    if not job or (of_jobs and job not in of_jobs) or (nodes and not any(holds(nodes, name) for name in here)):
        return None
    for name, count in _PER.items():
        each, times = environ.get(name, ""), "1" if count is None else environ.get(count, "")
        if each.isdigit() and times.isdigit() and int(each) * int(times):
            return name, int(each) * int(times) << 20
    return None


def holds(nodes, name):
    """Tell whether a list of nodes as Slurm writes it, ``"a[01-03,7],b"``, has this one. Local."""
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", nodes):
        pieces = re.split(r"\[([^\]]*)\]", part)
        pattern = "".join(re.escape(piece) if i % 2 == 0 else r"(\d+)" for i, piece in enumerate(pieces))
        match = re.fullmatch(pattern, name)
        if match and all(any(int(low) <= int(number) <= int(high or low) for low, _, high in
                             (span.partition("-") for span in spans.split(",")))
                         for number, spans in zip(match.groups(), pieces[1::2])):
            return True
    return False


def _groups(root, controller):
    """Yield the folder and the name of the control group that this process is in, and of those around it."""
    mounts = [line.partition(" - ")[::2] for line in _text(root / "proc/self/mountinfo").splitlines()]
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for place, kind in mounts:
            system, _, options = kind.split(" ")[:3]
            if system != ("cgroup" if controllers else "cgroup2") or controllers and controller not in options.split(","):
                continue
            top, mount = place.split(" ")[3:5]
            inside = PurePosixPath(path)
            # A container may see its own group as the top: what its path says of the host is not to be found.
            inside = inside.relative_to(top) if inside.is_relative_to(top) and ".." not in path else PurePosixPath()
            for group in (inside, *inside.parents):
                yield root / mount.lstrip("/") / group, str(PurePosixPath(mount) / group)


def _text(path):
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _number(path):
    """Return the number that a file holds; None if there is none, as of no limit."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _values(path):
    """Return the numbers of a file of names and numbers, ``Name: 1 kB`` or ``name 1``."""
    lines = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
