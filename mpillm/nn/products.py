"""Products of two matrices, in the ways that can have the same bits wherever their operands lie.

``numerics = "exact"`` needs that of products of equal shapes, also on different numbers of threads. Intel's library keeps it
on its own processors; on others the alignment of its operands shows in the last bits. Which way holds is tried out at the
start (:mod:`mpillm.train.selftest`); ``fast`` takes the faster way (:func:`fast_way`).
"""

import torch

from mpillm.comm.devices import leaves_instructions_unused

MEMORY_ALIGNMENT = 64  # bytes on whose multiples PyTorch allocates


def plain(left, right):
    """Multiply as PyTorch does."""
    return torch.mm(left, right)


def by_onednn(left, right):
    """Multiply by oneDNN, whose kernels for float32 do not see the alignment; it has none for float64."""
    if 0 in (*left.shape, right.shape[1]):
        return plain(left, right)
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


def of_aligned(left, right):
    """Multiply as PyTorch does, with a copy of each operand that starts elsewhere than memory of its own would."""
    return plain(*(x if x.data_ptr() % MEMORY_ALIGNMENT == 0 else x.clone() for x in (left, right)))


WAYS = {"plain": plain, "onednn": by_onednn, "aligned": of_aligned}  # in the order of preference


def fast_way(comm, device, dtype):
    """Return the way of ``fast``, a name in :data:`WAYS`, the same on all ranks.

    Collective over ``comm``. The processors decide, not a measurement, by which a run that goes on might get other bits.
    """
    return "onednn" if all(comm.allgather(leaves_instructions_unused(device, dtype))) else "plain"


def add_product(out, left, right, multiply=plain, is_new=False):
    """Add ``left @ right`` to ``out``, or set it to that if it ``is_new``; in one pass where the dtypes agree, and on
    GPUs, whose products of half types can end in float32."""
    beta = 0 if is_new else 1
    if multiply is plain and out.dtype == left.dtype:
        out.addmm_(left, right, beta=beta)
    elif out.is_cuda:
        torch.addmm(out, left, right, out.dtype, beta=beta, out=out)
    elif is_new:
        out.copy_(multiply(left, right))
    else:
        out.add_(multiply(left, right))
    return out
