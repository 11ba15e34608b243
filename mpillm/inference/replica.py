"""The ranks that hold one copy of a model and carry passes out.

The leader decides each pass and tells the others in one message. Activations go down the pipeline; the chooser, a rank of the
last stage, sends back what was chosen. While a pass is on its way the leader starts others, of other requests.
"""

import math
import time
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch

from mpillm.comm.p2p import FORWARD, irecv, isend, tag_of
from mpillm.errors import CheckpointError
from mpillm.inference.cache import KeyValuePool, Pages, block_size
from mpillm.inference.likelihood import log_probabilities
from mpillm.inference.sampling import choose, likeliest, log_softmax
from mpillm.inference.scheduler import Scheduler
from mpillm.nn.positions import Batch, rotary_tables

ANSWER = 1  # tag of what the chooser sends
AWAKE_S, LONGEST_NAP_S = 0.01, 0.005  # of a rank that waits for an order
ROWS = 128  # of which logits are in memory at a time


@dataclass(frozen=True)
class Order:
    """A pass as the leader tells it: its pieces, and for each request that chooses how, where, and what stands there."""

    pieces: list
    choices: dict


class Replica:
    """One copy of a model. Collective over its ranks, but where something else is said.

    Parameters
    ----------
    config : Config
        Resolved.
    mesh : Mesh
    stage : TransformerStage
        This rank's, with its weights.
    num_blocks : int
        Of keys and values.
    vocab_size : int
        Of the tokenizer: logits beyond are padding, and mean nothing.
    """

    def __init__(self, config, mesh, stage, num_blocks, vocab_size):
        self.model, self.stage, self.vocab_size = config.model, stage, vocab_size
        self.pipeline, self.ranks = mesh.group("pipeline"), mesh.group("pipeline", "tensor")
        self.leads = mesh.coord("pipeline") == mesh.coord("tensor") == 0
        self._chooses = stage.is_last and mesh.coord("tensor") == 0
        self._leader = self.ranks.comm.allgather(self.leads).index(True)
        self._like = next(stage.parameters())
        self.pool, self._settings = KeyValuePool(num_blocks, block_size(config.model.head_dim)), config.inference
        self.scheduler = self._new_scheduler()
        self.passes = self.tokens = 0
        self._sent = deque()

    def lead(self, rows):
        """Work until ``rows`` has nothing more. On the leader; the others :meth:`follow` meanwhile.

        Parameters
        ----------
        rows : mpillm.inference.rows.Rows
            Gives requests to the scheduler and takes what comes of them.
        """
        under_way = deque()
        while True:
            rows.feed(self.scheduler)
            pieces = self.scheduler.next_pass() if len(under_way) < self.pipeline.size else []
            if pieces:
                order = Order(pieces, {piece.request: rows.choice(piece) for piece in pieces if piece.chooses})
                self._tell(order)
                under_way.append((pieces, self._carry_out(order)))
            elif under_way:
                pieces, answers = under_way.popleft()
                try:
                    self._settle(rows, pieces, answers if self._chooses else self._receive())
                except CheckpointError as error:
                    self._give_up(str(error), len(under_way))
                    raise
            elif rows.is_done(self.scheduler):
                break
            else:
                rows.source.wait()
        self._tell(None)
        self._wait_for_sends(0)

    def _give_up(self, why, passes):
        """Let the others raise an error, once the passes that are under way have come back, and forget all requests."""
        for _ in range(0 if self._chooses else passes):
            self._receive()
        self._tell(why)
        self._wait_for_sends(0)
        self.scheduler = self._new_scheduler()

    def _new_scheduler(self):
        settings = self._settings
        return Scheduler(self.pool.num_blocks, self.pool.block_size, settings.pass_tokens, settings.batch, self.pipeline.size,
                         settings.share_prefixes)

    def follow(self, look):
        """Carry out what the leader tells until it has nothing more; ``look()`` before each pass. On all other ranks."""
        while (order := self._tell()) is not None:
            look()
            if isinstance(order, str):
                raise CheckpointError(order)
            answers = self._carry_out(order)
            if self._chooses:
                self.pipeline.comm.send(answers, 0, ANSWER)
        self._wait_for_sends(0)

    def _settle(self, rows, pieces, answers):
        """Hand answers to their rows and let the scheduler know."""
        scores = [value for *_, found, alternatives in answers.scored for value, _ in found + alternatives]
        if any(answer[0] < 0 for answer in answers.chosen.values()) or not all(map(math.isfinite, scores)):
            raise CheckpointError("inference: the weights give logits that are not finite: take an earlier checkpoint")
        ends = {number: (answer[0], rows.take(number, *answer)) for number, answer in answers.chosen.items()}
        for scored in answers.scored:
            rows.score(*scored)
        for number in self.scheduler.commit(pieces, ends):
            rows.finish(number)

    def _tell(self, order=None):
        """Tell an order, or wait for one: at first at work, then asleep, as nothing may come for long."""
        comm, begun_s = self.ranks.comm, time.monotonic()
        if comm.size > 1:
            request = comm.Ibcast(np.zeros(1, np.int8), self._leader)
            while not request.Test():
                idle_s = time.monotonic() - begun_s
                if idle_s > AWAKE_S:
                    time.sleep(min(LONGEST_NAP_S, idle_s / 10))
        return comm.bcast(order, self._leader)

    def _receive(self):
        return self.pipeline.comm.recv(source=self.pipeline.size - 1, tag=ANSWER)

    def _wait_for_sends(self, left):
        while len(self._sent) > left:
            self._sent.popleft().wait()

    @torch.no_grad()
    def _carry_out(self, order):
        """Compute this rank's part of a pass; return the :class:`Answers` where they are chosen."""
        pages = Pages(self.pool, order.pieces, self.model.window, self._like)
        batch = batch_of(self.model, pages, self._like)
        if self.stage.is_first:
            tokens = [token for piece in order.pieces for token in piece.tokens]
            x = torch.tensor(tokens, dtype=torch.int64, device=self._like.device)
        else:
            shape = pages.tokens, self.model.hidden_size
            x = irecv(shape, self._like, self.pipeline, self.pipeline.rank - 1, tag_of(FORWARD)).wait()
        x = self.stage(x, batch)
        self.passes, self.tokens = self.passes + 1, self.tokens + pages.tokens
        if not self.stage.is_last:
            self._wait_for_sends(1)
            self._sent.append(isend(x, self.pipeline, self.pipeline.rank + 1, tag_of(FORWARD)))
            return None
        return self._answer(x, batch, order)

    def _answer(self, x_TD, batch, order):
        """Return what the pass was asked for, on the chooser."""
        scored, choosing, targets, row = [], [], [], 0
        for piece in order.pieces:
            scored += range(row + piece.target_row, row + piece.target_row + len(piece.targets))
            row += len(piece.tokens)
            scored += [row - 1] * len(piece.alternatives)
            targets += piece.targets + piece.alternatives
            if piece.chooses:
                choosing.append((piece.request, row - 1))
        found = []
        for start in range(0, len(scored), ROWS):
            parts = self.stage.own_logits(*self._rows(x_TD, scored[start:start + ROWS], batch))
            found += log_probabilities(parts, self.stage.split, self.vocab_size, targets[start:start + ROWS])
        answers = Answers({}, [])
        for start in range(0, len(choosing), ROWS):
            part = choosing[start:start + ROWS]
            logits = self._logits(x_TD, [row for _, row in part], batch)
            if self._chooses:
                for (number, _), row in zip(part, logits.numpy()):
                    answers.chosen[number] = answer_of(row, *order.choices[number])
        if self._chooses:
            for piece in order.pieces:
                count, last = len(piece.targets), len(piece.targets) + len(piece.alternatives)
                if count:
                    first = piece.start + piece.target_row + 1
                    answers.scored.append((piece.request, first, found[:count], found[count:last]))
                    found = found[last:]
        return answers

    def _logits(self, x_TD, rows, batch):
        """Return logits of some rows, on the processor and in float32 at least, without the padding."""
        logits = self.stage.logits(*self._rows(x_TD, rows, batch))[:, :self.vocab_size]
        return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32)).contiguous()

    def _rows(self, x_TD, rows, batch):
        """Return some rows, and a pass of them."""
        return x_TD[torch.tensor(rows, device=x_TD.device)], replace(batch, positions=len(rows))


@dataclass(frozen=True)
class Answers:
    """What a pass found: ``chosen`` by request, as :func:`answer_of` says; ``scored`` as ``(request, position,
    of the tokens from there on the log-probability and whether it is the likeliest, the same of alternatives)``."""

    chosen: dict
    scored: list


def answer_of(logits, sampling, position, seen):
    """Return a chosen token, or -1 if the logits are not finite, its log-probability and the likeliest ones, both None unless
    asked for. Local."""
    token = choose(logits, sampling, position, seen)
    if sampling.logprobs is None or token < 0:
        return token, None, None
    logprobs = log_softmax(logits)
    return token, float(logprobs[token]), likeliest(logprobs, sampling.logprobs)


def batch_of(model, pages, like):
    """Return a pass as the layers see it: one row of tokens, each at its own position. Local."""
    tables = rotary_tables(model, pages.positions, like.dtype, like.device)
    places = torch.from_numpy(np.asarray(pages.positions, np.int64)).to(like.device)
    return Batch(1, pages.tokens, *tables, places_S=places, cache=pages)

