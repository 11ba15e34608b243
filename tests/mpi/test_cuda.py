"""Tensors and training on GPUs, where there are any: the same numbers as in host memory. Ranks may share a GPU."""

import pytest
import torch
from helpers import assert_all
from tiny import LAYOUTS, tiny, train

from mpillm.comm import allgather, allreduce, alltoall, bcast, gather, iallreduce, reduce_scatter, scatter
from mpillm.comm.group import as_group
from mpillm.comm.p2p import irecv, isend
from mpillm.train.engine import Engine, pick_device

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
