"""A run obeys the algorithms of its plan, and its numbers are those of the reference."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_all
from tiny import one_for_every_degrees, reference_steps, tiny, train

from mpillm.comm.group import Group, as_group
from mpillm.comm.probe import measure_machine, only
from mpillm.comm.scheduled import Scheduled
from mpillm.machine import Machine
from mpillm.plan import DEFAULT_TABLE
from mpillm.planner.layout import make_plan
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


def test_a_machine_is_measured_planned_for_and_obeyed(comm, tmp_path):
    machine = measure_machine(as_group(comm), DEFAULT_TABLE)
    assert_all(len(set(comm.allgather(repr(machine)))) == 1, machine, comm)
    assert machine.num_ranks == comm.size and all(rate > 1e6 for _, rate in machine.matmul)
    assert machine.memory_bytes_per_s > 1e6 and set(machine.repeatability) >= {"copy", "attention", "product 256"}
    machine.save(tmp_path / f"{comm.rank}.json")
    assert Machine.load(tmp_path / f"{comm.rank}.json") == machine
    config = tiny({"model.num_layers": 4})
    config = replace(config, train=replace(config.train, microbatch=None))
    plan = make_plan(config, machine, comm.size)
    obeyed = plan.applied_to(config).resolve(comm.size)
    assert_all(all(getattr(obeyed.layout, key) == plan.layout[key] for key in ("data", "pipeline", "tensor", "schedule",
                                                                              "chunks", "zero")), obeyed.layout, comm)
    _, expected = reference_steps(obeyed, 2, comm)
    losses = comm.bcast([step[0] for step in expected] if comm.rank == 0 else None)
    engine = Engine(obeyed, comm, table=plan.table)
    found = [loss for loss, _ in train(engine, 2)]
    engine.free()
    assert_all(torch.allclose(torch.tensor(found), torch.tensor(losses), rtol=1e-10, atol=0), found, comm)


def test_a_plan_changed_by_hand_changes_what_runs(comm):
    config = tiny({"model.num_layers": 4})
    free = config.with_values({"layout.pipeline": comm.size, "layout.data": 1, "layout.tensor": 1})
    plan = make_plan(free, Machine.load("cpu-node"), comm.size)
    orders = []
    for schedule in ("1f1b", "zb-h1"):
        changed = replace(plan, layout={**plan.layout, "schedule": schedule, "chunks": 1, "stage_cuts": "auto"})
        engine = Engine(changed.applied_to(free).resolve(comm.size), comm)
        orders.append(engine.schedule.to_text().split("\n")[1:])
        engine.free()
    assert orders[0] != orders[1]
