"""Pipeline schedules: generators against published figures, the checker against an oracle and mutants.

The oracle plays a schedule on a clock, tick by tick, from the bare rules of data flow; it shares no code with
check.py.
"""

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest

from mpillm.errors import ConfigError, ScheduleError
from mpillm.planner.footprint import in_flight, points
from mpillm.schedules import SCHEDULES, Action, PipelineSchedule, grid, make_schedule
from mpillm.schedules.check import check

RANKS, MICROBATCHES, CHUNKS = range(1, 6), range(1, 10), range(1, 4)
ONE_STAGE = ("1f1b", "zb-h1", "zb-h2")
DURATION = {"F": 1, "B": 2, "I": 1, "W": 1}


def cases(name):
    chunks = [1] if name in ONE_STAGE else CHUNKS
    return itertools.product(RANKS, MICROBATCHES, chunks)


def needs(action, last_stage):
    """Sets of actions as text; one of each set must have ended before ``action`` may start."""
    s, m = action.stage, action.microbatch
    if action.kind == "F":
        return [{f"{s - 1}F{m}"}] if s else []
    if action.kind == "W":
        return [{f"{s}I{m}"}]
    return [{f"{s}F{m}"}] + ([{f"{s + 1}B{m}", f"{s + 1}I{m}"}] if s < last_stage else [])


def play(schedule):
    """Return (first start, last end) of every rank, or ``None`` if the ranks come to a halt."""
    todo = [list(row) for row in schedule.actions]
    running = [None] * schedule.num_ranks
    ended, span = set(), [[] for _ in todo]
    for tick in itertools.count():
        for rank, job in enumerate(running):
            if job and job[0] == tick:
                ended.add(str(job[1]))
                running[rank] = None
        for rank, row in enumerate(todo):
            if running[rank] or not row:
                continue
            if all(ended & some for some in needs(row[0], schedule.num_stages - 1)):
                running[rank] = (tick + DURATION[row[0].kind], row.pop(0))
                span[rank] += [tick, running[rank][0]]
        if not any(running):
            return None if any(todo) else [(min(times), max(times)) for times in span]


def is_valid(schedule):
    """Whether everything is there once, at home, and runs to its end."""
    for rank, row in enumerate(schedule.actions):
        if any(action.stage % schedule.num_ranks != rank for action in row):
            return False
    kinds = Counter((action.stage, action.microbatch) for row in schedule.actions for action in row)
    count = Counter(str(action) for row in schedule.actions for action in row)
    everything = set(itertools.product(range(schedule.num_stages), range(schedule.num_microbatches)))
    if set(kinds) != everything or max(count.values()) > 1:
        return False
    sets = {key: {k for k in "FBIW" if f"{key[0]}{k}{key[1]}" in count} for key in everything}
    if any(found not in ({"F", "B"}, {"F", "I", "W"}) for found in sets.values()):
        return False
    return play(schedule) is not None


def bubble(schedule):
    """Longest idle time of a rank between its first and its last action."""
    return max(
        stop - start - sum(DURATION[action.kind] for action in row)
        for (start, stop), row in zip(play(schedule), schedule.actions)
    )


def peaks(schedule, released):
    """Most microbatches of each rank between ``F`` and one of the kinds ``released``."""
    result = []
    for row in schedule.actions:
        steps = [(action.kind == "F") - (action.kind in released) for action in row]
        result.append(max(itertools.accumulate(steps)))
    return tuple(result)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_size_is_complete_and_cannot_deadlock(name):
    for ranks, microbatches, chunks in cases(name):
        schedule = make_schedule(name, ranks, microbatches, chunks)
        assert is_valid(schedule), (ranks, microbatches, chunks)
        report = check(schedule)
        assert report.num_steps == max(stop for _, stop in play(schedule))
        assert report.in_flight_max == peaks(schedule, "BW")
        assert make_schedule(name, ranks, microbatches, chunks) == schedule
        halves = {"I", "W"} if name.startswith("zb") else {"B"}
        assert {action.kind for row in schedule.actions for action in row} == {"F"} | halves


@pytest.mark.parametrize("ranks", range(1, 8))
def test_bubbles_are_the_published_ones(ranks):
    for microbatches in range(ranks, 4 * ranks + 3):
        for chunks in CHUNKS:
            for name in ("gpipe", "interleaved"):
                assert bubble(make_schedule(name, ranks, microbatches, chunks)) == (ranks - 1) * 3
        assert bubble(make_schedule("1f1b", ranks, microbatches)) == (ranks - 1) * 3
        assert bubble(make_schedule("zb-h1", ranks, microbatches)) == ranks - 1
        if microbatches >= 2 * ranks - 1:
            assert bubble(make_schedule("zb-h2", ranks, microbatches)) == 0


@pytest.mark.parametrize("ranks, microbatches", list(itertools.product(RANKS, range(1, 13))))
def test_microbatches_in_flight_are_the_published_ones(ranks, microbatches):
    def in_flight(name, chunks=1):
        return check(make_schedule(name, ranks, microbatches, chunks)).in_flight_max

    ahead = [min(ranks - rank, microbatches) for rank in range(ranks)]
    assert in_flight("1f1b") == tuple(ahead)
    assert in_flight("gpipe", 2) == (2 * microbatches,) * ranks
    assert in_flight("zb-h1")[0] == min(ranks, microbatches) == max(in_flight("zb-h1"))
    assert max(in_flight("zb-h2")) <= min(2 * ranks - 1, microbatches)
    if microbatches >= 2 * ranks - 1:
        assert in_flight("zb-h2") == (2 * ranks - 1,) * ranks
    waiting = peaks(make_schedule("zb-h1", ranks, microbatches), "I")
    assert all(mine <= limit for mine, limit in zip(waiting, ahead))
    if microbatches % ranks == 0:
        for chunks in CHUNKS[1:]:
            warmups = [(chunks - 1) * ranks + 2 * (ranks - 1 - rank) for rank in range(ranks)]
            expected = tuple(min(warmup + 1, chunks * microbatches) for warmup in warmups)
            assert in_flight("interleaved", chunks) == expected


def test_known_orders():
    def rows(*args):
        return [" ".join(map(str, row)) for row in make_schedule(*args).actions]

    assert rows("gpipe", 2, 2, 2) == ["0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1", "1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1"]
    assert rows("1f1b", 2, 3) == ["0F0 0F1 0B0 0F2 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2"]
    assert rows("interleaved", 2, 2, 2)[1] == "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1"
    assert rows("zb-h1", 2, 3) == [
        "0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2", "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2"
    ]
    assert rows("zb-h2", 2, 3) == [
        "0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2", "1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2"
    ]


def test_interleaved_with_one_chunk_is_1f1b():
    for ranks, microbatches in itertools.product(RANKS, MICROBATCHES):
        schedule = make_schedule("interleaved", ranks, microbatches)
        assert schedule.actions == make_schedule("1f1b", ranks, microbatches).actions


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("2f2b", 2, 4), ["2f2b", *SCHEDULES]),
        (("1f1b", 0, 4), ["ranks = 0", "from 1"]),
        (("zb-h1", 2, -1), ["microbatches = -1"]),
        (("interleaved", 2, 4, 0), ["chunks = 0"]),
        (("gpipe", 2, 4.0), ["microbatches = 4.0"]),
        (("1f1b", 2, 4, 2), ["1f1b", "chunks = 2", "interleaved", "gpipe"]),
        (("zb-h2", 2, 4, 3), ["zb-h2", "chunks = 3", "chunks = 1"]),
    ],
)
def test_impossible_requests_say_what_works(arguments, words):
    with pytest.raises(ConfigError) as error:
        make_schedule(*arguments)
    assert all(word in str(error.value) for word in words)


def test_actions_print_and_parse():
    assert str(Action(12, "F", 340)) == "12F340"
    assert Action.parse("12F340") == Action(12, "F", 340)
    for text in ("", "F0", "2F", "2X0", "2f0", "-1F0", "2F-1", "2F0 ", "2F0B1", "2.0F1", "1F" + "9" * 5000):
        with pytest.raises(ScheduleError, match="as in 2F0"):
            Action.parse(text)
    for values in ((-1, "F", 0), (0, "F", -1), (0, "X", 0)):
        with pytest.raises(ScheduleError, match="as in 2F0"):
            Action(*values)


@pytest.mark.parametrize("name", SCHEDULES)
def test_text_round_trip(name):
    for ranks, microbatches, chunks in cases(name):
        schedule = make_schedule(name, ranks, microbatches, chunks)
        assert PipelineSchedule.from_text(str(schedule)) == schedule
        assert str(schedule) == schedule.to_text()
        homes = [schedule.rank_of(stage) for stage in range(schedule.num_stages)]
        assert homes == list(range(ranks)) * chunks


TEXT = "schedule=mine ranks=2 stages=2 microbatches=2\nrank 0: 0F0 0F1 0B0 0B1\nrank 1: 1F0 1B0 1F1 1B1\n"


def test_text_may_hold_comments_and_blank_lines():
    text = "# by hand\n\n" + TEXT.replace("\nrank", "   # note\n\n  rank").replace("0F0 ", "0F0\t ")
    assert PipelineSchedule.from_text(text) == PipelineSchedule.from_text(TEXT)
    assert check(PipelineSchedule.from_text(text)).in_flight_max == (2, 1)


@pytest.mark.parametrize(
    "old, new, words",
    [
        (TEXT, "", ["header", "microbatches="]),
        ("schedule=mine", "my schedule", ['"my schedule', "header"]),
        ("ranks=2", "ranks=two", ["header"]),
        ("=mine", "=", ["header"]),
        ("ranks=2 stages=2", "ranks=0 stages=0", ["ranks=0", "at least one"]),
        ("stages=2", "stages=3", ["stages=3", "divide"]),
        ("rank 1: 1F0 1B0 1F1 1B1\n", "", ["ranks=2", "for 1 ranks"]),
        ("1B1\n", "1B1\nrank 2: 0F0\n", ["for 3 ranks"]),
        ("rank 1", "rank 0", ["line 3", '"rank 1:"']),
        ("rank 0:", "", ["line 2", '"rank 0:"']),
        ("0B0", "0G0", ["line 2", "0G0", "as in 2F0"]),
    ],
)
def test_broken_text_is_refused(old, new, words):
    assert old in TEXT
    with pytest.raises(ScheduleError) as error:
        PipelineSchedule.from_text(TEXT.replace(old, new))
    assert all(word in str(error.value) for word in words)


def test_a_name_is_one_word():
    for name in ("", "two words", "a#b"):
        with pytest.raises(ScheduleError, match="one word"):
            replace(PipelineSchedule.from_text(TEXT), name=name)


def test_grid_shows_the_steps_as_played():
    assert grid(PipelineSchedule.from_text(TEXT)).splitlines() == [
        "step    0   1   2   3   4   5   6   7   8",
        "rank 0 0F0 0F1  .   .  0B0  =   .  0B1  =",
        "rank 1  .  1F0 1B0  =  1F1 1B1  =   .   .",
    ]
    assert ">1B0<" in grid(PipelineSchedule.from_text(TEXT), marked=[(1, 1)])


def test_grid_agrees_with_the_oracle():
    schedule = make_schedule("interleaved", 3, 5, 2)
    rows = [line.split()[2:] for line in grid(schedule).splitlines()[1:]]
    busy = [[step for step, cell in enumerate(row) if cell != "."] for row in rows]
    assert [(steps[0], steps[-1] + 1) for steps in busy] == play(schedule)
    order = [tuple(Action.parse(cell) for cell in row if cell not in ".=") for row in rows]
    assert tuple(order) == schedule.actions


def with_rows(schedule, rows):
    return replace(schedule, actions=tuple(map(tuple, rows)))


def edited(schedule, rank, place, *replacement):
    """The schedule with one action replaced by those given."""
    rows = [list(row) for row in schedule.actions]
    rows[rank][place:place + 1] = replacement
    return with_rows(schedule, rows)


def swapped(schedule, rank, i, j):
    row = list(schedule.actions[rank])
    row[i], row[j] = row[j], row[i]
    return with_rows(schedule, [row if r == rank else other for r, other in enumerate(schedule.actions)])


def places(schedule):
    return [(r, i, action) for r, row in enumerate(schedule.actions) for i, action in enumerate(row)]


def pairs(schedule):
    for rank, row in enumerate(schedule.actions):
        for i, j in itertools.combinations(range(len(row)), 2):
            yield rank, i, j


def is_own_order_kept(schedule):
    """Whether F, then B or I, then W follow each other for every stage and microbatch."""
    rank = {"F": 0, "B": 1, "I": 1, "W": 2}
    for row in schedule.actions:
        keys = [(a.stage, a.microbatch, rank[a.kind]) for a in row]
        if any(keys.index(key) < keys.index((*key[:2], key[2] - 1)) for key in keys if key[2]):
            return False
    return True


def dropped(schedule):
    return [edited(schedule, r, i) for r, i, _ in places(schedule)]


def duplicated(schedule):
    last = [len(row) - 1 for row in schedule.actions]
    twins = [edited(schedule, r, i, a, a) for r, i, a in places(schedule)]
    return twins + [edited(schedule, r, last[r], schedule.actions[r][-1], a) for r, _, a in places(schedule)]


def on_wrong_rank(schedule):
    def moved(r, i, action, to):
        rows = [list(row) for row in schedule.actions]
        rows[to].insert(min(i, len(rows[to])), rows[r].pop(i))
        return with_rows(schedule, rows)

    return [moved(r, i, a, to) for r, i, a in places(schedule) for to in range(schedule.num_ranks) if to != r]


def of_wrong_stage(schedule):
    stages = range(schedule.num_stages + 1)
    return [
        edited(schedule, r, i, replace(a, stage=s))
        for r, i, a in places(schedule) for s in stages if s != a.stage
    ]


def of_wrong_microbatch(schedule):
    numbers = range(schedule.num_microbatches + 1)
    return [
        edited(schedule, r, i, replace(a, microbatch=m))
        for r, i, a in places(schedule) for m in numbers if m != a.microbatch
    ]


def of_wrong_kind(schedule):
    return [
        edited(schedule, r, i, replace(a, kind=k))
        for r, i, a in places(schedule) for k in "FBIW" if k != a.kind
    ]


def backward_before_forward(schedule):
    mutants = (swapped(schedule, *pair) for pair in pairs(schedule))
    return [mutant for mutant in mutants if not is_own_order_kept(mutant)]


def deadlocked(schedule):
    mutants = (swapped(schedule, *pair) for pair in pairs(schedule))
    return [mutant for mutant in mutants if is_own_order_kept(mutant) and play(mutant) is None]


ORIGINALS = [
    make_schedule("gpipe", 2, 3, 2), make_schedule("1f1b", 3, 5), make_schedule("interleaved", 2, 3, 2),
    make_schedule("zb-h1", 3, 4), make_schedule("zb-h2", 3, 5),
]
MUTATIONS = {
    dropped: r"is missing|does not have",
    duplicated: r"comes twice",
    on_wrong_rank: r"lives on rank",
    of_wrong_stage: r"lives on rank|the last one is|comes twice|does not have",
    of_wrong_microbatch: r"the last one is|comes twice|does not have",
    of_wrong_kind: r"comes twice|comes after|does not have|is missing",
    backward_before_forward: r"does not have",
    deadlocked: r"deadlock: ranks .* would wait",
}


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_every_mutant_is_refused_with_its_place(mutate):
    mutants = [mutant for original in ORIGINALS for mutant in mutate(original)]
    assert len(mutants) >= 25
    for mutant in mutants:
        assert not is_valid(mutant)
        with pytest.raises(ScheduleError, match=MUTATIONS[mutate]) as error:
            check(mutant)
        reason, step, *rows = str(error.value).splitlines()
        assert step.split()[0] == "step" and len(rows) == mutant.num_ranks
        assert any(">" in row and "<" in row for row in rows)


@pytest.mark.parametrize("work, fault", [
    (("0F2", "0B2"), ">0F2<"), (("2F0", "2B0"), ">2F0<"), (("2F1", "2I1", "2W1"), ">2F1<"),
])
def test_work_beyond_the_schedule_is_refused(work, fault):
    schedule = PipelineSchedule.from_text(TEXT)
    first, second = schedule.actions
    with pytest.raises(ScheduleError, match="the last one is 1") as error:
        check(with_rows(schedule, [first + tuple(map(Action.parse, work)), second]))
    assert fault in str(error.value)


def test_harmless_swaps_pass():
    valid = 0
    for original in ORIGINALS:
        for pair in pairs(original):
            mutant = swapped(original, *pair)
            if is_valid(mutant):
                valid += 1
                assert check(mutant).num_steps == max(stop for _, stop in play(mutant))
    assert valid >= 25


@pytest.mark.parametrize("ranks, chunks, microbatches, kinds", [
    (2, 1, 2, "FB"), (3, 1, 1, "FIW"), (1, 2, 1, "FIW"), (1, 1, 3, "FB"), (1, 3, 1, "FB"), (2, 2, 1, "FB"),
])
def test_verdict_is_right_for_every_order(ranks, chunks, microbatches, kinds):
    work = [
        [Action(s, k, m) for s in range(r, ranks * chunks, ranks) for k in kinds for m in range(microbatches)]
        for r in range(ranks)
    ]
    verdicts = Counter()
    for rows in itertools.product(*map(itertools.permutations, work)):
        schedule = PipelineSchedule("any", ranks, ranks * chunks, microbatches, rows)
        verdicts[accepts(schedule)] += 1
        assert accepts(schedule) == is_valid(schedule), str(schedule)
    assert verdicts[True] and verdicts[False]


def test_verdict_is_right_for_random_orders():
    random_ = random.Random(0)
    verdicts = Counter()
    for _ in range(600):
        ranks, chunks, microbatches = random_.randint(2, 4), random_.randint(1, 2), random_.randint(2, 3)
        rows = [random_row(random_, range(r, ranks * chunks, ranks), microbatches) for r in range(ranks)]
        schedule = PipelineSchedule("any", ranks, ranks * chunks, microbatches, tuple(rows))
        verdicts[accepts(schedule)] += 1
        assert accepts(schedule) == is_valid(schedule), str(schedule)
    assert min(verdicts.values()) >= 25


def random_row(random_, stages, microbatches):
    """Mixed full and split backwards, in an order right for each stage by itself."""
    numbers = range(microbatches)
    left = [[Action(s, k, m) for k in random_.choice(["FB", "FIW"])] for s in stages for m in numbers]
    row = []
    while left:
        row.append(random_.choice(left).pop(0))
        left = [actions for actions in left if actions]
    return tuple(row)


def accepts(schedule):
    try:
        check(schedule)
    except ScheduleError:
        return False
    return True


def test_memory_limit_is_exact():
    for schedule in ORIGINALS:
        most = max(peaks(schedule, "BW"))
        assert check(schedule, memory_limit=most) == check(schedule)
        with pytest.raises(ScheduleError, match=f"hold {most} microbatches at once, the limit is {most - 1}"):
            check(schedule, memory_limit=most - 1)
    with pytest.raises(ScheduleError, match=">0F1<"):
        check(make_schedule("1f1b", 2, 4), memory_limit=1)


def test_deadlock_message_shows_who_waits_for_what():
    text = (
        "schedule=mine ranks=2 stages=2 microbatches=3\n"
        "rank 0: 0F0 0F1 0B0 0F2 0B1 0B2\n"
        "rank 1: 1F0 1F2 1B0 1B2 1F1 1B1\n"
    )
    with pytest.raises(ScheduleError) as error:
        check(PipelineSchedule.from_text(text))
    assert str(error.value).splitlines() == [
        "schedule mine: deadlock: ranks [0, 1] of 2 would wait for ever at the marked actions: "
        "change the order there",
        "step     0     1     2     3     4     5     6     7     8     9",
        "rank 0  0F0   0F1  >0B0<   =    0F2   0B1    =    0B2    =     .   waits for 1B0 of rank 1",
        "rank 1   .    1F0  >1F2<  1B0    =    1B2    =    1F1   1B1    =   waits for 0F2 of rank 0",
    ]


def test_missing_microbatch_is_named():
    with pytest.raises(ScheduleError, match="1F1 is missing") as error:
        check(PipelineSchedule.from_text(TEXT.replace(" 1F1 1B1", "")))
    assert str(error.value).endswith("lacks >1F1<")


def test_long_grids_are_cut_around_the_fault():
    schedule = make_schedule("1f1b", 2, 200)
    place = schedule.actions[1].index(Action.parse("1B150"))
    with pytest.raises(ScheduleError) as error:
        check(edited(schedule, 1, place, Action.parse("1B151")))
    lines = str(error.value).splitlines()
    assert ">1B151<" in lines[3] and "1F150" in lines[3] and "1F140" not in lines[3]
    assert max(map(len, lines)) < 200


@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3),
                                              ("zb-h1", 1), ("zb-h2", 1)])
def test_what_the_planner_counts_in_flight_is_what_the_schedule_has(name, chunks):
    """Without making it, though on thousands of ranks: the most pairs before and after their input half, of every rank."""
    def most(points):
        """Leave out what is below another in both."""
        return {one for one in map(tuple, points) if not any(all(a >= b for a, b in zip(other, one)) and other != one
                                                             for other in map(tuple, points))}

    for p, m in itertools.product(range(1, 7), range(1, 30)):
        counted, played = in_flight(name, p, m, chunks), points(make_schedule(name, p, m, chunks))
        assert list(map(most, counted.tolist())) == list(map(most, played.tolist())), (p, m)
