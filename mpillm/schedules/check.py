"""Proves a schedule before it runs: nothing forgotten, nothing twice, no deadlock, memory in flight.

A schedule is *played* in unit steps with blocking semantics: a rank runs its actions one after the other,
each as soon as its input is there. ``F``, ``I`` and ``W`` take one step, ``B`` takes two, messages take none.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

from mpillm.errors import ScheduleError
from mpillm.schedules.pipeline import KINDS, Action

STEPS = {"F": 1, "B": 2, "I": 1, "W": 1}
HELD = {"F": 1, "B": -1, "I": 0, "W": -1}
EARLIER = {"F": "", "B": "F", "I": "F", "W": "I"}
EXCLUDED = {"F": "", "B": "IW", "I": "B", "W": "B"}
MARGIN = 10


@dataclass(frozen=True)
class PipelineReport:
    """What the checker found out: the most microbatches each rank holds, and the steps the play took."""

    in_flight_max: tuple[int, ...]
    num_steps: int


def check(schedule, memory_limit=None):
    """Prove that a pipeline schedule computes everything once, cannot deadlock and stays within memory.

    Local.

    Parameters
    ----------
    schedule : PipelineSchedule
    memory_limit : int, optional
        Microbatches that a rank may hold at once: those whose ``F`` has run on one of its stages and whose
        ``B`` or ``W`` has not. One held on two stages counts twice.

    Returns
    -------
    PipelineReport

    Raises
    ------
    ScheduleError
        With the fault, and the grid with the faulty actions between ``>`` and ``<``, when

        - an action is not of the schedule, is on another rank than its stage, or comes twice;
        - a stage lacks, for a microbatch, ``F`` and then ``B``, or ``F``, ``I`` and ``W`` in this order;
        - ranks wait for each other;
        - a rank holds more than ``memory_limit``.

    Notes
    -----
    Cost: a few looks at every action, and one play.
    """
    _check_places(schedule)
    _check_order(schedule)
    _check_complete(schedule)
    starts = start_steps(schedule)
    _check_finished(schedule, starts)
    held = [list(accumulate(HELD[action.kind] for action in row)) for row in schedule.actions]
    if memory_limit is not None:
        _check_memory(schedule, held, memory_limit)
    ends = (start[-1] + STEPS[row[-1].kind] for start, row in zip(starts, schedule.actions))
    return PipelineReport(tuple(map(max, held)), max(ends))


def grid(schedule, marked=()):
    """Draw a schedule as played: a row a rank, a column a step.

    Local.

    Parameters
    ----------
    schedule : PipelineSchedule
        One that cannot run is drawn too: what comes after a blocked action follows it step by step.
    marked : iterable of (int, int)
        Actions to set between ``>`` and ``<``, each as rank and place in that rank's order.

    Returns
    -------
    str
        The second step of a ``B`` is drawn ``=``, idle steps ``.``.
    """
    return "\n".join(_draw(schedule, set(marked)))


def _check_places(schedule):
    """Refuse the first action that is not of the schedule or on another rank than its stage."""
    for (rank, place), action in _by_place(schedule):
        stage, microbatch, home = action.stage, action.microbatch, schedule.rank_of(action.stage)
        fault = None
        if stage >= schedule.num_stages:
            fault = f"{action} is of stage {stage}, the last one is {schedule.num_stages - 1}"
        elif microbatch >= schedule.num_microbatches:
            fault = f"{action} is of microbatch {microbatch}, the last one is {schedule.num_microbatches - 1}"
        elif home != rank:
            fault = f"{action} is on rank {rank}, but stage {stage} lives on rank {home}"
        if fault:
            raise _refusal(schedule, fault, {(rank, place)})


def _check_order(schedule):
    """Refuse the first action that is repeated, or does not follow what it needs on its own stage."""
    seen = set()
    for place, action in _by_place(schedule):
        excluded = [replace(action, kind=kind) for kind in EXCLUDED[action.kind]]
        excluded = [other for other in excluded if other in seen]
        earlier = [replace(action, kind=kind) for kind in EARLIER[action.kind]]
        fault = None
        if action in seen:
            fault = f"{action} comes twice: every action runs once"
        elif excluded:
            fault = f"{action} comes after {excluded[0]}: a backward is either one B, or one I and one W"
        elif not seen.issuperset(earlier):
            fault = f"{action} does not have {earlier[0]} before it"
        if fault:
            raise _refusal(schedule, fault, {place})
        seen.add(action)


def _check_complete(schedule):
    """Refuse a schedule, in which every action is in order, if one is missing."""
    places = {action: place for place, action in _by_place(schedule)}
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            kinds = [Action(stage, kind, microbatch) for kind in KINDS]
            present = [action for action in kinds if action in places]
            lacking = {"": "F", "F": "B", "FI": "W"}.get("".join(action.kind for action in present))
            if lacking:
                lacking = Action(stage, lacking, microbatch)
                raise _refusal(
                    schedule,
                    f"{lacking} is missing: every stage runs F and B, or F, I and W, for every microbatch",
                    {places[action] for action in present[-1:]},
                    {schedule.rank_of(stage): f"lacks >{lacking}<"},
                )


def _check_finished(schedule, starts):
    """Refuse a schedule that was not played to its end."""
    rows = schedule.actions
    blocked = {rank: len(played) for rank, played in enumerate(starts) if len(played) < len(rows[rank])}
    if not blocked:
        return
    notes = {}
    for rank, place in blocked.items():
        source = _source(rows[rank][place], schedule.num_stages)
        home = schedule.rank_of(source.stage)
        awaited = next(action for action in rows[home] if _product(action) == source)
        notes[rank] = f"waits for {awaited} of rank {home}"
    raise _refusal(
        schedule,
        f"deadlock: ranks {list(blocked)} of {schedule.num_ranks} would wait for ever at the marked actions: "
        "change the order there", set(blocked.items()), notes,
    )


def _check_memory(schedule, held, memory_limit):
    """Refuse a schedule in which a rank comes to hold more than the limit."""
    for rank, counts in enumerate(held):
        if max(counts) > memory_limit:
            first = next(place for place, count in enumerate(counts) if count > memory_limit)
            raise _refusal(
                schedule,
                f"rank {rank} would hold {max(counts)} microbatches at once, the limit is {memory_limit}: "
                "raise it, or take a schedule that holds fewer", {(rank, first)},
            )


def _by_place(schedule):
    """Return every action with its place: the rank, and the index in that rank's order."""
    return [((rank, i), action) for rank, row in enumerate(schedule.actions) for i, action in enumerate(row)]


def _product(action):
    """Return what other stages wait for: ``F``, or ``I`` also for the ``B`` that contains it."""
    return Action(action.stage, "I", action.microbatch) if action.kind == "B" else action


def _source(action, num_stages):
    """Return the product of another stage that an action needs, or ``None``."""
    if action.kind == "F" and action.stage > 0:
        return Action(action.stage - 1, "F", action.microbatch)
    if action.kind in "BI" and action.stage < num_stages - 1:
        return Action(action.stage + 1, "I", action.microbatch)
    return None


def start_steps(schedule):
    """Return for each rank the steps in which its actions start when played, as far as they come. Local."""
    starts = [[] for _ in schedule.actions]
    free = [0] * schedule.num_ranks
    ended = {None: 0}
    moving = True
    while moving:
        moving = False
        for rank, row in enumerate(schedule.actions):
            for place in range(len(starts[rank]), len(row)):
                source = _source(row[place], schedule.num_stages)
                if source not in ended:
                    break
                starts[rank].append(max(free[rank], ended[source]))
                free[rank] = starts[rank][-1] + STEPS[row[place].kind]
                ended[_product(row[place])] = free[rank]
                moving = True
    return starts


def _cells(row, starts, marked):
    """Return the text in each step of a rank; ``marked`` are places in its row."""
    cells, step = {}, 0
    for place, action in enumerate(row):
        step = starts[place] if place < len(starts) else step
        cells[step] = f">{action}<" if place in marked else str(action)
        cells.update((later, "=") for later in range(step + 1, step + STEPS[action.kind]))
        step += STEPS[action.kind]
    return cells


def _draw(schedule, marked, notes=None, margin=None):
    """Return the lines of the grid; with a margin, only the steps that near the marked ones."""
    notes = notes or {}
    rows = [
        _cells(row, starts, {place for marked_rank, place in marked if marked_rank == rank})
        for rank, (row, starts) in enumerate(zip(schedule.actions, start_steps(schedule)))
    ]
    first, last = 0, max(max(cells, default=0) for cells in rows)
    near = [step for cells in rows for step, text in cells.items() if text.startswith(">")]
    if margin is not None and near:
        first, last = max(first, min(near) - margin), min(last, max(near) + margin)
    steps = range(first, last + 1)
    width = max(len(cells.get(step, str(step))) for cells in rows for step in steps)
    head = len(f"rank {schedule.num_ranks - 1}")
    lines = [["step".ljust(head), *(str(step).center(width) for step in steps)]]
    for rank, cells in enumerate(rows):
        texts = (cells.get(step, ".").center(width) for step in steps)
        lines.append([f"rank {rank}".ljust(head), *texts, notes.get(rank, "")])
    return [" ".join(line).rstrip() for line in lines]


def _refusal(schedule, reason, marked, notes=None):
    """Return the error that says what is wrong and shows where."""
    table = _draw(schedule, marked, notes, MARGIN)
    return ScheduleError("\n".join([f"schedule {schedule.name}: {reason}", *table]))
