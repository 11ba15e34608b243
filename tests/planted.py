"""Faults that tests plant one at a time: each must be found, and the first wrong tensor named.

Every fault is a mistake that a rewrite could make. What must be named is worked out by hand: after a wrong forward the loss is
wrong; a wrong backward leaves the gradients of later layers right, and the first wrong one is that of the weight which
backward comes to next.
"""

from helpers import assert_all
from tiny import reference_steps, tiny

from mpillm.planner.stages import default_cuts
from mpillm.verify.compare import compare_layout

TENSOR = {"layout.tensor": 2, "layout.sequence_parallel": False}
SEQUENCE = {"layout.tensor": 2, "layout.sequence_parallel": True}
PIPELINE = {"layout.pipeline": 2, "layout.schedule": "1f1b"}


class Faults(dict):
    """By name: what plants a fault, the layout and model that show it, and what must be named."""

    def __init__(self):
        super().__init__()
        self._references = {}  # what the reference does, by what decides it

    def fault(self, layout, first):
        """Register a fault with what shows it and what must be named: a text with the last layers' numbers."""
        def register(plant):
            self[plant.__name__] = (plant, layout, first)
            return plant

        return register

    def check(self, name, comm, monkeypatch):
        """Plant a fault and see that it is found and named."""
        plant, layout, first = self[name]
        config = tiny({"model.num_layers": 4, **layout}, comm.size)
        kind = str(sorted((key, value) for key, value in layout.items() if not key.startswith("layout")))
        if kind not in self._references:
            self._references[kind] = reference_steps(config, 2, comm)
        cuts = default_cuts(config)
        first = first.format(last=3, cut=cuts[0] - 1 if cuts else None)
        with monkeypatch.context() as patch:
            plant(patch, config)
            found = compare_layout(config, comm, *self._references[kind])
        wanted = first if first.startswith("step") else f"step 1: {first}"
        assert_all(found.first == wanted, f"{found}; wanted {wanted}", comm)

    def check_without(self, comm):
        """See that nothing is found where none is planted."""
        for layout in {str(layout): layout for _, layout, _ in self.values()}.values():
            config = tiny({"model.num_layers": 4, **layout}, comm.size)
            found = compare_layout(config, comm, *reference_steps(config, 2, comm))
            assert_all(found.first is None, f"{layout}: {found}", comm)
