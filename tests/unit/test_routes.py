"""Bounds of collectives by linear programs, against cuts by brute force, closed forms and finite differences."""

import json
from itertools import combinations, product

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.optimize import linprog

from mpillm.cli.bound import command
from mpillm.errors import ConfigError
from mpillm.planner.routes import Topology, bound
from mpillm.planner.trees import pack_trees


def random_topology(rng, ranks, switches):
    """Return a ring over all nodes in random order, with chords; integer GB/s."""
    nodes = ranks + switches
    order, links = rng.permutation(nodes), {}
    for a, b in zip(order, np.roll(order, 1)):
        links[a, b] = float(rng.integers(1, 20))
    for _ in range(int(rng.integers(0, 2 * nodes))):
        a, b = rng.choice(nodes, 2, replace=False)
        links[a, b] = float(rng.integers(1, 20))
    names = [f"n{node}" for node in range(nodes)]
    return Topology.make(names, [node < ranks for node in range(nodes)],
                         [(names[a], names[b], rate * 1e9) for (a, b), rate in links.items()])


def worst_cut(topology):
    """Return the seconds a byte that the tightest cut allows: its ranks' share over what leaves it."""
    ranks, worst = set(topology.ranks), 0.0
    for size in range(1, len(topology.names)):
        for cut in map(set, combinations(range(len(topology.names)), size)):
            if 0 < len(cut & ranks) < len(ranks):
                leaves = sum(rate for a, b, rate in topology.links if a in cut and b not in cut)
                worst = max(worst, len(cut & ranks) / len(ranks) / leaves)
    return worst


@pytest.mark.parametrize("seed", range(200))
def test_gathering_and_scattering_equal_the_worst_cut(seed):
    rng = np.random.default_rng(seed)
    topology = random_topology(rng, int(rng.integers(2, 9)), int(rng.integers(0, 3)))
    gather, scatter = bound("allgather", topology), bound("reduce_scatter", topology)
    assert gather.beta_s_per_byte == pytest.approx(worst_cut(topology), rel=1e-9)
    assert scatter.beta_s_per_byte == pytest.approx(worst_cut(topology.reversed()), rel=1e-9)
    both = bound("allreduce", topology).beta_s_per_byte
    assert both == pytest.approx(gather.beta_s_per_byte + scatter.beta_s_per_byte, rel=1e-12)


def pods(count, size=8, inside=300e9, outside=25e9):
    names, links = ["network"], []
    for pod in range(count):
        names.append(f"switch {pod}")
        for rank in (f"{pod}.{i}" for i in range(size)):
            names.append(rank)
            for switch, rate in ((f"switch {pod}", inside), ("network", outside)):
                links += [(rank, switch, rate), (switch, rank, rate)]
    return Topology.make(names, ["." in name for name in names], links)


@pytest.mark.parametrize("count", [3, 16, 128])
def test_pods_have_their_closed_form(count):
    n = 8 * count
    found = bound("allgather", pods(count))
    assert found.beta_s_per_byte == pytest.approx((n - 8) / n / (8 * 25e9), rel=1e-9)
    assert all("network" in link for link in found.bottleneck)


def test_alltoall_has_its_closed_form():
    assert bound("alltoall", pods(3)).beta_s_per_byte == pytest.approx(16 / 24 / 25e9, rel=1e-9)
    ring = Topology.make("abc", [True] * 3, [("a", "b", 1e9), ("b", "c", 1e9), ("c", "a", 1e9)])
    assert bound("alltoall", ring).beta_s_per_byte == pytest.approx(3 / 3 / 1e9)  # every link carries 1 + 2 thirds


@pytest.mark.parametrize("op", ["allgather", "reduce_scatter", "alltoall"])
@pytest.mark.parametrize("seed", range(12))
def test_prices_say_what_a_wider_link_brings(op, seed):
    rng = np.random.default_rng(seed)
    topology = random_topology(rng, 4, 1)
    # Rates without ties, so that one cut decides and stays the one that decides.
    links = tuple((a, b, rate * (1 + 0.2 * rng.random())) for a, b, rate in topology.links)
    topology = Topology(topology.names, topology.is_compute, links)
    found = bound(op, topology)
    assert found.bottleneck
    for place, (a, b, rate) in enumerate(links):
        ends = topology.names[a], topology.names[b]
        raised = Topology(topology.names, topology.is_compute,
                          (*links[:place], (a, b, rate * 1.0001), *links[place + 1:]))
        change = found.beta_s_per_byte - bound(op, raised).beta_s_per_byte
        assert change == pytest.approx(found.prices.get(ends, 0.0) * rate * 1e-4, rel=0.01,
                                       abs=1e-7 * found.beta_s_per_byte)


def rate_without_copies(topology):
    """Return the most that each rank can give out where switches pass messages on whole, by one linear program.

    Ways: flows of every rank through the network, ``pipe[u, v]`` of which ends at ``v``. Trees (Edmonds 1973): from all
    ranks, each giving out ``x``, a flow of ``n x`` over the pipes to every rank ``w``.
    """
    ranks, n, e = topology.ranks, len(topology.ranks), len(topology.links)
    flow, pipe = np.arange(n * e).reshape(n, e), n * e + np.arange(n * n).reshape(n, n)
    into = pipe.max() + 1 + np.arange(n * n).reshape(n, n)
    over = into.max() + 1 + np.arange(n**3).reshape(n, n, n)
    x = over.max() + 1
    unit = max(rate for *_, rate in topology.links)
    equal, upper, limits = [], [], []

    def row(rows, *terms):
        rows.append(np.zeros(x + 1))
        for places, value in terms:
            np.add.at(rows[-1], places, value)

    for u, node in product(range(n), range(len(topology.names))):
        if node != ranks[u]:
            comes = [flow[u, k] for k, (_, to, _) in enumerate(topology.links) if to == node]
            goes = [flow[u, k] for k, (source, _, _) in enumerate(topology.links) if source == node]
            row(equal, (comes, 1), (goes, -1), ([pipe[u, ranks.index(node)]] if node in ranks else [], -1))
    for k, (*_, rate) in enumerate(topology.links):
        row(upper, (flow[:, k], 1))
        limits.append(rate / unit)
    for w, v in product(range(n), repeat=2):
        row(equal, (over[w, :, v], 1), (over[w, v], -1), (into[w, v], 1), (x, -n if v == w else 0))
        row(upper, (into[w, v], 1), (x, -1))
        for u in range(n):
            row(upper, (over[w, u, v], 1), (pipe[u, v], -1 if u != v else 0))
        limits += [0] * (n + 1)
    cost = np.zeros(x + 1)
    cost[x] = -1
    return linprog(cost, np.array(upper), limits, np.array(equal), np.zeros(len(equal)), method="highs").x[x] * unit


@pytest.mark.parametrize("seed", [*range(12), 40])
def test_packed_trees_reach_what_messages_can_where_switches_would_have_to_copy(seed):
    rng = np.random.default_rng(seed)
    topology = random_topology(rng, int(rng.integers(2, 7)), int(rng.integers(1, 4)))
    packed = pack_trees("allgather", topology)
    least = 1 / (len(topology.ranks) * rate_without_copies(topology))
    assert least * (1 - 1e-9) <= packed.beta_s_per_byte <= least / 0.995
    assert least * 0.99 <= packed.limit_s_per_byte <= least * (1 + 1e-9)
    assert seed != 40 or packed.fraction == pytest.approx(0.9, abs=1e-3)  # there the bound needs a switch that copies


@pytest.mark.parametrize("change, text", [
    ({"links": [{"from": "a", "to": "b", "bytes_per_s": 0}]}, "positive"),
    ({"links": [{"from": "a", "to": "z", "bytes_per_s": 1}]}, "unknown nodes"),
    ({"links": [{"from": "a", "to": "b", "bytes_per_s": 1}]}, "every rank must reach every other"),
    ({"nodes": [{"name": "a"}, {"name": "a"}]}, "twice"),
    ({"nodes": [{"name": "a"}, {"name": "b", "compute": False}]}, "2 or more"),
    ({"nodes": 3}, "needs nodes"),
])
def test_bad_topologies_are_refused(tmp_path, change, text):
    good = {"nodes": [{"name": "a"}, {"name": "b"}], "links": [{"from": "a", "to": "b", "bytes_per_s": 1}]}
    path = tmp_path / "topology.json"
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(ConfigError, match=text):
        Topology.load(path)


def test_the_command_writes_json(tmp_path):
    path = tmp_path / "two.json"
    links = [{"from": a, "to": b, "bytes_per_s": 1e9} for a, b in ("ab", "ba")]
    path.write_text(json.dumps({"nodes": [{"name": "a", "compute": True}, {"name": "b", "compute": True}],
                                "links": links}))
    found = json.loads(CliRunner().invoke(command, ["allgather", "--topology", str(path), "--json", "-"]).output)
    assert found["beta_s_per_byte"] == pytest.approx(0.5e-9)
    assert found["bottleneck"] in ([["a", "b"]], [["b", "a"]])
    refused = CliRunner().invoke(command, ["gossip", "--topology", str(path)]).exception
    assert isinstance(refused, ConfigError) and "allgather" in str(refused)
