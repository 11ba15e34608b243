"""Collective schedules: played with numbers against the definitions, counted against the textbooks, mutated."""

import random
from dataclasses import replace
from math import ceil, log2

import pytest
import torch

from mpillm.errors import ScheduleError
from mpillm.schedules.check_collective import check_collective
from mpillm.schedules.collective import CollectiveSchedule, Step, draw, traffic
from mpillm.schedules.generators import ALGORITHMS, make_collective, make_from_trees

RANKS = range(1, 10)
UNEVEN = {5: [0, 0, 0, 1, 1], 4: [0, 1, 0, 1], 7: [0, 0, 1, 2, 2, 2, 2]}
TREES = ("allreduce", "reduce_scatter", "allgather", "bcast", "reduce")
CASES = [(op, name) for op, names in ALGORITHMS.items() for name in names] + [(op, "trees") for op in TREES]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64]


def make(op, algorithm, p, root=0, nodes=None):
    """The schedule, with nodes and trees where it needs them."""
    if algorithm == "trees":
        return make_from_trees(op, p, trees_of(op, p, root))
    return make_collective(op, algorithm, p, root, nodes or UNEVEN.get(p, [rank // 3 for rank in range(p)]))


def trees_of(op, p, root=0):
    """Stars and chains in turn."""
    roots = range(p) if op in ("allgather", "reduce_scatter") else [root, root] if op != "allreduce" else [0, p - 1]
    return [(1 + number if op == "allreduce" else 1, chain(p, top) if number % 2 else star(p, top))
            for number, top in enumerate(roots)]


def chain(p, root):
    return [None if rank == root else (rank - 1) % p for rank in range(p)]


def star(p, root):
    return [None if rank == root else root for rank in range(p)]


class Vectors(list):
    """The same part of vectors of several lengths and dtypes, so that a schedule is played once for all."""

    def __add__(self, others):
        return Vectors(one + other for one, other in zip(self, others))


class Stuck(Exception):
    """The schedule cannot go on."""


def play(schedule, values):
    """Run a schedule on ``values[rank][chunk]``; return the slots. Written apart from the checker, with numbers.

    A rank is in its next round; a message moves once both its ends are in the round that names it, and a rank goes on
    when all messages of its round have moved. Arrivals show at the end of the round.
    """
    p, rounds = schedule.num_ranks, schedule.rounds
    slots, at, open_steps, arrived = [{} for _ in range(p)], [-1] * p, [[] for _ in range(p)], [[] for _ in range(p)]
    outgoing = [{} for _ in range(p)]
    moving = True
    while moving:
        moving = False
        for r in range(p):
            if not open_steps[r] and at[r] < len(rounds[r]):
                for kind, chunks, data in arrived[r]:
                    for c, value in zip(chunks, data):
                        slots[r][c] = slots[r][c] + value if kind == "reduce" else value
                arrived[r], at[r], moving = [], at[r] + 1, True
                if at[r] < len(rounds[r]):
                    for step in rounds[r][at[r]]:
                        if step.kind == "copy":
                            slots[r].update({c: values[r][c] for c in step.chunks})
                    open_steps[r] = [step for step in rounds[r][at[r]] if step.kind != "copy"]
                    outgoing[r] = dict(slots[r])
        for r in range(p):
            for step in [s for s in open_steps[r] if s.kind == "send"]:
                mine = next(s for s in open_steps[r] if s.kind == "send" and s.peer == step.peer)
                theirs = next((s for s in open_steps[step.peer] if s.kind != "send" and s.peer == r), None)
                if mine is step and theirs is not None:
                    if theirs.chunks != step.chunks:
                        raise Stuck("other chunks")
                    open_steps[r].remove(step)
                    open_steps[step.peer].remove(theirs)
                    arrived[step.peer].append((theirs.kind, step.chunks, [outgoing[r][c] for c in step.chunks]))
                    moving = True
    if any(open_steps) or any(at[r] < len(rounds[r]) for r in range(p)):
        raise Stuck("waits for ever")
    return slots


def is_right(schedule, sizes=(7,), dtypes=(torch.float64,)):
    """Tell whether a schedule gives what its sources and targets say, on integers that sum exactly."""
    cuts = [schedule.bounds(n) for n in sizes]
    values = [{c: Vectors(numbers(*own[c], rank, c, dtype) for own in cuts for dtype in dtypes)
               for c in range(schedule.num_chunks)} for rank in range(schedule.num_ranks)]
    try:
        slots = play(schedule, values)
        for c, (source, target) in enumerate(zip(schedule.sources, schedule.targets)):
            given = [[x.double() for x in own[c]] for own in values]
            right = [sum(parts) for parts in zip(*given)] if source is None else given[source]
            for rank in range(schedule.num_ranks) if target is None else [target]:
                if not all(torch.equal(x.double(), y) for x, y in zip(slots[rank][c], right)):
                    return False
    except (Stuck, KeyError, IndexError):
        return False
    return True


def numbers(low, high, rank, chunk, dtype):
    """Integers that depend on rank and chunk, of which nine ranks' sums are exact."""
    found = torch.arange(low, high) * 3 + 7 * rank + 11 * chunk + 1
    return (found % 23 if dtype == torch.bfloat16 else found).to(dtype)


@pytest.mark.parametrize(("op", "algorithm"), CASES, ids=map("-".join, CASES))
def test_every_generator_on_numbers(op, algorithm):
    for p in RANKS:
        schedule = make(op, algorithm, p, root=p // 2)
        check_collective(schedule)
        assert is_right(schedule, (0, 1, 7, 1000, 65537), DTYPES), p


def definition(op, p, root):
    """Sources and targets of the chunks of every rank's block, as the definition has them."""
    blocks = range(p)
    return {
        "allreduce": {(None, None)}, "reduce_scatter": {(None, b) for b in blocks},
        "allgather": {(b, None) for b in blocks}, "bcast": {(root, None)}, "reduce": {(None, root)},
        "alltoall": {(i, j) for i in blocks for j in blocks}, "scatter": {(root, b) for b in blocks},
        "gather": {(b, root) for b in blocks},
    }[op]


@pytest.mark.parametrize(("op", "algorithm"), CASES, ids=map("-".join, CASES))
def test_a_schedule_is_of_its_operation(op, algorithm):
    """And the chunks of a rank's block lie together, in the order of ranks, with equal shares."""
    for p in RANKS:
        root = 0 if op == "allreduce" else p // 2
        schedule = make(op, algorithm, p, root)
        ends = list(zip(schedule.sources, schedule.targets))
        if op in ("bcast", "reduce") and algorithm == "trees":  # whose chunks are the trees
            ends = ends[:1]
        assert set(ends) == definition(op, p, root)
        if op in ("reduce_scatter", "allgather", "scatter", "gather"):
            owners = [target if op in ("reduce_scatter", "scatter") else source for source, target in ends]
            assert owners == sorted(owners) and len({owners.count(r) for r in range(p)}) == 1


def textbook(op, algorithm, p, per_node):
    """Rounds, and the most bytes that a rank sends as a share of the whole: Thakur, Rabenseifner and Gropp (2005) for
    allgather, reduce_scatter, allreduce, bcast; Bruck et al. (1997) for Bruck's. For any number of ranks, of which the
    doubling algorithms fold those beyond the power of two ``inner`` onto others, in a round before and one after."""
    log, rest, nodes = ceil(log2(p)), (p - 1) / p, p // per_node
    inner = 1 << int(log2(p))
    folded = p - inner
    doubling = int(log2(p)) + 2 * (folded > 0)
    # rank 0 passes on, of every 1, 2, 4 ... ranks, their blocks and those folded onto them; at last all to its folded
    most_doubled = sum(k + min(k, folded) for k in (1 << i for i in range(int(log2(p))))) + (p - 1) * (folded > 0)
    subtree = max(p - (1 << log - 1), 1 << log - 2 if log > 1 else 0)  # the largest below the root of a binomial tree
    rounds = {"ring": p - 1, "ring2": p - 1, "pairwise": p - 1, "direct": 1, "recursive_doubling": doubling,
              "recursive_halving": doubling, "bruck": log, "two_level": nodes - 1 + (per_node > 1)}
    if algorithm == "trees":
        return textbook_trees(op, p)
    if op == "allgather" and algorithm == "recursive_doubling":
        return doubling, most_doubled / p
    if op in ("allgather", "reduce_scatter"):
        return rounds[algorithm], rest
    if op == "allreduce" and algorithm in ("ring", "ring2", "pairwise", "direct", "bruck", "two_level"):
        return 2 * rounds[algorithm], 2 * rest
    return {
        ("allreduce", "halving_doubling"): (2 * doubling, rest + most_doubled / p),
        ("allreduce", "recursive_doubling"): (doubling, int(log2(p)) + (folded > 0)),
        ("allreduce", "binomial"): (2 * log, log),
        ("bcast", "binomial"): (log, log), ("bcast", "direct"): (1, p - 1),
        ("bcast", "scatter_allgather"): (log + p - 1, 2 * rest),
        ("bcast", "two_level"): (ceil(log2(nodes)) + ceil(log2(per_node)),) * 2,
        ("reduce", "binomial"): (log, 1), ("reduce", "direct"): (1, 1),
        ("reduce", "reduce_scatter_gather"): (p - 1 + log, rest + subtree / p),
        ("reduce", "two_level"): (ceil(log2(nodes)) + ceil(log2(per_node)), 1),
        ("alltoall", "pairwise"): (p - 1, rest), ("alltoall", "direct"): (1, rest),
        ("alltoall", "bruck"): (log, sum(bin(distance).count("1") for distance in range(p)) / p),
        ("alltoall", "ring"): (p - 1, (p - 1) / 2),
        ("scatter", "binomial"): (log, rest), ("scatter", "direct"): (1, rest),
        ("gather", "binomial"): (log, subtree / p), ("gather", "direct"): (1, 1 / p),
    }[op, algorithm]


def textbook_trees(op, p):
    """Down a tree its share goes once to every child, up it once to every parent, a level a round; chains are deep."""
    trees = trees_of(op, p)
    ways = {"allreduce": "ud", "reduce": "u", "reduce_scatter": "u"}.get(op, "d")
    sent = [sum(share * ((parents[rank] is not None) * ("u" in ways) + parents.count(rank) * ("d" in ways))
                for share, parents in trees) for rank in range(p)]
    return len(ways) * (p - 1), max(sent) / sum(share for share, _ in trees)


@pytest.mark.parametrize(("op", "algorithm"), CASES, ids=map("-".join, CASES))
def test_rounds_and_bytes_are_the_textbook_s(op, algorithm):
    for p in (*range(2, 10), 12, 16):
        per_node = next(k for k in (3, 2, 1) if p % k == 0)
        schedule = make(op, algorithm, p, nodes=[rank // per_node for rank in range(p)])
        report = check_collective(schedule)
        whole = sum(schedule.shares) / (p if op == "alltoall" else 1)
        rounds, share = textbook(op, algorithm, p, per_node)
        assert report.num_rounds == rounds, p
        assert max(map(report.sent, range(p))) / whole == pytest.approx(share), p


@pytest.mark.parametrize("op", ALGORITHMS)
def test_no_two_names_hide_one_algorithm(op):
    found = [make(op, name, 7).rounds for other, name in CASES if other == op]
    assert len(set(found)) == len(found)


def test_names_that_come_to_the_same_for_few_ranks():
    """Two ranks can exchange halves, exchange all, or send all one way and back; for eight ranks all names differ."""
    def kinds(op, p):
        names = [name for name in ALGORITHMS[op] if name != "two_level"]
        return len({traffic(make(op, name, p)) for name in names}), len(names)

    operations = ("allreduce", "reduce_scatter", "allgather", "bcast", "alltoall")
    assert [kinds(op, 2)[0] for op in operations] == [3, 1, 1, 2, 1]
    assert all(len(set(kinds(op, 8))) == 1 for op in ALGORITHMS)


def test_two_level_crosses_the_network_as_little_as_can_be():
    """Each of k nodes gets the other nodes' blocks once: (k - 1) / k of the whole, over parallel lanes."""
    nodes = [rank // 4 for rank in range(12)]
    schedule = make_collective("allgather", "two_level", 12, nodes=nodes)
    report = check_collective(schedule)
    crossing = {pair: share for pair, share in report.shares_sent.items() if nodes[pair[0]] != nodes[pair[1]]}
    assert sum(crossing.values()) == 3 * 8 and max(crossing.values()) == 2 and len(crossing) == 12


def test_trees_carry_their_shares():
    schedule = make_from_trees("bcast", 4, [(3, chain(4, 0)), (1, star(4, 0))])
    assert schedule.bounds(8) == [(0, 6), (6, 8)]
    assert check_collective(schedule).shares_sent[2, 3] == 3


def test_json_and_drawing():
    for op, algorithm in CASES:
        schedule = make(op, algorithm, 5)
        assert CollectiveSchedule.from_dict(schedule.to_dict()) == schedule
    drawing = draw(make_collective("allreduce", "ring", 3))
    assert len(drawing.splitlines()) == 4 and "rank 2" in drawing
    with pytest.raises(ScheduleError, match="rounds"):
        CollectiveSchedule.from_dict({"op": "bcast"})
    for wrong in (("allreduce", "rings"), ("sort", "ring")):
        with pytest.raises(ScheduleError, match="known are"):
            make_collective(*wrong, 4)
    with pytest.raises(ScheduleError, match="give nodes"):
        make_collective("allreduce", "two_level", 4)


def edit(schedule, rank, number, steps):
    """The schedule with another round."""
    rounds = [list(map(list, own)) for own in schedule.rounds]
    rounds[rank][number] = steps
    return with_rounds(schedule, rounds)


def with_rounds(schedule, rounds):
    return replace(schedule, rounds=tuple(tuple(tuple(steps) for steps in own if steps) for own in rounds))


def some_step(schedule, rng, kinds=("copy", "send", "recv", "reduce")):
    places = [(rank, number, i) for rank, own in enumerate(schedule.rounds) for number, steps in enumerate(own)
              for i, step in enumerate(steps) if step.kind in kinds]
    return rng.choice(places)


def dropped(schedule, rng):
    rank, number, i = some_step(schedule, rng)
    steps = list(schedule.rounds[rank][number])
    return edit(schedule, rank, number, steps[:i] + steps[i + 1:])


def duplicated(schedule, rng):
    rank, number, i = some_step(schedule, rng)
    steps = list(schedule.rounds[rank][number])
    return edit(schedule, rank, number, steps + steps[i:i + 1])


def reordered(schedule, rng):
    rank = rng.choice([r for r, own in enumerate(schedule.rounds) if len(own) > 1])
    rounds = [list(own) for own in schedule.rounds]
    i, j = rng.sample(range(len(rounds[rank])), 2)
    rounds[rank][i], rounds[rank][j] = rounds[rank][j], rounds[rank][i]
    return with_rounds(schedule, rounds)


def changed(schedule, rng, kinds, change):
    rank, number, i = some_step(schedule, rng, kinds)
    steps = list(schedule.rounds[rank][number])
    steps[i] = change(steps[i], rank)
    return edit(schedule, rank, number, steps)


def wrong_peer(schedule, rng):
    def change(step, rank):
        return step._replace(peer=rng.choice([r for r in range(-1, schedule.num_ranks + 1) if r != step.peer]))

    return changed(schedule, rng, ("send", "recv", "reduce"), change)


def wrong_chunk(schedule, rng):
    def change(step, rank):
        others = [c for c in range(schedule.num_chunks + 1) if c not in step.chunks]
        return step._replace(chunks=(*step.chunks[1:], rng.choice(others)))

    return changed(schedule, rng, ("copy", "send", "recv", "reduce"), change)


def early_read(schedule, rng):
    """A send, with its partner, before the round in which its rank gets what it sends."""
    rank, number, i = some_step(schedule, rng, ("send",))
    step, rounds = schedule.rounds[rank][number][i], [[list(steps) for steps in own] for own in schedule.rounds]
    rounds[rank][number].remove(step)
    rounds[rank].insert(0, [step])
    return with_rounds(schedule, rounds)


def cycle(schedule, rng):
    """Two ranks that each first wait for the other's later message."""
    rank, number, i = some_step(schedule, rng, ("recv", "reduce"))
    step = schedule.rounds[rank][number][i]
    peer, rounds = step.peer, [[list(steps) for steps in own] for own in schedule.rounds]
    sends = [(n, s) for n, steps in enumerate(rounds[rank]) for s in steps if s.kind == "send" and s.peer == peer]
    if not sends:
        return schedule
    rounds[rank][number].remove(step)
    rounds[rank].insert(sends[0][0], [step])
    for n, steps in enumerate(rounds[peer]):
        for other in steps:
            if other.kind == "send" and other.peer == rank and other.chunks == step.chunks:
                steps.remove(other)
                rounds[peer].insert(n + 1 + rng.randrange(2), [other])
                return with_rounds(schedule, rounds)
    return schedule


@pytest.mark.parametrize("mutate", [dropped, duplicated, reordered, wrong_peer, wrong_chunk, early_read, cycle])
def test_mutants_are_rejected(mutate):
    """Every mutant that the player finds broken; those that it finds right, and no others, may pass."""
    rng, broken = random.Random(mutate.__name__), 0
    for number in range(2000):
        op, algorithm = CASES[number % len(CASES)]
        schedule = make(op, algorithm, rng.choice([3, 4, 5]))
        mutant = mutate(schedule, rng)
        if is_right(mutant):
            continue
        broken += 1
        with pytest.raises(ScheduleError):
            check_collective(mutant)
        if broken >= 120:
            break
    assert broken >= 25


def test_a_cycle_of_rendezvous_sends_is_a_deadlock():
    """Both send before they receive, in rounds of their own; in one round it is an exchange."""
    def both(*rounds):
        own = tuple(tuple((Step(kind, 1 - rank, (rank if kind == "send" else 1 - rank,)),) if isinstance(kind, str)
                          else tuple(Step(k, 1 - rank, (rank if k == "send" else 1 - rank,)) for k in kind)
                          for kind in rounds) for rank in range(2))
        return CollectiveSchedule("allgather", "by hand", 2, (0, 1), (None, None), (1, 1), tuple(
            ((Step("copy", None, (rank,)),), *steps) for rank, steps in enumerate(own)))

    check_collective(both(("send", "recv")))
    with pytest.raises(ScheduleError, match="deadlock"):
        check_collective(both("send", "recv"))


@pytest.mark.parametrize("kinds", [("recv", "reduce"), ("reduce", "recv"), ("recv", "recv")])
def test_what_replaces_a_chunk_and_what_adds_to_it_share_no_round(kinds):
    """Ranks 1 and 2 send their own to rank 0 in one round, where the order is nobody's."""
    receiver = tuple(Step(kind, peer, (0,)) for peer, kind in zip((1, 2), kinds))
    senders = (((Step("copy", None, (0,)),), (Step("send", 0, (0,)),)),) * 2
    schedule = CollectiveSchedule("reduce", "by hand", 3, (None,), (0,), (1,),
                                  (((Step("copy", None, (0,)),), receiver), *senders))
    with pytest.raises(ScheduleError, match="received in a round that sends or receives it too"):
        check_collective(schedule)


def test_many_ranks_are_checked_soon():
    report = check_collective(make_collective("allreduce", "ring", 64))
    assert report.num_rounds == 126
    assert check_collective(make_collective("allreduce", "recursive_doubling", 100)).num_rounds == ceil(log2(64)) + 2
