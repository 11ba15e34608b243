"""A service under load: how many tokens it gives, how long clients wait for the first and between two."""

import json
import queue
import socket
import statistics
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException

import numpy as np

from mpillm.bench.launch import mpiexec, started
from mpillm.errors import MpillmError
from mpillm.files import to_json

START_S = 120.0  # for a service to load its model


@dataclass(frozen=True)
class Load:
    """So many requests: by ``clients`` that ask again as soon as they have an answer, or arriving at random, ``rate`` a second
    on average (a Poisson process)."""

    name: str
    requests: int
    clients: int | None = None
    rate: float | None = None
    streams: bool = True


@dataclass(frozen=True)
class Answer:
    """When a request was due, its first token came, and its last; and how long it took from token to token."""

    due_s: float
    first_s: float
    last_s: float
    between_s: tuple


@contextmanager
def serving(path, ranks, overrides):
    """Start a service on so many ranks, give its port when it answers, and end it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher = () if ranks == 1 else (mpiexec(), "-n", str(ranks))
    command = (*launcher, sys.executable, "-m", "mpillm", "serve", str(path), "--port", str(port), *overrides)
    with started(command) as job:
        until_s = time.monotonic() + START_S
        while not _is_up(port):
            if job.poll() is not None or time.monotonic() > until_s:
                raise MpillmError(f"{' '.join(command)}: does not answer")
            time.sleep(0.1)
        yield port


def run(port, load, prompts, new_tokens):
    """Put a load on a service; return its row.

    Local. ``prompts`` are rows of tokens, asked one after the other, each answered with so many tokens. A request of a random
    load that finds no client waits, and that counts: it is the service that keeps clients busy.
    """
    numbers, answers, generator = queue.SimpleQueue(), [], np.random.default_rng(0)
    begin_s = time.monotonic() + 0.01
    gaps_s = generator.exponential(1 / load.rate, load.requests) if load.rate else np.zeros(load.requests)
    for number, due_s in enumerate(begin_s + np.cumsum(gaps_s)):
        numbers.put((number, due_s))

    def client():
        while True:
            try:
                number, due_s = numbers.get_nowait()
            except queue.Empty:
                return
            time.sleep(max(0.0, due_s - time.monotonic()))
            begun_s = due_s if load.rate else time.monotonic()
            answers.append(_ask(port, prompts[number % len(prompts)], new_tokens, load.streams, begun_s))

    threads = [threading.Thread(target=client) for _ in range(load.clients or load.requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(answers) < load.requests:
        raise MpillmError(f"{load.name}: {load.requests - len(answers)} of {load.requests} requests failed")
    return _row(load, answers, new_tokens)


def _row(load, answers, new_tokens):
    """Return the figures of a load."""
    wall_s = max(answer.last_s for answer in answers) - min(answer.due_s for answer in answers)
    row = {"load": load.name, "requests": load.requests, "clients": load.clients, "rate": load.rate,
           "requests_per_s": load.requests / wall_s, "tokens_per_s": load.requests * new_tokens / wall_s}
    first_s = [answer.first_s - answer.due_s for answer in answers]
    between_s = [gap_s for answer in answers for gap_s in answer.between_s]
    for name, values in (("first_token", first_s), ("between_tokens", between_s)) if load.streams else ():
        row |= {f"{name}_median_s": statistics.median(values), f"{name}_p99_s": float(np.quantile(values, 0.99))}
    return row


def _ask(port, prompt, new_tokens, streams, begun_s):
    """Ask for one answer and note when what came."""
    connection = HTTPConnection("127.0.0.1", port)
    try:
        connection.request("POST", "/v1/completions", to_json(
            {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": streams, "ignore_eos": True}))
        response = connection.getresponse()
        if response.status != 200:
            raise MpillmError(f"{response.status}: {response.read().decode(errors='replace')}")
        if not streams:
            tokens = json.loads(response.read())["usage"]["completion_tokens"]
            times_s = [time.monotonic()]
        else:
            times_s, tokens = [], new_tokens
            while line := response.readline():
                if line.startswith(b"data: {"):
                    times_s.append(time.monotonic())
            times_s = times_s[:-1] or times_s  # the last piece says why it ends
    except (OSError, HTTPException) as error:
        raise MpillmError(f"the service fails: {error!r}") from error
    finally:
        connection.close()
    if tokens != new_tokens:
        raise MpillmError(f"{tokens} tokens in place of {new_tokens}: the text of this model ends")
    gaps_s = tuple(later - earlier for earlier, later in zip(times_s, times_s[1:]))
    return Answer(begun_s, times_s[0], times_s[-1], gaps_s)


def _is_up(port):
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
