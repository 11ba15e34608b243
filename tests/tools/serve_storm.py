"""Clients of all kinds at once against `mpillm serve`, started without a launcher.

    PYTHONPATH=tests python tests/tools/serve_storm.py [RANKS [COUNT [SEED]]]

Of COUNT (2,000) requests a third are of clients that vanish, send garbage, or ask too much. Every other one must get exactly
one answer, the text that the same request got before the storm; at the end nothing may be open or left in memory. Then the
service is asked to stop while clients wait: what has begun must be finished.
"""

import json
import random
import re
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helpers import run_mpi
from written import make_model, make_run

from mpillm.errors import OK
from mpillm.files import to_json

KINDS, CLIENTS, LIMIT_S = 40, 48, 60
GARBAGE = (b"{", b"[]", b'{"prompt": [999]}', b'{"prompt": "a", "temperature": -1}', b'{"prompt": {}}', b"\xff" * 100)
TOO_MUCH = (to_json({"prompt": "a" * 400}).encode(), b'{"prompt": "' + b"a" * 300_000 + b'"}', b'{"prompt": "a", "n": 900}')


def main(ranks=2, count=2000, seed=None):
    """Return the exit code: 1 if anything was lost, answered wrong, or left behind."""
    seed = random.randrange(1 << 30) if seed is None else seed
    print(f"seed {seed}", flush=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    storm = Storm(port, random.Random(seed), count)
    with tempfile.TemporaryDirectory() as name:
        make_run(Path(name) / "run", make_model(max_seq_len=300), dtype="float32")
        words = ["serve", "run", "--port", port, "--max-body", 200_000, "--max-requests", 500]
        ended = run_mpi(ranks, ["-m", "mpillm", *words], timeout=600, cwd=name,
                        meanwhile=lambda job: threading.Thread(target=storm.run, args=(job,)).start())
    if ended.returncode != OK:
        storm.complaints.append(f"left with {ended.returncode}: {ended.stderr[-2000:]}")
    print(f"{dict(storm.counts)}; {len(storm.complaints)} complaints", *storm.complaints[:5], sep="\n")
    return 1 if storm.complaints else 0


class Storm:
    """What clients do to a service, and what is wrong with its answers."""

    def __init__(self, port, rng, count):
        self.port, self.rng, self.count = port, rng, count
        self.counts, self.complaints = Counter(), []

    def run(self, job):
        """Do it all, and let the job end."""
        try:
            self._run(job)
        except Exception as error:
            self.complaints.append(repr(error))
            job.kill()

    def _run(self, job):
        until_s = time.monotonic() + LIMIT_S
        while not self._is_up():
            if time.monotonic() > until_s:
                raise TimeoutError("the service does not start")
            time.sleep(0.1)
        bodies = [{"prompt": "ab " * self.rng.randrange(30), "max_tokens": self.rng.randrange(1, 40), "temperature": i % 2,
                   "seed": i, "stop": "e" if i % 5 == 0 else None} for i in range(KINDS)]
        wanted = [self._ask(body) for body in bodies]
        kinds = [self.rng.choice(["vanish", "garbage", "too much"]) if i % 3 == 0 else self.rng.choice(["whole", "stream"])
                 for i in range(self.count)]
        with ThreadPoolExecutor(CLIENTS) as clients:
            for kind, place in zip(kinds, [self.rng.randrange(KINDS) for _ in kinds]):
                clients.submit(self._visit, kind, bodies[place], wanted[place])
        until_s = time.monotonic() + LIMIT_S
        while (left := self._left()) != ("0", "0") and time.monotonic() < until_s:
            time.sleep(0.1)
        self.complaints += [f"left open and in memory: {left}"] * (left != ("0", "0"))
        with ThreadPoolExecutor(KINDS) as clients:
            last = [clients.submit(self._visit, "whole", *each) for each in zip(bodies, wanted)]
            while not any(each.done() for each in last):
                time.sleep(0.001)
            job.terminate()  # others wait
        self.counts["after the request to stop"] = sum(each.result() for each in last)

    def _visit(self, kind, body, wanted):
        """Be one client; return whether there was an answer."""
        try:
            self.counts[kind] += 1
            if kind == "vanish":
                with socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S) as gone:
                    data = to_json({**body, "max_tokens": 250, "stream": self.rng.random() < 0.5}).encode()
                    gone.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
                    time.sleep(self.rng.random() / 10)
            elif kind in ("garbage", "too much"):
                status = self._post(self.rng.choice(GARBAGE if kind == "garbage" else TOO_MUCH))[0]
                self.complaints += [f"{kind}: {status}"] * (status not in (400, 413, 429))
            else:
                found = self._ask(body, kind == "stream")
                self.complaints += [f"{body}: {found} in place of {wanted}"] * (found != wanted)
            return True
        except (OSError, ValueError) as error:
            self.complaints.append(f"{kind}: {error!r}")
            return False

    def _ask(self, body, streams=False):
        """Return the text of a body, when there is room for it."""
        while (answer := self._post(to_json({**body, "stream": streams}).encode()))[0] == 429:
            time.sleep(0.05)
        status, text = answer
        if status != 200:
            return status, text
        if not streams:
            choice, = json.loads(text)["choices"]
            return choice["text"], choice["finish_reason"]
        events = [line.removeprefix("data: ") for line in text.splitlines() if line]
        pieces = [json.loads(event)["choices"][0] for event in events[:-1]]
        return "".join(piece["text"] for piece in pieces), pieces[-1]["finish_reason"]

    def _post(self, data):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/completions", data, timeout=LIMIT_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def _get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=LIMIT_S) as answer:
            return answer.read().decode()

    def _is_up(self):
        try:
            return bool(self._get("/health"))
        except OSError:
            return False

    def _left(self):
        """Return how many requests are open, and how many blocks are in use on rank 0."""
        metrics = self._get("/metrics")
        return tuple(re.search(rf"^{name} (\d+)$", metrics, re.M)[1] for name in ("mpillm_requests_open",
                                                                                  "mpillm_cache_blocks_used"))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
