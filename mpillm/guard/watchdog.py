"""Ends a job that hangs: every rank writes its last calls, one prints what they say, all leave."""

import math
import os
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

from mpillm.comm.recorder import BETWEEN, RESTING
from mpillm.errors import FAILURE
from mpillm.files import to_json
from mpillm.guard.diagnose import diagnose, read_flights

PATIENCE = 20  # times the longest quiet seen in a kind of span
FILES, FILES_PATIENCE = ("data", "load", "save"), 4  # kinds that wait for a file system, for so many times the limit
KNOWN = 5  # how often progress must have been seen in a kind to know it
FLOOR_S, FLOOR_SHARE = 10.0, 0.1  # of a learned limit: so long, and no smaller a share of the limit for what is new
POLL_S, QUIET_S, GRACE_S = 0.25, 2.0, 5.0  # a rank that is quiet for longer looks whether others have given up
LOOKS_PER_S = 100  # of all ranks together: each is a question to the file system that they share


class Watchdog:
    """A thread that watches whether this rank makes progress.

    Local. A rank may be quiet in a kind of span that is new to it for ``limit_s``; once it knows the kind, for
    :data:`PATIENCE` times as long as it was at most before, but at least for the floor; in one of :data:`FILES` for
    :data:`FILES_PATIENCE` times ``limit_s`` whatever it has seen, because file systems stall for minutes; after a step, in
    the caller's own work, for ever. Then, or when another rank has done so, it writes what the recorder kept and where every
    thread is to ``folder``, waits for the others to do the same, and leaves; the rank that is first in number prints the
    diagnosis. The launcher ends whoever is left. While one that has written waits for a file system all wait with it, and
    a rank that makes progress takes back what it wrote.

    Parameters
    ----------
    recorder : Recorder
    folder : Path
        On a file system that all ranks share.
    rank, size : int
    coords : dict of str to int
        The rank's place on the mesh.
    limit_s : float
    """

    def __init__(self, recorder, folder, rank, size, coords, limit_s):
        self.recorder, self.folder, self.rank, self.size, self.coords = recorder, Path(folder), rank, size, coords
        self.limit_s, self._floor_s = limit_s, min(limit_s, max(FLOOR_S, FLOOR_SHARE * limit_s))
        self._seen, self._longest_s, self._ended = Counter(), Counter(), threading.Event()
        self._look_s = max(POLL_S, size / LOOKS_PER_S)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self):
        """Watch no longer; the thread ends, unless a file system holds it."""
        self._ended.set()
        self._thread.join(GRACE_S)

    def limit_of(self, kind):
        """Return for how long the rank may be quiet in a span of a kind."""
        if kind == RESTING:
            return math.inf
        if kind in FILES:
            return max(FILES_PATIENCE * self.limit_s, PATIENCE * self._longest_s[kind])
        is_new = self._seen[kind] < KNOWN or kind != BETWEEN and kind not in self.recorder.ended
        return max(self.limit_s if is_new else self._floor_s, PATIENCE * self._longest_s[kind])

    def _watch(self):
        beats, kind, since, next_look = self.recorder.beats, self.recorder.kind, time.monotonic(), 0.0
        while not self._ended.wait(POLL_S):
            now = time.monotonic()
            quiet_s = now - since
            if self.recorder.beats != beats:
                self._seen[kind] += 1
                self._longest_s[kind] = max(self._longest_s[kind], quiet_s)
                beats, kind, since = self.recorder.beats, self.recorder.kind, now
                continue
            has_given_up = quiet_s > self.limit_of(kind)
            if not has_given_up and quiet_s > QUIET_S and now >= next_look:
                next_look = now + self._look_s
                has_given_up = any(self.folder.glob("rank-*.json"))
            if has_given_up:
                self._fire(quiet_s)

    def _fire(self, quiet_s):
        """Write, wait for the others, let the first rank speak, leave; or, if there is progress meanwhile, take it back."""
        beats, kind = self.recorder.beats, self.recorder.kind
        record, mark = self.folder / f"rank-{self.rank:05d}.json", self.folder / f"files-{self.rank:05d}"
        where = f"[rank {self.rank}/{self.size} {os.uname().nodename}]"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            rest_s = self.limit_of(kind) - quiet_s if kind in FILES else 0.0
            if rest_s > 0:
                mark.touch()  # before the record, which may be the last that others wait for
                sys.stderr.write(f"{where} step {self.recorder.step}, {kind}: quiet for {quiet_s:.0f} s; all wait for the "
                                 f"file system, for {rest_s:.0f} s at most\n")
                sys.stderr.flush()
            record.with_suffix(".tmp").write_text(to_json(self._record(quiet_s), indent=1), encoding="utf-8")
            record.with_suffix(".tmp").rename(record)
            names = self._wait(beats, kind, rest_s, quiet_s <= self.limit_of(kind))
            if names is None:
                mark.unlink(missing_ok=True)
                record.unlink(missing_ok=True)
                return
            if rest_s > 0 or record.name == min(name for name in names if name.endswith(".json")):
                sys.stderr.write(f"{diagnose(read_flights(self.folder))}\n"
                                 f"the last calls and the stacks of every rank: {self.folder}\n")
                sys.stderr.flush()
            else:
                time.sleep(1.0 + self._look_s)  # the launcher ends all with the first that leaves
        except Exception as error:  # whatever it is: nobody else would hear of it
            sys.stderr.write(f"{where} no progress for {quiet_s:.0f} s in step {self.recorder.step}; its last calls could not "
                             f"be written: {error!r}\n")
            sys.stderr.flush()
        os._exit(FAILURE)

    def _record(self, quiet_s):
        """Return what is written of this rank."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = {names.get(ident, "?"): traceback.format_stack(frame)
                  for ident, frame in sys._current_frames().items() if ident != threading.get_ident()}
        return {"rank": self.rank, "ranks": self.size, "coords": self.coords, "host": os.uname().nodename,
                "pid": os.getpid(), "step": self.recorder.step, "kind": self.recorder.kind, "quiet_s": quiet_s,
                "limit_s": self.limit_of(self.recorder.kind), "calls": self.recorder.last, "stacks": stacks}

    def _wait(self, beats, kind, rest_s, is_asked):
        """Wait for ``rest_s``, for others to write, and while one waits for a file system; return the names of what was
        written, or None once there is progress, here or where a rank was that asked this one."""
        until = time.monotonic() + max(GRACE_S + self._look_s, rest_s)
        latest = until + FILES_PATIENCE * self.limit_s
        while self.recorder.beats == beats:
            names, now = os.listdir(self.folder), time.monotonic()
            written = sum(name.endswith(".json") for name in names)
            if is_asked and written == 1:
                break
            if not rest_s > 0 and any(name.startswith("files-") for name in names):
                until = min(latest, max(until, now + self.limit_of(kind)))  # as that rank has work to do when it goes on
            elif not rest_s > 0 and written == self.size:
                return names
            if now > until:
                return names
            time.sleep(self._look_s)
        return None
