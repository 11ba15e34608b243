"""The player of pipeline schedules and the synthesis, against published bubble rates, closed forms and a bound."""

import itertools
import json
import random

import pytest
from click.testing import CliRunner

from mpillm.cli.simulate import command
from mpillm.errors import ConfigError, ScheduleError
from mpillm.planner.synthesis import memory_max, synthesise
from mpillm.planner.timeline import BucketTimes, play
from mpillm.schedules.check import check
from mpillm.schedules.pipeline import SCHEDULES, Action, PipelineSchedule, make_schedule

# Qi et al. 2024, Tables 4, 5 and 9: chunks, microbatches, ms of F, B, W and a message on 8 ranks; bubble rates of 1f1b,
# interleaved, zb-h1, zb-h2.
PUBLISHED = [
    (3, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1055, 0.1585, 0.1083),
    (3, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.0818, 0.1242, 0.0837),
    (3, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0443, 0.0674, 0.0444),
    (4, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.0808, 0.1323, 0.0698),
    (4, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.0628, 0.1045, 0.0559),
    (4, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0320, 0.0554, 0.0294),
]


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_bubble_rates(row):
    chunks, m, f, i, w, c, *rates = row
    for name, rate in zip(("1f1b", "interleaved", "zb-h1", "zb-h2"), rates):
        v = chunks if name == "interleaved" else 1
        played = play(make_schedule(name, 8, m, v), f / v, i / v, w / v, c)
        assert played.bubble_fraction == pytest.approx(rate, abs=0.01 if v > 1 else 0.0005), name


@pytest.mark.parametrize("p", [1, 2, 5])
def test_closed_forms(p):
    m, f, i, w = 12, 3.0, 2.0, 1.0
    for name, ramp in (("gpipe", f + i + w), ("1f1b", f + i + w), ("zb-h1", f + i - w)):
        played = play(make_schedule(name, p, m), f, i, w)
        assert played.makespan_s == pytest.approx(m * (f + i + w) + (p - 1) * ramp), name
        assert sum(played.busy_s) == pytest.approx(p * m * (f + i + w))


@pytest.mark.parametrize("seed", range(20))
def test_the_player_agrees_with_relaxation(seed):
    """An oracle without a clock: start times as the least fixed point of all inequalities, by sweeps until rest."""
    rng = random.Random(seed)
    name = rng.choice(SCHEDULES)
    chunks = rng.choice([2, 3]) if name in ("interleaved", "gpipe") else 1
    schedule = make_schedule(name, rng.randint(2, 4), rng.randint(1, 6), chunks)
    stages = schedule.num_stages
    times = [[rng.randint(1, 9) for _ in range(stages)] for _ in "FIW"]
    between = [rng.randint(0, 5) for _ in range(stages - 1)]
    played = play(schedule, *times, between)

    def seconds(action):
        f, i, w = (row[action.stage] for row in times)
        return {"F": f, "I": i, "W": w, "B": i + w}[action.kind]

    start = {action: 0 for row in schedule.actions for action in row}
    moved = True
    while moved:
        moved = False
        for row in schedule.actions:
            for place, action in enumerate(row):
                least = start[row[place - 1]] + seconds(row[place - 1]) if place else 0
                for other in start:
                    if other.microbatch != action.microbatch:
                        continue
                    down = other.kind == "F" == action.kind and other.stage == action.stage - 1
                    up = other.kind in "BI" and action.kind in "BI" and other.stage == action.stage + 1
                    if down or up:
                        least = max(least, start[other] + seconds(other) + between[min(other.stage, action.stage)])
                moved |= least > start[action]
                start[action] = max(start[action], least)
    for row, starts in zip(schedule.actions, played.starts_s):
        assert [start[action] for action in row] == starts.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_messages_the_same_way_take_the_link_in_turn(seed):
    """Whatever is played: a message leaves once it is made and the one before has the link no more, and an action
    starts as soon as its rank is free and its message there."""
    rng = random.Random(seed)
    name = rng.choice(SCHEDULES)
    p, m, chunks = rng.randint(2, 4), rng.randint(1, 6), 2 if name in ("interleaved", "gpipe") else 1
    schedule, message, link = make_schedule(name, p, m, chunks), rng.uniform(3, 9), rng.uniform(0, 9)
    times = [rng.uniform(1, 9) for _ in "FIW"]
    played = play(schedule, *times, message, link)
    made = [(end, rank, action) for rank, row in enumerate(schedule.actions)
            for action, end in zip(row, played.ends_s[rank]) if action.kind != "W"]
    free, come = {}, {}
    for end, rank, action in sorted(made, key=lambda one: one[0]):
        to = action.stage + (1 if action.kind == "F" else -1)
        leaves = max(end, free.get((rank, to % p), 0.0))
        if 0 <= to < p * chunks:
            free[rank, to % p] = leaves + link
            come[to, action.kind == "F", action.microbatch] = leaves + message
    for row, starts, ends in zip(schedule.actions, played.starts_s, played.ends_s):
        for action, start, before in zip(row, starts, [0.0, *ends]):
            there = come.get((action.stage, action.kind == "F", action.microbatch), 0.0) if action.kind != "W" else 0.0
            assert start == pytest.approx(max(before, there)), action


def test_over_a_slow_link_more_microbatches_in_flight_hide_it():
    """A message takes as long as a forward, an input and a weight half together: the link, busy all the time, would take
    16; the textbook's schedules wait for it to come back."""
    made = synthesise(2, 16, 1 / 3, 1 / 3, 1 / 3, 1.0, 6, link_s=1.0)
    best = min(play(make_schedule(name, 2, 16), 1 / 3, 1 / 3, 1 / 3, 1.0, 1.0).total_s for name in SCHEDULES)
    assert 17 < made.total_s < 0.9 * best
    check(made.schedule, 6)


def test_the_critical_path_is_as_long_as_the_schedule():
    schedule = make_schedule("zb-h1", 4, 9)
    played = play(schedule, 3.0, 2.0, 1.5, 0.25)
    path = played.critical_path()
    places = {action: (rank, i) for rank, row in enumerate(schedule.actions) for i, action in enumerate(row)}
    length = sum({"F": 3.0, "I": 2.0, "W": 1.5}[step.what.kind] for step in path)
    crossings = sum(first.rank != second.rank for first, second in zip(path, path[1:]))
    assert all(places[step.what][0] == step.rank for step in path)
    assert length + 0.25 * crossings == pytest.approx(max(ends[-1] for ends in played.ends_s))
    assert played.critical_s == pytest.approx((length, 0.25 * crossings, 0.0))


@pytest.mark.parametrize("seed", range(30))
def test_buckets_beside_actions_agree_with_a_clock_that_ticks(seed):
    """Every tick each rank computes with what its transfer leaves of the processor. A message that finds a transfer on
    its link gets half of it; a transfer that finds a message begins later."""
    rng = random.Random(seed)
    name = rng.choice(SCHEDULES)
    chunks = 2 if name in ("interleaved", "gpipe") else 1
    p, m = rng.randint(chunks, 3), rng.randint(1, 4)
    schedule, message, link = make_schedule(name, p, m, chunks), rng.uniform(3, 6), rng.uniform(0, 3)
    times, shares_link = [[rng.uniform(1, 9) for _ in range(p * chunks)] for _ in "FIW"], rng.random() < 0.7
    buckets = [[BucketTimes(1.0, left, rng.uniform(0.6, 6), rng.uniform(0, 0.5))
                for left in sorted((rng.uniform(0, times[2][stage]) for _ in range(rng.randint(1, 3))), reverse=True)]
               for stage in range(p * chunks)]
    played = play(schedule, *times, message, link, buckets, shares_link)
    ends, arrived = tick(schedule, times, message, link, buckets, shares_link, 0.005)
    for own, found in zip(ends, played.ends_s):
        assert own == pytest.approx(found.tolist(), abs=0.1)
    for own, found in zip(arrived, played.transfers):
        assert own == pytest.approx([one.end_s for one in found], abs=0.1)
    assert sum(played.critical_s) == pytest.approx(played.reduced_s)
    path = played.critical_path()
    assert path[0].start_s == 0 and path[-1].end_s == played.reduced_s
    assert all(first.end_s <= second.start_s + 1e-9 for first, second in zip(path, path[1:]))
    for step in path:
        if isinstance(step.what, Action):
            place = schedule.actions[step.rank].index(step.what)
            assert step.start_s == played.starts_s[step.rank][place] and step.end_s <= played.ends_s[step.rank][place]


def tick(schedule, times, message, link, buckets, shares_link, tick_s):
    """Return when each action ends and each bucket has arrived, by rank."""
    p, last = schedule.num_ranks, schedule.num_stages - 1
    rows, now = [list(row) for row in schedule.actions], 0.0
    durations = dict(zip("FIW", times)) | {"B": [i + w for i, w in zip(*times[1:])]}
    final = [{action.stage: action for action in row if action.kind in "BW"} for row in rows]
    left, begun, ready = [None] * p, [0] * p, [[] for _ in rows]  # of the action, buckets, [share, seconds left, begun]
    links, flying, there = [], [], set()
    ends, arrived = [[] for _ in rows], [[] for _ in rows]
    while any(rows) or any(ready):
        now += tick_s
        for rank, row in enumerate(rows):
            share = ready[rank][0][0] if ready[rank] and ready[rank][0][2] else 0.0
            if row and left[rank] is None:
                stage, kind, microbatch = row[0].stage, row[0].kind, row[0].microbatch
                needs = stage > 0 if kind == "F" else kind != "W" and stage < last
                if not needs or (stage, kind == "F", microbatch) in there:
                    left[rank], begun[rank] = durations[kind][stage], 0
            if left[rank] is not None:
                left[rank] -= tick_s * (1 - share)
                action = row[0]
                own = buckets[action.stage] if final[rank].get(action.stage) == action else []
                while begun[rank] < len(own) and left[rank] <= own[begun[rank]].left_s:
                    bucket = own[begun[rank]]
                    ready[rank].append([bucket.busy_s / bucket.time_s, bucket.time_s, False])
                    begun[rank] += 1
                if left[rank] <= 0:
                    ends[rank].append(now)
                    row.pop(0)
                    left[rank] = None
                    to = action.stage + (1 if action.kind == "F" else -1)
                    if action.kind != "W" and 0 <= to <= last:
                        links.append([rank, to % p, link, (to, action.kind == "F", action.microbatch)])
        sending = {}
        for one in links:
            sending.setdefault((one[0], one[1]), one)
        for rank, own in enumerate(ready):
            messages = [one for (source, _), one in sending.items() if source == rank]
            if own and not (shares_link and messages):
                own[0][2] = True
            is_under_way = bool(own) and own[0][2]
            if is_under_way:
                own[0][1] -= tick_s / (2 if shares_link and messages else 1)
            for one in messages:
                one[2] -= tick_s / (2 if is_under_way and shares_link else 1)
            if own and own[0][1] <= 0:
                own.pop(0)
                arrived[rank].append(now)
                if own:
                    own[0][2] = True  # it follows at once
        flying += [(now + message - link, one[3]) for one in links if one[2] <= 0]
        links = [one for one in links if one[2] > 0]
        there |= {key for at, key in flying if at <= now}
    return ends, arrived


def lower_bound(p, m, f, i, w, c, limit):
    """When the last rank ends its last input half, at most ``limit`` of its weight halves are left."""
    return m * (f + i + w) + max(0.0, (p - 1) * (f + i + 2 * c) - (limit - 1) * w)


@pytest.mark.parametrize("row", PUBLISHED)
def test_synthesis_reaches_zb_h1_in_its_memory_and_the_bound_in_twice_that(row):
    chunks, m, f, i, w, c, *rates = row
    small, large = (synthesise(8, m, f, i, w, c, limit) for limit in (8, 16))
    assert small.bubble_fraction <= rates[2] + 5e-5
    bound = lower_bound(8, m, f, i, w, c, 16)
    assert bound - 1e-9 <= large.makespan_s <= 1.002 * bound
    assert max(large.in_flight_max) <= 16


@pytest.mark.parametrize("seed", range(30))
def test_synthesised_schedules_are_proved_and_no_worse_than_the_textbook(seed):
    rng = random.Random(seed)
    p, m, limit = rng.randint(1, 5), rng.randint(1, 9), rng.randint(1, 10)
    times, c = [[rng.uniform(1, 9) for _ in range(p)] for _ in "FIW"], rng.uniform(0, 3)
    share = rng.choice([1.0, 0.4])
    link = rng.choice([0.0, c])
    made = synthesise(p, m, *times, c, limit, share, link)
    check(made.schedule, limit if share == 1.0 else None)
    assert memory_max(made.schedule, share) <= limit + 1e-9
    for name in ("1f1b", "zb-h1", "zb-h2"):
        textbook = make_schedule(name, p, m)
        if memory_max(textbook, share) <= limit:
            assert made.makespan_s <= play(textbook, *times, c, link).makespan_s + 1e-9


def orders(m, share, limit, f=0, i=0, w=0):
    """Yield every order of a rank's actions that keeps to the limit, as words; microbatches are alike, so in turn."""
    if w == m:
        yield ""
    for kind, may in (("F", f < m and f - i + share * (i - w) + 1 <= limit + 1e-9), ("I", i < f), ("W", w < i)):
        if may:
            done = f + (kind == "F"), i + (kind == "I"), w + (kind == "W")
            yield from (kind + rest for rest in orders(m, share, limit, *done))


def shortest(p, m, times, c, limit, share):
    """Return the makespan of the best of all orders of all ranks."""
    rows = [[tuple(Action(rank, kind, word[:place].count(kind)) for place, kind in enumerate(word))
             for word in orders(m, share, limit)] for rank in range(p)]
    found = []
    for actions in itertools.product(*rows):
        try:
            found.append(play(PipelineSchedule("one", p, p, m, actions), *times, c).makespan_s)
        except ScheduleError:  # ranks wait for each other
            pass
    return min(found)


@pytest.mark.parametrize("seed", range(40))
def test_synthesis_against_all_orders(seed):
    """It is a heuristic: the optimum where ranks are equal in all cases that were tried, else near it."""
    rng = random.Random(seed)
    p, m = rng.choice([(2, 2), (2, 3), (3, 2), (4, 2)])
    limit, share, c = rng.randint(1, m + 1), rng.choice([1.0, 0.4]), rng.uniform(0, 3)
    times = [[rng.uniform(1, 9)] * p if seed % 2 else [rng.uniform(1, 9) for _ in range(p)] for _ in "FIW"]
    best = shortest(p, m, times, c, limit, share)
    assert best - 1e-9 <= synthesise(p, m, *times, c, limit, share).makespan_s <= best * (1 if seed % 2 else 1.1) + 1e-9


def simulate(*words):
    return CliRunner().invoke(command, ["pipeline", *words])


TIMES = ["--pipeline", "4", "--microbatches", "8", "--forward-ms", "10", "--backward-input-ms", "10",
         "--backward-weight-ms", "10"]


def test_the_command_writes_json_and_refuses_chunks_for_auto():
    found = json.loads(simulate("--schedule", "1f1b", *TIMES, "--json", "-").output)
    assert found["makespan_ms"] == pytest.approx(8 * 30 + 3 * 30)
    assert found["bubble_fraction"] == pytest.approx(3 / 11)
    assert found["in_flight_max"] == [4, 3, 2, 1]
    path = found["critical_path"]
    assert (path[0], path[-1]) == ("0F0", "0B7") and found["total_ms"] == pytest.approx(
        sum(20 if "B" in action else 10 for action in path))
    still = simulate("--schedule", "1f1b", "--pipeline", "2", "--microbatches", "2", "--forward-ms", "0",
                     "--backward-input-ms", "0", "--backward-weight-ms", "0", "--json", "-").exception
    assert isinstance(still, ConfigError) and "all are 0" in str(still)
    refused = simulate("--schedule", "auto", *TIMES, "--chunks", "2").exception
    assert isinstance(refused, ConfigError) and "interleaved" in str(refused)
