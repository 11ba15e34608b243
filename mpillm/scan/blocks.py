"""Viterbi's recurrence on one rank: many blocks of a chain at once, as columns of one array.

Scores are integers, or double precision numbers that hold integers, so that two score vectors either differ by one number in
all states, and then lead to the same path whatever comes, or they do not. Forward, every block starts some steps before its
first from nothing known; where the block before it ends otherwise than was assumed, steps are computed again one by one until
vectors agree. Backward likewise with states. That is at most one more pass over the chain each way.

Legend: T steps, K states, B blocks, L steps of a block.
"""

import numpy as np

WARMUP = 64  # steps before a block
_SHORTEST = 2 * WARMUP  # steps of a block, at least
_MOST_COLUMNS = 4096
_ROW_NUMBERS = 65536  # of the states of all blocks: longer rows leave the cache
_TILE_BYTES = 1 << 18  # of the sums of some states, where there is one block


class Chain:
    """Steps of a chain on one rank.

    Parameters
    ----------
    scores_TK : array
        Of integers, each step's greatest subtracted.
    transitions_KK : array
        From row to column, of the same type.
    """

    def __init__(self, scores_TK, transitions_KK):
        self.transitions_KK, self.num_states = transitions_KK, len(transitions_KK)
        steps = len(scores_TK)
        blocks = max(1, min(steps // _SHORTEST, _MOST_COLUMNS, _ROW_NUMBERS // self.num_states))
        if blocks < self.num_states**2 / 1024:  # what NumPy's rows cost by themselves is more than a step of one block
            blocks = 1
        self.length = -(-steps // blocks)
        self.blocks, self.steps = -(-steps // self.length), steps
        padded = np.zeros((self.blocks * self.length, self.num_states), scores_TK.dtype)
        padded[:steps] = scores_TK
        self.scores_BLK = padded.reshape(self.blocks, self.length, self.num_states)
        self.vectors_LKB = np.empty((self.length, self.num_states, self.blocks), scores_TK.dtype)
        self.states_LB = np.zeros((self.length, self.blocks), np.int32)
        self._end = steps - 1 - (self.blocks - 1) * self.length  # the last step in the last block
        self._advance, self._single = _Advance(transitions_KK, self.blocks), _Advance(transitions_KK, 1)
        self.recomputed = 0  # steps

    def forward(self, first_K):
        """Compute the score vectors of all steps, with ``first_K`` that of the first."""
        vectors = np.zeros((self.num_states, self.blocks), self.transitions_KK.dtype)
        warmup = min(WARMUP, self.length) if self.blocks > 1 else 0
        for step in range(self.length - warmup, self.length):
            vectors = self._advance(vectors, np.roll(self.scores_BLK[:, step], 1, axis=0))
        assumed = vectors
        for step in range(self.length):
            out = self.vectors_LKB[step]
            self._advance(vectors, self.scores_BLK[:, step], out)
            if step == 0:
                out[:, 0] = first_K
            vectors = out
        for block in range(1, self.blocks):
            before_K = self.vectors_LKB[-1, :, block - 1]
            if (before_K != assumed[:, block]).any():
                self._write(block, self.first_after(before_K, block))

    def first_after(self, before_K, block=0):
        """Return the vector of a block's first step, from that of the step before it."""
        return self._single(before_K[:, None], self.scores_BLK[block:block + 1, 0])[:, 0]

    def begin_otherwise(self, first_K):
        """Take another vector for the first step; return whether that of the last step changed."""
        block, before_K = 0, self.last_K.copy()
        while block < self.blocks and self._write(block, first_K):
            block += 1
            if block < self.blocks:
                first_K = self.first_after(self.vectors_LKB[-1, :, block - 1], block)
        return bool((self.last_K != before_K).any())

    @property
    def last_K(self):
        """The vector of the last step."""
        return self.vectors_LKB[self._end, :, -1]

    def backward(self, last_state):
        """Trace the best path that ends in ``last_state``."""
        warmup = min(WARMUP, self._end + 1) if self.blocks > 1 else 0
        states = np.zeros(self.blocks, np.intp)
        if warmup:
            states = self.vectors_LKB[warmup - 1].argmax(0)
            for step in range(warmup - 2, -1, -1):
                states = self._previous(step, states)
            states = self._previous(-1, np.roll(states, -1))
        for step in range(self.length - 1, -1, -1):
            if step < self.length - 1:
                states = self._previous(step, states)
            if step == self._end:
                states[-1] = last_state
            self.states_LB[step] = states
        self._agree(self.blocks - 1)

    def end_otherwise(self, last_state):
        """Trace from another last state; return whether the first state changed."""
        before = self.states_LB[0, 0]
        self._trace(self._end, self.blocks - 1, last_state)
        self._agree(self.blocks - 1)
        return bool(self.states_LB[0, 0] != before)

    def state_before(self, vector_K, state):
        """Return the best state before ``state``, the lowest of equally good ones."""
        return int((vector_K + self.transitions_KK[:, state]).argmax())

    @property
    def path_T(self):
        """The states of all steps."""
        return self.states_LB.T.reshape(-1)[:self.steps].astype(np.int64)

    def _previous(self, step, states):
        """Return the best state of every block at ``step``, if it is in ``states`` at the next."""
        sums = self.vectors_LKB[step] + np.take(self.transitions_KK, states, axis=1)
        return (sums == sums.max(0)).argmax(0)

    def _agree(self, last):
        """Trace again, from the last block to the first, what does not lead to the states of the next block."""
        for block in range(last - 1, -1, -1):
            state = self.state_before(self.vectors_LKB[-1, :, block], self.states_LB[0, block + 1])
            if state != self.states_LB[-1, block]:
                self._trace(self.length - 1, block, state)

    def _trace(self, step, block, state):
        """Put a state in its place and trace back in its block until nothing changes."""
        while step >= 0 and self.states_LB[step, block] != state:
            self.states_LB[step, block] = state
            self.recomputed += 1
            step -= 1
            if step >= 0:
                state = self.state_before(self.vectors_LKB[step, :, block], state)

    def _write(self, block, vector_K):
        """Put a vector at the start of a block and go on from it until nothing changes; return whether all changed."""
        last = self._end if block == self.blocks - 1 else self.length - 1
        for step in range(last + 1):
            if (self.vectors_LKB[step, :, block] == vector_K).all():
                return False
            self.vectors_LKB[step, :, block] = vector_K
            self.recomputed += 1
            if step < last:
                vector_K = self._single(vector_K[:, None], self.scores_BLK[block:block + 1, step + 1])[:, 0]
        return True


class _Advance:
    """One step of the recurrence for many columns: the best way into every state, relative to the best state of all."""

    def __init__(self, transitions_KK, columns):
        self.transitions_KK, self.columns = transitions_KK, columns
        states, dtype = len(transitions_KK), transitions_KK.dtype
        self.rows = max(1, _TILE_BYTES // (states * dtype.itemsize)) if columns == 1 else 1
        self.sums = np.empty((self.rows, states) if columns == 1 else (states, columns), dtype)
        self.scores_BK = np.empty((columns, states), dtype)

    def __call__(self, vectors_KB, scores_BK, out=None):
        """Return the vectors after a step; ``out`` may not be ``vectors_KB``."""
        out = np.empty_like(vectors_KB) if out is None else out
        if self.columns == 1:
            self._from_tiles(vectors_KB[:, 0], out[:, 0])
        else:
            self._from_rows(vectors_KB, out)
        np.copyto(self.scores_BK, scores_BK)  # whole rows first: what is turned must lie close together
        out += self.scores_BK.T
        return relative(out, out)

    def _from_rows(self, vectors_KB, out):
        for state, (vector_B, transitions_K) in enumerate(zip(vectors_KB, self.transitions_KK[:, :, None])):
            if state == 0:
                np.add(vector_B, transitions_K, out=out)
            else:
                np.add(vector_B, transitions_K, out=self.sums)
                np.maximum(out, self.sums, out=out)

    def _from_tiles(self, vector_K, out_K):
        best = None
        for row in range(0, len(vector_K), self.rows):
            sums = self.sums[:len(vector_K) - row]
            np.add(vector_K[row:row + self.rows, None], self.transitions_KK[row:row + self.rows], out=sums)
            found = np.maximum.reduce(sums, 0)
            best = found if best is None else np.maximum(best, found, out=best)
        out_K[:] = best


def relative(vectors, out=None):
    """Subtract from every column its greatest number, but where that is minus infinity."""
    greatest = vectors.max(0)
    if vectors.dtype.kind == "f":
        greatest = np.where(greatest == -np.inf, 0, greatest)
    return np.subtract(vectors, greatest, out=out)
