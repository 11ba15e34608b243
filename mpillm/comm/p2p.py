"""Activations and their gradients between neighbouring pipeline ranks: tagged, nonblocking.

A message travels without a copy, or is handed over in memory where the group offers that
(:meth:`mpillm.comm.group.Group.open_handover`).
"""

import math

from mpillm.comm.buffers import as_words, host_empty, staged, unstaged
from mpillm.comm.collectives import Pending
from mpillm.comm.group import as_group

FORWARD, BACKWARD, TIED = range(3)  # what a message carries; the lowest digits of its tag


def tag_of(kind, stage=0, microbatch=0, num_microbatches=1):
    """Number a message so that no two in flight between two ranks share a tag."""
    return 3 * (stage * num_microbatches + microbatch) + kind


def isend(x, comm, to, tag):
    """Start sending ``x`` to another rank.

    Local; collective over ``comm`` the first time a bare communicator is seen (:func:`mpillm.comm.group.as_group`).

    Parameters
    ----------
    x : Tensor, any shape, varying
        Must not change before ``wait()``.
    comm : Comm or Group
    to : int
        Rank in ``comm``, which must receive.
    tag : int

    Returns
    -------
    Pending
        ``wait()`` returns ``x``.

    Notes
    -----
    Sends the bytes of ``x``.
    """
    group, source = as_group(comm), staged(x)
    group.recorder.add((group.name, "send", x.nbytes))
    if group.handover and group.handover.carries(to, x.nbytes):
        return Pending(x, group.handover.isend(source, to, tag), (source,))
    return Pending(x, group.comm.Isend(as_words(source), to, tag), (source,))


def irecv(shape, like, comm, source, tag):
    """Start receiving a tensor from another rank.

    Local or collective as :func:`isend`.

    Parameters
    ----------
    shape : Size
        As it was sent: MPI tells nobody.
    like : Tensor
        Whose dtype and device it has.
    comm : Comm or Group
    source, tag : int

    Returns
    -------
    Pending
        ``wait()`` returns the tensor, varying.
    """
    group = as_group(comm)
    if group.handover and group.handover.carries(source, math.prod(shape) * like.element_size()):
        request, take = group.handover.irecv(shape, like, source, tag)
        return Pending(None, request, (), lambda: unstaged(take(), like))
    out = host_empty(shape, like)
    return Pending(out, group.comm.Irecv(as_words(out), source, tag), (), lambda: unstaged(out, like))
