"""Tensors as MPI buffers, without a copy where the tensor already is contiguous host memory."""

import math
from functools import cache, lru_cache
from itertools import accumulate, pairwise

import torch

from mpillm.schedules.blocks import all_bounds

HALF_TYPES = (torch.bfloat16, torch.float16)


def staged(x):
    """Return ``x`` as a contiguous tensor in host memory: itself if it is one, else a copy (pinned for CUDA)."""
    if x.is_cuda:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return host.copy_(x.detach())
    return x.detach().contiguous() if x.requires_grad or not x.is_contiguous() else x


def host_empty(shape, like):
    """Return an uninitialised host tensor of ``like``'s dtype, pinned if ``like`` is on a GPU."""
    return torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)


def as_numbers(x):
    """Return a contiguous host tensor as MPI takes it to compute with.

    Half types have no place here: MPI knows none, they are only ever moved (:func:`as_words`).
    """
    from_address, numbers, _ = _mpi()
    return from_address(x.data_ptr(), x.nbytes), numbers[x.dtype]


def as_words(x, cuts=None):
    """Return a contiguous host tensor as MPI takes it to move, whole or in the blocks of ``cuts``: as integers as long as
    its items, of any type, and with counts that reach further than bytes (some libraries take no more than 31 bits)."""
    from_address, _, words = _mpi()
    buffer, word = from_address(x.data_ptr(), x.nbytes), words[x.element_size()]
    if cuts is None:
        return buffer, word
    return buffer, counts_and_places(tuple(cuts)), word


@lru_cache(maxsize=1024)
def counts_and_places(cuts):
    """Return sizes and places of blocks."""
    return [high - low for low, high in cuts], [low for low, _ in cuts]


@cache
def _mpi():
    """Return what makes a buffer of an address, which is the shortest way, and MPI's types."""
    from mpi4py import MPI

    numbers = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE, torch.uint8: MPI.UINT8_T, torch.int8: MPI.INT8_T,
               torch.int16: MPI.INT16_T, torch.int32: MPI.INT32_T, torch.int64: MPI.INT64_T}
    words = {1: MPI.INT8_T, 2: MPI.INT16_T, 4: MPI.INT32_T, 8: MPI.INT64_T}
    return MPI.buffer.fromaddress, numbers, words


def flat(x):
    """View contiguous ``x`` as one dimension, without the odd strides that dimensions of size one may have."""
    return x if x.dim() == 1 and x.stride(0) == 1 else x.as_strided((x.numel(),), (1,))


def moved(x, dim, to):
    """Return ``x`` with a dimension elsewhere: itself, which saves a microsecond, where it stays."""
    return x if dim == to else x.movedim(dim, to)


def row_blocks(lengths, rows):
    """Return ``(start, stop)`` in flat memory of blocks of so many of contiguous ``rows``."""
    return _blocks(lengths, math.prod(rows.shape[1:]))


def even_blocks(rows, p):
    """Return the same of all ``p`` blocks of ``rows``."""
    return _even_blocks(rows.shape[0], p, math.prod(rows.shape[1:]))


@lru_cache(maxsize=1024)
def _blocks(lengths, width):
    return tuple(pairwise(accumulate((length * width for length in lengths), initial=0)))


@lru_cache(maxsize=1024)
def _even_blocks(num_rows, p, width):
    return tuple((low * width, high * width) for low, high in all_bounds(num_rows, p))


def is_within(part, x):
    """Tell whether ``part`` begins within contiguous ``x``."""
    return x.data_ptr() <= part.data_ptr() < x.data_ptr() + x.nbytes


def synchronize(device):
    """Wait until a device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def unstaged(host, like):
    """Return ``host`` on the device of ``like``."""
    return host.to(like.device, non_blocking=False) if like.is_cuda else host
