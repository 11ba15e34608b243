"""Digests of weights and optimiser state: what changes between two updates was not changed by training."""

from collections import Counter

import torch

from mpillm.errors import NumbersError, agreed

VOTERS = 3  # the fewest among whom a majority can be right
REMEDY = "the memory of this rank, or its node, is not to be trusted; go on from the last checkpoint elsewhere"


class Digests:
    """Sums of the bits of all that a rank answers for, taken after each update and compared before the next.

    Of weights that the ranks of a node share a rank answers for those that it updates. Where three or more data ranks
    hold the same (``layout.zero = 0``) their sums are compared too: most are right.

    Parameters
    ----------
    engine : mpillm.train.engine.Engine
    is_on : bool
        Otherwise nothing is done.

    Notes
    -----
    A sum of 32-bit words in 64 bits sees every flipped bit. Cost: one pass over weights and state each time, and with
    replicas one message of 8 bytes a tensor.
    """

    def __init__(self, engine, is_on):
        self._engine, self._is_on, self._kept = engine, is_on, {}

    def take(self):
        """Remember what is held now. Local."""
        if self._is_on:
            self._kept = self._sums()

    def check(self):
        """Raise on every rank if anything is not as it was, or not as most replicas have it.

        Collective over the mesh.
        """
        if not self._is_on:
            return
        found = self._sums()
        changed = [name for name, kept in self._kept.items() if found[name] != kept]
        differing = self._outvoted(found)
        with agreed(self._engine.mesh.world.comm, "digests of weights and optimiser state"):
            if changed:
                raise NumbersError(f"{changed[0]} has changed since the last update, and not by training "
                                   f"({len(changed)} tensors have): {REMEDY}")
            if differing:
                raise NumbersError(f"{differing[0]} is not what most replicas hold ({len(differing)} tensors are not): "
                                   f"{REMEDY}")

    def _outvoted(self, found):
        """Return the names of the tensors of which most data ranks have another sum than this one."""
        data = self._engine.mesh.group("data")
        if self._engine.config.layout.zero or data.size < VOTERS:
            return []
        replicas = zip(*data.comm.allgather(list(found.values())))
        return [name for (name, own), sums in zip(found.items(), replicas)
                if any(count > data.size / 2 and common != own for common, count in Counter(sums).items())]

    def _sums(self):
        """Return the sum of the words of each tensor by kind and name."""
        tensors = {}
        gradients = self._engine.gradients
        for bucket in gradients.updated + gradients.frozen:
            low, high = bucket.range if bucket.is_one_copy else (0, bucket.size)
            for p, offset in zip(bucket.parameters, bucket.offsets):
                start, stop = max(low, offset), min(high, offset + p.numel())
                if start < stop:
                    tensors[f"weight {p.shard.name}[{p.shard.start + start - offset}:]"] = bucket.data[start:stop]
        for piece, kinds in self._engine.optimizer.state():
            tensors |= {f"{kind} of {piece.name}[{piece.start}:]": tensor for kind, tensor in kinds.items()}
        return {name: _sum_of_words(tensor) for name, tensor in tensors.items()}


def _sum_of_words(x):
    return int(x.reshape(-1).view(torch.int16 if x.element_size() == 2 else torch.int32).sum(dtype=torch.int64))
