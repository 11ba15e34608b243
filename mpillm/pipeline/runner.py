"""Executes a checked pipeline schedule: receives posted ahead, sends left to overlap."""

import os
from collections import deque

import torch

from mpillm.comm.p2p import BACKWARD, FORWARD, irecv, isend, tag_of

RECEIVES_AHEAD = 2


class PipelineRunner:
    """Runs a schedule's actions of this rank.

    Parameters
    ----------
    stages : list of Stage
        This rank's, in order.
    group : Group
        The pipeline axis.
    trace : Trace
        Where actions and waits are recorded.
    gradients : GradientStore
        Its ``microbatch_done(stage index, microbatch)`` is called once all weight gradients of a microbatch are there;
        ``progress()`` between actions and while waiting, for reductions under way.
    """

    def __init__(self, stages, group, trace, gradients):
        self.stages = {stage.index: stage for stage in stages}
        self.group, self.trace, self.gradients = group, trace, gradients

    def run(self, schedule, microbatches):
        """Execute ``schedule``; return the losses by number of the microbatch (last stage only).

        Collective over the pipeline axis.

        Parameters
        ----------
        schedule : PipelineSchedule
            Checked before; without backward actions it evaluates.
        microbatches : list of Microbatch
        """
        way = _Pass(self, schedule, microbatches)
        for action in schedule.actions[self.group.rank]:
            way.execute(action)
        way.finish()
        return way.losses


class _Pass:
    """One pass through a schedule: the messages in flight and the losses so far."""

    def __init__(self, runner, schedule, microbatches):
        self.runner, self.schedule, self.microbatches = runner, schedule, microbatches
        self.group, self.trace = runner.group, runner.trace
        self.last = schedule.num_stages - 1
        self.losses, self.local, self.sends, self.posted = {}, {}, [], {}
        self.to_post = deque(filter(self._comes_from_elsewhere, map(self._input_of, schedule.actions[self.group.rank])))

    def execute(self, action):
        """Run one action: wait for its input, compute, send its output on."""
        stage, microbatch = self.runner.stages[action.stage], action.microbatch
        if action.kind in "BIW" and not stage.has_backward:
            return
        key = self._input_of(action)
        x = self._receive(key, action) if key else None
        with self.trace.span(action.kind, str(action)):
            if action.kind == "F":
                y = stage.forward(microbatch, x, self.microbatches[microbatch])
                if stage.is_last:
                    self.losses[microbatch] = y
                else:
                    self._send((FORWARD, action.stage + 1, microbatch), y)
            elif action.kind == "W":
                stage.compute_weight_gradients(microbatch)
            else:
                dx = stage.backward(microbatch, x, keep_weights=action.kind == "I")
                if stage.passes_gradient:
                    self._send((BACKWARD, action.stage - 1, microbatch), dx)
            if action.kind in "BW":
                self.runner.gradients.microbatch_done(action.stage, microbatch)
        self.sends = [send for send in self.sends if not send.test()]
        self.runner.gradients.progress()

    def finish(self):
        """Wait until everything sent has left."""
        with self.trace.span("wait", "sends"):
            for send in self.sends:
                send.wait()

    def _input_of(self, action):
        """Return the message an action needs, ``(kind, stage it is for, microbatch)``, or None."""
        if action.kind == "F" and action.stage > 0:
            return FORWARD, action.stage, action.microbatch
        if action.kind in "BI" and action.stage < self.last and self.runner.stages[action.stage].has_backward:
            return BACKWARD, action.stage, action.microbatch
        return None

    def _source(self, key):
        kind, stage, _ = key
        return self.schedule.rank_of(stage - 1 if kind == FORWARD else stage + 1)

    def _comes_from_elsewhere(self, key):
        return key is not None and self._source(key) != self.group.rank

    def _tag(self, key):
        kind, stage, microbatch = key
        return tag_of(kind, stage, microbatch, self.schedule.num_microbatches)

    def _send(self, key, x):
        to = self.schedule.rank_of(key[1])
        if to == self.group.rank:
            self.local[key] = x
        else:
            self.sends.append(isend(x, self.group, to, self._tag(key)))

    def _receive(self, key, action):
        while self.to_post and len(self.posted) < RECEIVES_AHEAD:
            self._post(self.to_post.popleft())
        if key in self.local:
            return self.local.pop(key)
        with self.trace.span("wait", f"wait {action}"):
            pending = self.posted.pop(key)
            while self.runner.gradients.progress() and not pending.test():
                os.sched_yield()
            x = pending.wait()
        while self.to_post and len(self.posted) < RECEIVES_AHEAD:
            self._post(self.to_post.popleft())
        return x

    def _post(self, key):
        stage = self.runner.stages[key[1]]
        like = next(stage.module.parameters())
        shape = (stage.module.split.tokens(self.microbatches[key[2]].batch.tokens), stage.module.model.hidden_size)
        self.posted[key] = irecv(torch.Size(shape), like, self.group, self._source(key), self._tag(key))
