"""Products of two matrices: in the ways that can have the same bits wherever their operands lie, in the fastest, and in those
whose rows do not see each other.

``numerics = "exact"`` needs that of products of equal shapes, also on different numbers of threads. Intel's library keeps it
on its own processors; on others the alignment of its operands shows in the last bits. Which way holds is tried out at the
start (:mod:`mpillm.train.selftest`); what ``fast`` takes the processors decide (:func:`fast_product`).
"""

import torch
from torch.nn import functional

from mpillm.comm.devices import onednn_gains
from mpillm.schedules.blocks import SUM_BYTES

MEMORY_ALIGNMENT = 64  # bytes on whose multiples PyTorch allocates
# Where oneDNN gains, measured on an AMD Zen 5. It takes 10 us to begin; one row is bound by memory, and it would copy weights.
_LEAST_WORK, _LEAST_ROWS = 1 << 20, 4  # multiplications a thread; rows of the left factor
# A sum is added in a pass of its own, which needs more terms to be worth it, and one thread alone transposes the left factor.
_LEAST_SUM_WORK, _LEAST_TERMS, _LEAST_COLUMNS = 1 << 22, 32, 128  # multiplications and columns a thread


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


WAYS = {"plain": plain, "onednn": by_onednn, "aligned": of_aligned}  # of exact, in the order of preference


def by_size(left, right):
    """Multiply by oneDNN where that is faster, else as PyTorch does."""
    (rows, inner), columns = left.shape, right.shape[1]
    if rows < _LEAST_ROWS or rows * inner * columns < _LEAST_WORK * torch.get_num_threads():
        return plain(left, right)
    return by_onednn(left, right)


def fast_product(comm, device, dtype):
    """Return the product of ``fast``, :func:`plain` or :func:`by_size`, the same on all ranks. Collective over ``comm``."""
    return by_size if onednn_gains(comm, device, dtype) else plain


def add_product(out, left, right, multiply=plain, is_new=False):
    """Add ``left @ right`` to ``out``, or set it to that if it ``is_new``; in one pass where the dtypes agree, and on
    GPUs, whose products of half types can end in float32."""
    beta = 0 if is_new else 1
    if multiply is by_size and _sum_gains(left, right):
        rows = max(1, SUM_BYTES // (out[0].nbytes + 2 * left[0].nbytes))
        for part, factor in zip(out.split(rows), left.t().split(rows, 1)):
            # A transposed matrix is copied fast only where all of it lies together
            add_product(part, factor.contiguous().t(), right, by_onednn, is_new)
    elif multiply in (plain, by_size) and out.dtype == left.dtype:
        out.addmm_(left, right, beta=beta)
    elif out.is_cuda:
        torch.addmm(out, left, right, out.dtype, beta=beta, out=out)
    elif is_new:
        out.copy_(multiply(left, right))
    else:
        out.add_(multiply(left, right))
    return out


def _sum_gains(left, right):
    """Tell whether oneDNN and a pass to add are faster than PyTorch's product that adds."""
    (rows, inner), columns, threads = left.shape, right.shape[1], torch.get_num_threads()
    return (inner >= _LEAST_TERMS and columns >= _LEAST_COLUMNS * threads
            and rows * inner * columns >= _LEAST_SUM_WORK * threads)


class PackedRows:
    """Products of rows with weights that stay as they are, each row's bits the same whatever rows lie beside it: by oneDNN, for
    which a weight is packed once.

    Whether it is so on this processor is tried out at the start (:mod:`mpillm.inference.selftest`).
    """

    copies = True
    _PACKED_FOR, _LEAST = 16, 2  # rows; one row alone has kernels of its own, and is computed beside an empty one

    def pack(self, weight_FD):
        """Return what :meth:`__call__` multiplies with the transpose of."""
        if 0 in weight_FD.shape:
            return weight_FD
        return torch.ops.mkldnn._reorder_linear_weight(weight_FD.contiguous(), self._PACKED_FOR)

    def __call__(self, x_TD, packed):
        """Return ``x w^T``."""
        rows = len(x_TD)
        if not rows or 0 in packed.shape:
            return x_TD.new_zeros(rows, packed.shape[0])
        if rows < self._LEAST:
            x_TD = functional.pad(x_TD, (0, 0, 0, self._LEAST - rows))
        return torch.ops.mkldnn._linear_pointwise(x_TD, packed, None, "none", [], "")[:rows]


class TiledRows:
    """The same by PyTorch's own products, for types that oneDNN does not have: of a fixed number of rows at a time."""

    copies = False
    _ROWS = 16

    def pack(self, weight_FD):
        """Return what :meth:`__call__` multiplies with the transpose of."""
        return weight_FD

    def __call__(self, x_TD, weight_FD):
        """Return ``x w^T``."""
        rows = len(x_TD)
        x_TD = functional.pad(x_TD, (0, 0, 0, -rows % self._ROWS))
        return torch.cat([x_TD.new_zeros(0, len(weight_FD)), *(tile @ weight_FD.t() for tile in x_TD.split(self._ROWS))])[:rows]


class PlainRows(TiledRows):
    """The same, as fast as PyTorch is, where rows may see each other."""

    def __call__(self, x_TD, weight_FD):
        """Return ``x w^T``."""
        return x_TD @ weight_FD.t()


def row_product(device, dtype):
    """Return the product of rows for inference on this device. Local."""
    if device.type != "cpu":
        return PlainRows()
    is_packable = dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return PackedRows() if is_packable else TiledRows()
