"""Tensors as MPI buffers, without a copy where the tensor already is contiguous host memory."""

import torch

HALF_TYPES = (torch.bfloat16, torch.float16)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def staged(x):
    """Return ``x`` as a contiguous tensor in host memory: itself if it is one, else a copy (pinned for CUDA)."""
    if x.is_cuda:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return host.copy_(x.detach())
    return x.detach().contiguous() if x.requires_grad or not x.is_contiguous() else x


def host_empty(shape, like):
    """Return an uninitialised host tensor of ``like``'s dtype, pinned if ``like`` is on a GPU."""
    return torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)


def as_array(x):
    """View a contiguous host tensor as a flat numpy array of its own type, for MPI to compute with.

    bfloat16 has no numpy type: it is only ever moved (:func:`as_words`), never handed to MPI for a sum.
    """
    return flat(x).numpy()


def as_words(x):
    """View a contiguous host tensor as a flat array of integers as long as its items, for MPI to move: of any type, and
    with counts that reach further than bytes (some libraries take no more than 31 bits)."""
    return flat(x).view(_WORDS[x.element_size()]).numpy()


def flat(x):
    """View contiguous ``x`` as one dimension, without the odd strides that dimensions of size one may have."""
    return x if x.dim() == 1 and x.stride(0) == 1 else x.as_strided((x.numel(),), (1,))


def synchronize(device):
    """Wait until a device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def unstaged(host, like):
    """Return ``host`` on the device of ``like``."""
    return host.to(like.device, non_blocking=False) if like.is_cuda else host
