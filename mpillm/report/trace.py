"""The trace of a rank: what it did when, as lines of JSON."""

import os
import time
import uuid
from contextlib import contextmanager

from mpillm.config import AXES
from mpillm.errors import agreed, half_made
from mpillm.files import to_json


class Trace:
    """Spans of time of one rank, written to ``rank-00000.jsonl`` if there is a folder, and noted by the recorder.

    The first line names the rank; each other line is ``{"step", "kind", "name", "start_s", "stop_s"}`` with times since
    a moment that all ranks share (a barrier at the start), or ``{"step", "sent"}`` with the bytes that the recorder
    counted in the step, as ``[axis, operation, bytes]``. Kinds: ``F B I W`` the pipeline's actions, ``wait`` for a
    message, ``reduce`` gradients, ``update`` weights, ``data``, ``evaluate``, ``save``; ``transfer``, beside others, is
    a reduction on its way. What lies between two steps, such as an evaluation, belongs to the later.

    Parameters
    ----------
    folder : Path or None
    mesh : Mesh
    """

    def __init__(self, folder, mesh):
        self.recorder, self._spans, self._file = mesh.recorder, [], None
        if folder is None:
            return
        writing = f"train.trace: {folder} cannot be written, choose another train.run_dir or set train.trace = false"
        with half_made(mesh.world.comm) as made, agreed(mesh.world.comm, writing):
            made.callback(self.close)
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / f"rank-{mesh.world.rank:05d}.jsonl", "a", encoding="utf-8")
        launch = mesh.world.comm.bcast(uuid.uuid4().hex[:12])
        mesh.world.comm.Barrier()
        self._origin_s = time.perf_counter()
        coords = {axis: mesh.coord(axis) for axis in AXES}
        self._write({"rank": mesh.world.rank, "ranks": mesh.world.size, "coords": coords, "launch": launch,
                     "host": os.uname().nodename})

    @contextmanager
    def span(self, kind, name):
        """Record how long the block takes."""
        self.recorder.begin(kind, name)
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            error.during = getattr(error, "during", f"step {self.step}, in {name}")  # the innermost, for the report
            raise
        finally:
            self.recorder.end(kind)
            if self._file is not None:
                self._spans.append((kind, name, start, time.perf_counter()))

    def add(self, kind, name, start_s):
        """Record what went on beside other spans, since ``start_s`` of :func:`time.perf_counter`."""
        if self._file is not None:
            self._spans.append((kind, name, start_s, time.perf_counter()))

    @property
    def step(self):
        """The step that spans belong to."""
        return self.recorder.step

    def begin_step(self, number):
        """Let the spans that follow belong to step ``number``."""
        self.recorder.begin_step(number)

    def end_step(self):
        """Write the spans of the step. Call outside what is timed."""
        self.recorder.end_step()
        self._write_spans(self.step)
        if self._file is not None:
            self._write({"step": self.step, "sent": [[*key, n_bytes] for key, n_bytes in self.recorder.sent_bytes.items()]})
            self._file.flush()

    def close(self):
        """Write what came after the last step, such as the last evaluation and save, and close the file. Local."""
        self._write_spans(self.step + 1)  # to which it would belong
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_spans(self, step):
        for kind, name, start, stop in self._spans:
            self._write({"step": step, "kind": kind, "name": name,
                         "start_s": round(start - self._origin_s, 7), "stop_s": round(stop - self._origin_s, 7)})
        self._spans.clear()

    def _write(self, record):
        self._file.write(to_json(record) + "\n")
