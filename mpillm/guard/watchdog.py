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
KNOWN = 5  # how often progress must have been seen in a kind to know it
FLOOR_S, FLOOR_SHARE = 10.0, 0.1  # of a learned limit: so long, and no smaller a share of the limit for what is new
POLL_S, QUIET_S, GRACE_S = 0.25, 2.0, 5.0  # a rank that is quiet for longer looks whether others have given up


class Watchdog:
    """A thread that watches whether this rank makes progress.

    Local. A rank may be quiet in a kind of span that is new to it for ``limit_s``; once it knows the kind, for
    :data:`PATIENCE` times as long as it was at most before, but at least for the floor; after a step, in the caller's
    own work, for ever. Then, or when another rank has done so, it writes what the recorder kept and where every thread
    is to ``folder``, waits for the others to do the same, and leaves; the rank that is first in number prints the
    diagnosis. The launcher ends whoever is left.

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
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self):
        """Watch no longer."""
        self._ended.set()

    def limit_of(self, kind):
        """Return for how long the rank may be quiet in a span of a kind."""
        if kind == RESTING:
            return math.inf
        is_new = self._seen[kind] < KNOWN or kind != BETWEEN and kind not in self.recorder.ended
        return max(self.limit_s if is_new else self._floor_s, PATIENCE * self._longest_s[kind])

    def _watch(self):
        beats, kind, since = self.recorder.beats, self.recorder.kind, time.monotonic()
        while not self._ended.wait(POLL_S):
            now = time.monotonic()
            quiet_s = now - since
            if self.recorder.beats != beats:
                self._seen[kind] += 1
                self._longest_s[kind] = max(self._longest_s[kind], quiet_s)
                beats, kind, since = self.recorder.beats, self.recorder.kind, now
            elif quiet_s > self.limit_of(kind) or quiet_s > QUIET_S and any(self.folder.glob("rank-*.json")):
                self._fire(quiet_s)

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
            path.with_suffix(".tmp").write_text(to_json(record, indent=1), encoding="utf-8")
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
        except Exception as error:  # whatever it is: nobody else would hear of it
            sys.stderr.write(f"[rank {self.rank}/{self.size} {os.uname().nodename}] no progress for {quiet_s:.0f} s in "
                             f"step {self.recorder.step}; its last calls could not be written: {error!r}\n")
            sys.stderr.flush()
        finally:
            os._exit(FAILURE)
