"""A run obeys the algorithms of its plan, and its numbers are those of the reference."""

import pytest
import torch
from helpers import assert_all
from tiny import one_for_every_degrees, reference_steps, tiny, train

from mpillm.comm.group import Group
from mpillm.comm.probe import only
from mpillm.comm.scheduled import Scheduled
from mpillm.train.engine import Engine

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("algorithm", ["ring", "direct", "window"])
def test_training_by_every_kind_of_algorithm(comm, algorithm, monkeypatch):
    config, taken = tiny({"model.num_layers": 4}), set()
    transport = Group.transport

    def noting(*args):
        found = transport(*args)
        taken.add(type(found).__name__)
        return found

    monkeypatch.setattr(Group, "transport", noting)
    _, expected = reference_steps(config, 1, comm)
    losses = comm.bcast([step[0] for step in expected] if comm.rank == 0 else None)
    for layout in one_for_every_degrees(config, comm.size):
        engine = Engine(layout, comm, table=only(algorithm))
        found = [loss for loss, _ in train(engine, 1)]
        engine.free()
        assert_all(torch.allclose(torch.tensor(found), torch.tensor(losses), rtol=1e-10, atol=0), found, comm)
    wanted = "Node" if algorithm == "window" else Scheduled.__name__
    assert_all(comm.size == 1 or wanted in taken, taken, comm)
