"""Runs the command line with a fault planted: ``python faulty.py KIND RANK STEP train CONFIG ...``.

The fault happens on one rank in one step: ``kill``, ``stop`` (SIGSTOP) or ``raise`` in the backward pass,
``skip`` or ``other-op``, where it leaves out the sums for norm and loss, or calls a broadcast in place of the first,
``save-PHASE``, where the rank kills itself in that phase of writing the checkpoint, ``full``, from where on it can write
no file longer than a few bytes, or ``ask-MOMENT``, where it makes a file ``now-PID`` and waits for the file ``sent``: in a
``step``, in ``evaluate``, in ``save``, or at the ``start``, there on every rank before MPI.
"""

import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import h5py
import torch

from mpillm import __main__
from mpillm.checkpoint import saving
from mpillm.comm import collectives, world
from mpillm.pipeline import stage
from mpillm.train import engine, run


def ask():
    """Let the test do now what it does to a running job."""
    Path(f"now-{os.getpid()}").touch()
    while not Path("sent").exists():
        time.sleep(0.01)


def before(where, name, act):
    """Call ``act(*arguments)`` before a function or method."""
    original = getattr(where, name)
    setattr(where, name, lambda *arguments, **options: (act(*arguments), original(*arguments, **options))[1])


def plant(kind, rank, step):
    """Make the fault happen on this rank if it is the one."""
    if kind == "ask-start":
        before(world, "comm_world", ask)
        return
    if world.comm_world().rank != rank:
        return
    if kind == "ask-evaluate":
        before(run.Run, "evaluate", lambda self: ask() if self.step_number == step else None)
        return
    if kind == "ask-save":
        plant_in_save("written", step, ask)
        return

    def die():
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def fail(*_):
        threading.Thread(target=time.sleep, args=(900,)).start()  # which must not keep the process alive
        raise RuntimeError("planted")

    if kind.startswith("save-"):
        plant_in_save(kind.removeprefix("save-"), step, die)
        return
    train_step = engine.Engine.train_step

    def spoilt(self, *arguments):
        if self.trace.step == step:
            run = self.runner.run

            def norm(_):
                if kind == "other-op":
                    collectives.bcast(torch.zeros(1, dtype=torch.float64), self.mesh.world)
                return 1.0

            def within(*work):
                losses = run(*work)
                if kind == "kill":
                    die()
                elif kind == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif kind == "full":
                    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
                elif kind == "ask-step":
                    ask()
                elif kind in ("skip", "other-op"):
                    self.gradients.norm = norm
                    if kind == "skip":
                        self._sum_losses = lambda *_: 1.0
                return losses

            self.runner.run = within
            if kind == "raise":
                before(stage.Stage, "backward", fail)
        return train_step(self, *arguments)

    engine.Engine.train_step = spoilt


def plant_in_save(phase, step, die):
    """Kill this rank in a phase of saving ``step``."""
    def after(name, where):
        original = getattr(where, name)

        def spoilt(*arguments, **options):
            found = original(*arguments, **options)
            if any(f"step-{step:08d}" in str(argument) for argument in arguments):
                die()
            return found

        setattr(where, name, spoilt)

    if phase == "middle":
        create = h5py.Group.create_dataset

        def spoilt(self, *arguments, **options):
            found = create(self, *arguments, **options)
            if f"step-{step:08d}" in self.file.filename and len(self.file.keys()) > 1:
                die()
            return found

        h5py.Group.create_dataset = spoilt
    elif phase == "written":
        after("_write_file", saving)
    elif phase == "manifest":
        after("_write_manifest", saving)
    elif phase == "renamed":
        after("rename", saving.os)
    else:
        raise ValueError(phase)


if __name__ == "__main__":
    kind, rank, step, *sys.argv[1:] = sys.argv[1:]
    plant(kind, int(rank), int(step))
    sys.argv[0] = "mpillm"
    __main__.main()
