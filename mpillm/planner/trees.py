"""Linear program by columns: trees that together use a network to its bound, as a schedule that can run."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, csgraph

from mpillm.errors import ConfigError
from mpillm.planner.routes import bound
from mpillm.schedules.generators import make_from_trees

UNITS = 10_000  # the whole shares of a rank's trees add up to this
ENOUGH = 0.995  # of the bound: no more trees are sought
TIE = 1e-6


@dataclass(frozen=True)
class Packing:
    """Trees for an allgather or, turned round, a reduce-scatter.

    Attributes
    ----------
    schedule : CollectiveSchedule
    beta_s_per_byte : float
        Seconds a byte of the whole that the busiest link takes, with the shares of the schedule.
    fraction : float
        The bound over that.
    limit_s_per_byte : float
        What no messages between ranks can beat. The bound is below it where only a switch that copies would reach it.
    """

    schedule: object
    beta_s_per_byte: float
    fraction: float
    limit_s_per_byte: float


def pack_trees(op, topology):
    """Pack trees into a network so that a collective comes close to its bound.

    Local. The master program gives every rank the same rate, made up of trees that reach all ranks; a link carries no
    more than it can. New trees are those that cost the least under its duals: each way between two ranks is a shortest
    path, and each tree a cheapest arborescence of such ways (Edmonds 1967), until rates reach :data:`ENOUGH` of the
    bound, or of the limit. Ways through switches carry a copy for every rank behind them, as messages do.

    The limit: whatever the links' prices, trees of one rate for all roots cost that rate times the sum of the cheapest
    trees of all roots, which cannot be more than all capacities together are worth (the Lagrangian bound of column
    generation).

    Parameters
    ----------
    op : {"allgather", "reduce_scatter", "allreduce"}
        An allreduce is packed as a reduce-scatter and then an allgather over the same trees.
    topology : Topology
        For allreduce with links as fast back as there.

    Returns
    -------
    Packing
        Its time is within 1 - :data:`ENOUGH` of its limit. Where a switch passes on more than it takes in, that may lie
        above the bound, which lets switches copy.

    Raises
    ------
    ConfigError
        For another operation, or an allreduce over links that differ there and back.
    """
    if op not in ("allgather", "reduce_scatter", "allreduce"):
        raise ConfigError(f"trees for {op}: they are packed for allgather, reduce_scatter and allreduce")
    if op == "allreduce" and Counter(topology.links) != Counter(topology.reversed().links):
        raise ConfigError("trees for allreduce: every link needs one back that is as fast; pack reduce_scatter and "
                          "allgather by themselves")
    network = topology.reversed() if op == "reduce_scatter" else topology
    best = bound("allgather", network).beta_s_per_byte
    num_ranks, capacity = len(network.ranks), np.array([link[2] for link in network.links])
    found, limit = _generate(network, 1 / (num_ranks * best))
    shares = _whole_shares([tree[0] for tree in found], [tree[1] for tree in found], num_ranks)
    load = sum(share / UNITS * usage for share, (*_, usage) in zip(shares, found))
    beta = float((load / capacity).max()) / num_ranks
    order = sorted(range(len(found)), key=lambda i: found[i][1])
    trees = [(shares[i], found[i][2]) for i in order if shares[i]]
    if op == "allreduce":
        best, beta, limit = 2 * best, 2 * beta, 2 * limit
    return Packing(make_from_trees(op, num_ranks, trees), beta, best / beta, limit)


def _generate(network, wanted):
    """Return trees with their rates, a list of (rate, root, parents, times that each link is used); and the limit."""
    links, num_ranks = network.links, len(network.ranks)
    unit = max(link[2] for link in links)
    capacity = np.array([link[2] for link in links]) / unit
    columns, known, most = [], set(), wanted
    prices = 1 / capacity
    while True:
        before, cost = len(columns), 0.0
        costs, ways = _ways(network, prices)
        for root in range(num_ranks):
            parents = cheapest_arborescence(costs, root)
            used = sorted(link for child in range(num_ranks) if child != root for link in ways[parents[child]][child])
            cost += prices[used].sum()
            if (root, *used) not in known:
                known.add((root, *used))
                columns.append((root, parents, np.bincount(used, minlength=len(links))))
        most = min(most, prices @ capacity * unit / cost)
        rate, prices, rates = _master(columns, capacity, num_ranks)
        if rate * unit >= ENOUGH * most or len(columns) == before:
            return [(share, *column) for share, column in zip(rates, columns)], 1 / (num_ranks * most)
        prices = prices + TIE * prices.max() / capacity  # of equally cheap ways those over faster links


def _master(columns, capacity, num_ranks):
    """Return the rate of every rank, the price of each link, and the rates of the trees."""
    count = len(columns)
    usage = np.stack([column[2] for column in columns], 1)
    of_root = np.zeros((num_ranks, count))
    of_root[[column[0] for column in columns], np.arange(count)] = -1
    upper = np.block([[usage, np.zeros((len(capacity), 1))], [of_root, np.ones((num_ranks, 1))]])
    found = linprog(np.r_[np.zeros(count), -1.0], A_ub=upper, b_ub=np.r_[capacity, np.zeros(num_ranks)], method="highs")
    return found.x[-1], -found.ineqlin.marginals[:len(capacity)], found.x[:-1]


def _ways(network, prices):
    """Return the price of the cheapest way from every rank to every other, and the links that it takes."""
    cheapest = {}
    for link, (source, to, _) in enumerate(network.links):
        if (source, to) not in cheapest or prices[link] < prices[cheapest[source, to]]:
            cheapest[source, to] = link
    nodes, ranks = len(network.names), network.ranks
    ends, chosen = np.array(list(cheapest)), list(cheapest.values())
    graph = coo_array((prices[chosen], (ends[:, 0], ends[:, 1])), shape=(nodes, nodes)).tocsr()
    costs, before = csgraph.dijkstra(graph, indices=ranks, return_predecessors=True)

    def way(i, to):
        links = []
        while to != ranks[i]:
            links.append(cheapest[int(before[i, to]), int(to)])
            to = before[i, to]
        return links

    return costs[:, ranks], [[way(i, to) for to in ranks] for i in range(len(ranks))]


def cheapest_arborescence(costs, root):
    """Return the parent of every node, ``None`` for the root, in the cheapest tree from it (Edmonds 1967). Local.

    ``costs[u][v]`` is that of the way from ``u`` to ``v``.
    """
    count = len(costs)
    costs = np.array(costs, float)
    np.fill_diagonal(costs, np.inf)
    parents = [None if node == root else int(costs[:, node].argmin()) for node in range(count)]
    cycle = _cycle(parents)
    if not cycle:
        return tuple(parents)
    # Make one node of the cycle; a way into it costs what it costs more than the one that it would replace.
    others = [node for node in range(count) if node not in cycle]
    ring = np.array(sorted(cycle))
    extra = costs[np.ix_(others, ring)] - costs[[parents[node] for node in ring], ring]
    small = np.full((len(others) + 1,) * 2, np.inf)
    small[:-1, :-1] = costs[np.ix_(others, others)]
    small[:-1, -1] = extra.min(1)
    small[-1, :-1] = costs[np.ix_(ring, others)].min(0)
    found = cheapest_arborescence(small, others.index(root))
    for place, node in enumerate(others):
        parent = found[place]
        if parent is not None:
            parents[node] = others[parent] if parent < len(others) else int(ring[costs[ring, node].argmin()])
    entered = int(ring[extra[found[-1]].argmin()])
    parents[entered] = others[found[-1]]
    return tuple(parents)


def _cycle(parents):
    """Return the nodes of a cycle, empty if there is none."""
    for start in range(len(parents)):
        seen, node = [], start
        while node is not None and node not in seen:
            seen.append(node)
            node = parents[node]
        if node is not None:
            return set(seen[seen.index(node):])
    return set()


def _whole_shares(rates, roots, num_ranks):
    """Return rates as whole shares that add up to :data:`UNITS` for every root, the largest remainders rounded up."""
    rates, roots = np.array(rates), np.array(roots)
    shares = np.zeros(len(rates), int)
    for root in range(num_ranks):
        own = np.flatnonzero(roots == root)
        exact = rates[own] / rates[own].sum() * UNITS
        shares[own] = np.floor(exact)
        lacking = UNITS - shares[own].sum()
        shares[own[np.argsort(shares[own] - exact, kind="stable")[:lacking]]] += 1
    return shares.tolist()
