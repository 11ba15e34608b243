"""Files of many lines: dealt out to replicas, worked on, stopped at any moment, gone on with at any number of ranks.

Every rank looks at its share of the lines beforehand, so that what cannot be is known, and the longest go first. A rank that is
asked to stop raises a counter, which the leaders of all replicas look at between passes.
"""

import hashlib
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from mpillm.errors import CheckpointError, DataError, MpillmError, agreed, on_rank_0
from mpillm.files import unwritable
from mpillm.inference.dealing import Counters, Dealer
from mpillm.inference.lines import name_of, read_object
from mpillm.inference.parts import Part, Parts
from mpillm.inference.rows import Source
from mpillm.schedules.blocks import bounds

LOOK_S = 0.25  # between two looks at the counters
STOPS, LINES, COSTS, TOKENS = 1, 2, 3, 4  # counters behind the dealer's: requests to stop; what is done
FORMAT = 1


@dataclass(frozen=True)
class Outcome:
    """What came of a batch.

    Attributes
    ----------
    lines : int
    refused : dict of int to dict
        What was written for lines that ask for nothing that can be, by their number.
    stopped_by : str or None
        What asked to stop before all was done.
    was_done : bool
        Whether an earlier launch had done all.
    """

    lines: int
    refused: dict
    stopped_by: str | None = None
    was_done: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a batch is: the lines that are done or refused, of how many, and how many earlier launches did; the tokens that
    this launch has computed; its share of work that is done."""

    lines: int
    all_lines: int
    before: int
    tokens: int
    share: float


def run_batch(engine, task, source, target, stop, show=None):
    """Work on the lines of a file and write what comes of them to another, in their order.

    Collective over the ranks of the engine.

    Parameters
    ----------
    engine : Engine
    task : Generation or Scoring
    source, target : str or Path
        What is done before a stop is kept in a folder beside ``target``, from which the same call goes on.
    stop : mpillm.guard.stop.StopRequest
    show : callable, optional
        Gets a :class:`Progress` now and then, on rank 0.

    Returns
    -------
    Outcome

    Raises
    ------
    ConfigError
        On every rank, if what is there already is of another job.
    DataError
        On every rank, if a file cannot be read or written, or the weights give logits that are not finite.
    """
    mesh, comm = engine.mesh, engine.mesh.world.comm
    lines, digest = on_rank_0(comm, f"read {source}", _scan, source)
    parts = Parts(target, _job(engine, task, digest))
    paths = on_rank_0(comm, f"write {target}", parts.begin, mesh.size("data"))
    if not paths:
        stop.settle()
        return Outcome(len(lines.numbers), {}, was_done=True)
    costs, refused = _survey(engine, task, lines, comm)
    before = 0
    if comm.rank == 0:
        places, _ = parts.done(int(lines.numbers.max(initial=0)))
        is_done = (places[lines.numbers, 2] > 0) & (costs > 0)
        costs[is_done], before = 0, int(is_done.sum())
    costs = comm.bcast(costs)
    todo = np.flatnonzero(costs)
    with Counters(comm, 5) as counters:
        dealer = Dealer(counters, mesh.size("data"), costs[todo].tolist(), engine.config.inference.batch)
        work = _Work(task, lines, todo, costs, dealer, counters, stop, comm.rank == 0, before, show)
        with agreed(comm, f"write {target}"):
            if engine.replica.leads:
                work.part = Part(paths[mesh.coord("data")])
        try:
            engine.serve(work, work.deliver)
        except CheckpointError as error:  # of all ranks of a replica
            work.fail(error)
        work.close()
        _wait_for_all(comm, work.look)
        work.report()
        is_done = on_rank_0(comm, "count", lambda: counters.read(LINES) == len(todo))
        asked = stop.agreed(comm)
    with agreed(comm, f"make {target}"):
        if work.error is not None:
            raise work.error
    if is_done:
        stop.settle()
        on_rank_0(comm, f"write {target}", parts.merge, lines.numbers.tolist(), refused)
    return Outcome(len(lines.numbers), refused, None if is_done else asked or "a request that is gone")


@dataclass(frozen=True)
class _Lines:
    """Where the lines of a file that are not blank begin, and their numbers from 1 on."""

    path: str
    numbers: np.ndarray
    starts: np.ndarray

    def read(self, indices):
        """Yield the bytes of some lines."""
        with open(self.path, "rb") as file:
            for index in indices:
                file.seek(int(self.starts[index]))
                yield file.readline()


def _scan(path):
    """Return the lines of a file, and its SHA-256."""
    numbers, starts, digest, start = [], [], hashlib.sha256(), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            digest.update(line)
            if line.strip():
                numbers.append(number)
                starts.append(start)
            start += len(line)
    return _Lines(path, np.array(numbers, np.int64), np.array(starts, np.int64)), digest.hexdigest()


def _job(engine, task, digest):
    """Return what results depend on."""
    train, tokenizer = engine.config.train, engine.tokenizer
    settings = tokenizer.settings.to_json() if tokenizer.settings else ""
    products = {"exact_blocks": train.exact_blocks} if train.numerics == "exact" else {"tensor": engine.mesh.size("tensor")}
    return {"format": FORMAT, "input": digest, **task.settings, "weights": engine.weights_digest,
            "tokenizer": hashlib.sha256((tokenizer.to_json() + settings).encode()).hexdigest(),
            "device": engine.device.type, "dtype": train.dtype, "numerics": train.numerics, **products}


def _survey(engine, task, lines, comm):
    """Return the cost of each line, 0 if it is refused, and on rank 0 what is said of those that are. Collective."""
    share, found = range(*bounds(len(lines.numbers), comm.size, comm.rank)), []
    with agreed(comm, f"read {lines.path}"):
        for index, data in zip(share, lines.read(share)):
            found.append(_look_at(engine, task, data, int(lines.numbers[index])))
    gathered = comm.gather(found)
    if comm.rank:
        return None, None
    costs, refused, first = np.zeros(len(lines.numbers), np.int64), {}, {}
    for index, (name, cost, error) in enumerate(each for part in gathered for each in part):
        number = int(lines.numbers[index])
        before = first.setdefault(str(name), number)
        if error is None and before != number:
            error = f"id {name} is that of line {before} already"
        if error is None:
            costs[index] = cost
        else:
            refused[number] = {"id": name, "line": number, "error": error}
    return costs, refused


def _look_at(engine, task, data, number):
    """Return the name of a line, its cost, and why it is refused or None."""
    name = number
    try:
        values = read_object(data)
        name = name_of(values, number)
        asked = task.ask(values, number)
        for request in asked.requests:
            engine.check(request)
    except MpillmError as error:
        return name, 0, str(error)
    return name, asked.cost, None


class _Work(Source):
    """The lines that this replica gets, and what comes of them.

    ``error`` is why this rank cannot go on.
    """

    def __init__(self, task, lines, todo, costs, dealer, counters, stop, is_first, before, show):
        self._task, self._lines, self._todo, self._costs = task, lines, todo, costs
        self._dealer, self._counters, self._stop = dealer, counters, stop
        self._is_first, self._before, self._show = is_first, before, show
        self._waiting, self._open = deque(), {}
        self._done = {LINES: 0, COSTS: 0, TOKENS: 0}  # since the last look
        self._looked_s, self._has_asked, self.part, self.error = 0.0, False, None, None

    @property
    def is_done(self):
        return self.is_stopped or not self._waiting and self._dealer.is_done

    def look(self):
        """Pass on a request to stop; now and then tell what is done, see whether somebody asked, and sync."""
        if not self._has_asked and self._stop.asked(self._is_first):
            self._ask_to_stop()
        if time.monotonic() < self._looked_s + LOOK_S:
            return
        self._looked_s = time.monotonic()
        self._tell()
        self.is_stopped = self.is_stopped or self._counters.read(STOPS) > 0
        if self.part is not None:
            self._writing(self.part.sync)
        self.report()

    def report(self):
        """Show how far all ranks are, on rank 0."""
        if self._is_first and self._show is not None:
            lines, costs, tokens = (self._counters.read(counter) for counter in (LINES, COSTS, TOKENS))
            total, share = len(self._lines.numbers), costs / max(1, int(self._costs.sum()))
            self._show(Progress(total - len(self._todo) + lines, total, self._before, tokens, share))

    def take(self, busy):
        """Return the next request of a line, as a key its index and which of the line's it is."""
        if self.is_stopped:
            return None
        if not self._waiting:
            place = self._dealer.take(busy)
            if place is None:
                return None
            self._begin(int(self._todo[place]))
        return self._waiting.popleft() if self._waiting else None

    def deliver(self, key, result):
        """Take the result of a request; write the line's when it has all."""
        index, choice = key
        if result.finish_reason == "cancelled":
            return
        asked, results = self._open[index]
        results[choice] = result
        if None not in results:
            del self._open[index]
            self._writing(self.part.add, int(self._lines.numbers[index]), self._task.answer(asked, results))
            for counter, amount in ((LINES, 1), (COSTS, int(self._costs[index])), (TOKENS, self._task.tokens(results))):
                self._done[counter] += amount

    def close(self):
        """Write what is left."""
        if self.part is not None:
            self._writing(self.part.close)
            self.part = None
        self._tell()

    def fail(self, error):
        """Let all stop because of an error; what is written stays."""
        self.error = self.error or error
        self._ask_to_stop()

    def _begin(self, index):
        """Make the requests of a line wait."""
        number = int(self._lines.numbers[index])
        try:
            asked = self._task.ask(read_object(next(self._lines.read([index]))), number)
        except MpillmError as error:
            self.fail(DataError(f"{self._lines.path}: line {number} is no longer what it was ({error}): start again with a "
                                "file that stays"))
            return
        self._open[index] = asked, [None] * len(asked.requests)
        self._waiting.extend(((index, choice), request) for choice, request in enumerate(asked.requests))

    def _writing(self, write, *arguments):
        """Call a function that writes; if it cannot, let all stop."""
        try:
            write(*arguments)
        except OSError as error:
            self.fail(unwritable(self.part.path, error))

    def _ask_to_stop(self):
        self._has_asked = self.is_stopped = True
        self._counters.add(STOPS, 1)

    def _tell(self):
        for counter, amount in self._done.items():
            if amount:
                self._counters.add(counter, amount)
                self._done[counter] = 0


def _wait_for_all(comm, look):
    """Meet the other ranks, which may be at work for long, without keeping a core busy."""
    if comm.size > 1:
        request = comm.Ibarrier()
        while not request.Test():
            look()
            time.sleep(0.01)
