"""Ends a job that hangs: every rank writes its last calls, one prints what they say, all leave."""

import json
import math
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from mpillm.comm.recorder import BETWEEN, RESTING
from mpillm.errors import FAILURE
from mpillm.train.diagnose import diagnose, read_flights

PATIENCE = 10  # times the longest quiet seen in a kind of span
UNSEEN = 3  # times the limit, in a kind of span that has not come to its end before
POLL_S, GRACE_S = 0.25, 5.0


class Watchdog:
    """A thread that watches whether this rank makes progress.

    Local. A rank may be quiet in a kind of span for ``limit_s``, or :data:`PATIENCE` times as long as it was at most
    before; in kinds that it has not come to the end of, :data:`UNSEEN` times ``limit_s``; after a step, in the caller's
    own work, for ever. Then it writes what the recorder kept and where every thread is to ``folder``, waits for the
    others to do the same, and leaves; the rank that is first in number prints the diagnosis. The launcher ends whoever
    is left.

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
        self.limit_s, self._longest_s, self._ended = limit_s, {}, threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self):
        """Watch no longer."""
        self._ended.set()

    def limit_of(self, kind):
        """Return for how long the rank may be quiet in a span of a kind."""
        if kind == RESTING:
            return math.inf
        if kind != BETWEEN and kind not in self.recorder.ended:
            return UNSEEN * self.limit_s
        return max(self.limit_s, PATIENCE * self._longest_s.get(kind, 0.0))

    def _watch(self):
        beats, kind, since = self.recorder.beats, self.recorder.kind, time.monotonic()
        while not self._ended.wait(POLL_S):
            now = time.monotonic()
            if self.recorder.beats != beats:
                self._longest_s[kind] = max(self._longest_s.get(kind, 0.0), now - since)
                beats, kind, since = self.recorder.beats, self.recorder.kind, now
            elif now - since > self.limit_of(kind):
                self._fire(now - since)

    def _fire(self, quiet_s):
        """Write, wait for the others, let the first rank speak, leave. Does not return."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = {names.get(ident, "?"): traceback.format_stack(frame)
                  for ident, frame in sys._current_frames().items() if ident != threading.get_ident()}
        record = {"rank": self.rank, "ranks": self.size, "coords": self.coords, "host": os.uname().nodename,
                  "pid": os.getpid(), "step": self.recorder.step, "kind": self.recorder.kind, "quiet_s": quiet_s,
                  "limit_s": self.limit_of(self.recorder.kind), "calls": list(self.recorder.last), "stacks": stacks}
        path = self.folder / f"rank-{self.rank:05d}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".tmp").write_text(json.dumps(record, indent=1), encoding="utf-8")
            path.with_suffix(".tmp").rename(path)
            deadline = time.monotonic() + GRACE_S
            while time.monotonic() < deadline and len(read_flights(self.folder)) < self.size:
                time.sleep(POLL_S)
            found = read_flights(self.folder)
            if self.rank == min(found):
                sys.stderr.write(f"{diagnose(found)}\nthe last calls and the stacks of every rank: {self.folder}\n")
                sys.stderr.flush()
            else:
                time.sleep(1.0)  # the launcher ends all with the first that leaves
        except OSError as error:
            sys.stderr.write(f"[rank {self.rank}/{self.size} {os.uname().nodename}] no progress for {quiet_s:.0f} s in "
                             f"step {self.recorder.step}; its last calls could not be written: {error}\n")
        finally:
            os._exit(FAILURE)
