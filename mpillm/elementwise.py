"""Functions of single numbers whose results do not depend on where a number stands.

PyTorch computes 16 to 64 numbers at a time and what is left over one by one, with another last bit now and then. It also cuts a
tensor at other places for other numbers of threads.
"""

import torch

_AT_A_TIME = 64  # numbers, at most
_GRAIN = 32768  # numbers of a thread, at least, before PyTorch takes a second


def evenly(function):
    """Return ``function`` computed on a copy of such a length that every thread gets whole groups of numbers."""

    def compute(x):
        threads = min(torch.get_num_threads(), max(1, -(-x.numel() // _GRAIN)))
        room = x.new_empty(x.numel() + -x.numel() % (_AT_A_TIME * threads))
        room[:x.numel()].view(x.shape).copy_(x)
        return function(room)[:x.numel()].view(x.shape)

    return compute
