"""Linear programs on a network: how fast any collective could be, and which links decide it."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, StrictBool
from scipy.optimize import linprog
from scipy.sparse import block_array, coo_array, csgraph, eye_array, kron

from mpillm.errors import ConfigError
from mpillm.plain import KNOWN_KEYS, load_json

_NAMED = KNOWN_KEYS | {"coerce_numbers_to_str": True}  # a node may be called 3
OPERATIONS = ("allgather", "reduce_scatter", "allreduce", "alltoall")


@dataclass(frozen=True)
class _Node:
    __pydantic_config__ = _NAMED
    name: str
    compute: StrictBool = True


@dataclass(frozen=True)
class _Link:
    __pydantic_config__ = _NAMED
    source: Annotated[str, Field(alias="from")]
    target: Annotated[str, Field(alias="to")]
    bytes_per_s: float


@dataclass(frozen=True)
class _Network:
    """The file of a :class:`Topology`."""

    __pydantic_config__ = KNOWN_KEYS
    nodes: list[_Node]
    links: list[_Link]


@dataclass(frozen=True)
class Topology:
    """Ranks and switches, and the directed links between them.

    Attributes
    ----------
    names : tuple of str
    is_compute : tuple of bool
        Whether the node is a rank; the others only pass on.
    links : tuple of (int, int, float)
        Source, target, bytes a second.
    """

    names: tuple
    is_compute: tuple
    links: tuple

    @property
    def ranks(self):
        """The nodes that compute."""
        return [node for node, computes in enumerate(self.is_compute) if computes]

    def reversed(self):
        """Return the topology with every link turned round. Local."""
        return Topology(self.names, self.is_compute, tuple((to, source, rate) for source, to, rate in self.links))

    @classmethod
    def load(cls, path):
        """Read ``{"nodes": [{"name", "compute"}], "links": [{"from", "to", "bytes_per_s"}]}``.

        Raises
        ------
        ConfigError
            If the file is none, or ranks cannot all reach each other.
        """
        found = load_json(_Network, path, "topology",
                          "it needs nodes with name and compute, and links with from, to and bytes_per_s")
        return cls.make([node.name for node in found.nodes], [node.compute for node in found.nodes],
                        [(link.source, link.target, link.bytes_per_s) for link in found.links], path)

    @classmethod
    def make(cls, names, is_compute, links, source="topology"):
        """Build from links between names, and check. Local; raises as :meth:`load` does."""
        place = {name: node for node, name in enumerate(names)}
        twice = [name for name, count in Counter(names).items() if count > 1]
        unknown = sorted({end for link in links for end in link[:2]} - set(place))
        rates = [rate for *_, rate in links if isinstance(rate, bool) or not isinstance(rate, (int, float))
                 or not 0 < rate < math.inf]
        loops = [first for first, second, _ in links if first == second]
        faults = {
            f"nodes {twice} are named twice": twice, f"links name unknown nodes {unknown}": unknown,
            f"bytes_per_s = {rates}: each must be a positive number": rates,
            f"links from {loops} to themselves": loops,
            f"{sum(is_compute)} compute nodes: a collective needs 2 or more": sum(is_compute) < 2,
        }
        text = [fault for fault, is_one in faults.items() if is_one]
        if text:
            raise ConfigError(f"{source}: {'; '.join(text)}")
        found = cls(tuple(names), tuple(is_compute), tuple((place[a], place[b], float(r)) for a, b, r in links))
        found._check_connected(source)
        return found

    def _check_connected(self, source):
        n, ranks = len(self.names), self.ranks
        ends = np.array([link[:2] for link in self.links]).reshape(-1, 2)
        graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(n, n)).tocsr()
        for turned, way in ((graph, "from"), (graph.T.tocsr(), "to")):
            reached = csgraph.breadth_first_order(turned, ranks[0], return_predecessors=False)
            lost = [self.names[rank] for rank in ranks if rank not in set(reached.tolist())]
            if lost:
                raise ConfigError(f"{source}: no way {way} {self.names[ranks[0]]} {'to' if way == 'from' else 'from'} "
                                  f"{', '.join(lost[:5])}: every rank must reach every other; add links")


@dataclass(frozen=True)
class Bound:
    """What no schedule can beat.

    Attributes
    ----------
    beta_s_per_byte : float
        Seconds a byte of the whole buffer: that gathered, reduced, or sent by one rank of an alltoall.
    bottleneck : list of (str, str)
        Links of the cut that decides it.
    prices : dict of (str, str) to float
        By how much ``beta_s_per_byte`` falls for every byte a second that the link gains: the program's duals. Where
        several ranks are equally hard to reach, the price is of widening the links of all of them alike.
    """

    beta_s_per_byte: float
    bottleneck: list
    prices: dict


def bound(op, topology):
    """Return the least time a byte in which any schedule could carry out a collective.

    Local.

    Allgather: a rank ``w`` must receive a share from every rank. Let all ranks give out ``x`` bytes a second each; that
    can go on for ever if the maximal flow from them to every ``w`` is ``N x`` (Edmonds 1973; Zhao et al. 2023 with
    switches). A linear program for every ``w`` has the flow and ``x`` as variables; the smallest ``x`` decides. Ranks
    that look alike in the network are solved once. Reduce-scatter is the same with all links turned round; allreduce is
    taken as a reduce-scatter and then an allgather, and its bound is the sum of theirs.
    Alltoall: a concurrent flow of many commodities, those of one source together (Shahrokhi and Matula 1990).

    Parameters
    ----------
    op : {"allgather", "reduce_scatter", "allreduce", "alltoall"}
    topology : Topology

    Returns
    -------
    Bound

    Notes
    -----
    Variables: links + ranks + 1 for each kind of rank; ranks times links for alltoall.
    """
    if op not in OPERATIONS:
        raise ConfigError(f'bound of "{op}": it is known for {", ".join(OPERATIONS)}')
    if op == "alltoall":
        return _alltoall(topology)
    if op == "reduce_scatter":
        found = _allgather(topology.reversed())
        return Bound(found.beta_s_per_byte, [(b, a) for a, b in found.bottleneck],
                     {(b, a): price for (a, b), price in found.prices.items()})
    if op == "allreduce":
        halves = [bound(half, topology) for half in ("reduce_scatter", "allgather")]
        prices = Counter(halves[0].prices)
        prices.update(halves[1].prices)
        links = list(dict.fromkeys(halves[0].bottleneck + halves[1].bottleneck))
        return Bound(sum(half.beta_s_per_byte for half in halves), links, dict(prices))
    return _allgather(topology)


def _conservation(topology):
    """Return the matrix of what flows out of each node less what flows in, a column a link."""
    ends, count = np.array([link[:2] for link in topology.links]), len(topology.links)
    columns = np.arange(count)
    return coo_array((np.r_[np.ones(count), -np.ones(count)], (np.r_[ends[:, 0], ends[:, 1]], np.r_[columns, columns])),
                     shape=(len(topology.names), count))


def _allgather(topology):
    flow, rates = _conservation(topology), np.array([link[2] for link in topology.links])
    ranks = topology.ranks
    best = None
    for target in _one_of_each_kind(topology):
        found = _gather_to(target, flow, rates, ranks)
        if best is None or found[0] < best[0]:
            best = found
    rate, duals = best
    beta = 1 / (len(ranks) * rate)
    prices = {_ends(topology, link): -dual * beta / rate for link, dual in enumerate(duals) if dual < -1e-12}
    return Bound(beta, list(prices), prices)


def _gather_to(target, flow, rates, ranks):
    """Return the most that each rank can give out while ``target`` receives all, and the price of each link.

    Variables: flow on every link, flow from the super source into every rank, the rate ``x``. All are in units of the
    fastest link, which keeps the solver's tolerances meaningful.
    """
    nodes, count = flow.shape
    unit, n = rates.max(), len(ranks)
    into = coo_array((-np.ones(n), (ranks, np.arange(n))), shape=(nodes, n))
    last = coo_array(([float(n)], ([target], [0])), shape=(nodes, 1))
    equal = block_array([[flow, into, last]]).tocsr()
    limit = block_array([[eye_array(count), None, None], [None, eye_array(n), -np.ones((n, 1))]]).tocsr()
    cost = np.zeros(count + n + 1)
    cost[-1] = -1
    found = linprog(cost, A_ub=limit, b_ub=np.r_[rates / unit, np.zeros(n)], A_eq=equal, b_eq=np.zeros(nodes),
                    method="highs")
    return found.x[-1] * unit, found.ineqlin.marginals[:count]


def _one_of_each_kind(topology):
    """Return one rank of each class that colours cannot tell apart (Weisfeiler and Leman 1968).

    Two nodes of one colour have the same view of the network; so that the program of one, averaged over its class, has
    the value of the other: fractional isomorphism keeps linear programs (Tinhofer 1986).
    """
    colours = list(topology.is_compute)
    while True:
        around = [[] for _ in colours]
        for source, to, rate in topology.links:
            around[source].append((0, rate, colours[to]))
            around[to].append((1, rate, colours[source]))
        seen = {}
        new = [seen.setdefault((own, tuple(sorted(near))), len(seen)) for own, near in zip(colours, around)]
        if len(set(new)) == len(set(colours)):
            break
        colours = new
    return {colours[rank]: rank for rank in reversed(topology.ranks)}.values()


def _alltoall(topology):
    """Solve the flow that sends as much from every rank to every other, all at once."""
    flow, rates = _conservation(topology).tocsr(), np.array([link[2] for link in topology.links])
    ranks, unit = topology.ranks, max(link[2] for link in topology.links)
    n, count = len(ranks), len(rates)
    blocks, demands = [], []
    for source in ranks:
        others = [rank for rank in ranks if rank != source]
        rows = [node for node in range(flow.shape[0]) if node != source]
        demand = np.zeros(flow.shape[0])
        demand[others] = 1
        blocks.append(flow[rows])
        demands.append(demand[rows])
    zeros = [[block if i == j else None for j in range(n)] + [demands[i][:, None]] for i, block in enumerate(blocks)]
    limit = block_array([[kron(np.ones((1, n)), eye_array(count)), np.zeros((count, 1))]]).tocsr()
    cost = np.zeros(n * count + 1)
    cost[-1] = -1
    found = linprog(cost, A_ub=limit, b_ub=rates / unit, A_eq=block_array(zeros).tocsr(),
                    b_eq=np.zeros(n * (flow.shape[0] - 1)), method="highs")
    theta = found.x[-1] * unit  # bytes a second from each rank to each other
    beta = 1 / (n * theta)
    prices = {_ends(topology, link): -dual * beta / theta
              for link, dual in enumerate(found.ineqlin.marginals) if dual < -1e-12}
    return Bound(beta, list(prices), prices)


def _ends(topology, link):
    source, to, _ = topology.links[link]
    return topology.names[source], topology.names[to]
