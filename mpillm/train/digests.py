"""Digests of weights and optimiser state: what changes between two updates was not changed by training."""

import torch

from mpillm.errors import NumbersError, together


class Digests:
    """Sums of the bits of all that a rank holds, taken after each update and compared before the next.

    Parameters
    ----------
    engine : Engine
    is_on : bool
        Otherwise nothing is done.

    Notes
    -----
    A sum of 32-bit words in 64 bits sees every flipped bit. Cost: one pass over weights and state each time.
    """

    def __init__(self, engine, is_on):
        self._engine, self._is_on, self._kept = engine, is_on, {}

    def take(self):
        """Remember what is held now. Local."""
        if self._is_on:
            self._kept = self._sums()

    def check(self):
        """Raise on every rank if anything is not as it was. Collective over the mesh."""
        if not self._is_on:
            return
        found = self._sums()
        changed = [name for name, kept in self._kept.items() if found[name] != kept]

        def refuse():
            if changed:
                raise NumbersError(f"{changed[0]} has changed since the last update, and not by training "
                                   f"({len(changed)} tensors have): the memory of this rank, or its node, is not to be "
                                   "trusted; go on from the last checkpoint elsewhere")

        together(self._engine.mesh.world.comm, refuse, "digests of weights and optimiser state")

    def _sums(self):
        """Return the sum of the words of each tensor by kind and name."""
        tensors = {f"weight {p.shard.name}[{p.shard.start}:]": p.detach()
                   for stage in self._engine.stages for p in stage.module.parameters()}
        for piece, kinds in self._engine.optimizer.state():
            tensors |= {f"{kind} of {piece.name}[{piece.start}:]": tensor for kind, tensor in kinds.items()}
        return {name: _sum_of_words(tensor) for name, tensor in tensors.items()}


def _sum_of_words(x):
    return int(x.reshape(-1).view(torch.int16 if x.element_size() == 2 else torch.int32).sum(dtype=torch.int64))
