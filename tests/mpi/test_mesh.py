"""The mesh: coordinates and groups against a numpy array of the ranks."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import assert_all

from mpillm import Mesh
from mpillm.comm import allreduce
from mpillm.comm.mesh import AXES
from mpillm.comm.single import SingleComm
from mpillm.errors import USAGE, ConfigError

pytestmark = [pytest.mark.mpi, pytest.mark.parts]


def degrees(ranks):
    return [dict(zip(AXES, found)) for found in itertools.product(range(1, ranks + 1), repeat=3)
            if math.prod(found) == ranks]


@pytest.mark.parametrize("order", list(itertools.permutations(AXES)), ids="-".join)
def test_coordinates_and_groups(comm, order):
    for sizes in degrees(comm.size):
        ranks = np.arange(comm.size).reshape([sizes[axis] for axis in order])
        place = dict(zip(order, np.argwhere(ranks == comm.rank)[0]))
        with Mesh(comm, **sizes, order=order) as mesh:
            ok = (mesh.world.rank, mesh.world.size) == (comm.rank, comm.size)
            for axis in AXES:
                line = ranks[tuple(slice(None) if name == axis else place[name] for name in order)]
                group = mesh.group(axis)
                ok &= mesh.size(axis) == group.size == sizes[axis] and mesh.coord(axis) == group.rank == place[axis]
                ok &= group.comm.allgather(comm.rank) == line.tolist() and group.name == axis
                total = allreduce(torch.tensor([2.0**comm.rank]), group)
                ok &= total.item() == sum(2.0**rank for rank in line)
            assert_all(ok, f"{sizes}: {mesh}", comm)


@pytest.mark.parametrize("comm", [4], ids="{}-ranks".format, indirect=True)
def test_the_documented_example(comm):
    with Mesh(comm, data=2, tensor=2) as mesh:
        assert comm.allgather(mesh.coord("data")) == [0, 0, 1, 1]
        assert comm.allgather(mesh.coord("tensor")) == [0, 1, 0, 1]
        assert str(mesh) == (f"mesh data=2 x pipeline=1 x tensor=2, rank {comm.rank}/4 "
                             f"data={comm.rank // 2} pipeline=0 tensor={comm.rank % 2}")


def test_groups_over_sets_of_axes(comm):
    """Of meshes with axes beside the usual ones: against a numpy array of the ranks, in any order of the names."""
    sizes = {1: {}, 2: {"expert": 2}, 3: {"context": 3, "expert": 1}, 4: {"context": 2, "data": 2}}[comm.size]
    names = (*AXES, *(name for name in sizes if name not in AXES))
    for order in (names, names[::-1]):
        ranks = np.arange(comm.size).reshape([sizes.get(axis, 1) for axis in order])
        place = dict(zip(order, np.argwhere(ranks == comm.rank)[0]))
        with Mesh(comm, order=order, **sizes) as mesh:
            ok = mesh.axes == order and mesh.group(*names) is mesh.world
            for count in range(1, len(order)):
                for axes in itertools.combinations(names, count):
                    plane = ranks[tuple(slice(None) if name in axes else place[name] for name in order)]
                    group = mesh.group(*axes)
                    ok &= group.comm.allgather(comm.rank) == plane.reshape(-1).tolist()
                    ok &= group is mesh.group(*axes[::-1])
            assert_all(ok, f"{order}: {mesh}", comm)
            for axes in ((), ("data", "data"), ("data", "expertise")):
                with pytest.raises(ConfigError, match="must name axes of .*, each once"):
                    mesh.group(*axes)


def test_a_wrong_product_is_refused_on_every_rank(comm):
    wrong = {"data": comm.size, "pipeline": 2, "tensor": 3}
    with pytest.raises(ConfigError) as caught:
        Mesh(comm, **wrong)
    message, needed = str(caught.value), comm.size * 6
    assert message.startswith(f"mesh data={comm.size} x pipeline=2 x tensor=3 needs {needed} ranks, this")
    assert f"has {comm.size}" in message and caught.value.exit_code == USAGE
    comm.Barrier()  # nobody waits elsewhere


def test_degrees_below_one_are_refused_though_the_product_fits(comm):
    with pytest.raises(ConfigError, match="data=-1 x .*each at least 1"):
        Mesh(comm, data=-1, pipeline=-1, tensor=comm.size)


@pytest.mark.parametrize("order", [("data", "tensor"), ("data", "pipeline", "tensors"), (*AXES, "data"), "tensor"])
def test_an_order_that_does_not_name_each_axis_once_is_refused_on_every_rank(comm, order):
    with pytest.raises(ConfigError, match="must name each of data, pipeline, tensor once") as caught:
        Mesh(comm, data=comm.size, order=order)
    assert repr(order) in str(caught.value) and caught.value.exit_code == USAGE


def test_one_recorder_counts_for_all_axes(comm):
    with Mesh(comm, data=comm.size) as mesh:
        allreduce(torch.zeros(2), mesh.group("data"))
        allreduce(torch.zeros(2), mesh.world)
        allreduce(torch.zeros(2), mesh.group("tensor"))
        found = set(mesh.recorder.calls)
        assert found == ({("data", "allreduce"), ("world", "allreduce")} if comm.size > 1 else set())
        mesh.recorder.reset()
        assert not mesh.recorder.calls and not mesh.recorder.sent_bytes


def test_the_stand_in_is_a_mesh_of_one():
    with Mesh(SingleComm()) as mesh:
        assert [mesh.size(axis) for axis in AXES] == [1, 1, 1] and [mesh.coord(axis) for axis in AXES] == [0, 0, 0]
        assert torch.equal(allreduce(torch.ones(3), mesh.group("tensor")), torch.ones(3))
