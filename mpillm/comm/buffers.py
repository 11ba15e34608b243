"""Tensors as MPI buffers, without a copy where the tensor already is contiguous host memory."""

import numpy as np
import torch

HALF_TYPES = (torch.bfloat16, torch.float16)


def staged(x):
    """Return ``x`` as a contiguous tensor in host memory: itself if it is one, else a copy (pinned for CUDA)."""
    if x.is_cuda:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return host.copy_(x)
    return x.detach().contiguous() if x.requires_grad or not x.is_contiguous() else x


def host_empty(shape, like):
    """Return an uninitialised host tensor of ``like``'s dtype, pinned if ``like`` is on a GPU."""
    return torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)


def as_array(x):
    """View a contiguous host tensor as a flat numpy array of its own type, for MPI to compute with.

    bfloat16 has no numpy type: it is only ever moved (:func:`as_bytes`), never handed to MPI for a sum.
    """
    return flat(x).numpy()


def as_bytes(x):
    """View a contiguous host tensor as a flat array of bytes, for MPI to move."""
    return flat(x).view(torch.uint8).numpy() if x.numel() else np.empty(0, np.uint8)


def flat(x):
    """View contiguous ``x`` as one dimension, without the odd strides that dimensions of size one may have."""
    return x if x.dim() == 1 else x.as_strided((x.numel(),), (1,))


def unstaged(host, like):
    """Return ``host`` on the device of ``like``."""
    return host.to(like.device, non_blocking=False) if like.is_cuda else host
