"""Collective schedules on a clock against closed forms; packed trees against their bound."""

import itertools
import json

import numpy as np
import pytest
from click.testing import CliRunner

from mpillm.cli.bound import command as bound_command
from mpillm.cli.simulate import command as simulate
from mpillm.errors import ConfigError, ScheduleError
from mpillm.machine import Level, Machine
from mpillm.planner.messages import play_collective
from mpillm.planner.routes import Topology
from mpillm.planner.trees import cheapest_arborescence, pack_trees
from mpillm.schedules.check_collective import check_collective
from mpillm.schedules.generators import make_collective

ALPHA, BETA, N = 1e-6, 1e-9, 840_000
ONE = Machine("one level", "made up", (Level("node", 64, ALPHA, BETA),), ((32, 1e9),), 1e9, 1e10)
TWO = Machine("two levels", "made up", (Level("node", 4, ALPHA, BETA), Level("network", 64, 1e-5, 1e-8)),
              ((32, 1e9),), 1e9, 1e10)


@pytest.mark.parametrize("op, name, ranks, rounds, share", [
    ("allreduce", "ring", 5, 8, 8 / 5), ("allreduce", "ring2", 4, 6, 6 / 4),
    ("allreduce", "recursive_doubling", 8, 3, 3), ("allreduce", "halving_doubling", 8, 6, 14 / 8),
    ("reduce_scatter", "recursive_halving", 8, 3, 7 / 8), ("allgather", "bruck", 8, 3, 7 / 8),
    ("allgather", "direct", 7, 1, 6 / 7), ("bcast", "binomial", 8, 3, 3), ("alltoall", "pairwise", 6, 5, 5 / 36),
])
def test_times_are_the_textbook_ones(op, name, ranks, rounds, share):
    played = play_collective(make_collective(op, name, ranks), ONE, N)
    assert played.total_s == pytest.approx(rounds * ALPHA + share * N * BETA, rel=1e-4)


def test_the_slow_level_decides_and_two_levels_help():
    nodes = [TWO.node_of(rank) for rank in range(16)]
    ring = play_collective(make_collective("allreduce", "ring", 16), TWO, N)
    assert ring.total_s == pytest.approx(30 * (1e-5 + N / 16 * 1e-8), rel=1e-3)
    two_level = play_collective(make_collective("allreduce", "two_level", 16, nodes=nodes), TWO, N)
    assert two_level.total_s < ring.total_s / 3
    across = sum(n for (a, b), n in two_level.bytes_per_link.items() if nodes[a] != nodes[b])
    assert across == pytest.approx(4 * 4 * 2 * 3 / 4 * N / 4)  # each of 4 lanes a ring of 4 over its quarter


def test_the_command_reads_names_and_files(tmp_path):
    def run(schedule, op="allreduce", ranks=3):
        return CliRunner().invoke(simulate, ["collective", "--op", op, "--schedule", str(schedule), "--ranks",
                                             str(ranks), "--bytes", "300", "--machine", "cpu-node", "--json", "-"])

    found = json.loads(run("ring").output)
    pairs = ("0>1", "0>2", "1>0", "1>2", "2>0", "2>1")
    assert found["bytes_per_link"] == dict.fromkeys(pairs, 200) and found["seconds"] > 0
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(make_collective("allreduce", "ring", 3).to_dict()))
    assert json.loads(run(path).output)["seconds"] == found["seconds"]
    assert isinstance(run(path, ranks=4).exception, ConfigError)
    assert isinstance(run("zigzag").exception, ScheduleError)
    path.write_text("{")
    assert isinstance(run(path).exception, ScheduleError)


def random_network(rng, switches):
    """Links as fast back as there, so that no switch passes on more than it takes in."""
    ranks = int(rng.integers(2, 9))
    names = [f"n{i}" for i in range(ranks + switches)]
    while True:
        links = []
        for a, b in itertools.combinations(names, 2):
            if rng.random() < 0.5:
                rate = float(rng.integers(1, 20)) * 1e9
                links += [(a, b, rate), (b, a, rate)]
        try:
            return Topology.make(names, [i < ranks for i in range(len(names))], links)
        except ConfigError:
            continue


@pytest.mark.parametrize("op", ["allgather", "reduce_scatter", "allreduce"])
@pytest.mark.parametrize("seed", range(15))
def test_packed_trees_reach_the_bound_and_are_schedules(op, seed):
    packed = pack_trees(op, random_network(np.random.default_rng(seed), seed % 3))
    assert 0.95 <= packed.fraction <= 1 + 1e-9
    check_collective(packed.schedule)


@pytest.mark.parametrize("seed", range(30))
def test_arborescences_are_the_cheapest(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 6))
    costs, root = rng.integers(1, 9, (n, n)).astype(float), int(rng.integers(n))

    def cost(parents):
        return sum(costs[parent, node] for node, parent in enumerate(parents) if node != root)

    def is_tree(parents):
        for node in range(n):
            seen = set()
            while node != root and node not in seen:
                seen.add(node)
                node = parents[node]
            if node != root:
                return False
        return True

    every = [p for p in itertools.product(range(n), repeat=n) if p[root] == root and is_tree(p)]
    found = cheapest_arborescence(costs, root)
    assert found[root] is None and is_tree([root if parent is None else parent for parent in found])
    assert cost(found) == min(map(cost, every))


def test_trees_are_written_as_a_schedule_that_can_be_played(tmp_path):
    topology, trees = tmp_path / "net.json", tmp_path / "trees.json"
    links = [{"from": a, "to": b, "bytes_per_s": 1e9} for a, b in itertools.permutations("abc", 2)]
    topology.write_text(json.dumps({"nodes": [{"name": name} for name in "abc"], "links": links}))
    found = CliRunner().invoke(bound_command, ["allgather", "--topology", str(topology), "--trees", str(trees),
                                               "--json", "-"])
    reached = json.loads(found.output)
    assert reached["trees_fraction"] > 0.99 and reached["trees_limit_s_per_byte"] <= reached["trees_beta_s_per_byte"]
    played = CliRunner().invoke(simulate, ["collective", "--op", "allgather", "--schedule", str(trees), "--ranks", "3",
                                           "--bytes", "3000", "--machine", "cpu-node"])
    assert played.exit_code == 0
    refused = CliRunner().invoke(bound_command, ["alltoall", "--topology", str(topology), "--trees", str(trees)])
    assert isinstance(refused.exception, ConfigError)
