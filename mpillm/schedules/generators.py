"""Generators of collective schedules: few are written, the others are made of them.

Backwards in time a schedule is its adjoint (:func:`adjoint`): allgather becomes reduce_scatter, bcast reduce, scatter
gather. So one generator serves both; and reduce_scatter, then allgather, is allreduce (:func:`then`).
"""

from itertools import zip_longest
from typing import NamedTuple

from mpillm.errors import ScheduleError
from mpillm.schedules.collective import CollectiveSchedule, Step


class Message(NamedTuple):
    """A message as the generators think of it."""

    source: int
    target: int
    chunks: tuple[int, ...]
    is_reduced: bool


class Draft(NamedTuple):
    """A schedule as the generators think of it: rounds of messages of all ranks. Small ones combine to large ones."""

    sources: tuple
    targets: tuple
    shares: tuple
    rounds: list


ALGORITHMS = {
    "allreduce": ("ring", "ring2", "recursive_doubling", "halving_doubling", "bruck", "pairwise", "direct", "binomial",
                  "two_level"),
    "reduce_scatter": ("ring", "ring2", "recursive_halving", "bruck", "pairwise", "direct", "two_level"),
    "allgather": ("ring", "ring2", "recursive_doubling", "bruck", "pairwise", "direct", "two_level"),
    "bcast": ("binomial", "scatter_allgather", "direct", "two_level"),
    "reduce": ("binomial", "reduce_scatter_gather", "direct", "two_level"),
    "alltoall": ("pairwise", "bruck", "ring", "direct"),
    "scatter": ("binomial", "direct"),
    "gather": ("binomial", "direct"),
}


_DOUBLING = {"recursive_halving": "recursive_doubling", "halving_doubling": "recursive_doubling"}  # whose half it is


def make_collective(op, algorithm, num_ranks, root=0, nodes=None):
    """Return the schedule of a collective.

    Local.

    Parameters
    ----------
    op, algorithm : str
        Of :data:`ALGORITHMS`.
    num_ranks : int
    root : int
        Of bcast, reduce, scatter and gather.
    nodes : sequence of int
        For ``"two_level"``: the node of every rank.

    Raises
    ------
    ScheduleError
        If there is no such algorithm or what it needs is missing.
    """
    if algorithm not in ALGORITHMS.get(op, ()):
        known = ALGORITHMS.get(op) or sorted(ALGORITHMS)
        raise ScheduleError(f"no algorithm {algorithm} for {op}: known are {', '.join(known)}")
    if algorithm == "two_level" and not nodes:
        raise ScheduleError(f"{op} by two_level over {num_ranks} ranks: give nodes")
    return _finish(op, algorithm, num_ranks, _draft(op, algorithm, num_ranks, root, nodes))


def make_from_trees(op, num_ranks, trees):
    """Return the schedule of a collective along trees that were packed into a network.

    Local.

    Parameters
    ----------
    op : {"allreduce", "reduce_scatter", "allgather", "bcast", "reduce"}
    num_ranks : int
    trees : sequence of (int, sequence of (int or None))
        Of every tree its share of the bytes and every rank's parent, None for its root. Those of allgather and
        reduce_scatter come in the order of their roots, with equal shares for each root in all.
    """
    roots = tuple(list(parents).index(None) for _, parents in trees)
    down = Draft(roots, (None,) * len(trees), tuple(share for share, _ in trees), _trees(trees))
    whole = {"allgather": down, "bcast": down, "allreduce": then(adjoint(down), down)}
    return _finish(op, "trees", num_ranks, whole.get(op) or adjoint(down))


def adjoint(draft):
    """Return a draft backwards in time: what was given out is collected, what was summed is given out."""
    rounds = [[Message(m.target, m.source, m.chunks, not m.is_reduced and draft.targets[m.chunks[0]] is None)
               for m in messages] for messages in reversed(draft.rounds)]
    return Draft(draft.targets, draft.sources, draft.shares, rounds)


def then(first, second):
    """Return the draft that goes on with ``second``, of the same chunks, where ``first`` ends."""
    return Draft(first.sources, second.targets, first.shares, first.rounds + second.rounds)


def beside(first, second):
    """Return the draft that does two at once, each on its half of every chunk."""
    def mix(left, right):
        return tuple(item for pair in zip(left, right) for item in pair)

    rounds = [[m._replace(chunks=tuple(2 * c + side for c in m.chunks))
               for side, messages in enumerate(pair) for m in messages]
              for pair in zip_longest(first.rounds, second.rounds, fillvalue=())]
    return Draft(mix(first.sources, second.sources), mix(first.targets, second.targets),
                 mix(first.shares, second.shares), rounds)


def placed(rounds, ranks, chunks=None):
    """Return rounds with rank ``i`` renamed to ``ranks[i]`` and chunk ``c`` to all of ``chunks[c]``."""
    def rename(own):
        return own if chunks is None else tuple(new for c in own for new in chunks[c])

    return [[Message(ranks[m.source], ranks[m.target], rename(m.chunks), m.is_reduced) for m in messages]
            for messages in rounds]


def together(parts):
    """Merge several lists of rounds that do not touch each other's slots."""
    return [[m for messages in group for m in messages] for group in zip_longest(*parts, fillvalue=())]


def _draft(op, algorithm, p, root, nodes):
    """Return the draft of any operation: five kinds are generated, the others are adjoints and sequences of them."""
    if op == "allgather":
        return _allgather(algorithm, p, nodes)
    if op == "reduce_scatter":
        return adjoint(_allgather(_DOUBLING.get(algorithm, algorithm), p, nodes))
    if op == "bcast":
        return _bcast(algorithm, p, root, nodes)
    if algorithm == "reduce_scatter_gather":
        return then(adjoint(_allgather("ring", p, nodes)), adjoint(_scatter("binomial", p, root)))
    if op == "reduce":
        return adjoint(_bcast(algorithm, p, root, nodes))
    if op == "scatter":
        return _scatter(algorithm, p, root)
    if op == "gather":
        return adjoint(_scatter(algorithm, p, root))
    if op == "alltoall":
        return _alltoall(algorithm, p)
    if algorithm == "recursive_doubling":
        return Draft((None,), (None,), (1,), _exchange_doubling(p))
    if algorithm == "binomial":
        half = _bcast(algorithm, p, 0, nodes)
    else:
        half = _allgather(_DOUBLING.get(algorithm, algorithm), p, nodes)
    return then(adjoint(half), half)


def _allgather(algorithm, p, nodes):
    """Each rank's chunk to all ranks."""
    if algorithm == "ring2":
        return beside(*(Draft(tuple(range(p)), (None,) * p, (1,) * p, _ring(p, step)) for step in (1, -1)))
    rounds = {
        "ring": lambda: _ring(p, 1),
        "recursive_doubling": lambda: _doubling(p),
        "bruck": lambda: [[Message(r, (r - step) % p, tuple((r + i) % p for i in range(min(step, p - step))), False)
                           for r in range(p)] for step in _powers(p)],
        "pairwise": lambda: [[Message(r, (r + k) % p, (r,), False) for r in range(p)] for k in range(1, p)],
        "direct": lambda: [[Message(r, (r + k) % p, (r,), False) for k in range(1, p) for r in range(p)]],
        "two_level": lambda: _two_level(nodes),
    }[algorithm]()
    return Draft(tuple(range(p)), (None,) * p, (1,) * p, rounds)


def _ring(p, step):
    """Round k: every rank passes on what it got in round k - 1."""
    return [[Message(r, (r + step) % p, ((r - step * k) % p,), False) for r in range(p)] for k in range(p - 1)]


def _doubling(p):
    """Pairs at distance 1, 2, 4 ... exchange all they have; ranks beyond a power of two give first and get last."""
    inner = 1 << (p.bit_length() - 1)
    has = [{r} for r in range(p)]
    rounds = [[Message(r, r - inner, (r,), False) for r in range(inner, p)]]
    for r in range(inner, p):
        has[r - inner].add(r)
    for step in _powers(inner):
        rounds.append([Message(r, r ^ step, tuple(sorted(has[r])), False) for r in range(inner)])
        has[:inner] = [has[r] | has[r ^ step] for r in range(inner)]
    rounds.append([Message(r - inner, r, tuple(sorted(set(range(p)) - {r})), False) for r in range(inner, p)])
    return rounds


def _exchange_doubling(p):
    """Pairs at distance 1, 2, 4 ... add what the other has to what they have."""
    inner = 1 << (p.bit_length() - 1)
    rounds = [[Message(r, r - inner, (0,), True) for r in range(inner, p)]]
    rounds += [[Message(r, r ^ step, (0,), True) for r in range(inner)] for step in _powers(inner)]
    return [*rounds, [Message(r - inner, r, (0,), False) for r in range(inner, p)]]


def _two_level(nodes):
    """Allgather over nodes: chunks to as many lanes as the smallest node has ranks, lanes round the nodes, all inside.

    A lane is one rank of every node; lanes go side by side, so that every rank of a node uses the network.
    """
    members = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    members = list(members.values())
    lanes = min(map(len, members))
    first = [Message(rank, ranks[i % lanes], (rank,), False) for ranks in members for i, rank in enumerate(ranks)
             if i >= lanes]
    across = together([placed(_ring(len(members), 1), [ranks[lane] for ranks in members],
                              [tuple(ranks[lane::lanes]) for ranks in members]) for lane in range(lanes)])
    inside = []
    for ranks in members:
        for lane, rank in enumerate(ranks[:lanes]):
            chunks = [chunk for others in members for chunk in others[lane::lanes]]
            inside += [Message(rank, other, tuple(c for c in chunks if c != other), False)
                       for other in ranks if other != rank]
    return [first, *across, [m for m in inside if m.chunks]]


def _bcast(algorithm, p, root, nodes):
    """The root's value to all ranks."""
    if algorithm == "scatter_allgather":
        return then(_scatter("binomial", p, root), _allgather("ring", p, nodes))
    turned = [(root + i) % p for i in range(p)]
    if algorithm == "binomial":
        rounds = placed(_binomial(p), turned)
    elif algorithm == "direct":
        rounds = [[Message(root, other, (0,), False) for other in turned[1:]]]
    else:
        heads, inside = {nodes[root]: root}, []
        for rank, node in enumerate(nodes):
            heads.setdefault(node, rank)
        for node, head in heads.items():
            others = [rank for rank in range(p) if nodes[rank] == node and rank != head]
            inside.append(placed(_binomial(len(others) + 1), [head, *others]))
        rounds = placed(_binomial(len(heads)), list(heads.values())) + together(inside)
    return Draft((root,), (None,), (1,), rounds)


def _binomial(p):
    """Round k: the 2**k ranks that have the value give it to as many others."""
    return [[Message(r, r + step, (0,), False) for r in range(min(step, p - step))] for step in _powers(p)]


def _trees(trees):
    """Each chunk down its own tree, a level a round."""
    parts = []
    for chunk, (_, parents) in enumerate(trees):
        rounds, level = [], [list(parents).index(None)]
        while level:
            below = [rank for rank, parent in enumerate(parents) if parent in level]
            rounds.append([Message(parents[rank], rank, (chunk,), False) for rank in below])
            level = below
        parts.append(rounds)
    return together(parts)


def _scatter(algorithm, p, root):
    """A chunk of the root's for every rank; chunk ``c`` is that of rank ``c``."""
    turned, rounds = [(root + i) % p for i in range(p)], []
    if algorithm == "direct":
        rounds = [[Message(root, other, (other,), False) for other in turned[1:]]]
    else:
        for step in reversed(_powers(p)):
            rounds.append([Message(turned[i], turned[i + step], tuple(sorted(turned[i + step:i + 2 * step])), False)
                           for i in range(0, p - step, 2 * step)])
    return Draft((root,) * p, tuple(range(p)), (1,) * p, rounds)


def _alltoall(algorithm, p):
    """Chunk ``i * p + j`` from rank ``i`` to rank ``j``, at distance ``j - i``."""
    hops = {  # of every round: how far chunks go, and which distances do, by how far they have come
        "ring": [(1, {d: k for d in range(k + 1, p)}) for k in range(p - 1)],
        "bruck": [(step, {d: d % step for d in range(1, p) if d & step}) for step in _powers(p)],
    }.get(algorithm, [(d, {d: 0}) for d in range(1, p)])
    rounds = []
    for step, distances in hops:
        rounds.append([])
        for r in range(p):
            origins = [((r - done) % p, d) for d, done in distances.items()]
            rounds[-1].append(Message(r, (r + step) % p, tuple(i * p + (i + d) % p for i, d in origins), False))
    if algorithm == "direct":
        rounds = [[m for messages in rounds for m in messages]]
    pairs = [(i, j) for i in range(p) for j in range(p)]
    return Draft(tuple(i for i, _ in pairs), tuple(j for _, j in pairs), (1,) * (p * p), rounds)


def _powers(p):
    """Return the powers of two below ``p``."""
    return [1 << k for k in range((p - 1).bit_length())]


def _finish(op, algorithm, p, draft):
    """Return the schedule of a draft: what each rank does; messages of a round between two ranks become one."""
    own = [[[Step("copy", None, tuple(c for c, source in enumerate(draft.sources) if source in (None, r)))]]
           for r in range(p)]
    own = [[[step] for [step] in rounds if step.chunks] for rounds in own]
    for messages in draft.rounds:
        merged = {}
        for m in messages:
            merged.setdefault((m.source, m.target, m.is_reduced), []).extend(m.chunks)
        steps = {}
        for (source, target, is_reduced), chunks in merged.items():
            chunks = tuple(sorted(chunks))
            steps.setdefault(source, []).append(Step("send", target, chunks))
            steps.setdefault(target, []).append(Step("reduce" if is_reduced else "recv", source, chunks))
        for rank, found in steps.items():
            own[rank].append(found)
    rounds = tuple(tuple(tuple(steps) for steps in rounds) for rounds in own)
    return CollectiveSchedule(op, algorithm, p, draft.sources, draft.targets, draft.shares, rounds)
