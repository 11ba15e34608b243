"""A node of autograd that is no more than its forward where no gradient is wanted."""

import torch


class Node(torch.autograd.Function):
    """What the layers' functions of autograd derive from.

    Without gradients their ``forward`` is called as it is. PyTorch would look at every argument of every call first, which
    takes longer than a small product.
    """

    @classmethod
    def apply(cls, *args):
        """Compute, and let autograd know if it records."""
        return super().apply(*args) if torch.is_grad_enabled() else cls.forward(_Unrecorded(), *args)


class _Unrecorded:
    """Stands for the context of a node that has no backward."""

    def save_for_backward(self, *tensors):
        """Keep nothing."""
