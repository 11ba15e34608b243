"""Activations and their gradients between neighbouring pipeline ranks: tagged, nonblocking.

A message travels without a copy, or is handed over in memory where the group offers that
(:meth:`mpillm.comm.group.Group.open_handover`).
"""

import math

from mpillm.comm.buffers import as_bytes, host_empty, staged, unstaged
from mpillm.comm.collectives import Pending

FORWARD, BACKWARD, TIED = range(3)  # what a message carries; the lowest digits of its tag


def tag_of(kind, stage=0, microbatch=0, num_microbatches=1):
    """Number a message so that no two in flight between two ranks share a tag."""
    return 3 * (stage * num_microbatches + microbatch) + kind


def isend(x, group, to, tag):
    """Start sending ``x`` to rank ``to`` of ``group``.

    Local start; rank ``to`` must receive. ``x`` must not change before ``wait()``, which returns ``x``.
    """
    source = staged(x)
    group.recorder.add(group.name, "send", x.nbytes)
    if group.handover and group.handover.carries(to, x.nbytes):
        return Pending(x, group.handover.isend(source, to, tag), (source,))
    return Pending(x, group.comm.Isend(as_bytes(source), to, tag), (source,))


def irecv(shape, like, group, source, tag):
    """Start receiving a tensor of ``shape``, with dtype and device of ``like``, from rank ``source`` of ``group``.

    ``wait()`` returns it.
    """
    if group.handover and group.handover.carries(source, math.prod(shape) * like.element_size()):
        request, take = group.handover.irecv(shape, like, source, tag)
        return Pending(None, request, (), lambda: unstaged(take(), like))
    out = host_empty(shape, like)
    return Pending(out, group.comm.Irecv(as_bytes(out), source, tag), (), lambda: unstaged(out, like))
