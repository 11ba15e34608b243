"""Requests that come while others are worked on: from threads of rank 0, which never call MPI, to replicas and back.

A thread puts a request on the desk and reads its stream. The main thread of rank 0 looks at the desk between passes, gives
each request to the replica that has least to do, and hands out what comes back. Leaders of other replicas send it what a pass
gave in one message.
"""

import queue
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass

from mpillm.errors import MpillmError
from mpillm.inference.requests import Result
from mpillm.inference.rows import Source
from mpillm.inference.text import Text

WORK, NEWS = 2, 3  # tags: to a leader, and back
IDLE_S = 0.001  # between two looks of a rank that has nothing to do
PATIENCE_S = 60.0  # with a client that does not return though all its streams have failed
TURN_S = 1e-4  # of a thread, when others wait for the interpreter


class Closed(MpillmError):
    """A request that came when no more are taken, or was given up."""


@dataclass(frozen=True)
class Chosen:
    """A token as it is chosen, with what was asked for beside: its log-probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    likeliest: list | None = None


class Stream:
    """What becomes of a request: iterate over the :class:`Chosen` tokens, or over :meth:`texts`.

    For one thread.

    Parameters
    ----------
    desk : Desk
    key : int
    request : Request
    """

    def __init__(self, desk, key, request):
        self.request, self._desk, self._key = request, desk, key
        self._news, self._end = queue.SimpleQueue(), None

    def __iter__(self):
        while (news := self._next()) is not None:
            yield news

    def texts(self):
        """Yield the text piece by piece: whole characters, and nothing that a stop string may begin with."""
        text = Text(self._desk.tokenizer, self.request.stop)
        for chosen in self:
            if piece := text.add(chosen.token):
                yield piece
        if piece := text.rest(self.result().text):
            yield piece

    def result(self, timeout_s=None):
        """Wait for the :class:`~mpillm.inference.requests.Result`.

        Raises
        ------
        MpillmError
            If the engine could not go on.
        TimeoutError
            If it is not there in time; the request goes on.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while self._next(until_s) is not None:
            pass
        return self._end

    def cancel(self):
        """Give the request up; its result is what there is by then."""
        self._desk.cancel(self._key)

    def put(self, news):
        """Take a :class:`Chosen`, the result, or an error that ends the stream. For the desk."""
        self._news.put(news)

    def _next(self, until_s=None):
        """Return the next token, or None behind the last."""
        if self._end is None:
            try:
                news = self._news.get(timeout=None if until_s is None else max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                raise TimeoutError("the result is not there in time") from None
            if isinstance(news, Chosen):
                return news
            self._end = news
        if isinstance(self._end, Exception):
            raise self._end
        return None


class Desk:
    """Where threads leave requests. On rank 0; every method may be called by any thread.

    Parameters
    ----------
    check : callable
        Raises what is wrong with a request.
    tokenizer : tokenizer
    """

    def __init__(self, check, tokenizer):
        self.tokenizer, self._check = tokenizer, check
        self._lock, self._bell, self._left, self._why = threading.Lock(), threading.Event(), [], None
        self._streams, self._next = {}, 0

    def __len__(self):
        """Return how many requests are not done."""
        return len(self._streams)

    @property
    def is_closed(self):
        """Whether no more requests are taken."""
        return self._why is not None

    def submit(self, request, make=Stream):
        """Return the :class:`Stream` of a request; raise what :meth:`Engine.check` does, or :class:`Closed`."""
        self._check(request)
        with self._lock:
            if self._why is not None:
                raise Closed(self._why)
            key, self._next = self._next, self._next + 1
            stream = self._streams[key] = make(self, key, request)
            self._left.append((key, request))
        self._bell.set()
        return stream

    def cancel(self, key):
        """Let a request end soon."""
        with self._lock:
            if key in self._streams:
                self._left.append((key, None))
        self._bell.set()

    def take(self):
        """Return what was left since: keys, each with a request, or with None to cancel it."""
        self._bell.clear()
        with self._lock:
            left, self._left = self._left, []
        return left

    def give(self, key, news):
        """Hand a request's news to its stream."""
        stream = self._streams.get(key) if isinstance(news, Chosen) else self._streams.pop(key, None)
        if stream is not None:
            stream.put(news)

    def close(self, why):
        """Take no more requests."""
        with self._lock:
            self._why = self._why or why
        self._bell.set()

    def fail(self, error):
        """Take no more requests, and end all streams with an error."""
        self.close(str(error))
        for key in list(self._streams):
            self.give(key, error)

    def wait(self, seconds):
        """Wait until somebody comes, for so long at most."""
        self._bell.wait(seconds)


@contextmanager
def short_turns():
    """Let threads hand the interpreter over soon. A pass gives it away at every product; without this it would then wait up to
    5 ms for it, each time that another thread has something to do."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)


class Call:
    """A function that is called in a thread.

    Parameters
    ----------
    function : callable
    """

    def __init__(self, function):
        self._function, self._thread, self._found, self._error = function, None, None, None

    def start(self, is_wanted=True):
        """Call it, if that is wanted."""
        if is_wanted:
            self._thread = threading.Thread(target=self._call, daemon=True)
            self._thread.start()

    def is_alive(self):
        """Tell whether it has not returned."""
        return self._thread is not None and self._thread.is_alive()

    def join(self, timeout_s=None):
        """Wait until it has returned, or so long."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def result(self):
        """Return what it returned, or raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._found

    def _call(self):
        try:
            self._found = self._function()
        except BaseException as error:  # for the main thread to raise
            self._error = error


class Live(Source):
    """The requests of the desk, on the leader of a replica.

    Parameters
    ----------
    leaders : Comm
        Of all replicas; its rank 0 has the desk.
    desk : Desk or None
    is_open : callable
        Tells whether somebody may still come. On rank 0.
    """

    def __init__(self, leaders, desk, is_open):
        self._leaders, self._desk, self._is_open = leaders, desk, is_open
        self._waiting, self._cancelled, self._news, self._sent = deque(), [], [], []
        self._at, self._costs = {}, [0] * leaders.size  # on rank 0: where each request is, and the tokens there at most

    @property
    def is_done(self):
        return self.is_stopped

    def look(self):
        if self._desk is None:
            self._exchange_with_desk()
        elif not self.is_stopped:
            self._deal()
            self._receive_news()
            if not self._is_open():
                self._end(Closed("the service has ended"))

    def take(self, busy):
        return self._waiting.popleft() if self._waiting else None

    def cancelled(self):
        found, self._cancelled = self._cancelled, []
        return found

    def wait(self):
        if self._leaders.size == 1:
            self._desk.wait(10 * IDLE_S)
        else:
            time.sleep(IDLE_S)

    def choose(self, key, *chosen):
        """Take a chosen token of a request."""
        self._tell(key, Chosen(*chosen))

    def deliver(self, key, result):
        """Take a result."""
        self._tell(key, result)

    def fail(self, error):
        """End the service because this replica cannot go on."""
        if self._desk is not None:
            self._end(error)
            return
        self._news.append((None, error))
        while not self.is_stopped:  # until rank 0 says so: it may be sending
            self._exchange_with_desk()
            self.wait()

    def close(self):
        """Leave no message behind: what is still on its way to rank 0, until each leader says that it was the last, is for
        nobody, and would be taken for news of later requests. On every leader, behind the last pass."""
        if self._desk is None:
            self._send(None, 0, NEWS)
        left = 0 if self._desk is None else self._leaders.size - 1
        while left or self._sent:
            if left and self._leaders.iprobe(tag=NEWS):
                left -= self._leaders.recv(tag=NEWS) is None
            else:
                self._forget_sent()
                time.sleep(IDLE_S)

    def _deal(self):
        """Give what is on the desk to the replicas, each request to the one that has least to do."""
        for key, request in self._desk.take():
            if request is not None:
                cost = len(request.prompt) + request.max_tokens
                place = min(range(self._leaders.size), key=self._costs.__getitem__)
                self._at[key] = place, cost
                self._costs[place] += cost
            if key not in self._at:
                continue  # done meanwhile
            place, _ = self._at[key]
            if place:
                self._send((key, request), place, WORK)
            else:
                self._accept(key, request)

    def _accept(self, key, request):
        """Take a request, or None to cancel it."""
        if request is not None:
            self._waiting.append((key, request))
            return
        begun = [each for each in self._waiting if each[0] != key]
        if len(begun) == len(self._waiting):
            self._cancelled.append(key)
        else:
            self._waiting = deque(begun)
            self._tell(key, Result("", text="", finish_reason="cancelled"))

    def _tell(self, key, news):
        """Let rank 0 know of a request."""
        if self._desk is None:
            self._news.append((key, news))
        else:
            self._hand_out(key, news)

    def _hand_out(self, key, news):
        """Give news of any replica to the stream. On rank 0."""
        if key is None:
            self._end(news)
            return
        if not isinstance(news, Chosen):
            place, cost = self._at.pop(key)
            self._costs[place] -= cost
        self._desk.give(key, news)

    def _end(self, error):
        """End all: those who wait get an error, and all replicas drop what they have. On rank 0."""
        if not self.is_stopped:
            self.is_stopped = True
            self._waiting.clear()
            self._desk.fail(error)
            for place in range(1, self._leaders.size):
                self._send(None, place, WORK)

    def _receive_news(self):
        while self._leaders.size > 1 and self._leaders.iprobe(tag=NEWS):
            for key, news in self._leaders.recv(tag=NEWS):
                self._hand_out(key, news)

    def _exchange_with_desk(self):
        """Send what came of requests, and receive new ones. On the other leaders."""
        if self._news:
            self._send(self._news, 0, NEWS)
            self._news = []
        while not self.is_stopped and self._leaders.iprobe(source=0, tag=WORK):
            work = self._leaders.recv(source=0, tag=WORK)
            if work is None:
                self.is_stopped = True
                self._waiting.clear()
            else:
                self._accept(*work)

    def _send(self, what, place, tag):
        self._forget_sent()
        self._sent.append(self._leaders.isend(what, place, tag))

    def _forget_sent(self):
        self._sent = [request for request in self._sent if not request.Test()]
