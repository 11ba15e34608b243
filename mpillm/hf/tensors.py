"""Where the parameters of a model lie in the tensors of a folder, by the table of its family.

A tensor holds one parameter or several, stored as mpillm stores them or turned; either way a range of rows of a parameter is a
range of the tensor, so that nobody has to read more than is asked for.
"""

import re
from dataclasses import dataclass

import torch

from mpillm.comm.buffers import HALF_TYPES
from mpillm.model.parameters import parameters

INPUT_FIRST = ("attention.output.weight", "ffn.down.weight")  # so mpillm stores these; all others output-first


@dataclass(frozen=True)
class Tensor:
    """A tensor of a folder.

    Attributes
    ----------
    name : str
    parts : tuple of mpillm.model.parameters.Parameter
        In their order.
    is_turned : bool
        Whether it is stored the other way.
    head_rows : int
        Where parts lie head by head the rows of one, else 0.
    """

    name: str
    parts: tuple
    is_turned: bool = False
    head_rows: int = 0

    @property
    def shape(self):
        """As in the folder."""
        rows, *rest = self.parts[0].shape
        shape = (sum(part.shape[0] for part in self.parts), *rest)
        return shape[::-1] if self.is_turned else shape

    def rows(self, source, name, low, high):
        """Return rows ``[low, high)`` of a part, in our order, float64 or float32. ``source`` is sliced like the tensor."""
        place = [part.name for part in self.parts].index(name)
        if self.head_rows:
            first, last = low // self.head_rows, -(-high // self.head_rows)
            whole = self._cut(source, first * self.head_rows * len(self.parts), last * self.head_rows * len(self.parts))
            heads = whole.unflatten(0, (last - first, len(self.parts), self.head_rows))[:, place].flatten(0, 1)
            return heads[low - first * self.head_rows:high - first * self.head_rows]
        before = sum(part.shape[0] for part in self.parts[:place])
        return self._cut(source, before + low, before + high)

    def _cut(self, source, low, high):
        values = source[:, low:high].T if self.is_turned else source[low:high]
        return values.float() if values.dtype in HALF_TYPES else values

    def joined(self, values):
        """Return the whole tensor of the whole parts, which are torch tensors."""
        if self.head_rows:
            heads = [part.unflatten(0, (-1, self.head_rows)) for part in values]
            whole = torch.stack(heads, dim=1).flatten(0, 2)
        else:
            whole = torch.cat(values)
        return (whole.T if self.is_turned else whole).contiguous()


def tensors_of(family, model):
    """Return the tensors of a folder of a model by name, in the order of its parameters. Local."""
    table, found = parameters(model), {}
    order = {name: place for place, name in enumerate(table)}
    for theirs, ours in family.tensors.items():
        for layer in range(model.num_layers) if "{}" in theirs else (None,):
            for end in ("weight", "bias"):
                name, parts = _names(theirs, ours.split(), end, layer)
                held = [table[part] for part in parts if part in table]
                if len(held) == len(parts):
                    is_turned = len(held[0].shape) > 1 and (parts[0].endswith(INPUT_FIRST) != name.endswith(family.input_first))
                    by_head = held[0].unit if family.is_fused_by_head and len(held) > 1 else 0
                    found[name] = Tensor(name, tuple(held), is_turned, by_head)
    return dict(sorted(found.items(), key=lambda item: order[item[1].parts[0].name]))


def _names(theirs, ours, end, layer):
    """Return the name of a tensor and those of the parameters in it; the table may say the end itself."""
    before = "" if layer is None else f"layers.{layer}."
    if theirs.endswith((".weight", ".bias")):
        return theirs, [*ours]
    return f"{theirs.format(layer)}.{end}", [f"{before}{part}.{end}" for part in ours]


def copies_of(family, model):
    """Return the tensors that repeat others in models with tied ends, with those that they repeat. Local."""
    if not model.tie_embeddings:
        return {}
    named = {ours: theirs for theirs, ours in family.tensors.items()}
    ends = {f"{named['head']}.weight": f"{named['embedding']}.weight"} if "head" in named else {}
    return {**ends, **family.copies}


def is_ignored(family, name):
    """Tell whether a family has tensors of that name that its model does not compute with. Local."""
    return any(re.fullmatch(pattern, name) for pattern in family.ignored)
