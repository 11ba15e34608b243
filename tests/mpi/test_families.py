"""Models of every description against the serial reference in float64; each on every choice of degrees, all of them together
with every setting that goes with it. ``tests/soak.sh`` compares each on every layout.
"""

import pytest
from helpers import assert_all
from tiny import FAMILIES, reference_steps, representative, tiny

from mpillm.planner.keys import describe
from mpillm.verify.compare import all_layouts, compare_layout

pytestmark = [pytest.mark.mpi, pytest.mark.slow]


def dealt(configs, turn):
    """Return one of the configurations for every choice of degrees: another in every turn, until each was dealt."""
    by_degrees = {}
    for config in configs:
        by_degrees.setdefault(tuple(config.layout.sizes().values()), []).append(config)
    return [own[turn % len(own)] for own in by_degrees.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_every_degrees(comm, family):
    config = tiny({"model.num_layers": 4, **FAMILIES[family]})
    batches, expected = reference_steps(config, 2, comm)
    wrong = []
    for layout in dealt(representative(all_layouts(config, comm.size)), [*FAMILIES].index(family)):
        found = compare_layout(layout, comm, batches, expected)
        if found.first:
            wrong.append(f"{describe(layout.layout)}: {found}")
    assert_all(not wrong, "; ".join(wrong), comm)


def test_the_families_together_meet_every_setting(comm):
    """That which keeps the test above short leaves nothing out."""
    layouts = representative(all_layouts(tiny({"model.num_layers": 4}), comm.size))
    dealt_out = {describe(config.layout) for turn in range(len(FAMILIES)) for config in dealt(layouts, turn)}
    assert dealt_out == {describe(config.layout) for config in layouts}
