"""Tensors and training on GPUs, where there are any: the same numbers as in host memory. Ranks may share a GPU."""

import pytest
import torch
from helpers import assert_all
from tiny import LAYOUTS, alone, tiny, train

from mpillm.comm import allgather, allreduce, alltoall, bcast, gather, iallreduce, reduce_scatter, scatter
from mpillm.comm.devices import pick_device
from mpillm.comm.group import as_group
from mpillm.comm.p2p import irecv, isend
from mpillm.comm.probe import as_of_now, measure_machine
from mpillm.errors import ConfigError
from mpillm.plan import DEFAULT_TABLE
from mpillm.planner.search import make_plan
from mpillm.train.engine import Engine

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]

COLLECTIVES = [allreduce, allgather, alltoall, bcast, gather, reduce_scatter, scatter,
               lambda x, comm: iallreduce(x, comm).wait()]
TOLERANCE = 1e-8  # in float64, where the order of sums may be another
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]


def own(comm, dtype, shape=(8, 3)):
    """Return this rank's numbers, small whole ones that every dtype adds without rounding, on host and GPU."""
    numbers = torch.randint(-5, 5, shape, generator=torch.Generator().manual_seed(comm.rank)).to(dtype)
    return numbers, numbers.to(pick_device("cuda", comm))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("collective", COLLECTIVES, ids=lambda function: function.__name__)
def test_collectives_give_what_they_give_in_host_memory(comm, collective, dtype):
    host, device = own(comm, dtype)
    wanted, strided = collective(host, comm), device.t().contiguous().t()
    for x in (device, strided):
        found = collective(x, comm)
        same = found.device == device.device and torch.equal(found.cpu(), wanted)
        assert_all(same, f"{found}, not {wanted}", comm)
    assert_all(torch.equal(device.cpu(), host), "the input was changed", comm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_message_to_the_next_rank_arrives(comm, dtype):
    group, (host, device) = as_group(comm), own(comm, dtype)
    if comm.size == 1:  # which has nobody to send to
        return
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    receive = irecv(device.shape, device, group, source, tag=5)
    send = isend(device, group, to, tag=5)
    found = receive.wait()
    send.wait()
    wanted = comm.sendrecv(host, to, source=source)
    assert_all(found.device == device.device and torch.equal(found.cpu(), wanted), f"{found}, not {wanted}", comm)


@pytest.mark.parametrize("layout", ["usual", "pipeline"])
def test_training_steps_give_what_they_give_on_the_cpu(comm, layout):
    degrees = LAYOUTS[comm.size] if layout == "usual" else {"layout.pipeline": comm.size}
    histories, weights = [], []
    for device in ("cpu", "cuda"):
        engine = Engine(tiny({**degrees, "train.device": device}, comm.size), comm)
        histories.append(torch.tensor(train(engine, 2), dtype=torch.float64))
        weights.append({name: [values.cpu().clone() for _, values in ranges]
                        for name, ranges in engine.weight_ranges().items()})
        assert engine.device.type == device
        engine.free()
    assert_all(torch.allclose(*histories, rtol=TOLERANCE, atol=0), histories, comm)
    far = [name for name, parts in weights[0].items() for one, other in zip(parts, weights[1][name])
           if len(one) and (one - other).abs().max() > TOLERANCE * one.abs().max()]
    assert_all(not far, far, comm)


@pytest.mark.parametrize("layout", ["usual", "tensor"])
def test_bfloat16_training_stays_near_float64(comm, layout):
    """Half types meet float32 in products that only GPUs have."""
    degrees = LAYOUTS[comm.size] if layout == "usual" else {"layout.tensor": comm.size}
    losses = []
    for dtype in ("float64", "bfloat16"):
        engine = Engine(tiny({**degrees, "train.device": "cuda", "train.dtype": dtype}, comm.size), comm)
        losses.append(torch.tensor([loss for loss, _ in train(engine, 4)]))
        engine.free()
    assert_all(torch.allclose(*losses, rtol=0.01), losses, comm)


def test_gpus_are_measured_planned_for_and_obeyed(comm):
    config = tiny({"model.num_layers": 4, "train.dtype": "bfloat16", "train.device": "cuda"})
    device, group = pick_device("cuda", comm), as_group(comm)
    machine = as_of_now(comm, measure_machine(group, DEFAULT_TABLE, device, torch.bfloat16), device, torch.bfloat16)
    assert_all(len(set(comm.allgather(repr(machine)))) == 1 and not machine.shares_memory, machine, comm)
    assert torch.cuda.get_device_name(device) in machine.source and "bfloat16" in machine.source
    free, own = torch.cuda.mem_get_info(device)[1], comm.allgather(str(device)).count(str(device))
    assert_all(0 < machine.memory_bytes <= free / own, machine.memory_bytes, comm)
    plan = make_plan(config, machine, comm.size)
    engine = Engine(plan.applied_to(config).resolve(comm.size), comm, table=plan.table)
    losses = torch.tensor([loss for loss, _ in train(engine, 2)])
    engine.free()
    wanted = torch.tensor([loss for loss, _ in alone(tiny({"model.num_layers": 4}), comm, 2)[0]])
    assert_all(engine.device.type == "cuda" and torch.allclose(losses, wanted, rtol=0.01), losses, comm)


def test_exact_sums_are_refused(comm):
    with pytest.raises(ConfigError, match="exact: kernels of GPUs add in an order.*set train.device = cpu"):
        Engine(tiny({"train.device": "cuda", "train.numerics": "exact", "layout.pipeline": comm.size}, comm.size), comm)
