"""Exact Viterbi decoding of one long chain over ranks, by rank convergence.

Every rank computes its steps as if nothing were known of those before; then it learns the true score vector of the step before
its first, and computes again from there until its vectors agree with those it has. Few chains remember their past for long, so
that this is soon. The path is traced back the same way. After the ``k``-th exchange the first ``k`` ranks are right, so that
``p`` exchanges are enough for any chain; one that never forgets is then computed in sequence, as it would be on one rank.

Maleki, Musuvathi, Mytkowicz: Parallelizing dynamic programming through rank convergence (2014).
"""

import math
import warnings

import numpy as np
import torch

from mpillm.comm.collectives import allreduce
from mpillm.comm.group import as_group
from mpillm.comm.p2p import BACKWARD, FORWARD, irecv, isend, tag_of
from mpillm.errors import ConfigError, NumbersError, ShapeError, agreed
from mpillm.scan.blocks import Chain, relative

_EXACT_BITS = 52  # of whole numbers in double precision, with room for a sum of two
_FORBIDDEN_BITS = 42  # the same with room for vectors that drift apart
_FORGETS = 0.5  # of the steps of a rank that are computed once more: above, the ranks wait for each other


def viterbi(emissions_TK, transitions_KK, initial_K, comm):
    """Find the best path through a chain whose steps are spread over ranks.

    Collective over ``comm``.

    Parameters
    ----------
    emissions_TK : Tensor or array, shape (T_i, K), sharded(0)
        Scores of this rank's steps, in any number; those of rank 0 come first. The larger the better; -inf forbids.
    transitions_KK : Tensor or array, shape (K, K), replicated
        From the state of its row to that of its column.
    initial_K : Tensor or array, shape (K,), replicated
    comm : Comm or Group

    Returns
    -------
    path_T : Tensor of int64, shape (T_i,), sharded(0)
    score : int or float, replicated
        The sum of the path's scores: an integer if all scores are of integer types.

    Raises
    ------
    ShapeError, NumbersError, ConfigError
        On every rank, if shapes do not fit, scores are no numbers or +inf, or integers too far apart.

    Notes
    -----
    Of equally good paths it is the one that the sequential algorithm finds which takes the lowest state among equals: first
    for the last step, then for the one before it, and so on. Whole numbers (of any type) are computed exactly, and the path is
    the same at any rank count. Others are first rounded to about ``2**-51`` of the range of scores, with -inf among them
    ``2**-41``; on these the result is exact, and the same at any rank count.

    A rank computes ``T_i K**2`` sums, and those of the steps before vectors agree again. An exchange is a message of K
    numbers to the next rank and an allreduce of one; at most ``p`` forward, and ``p`` of one number backward, usually two
    each. Where more than half of a rank's steps had to be computed again, rank 0 warns.
    """
    group = as_group(comm)
    emissions, transitions, initial = (_array(scores) for scores in (emissions_TK, transitions_KK, initial_K))
    with agreed(group.comm, "viterbi"):
        _check(emissions, transitions, initial)
    counts, scores, is_integer = _as_integers(emissions, transitions, initial, group)
    if not sum(counts):
        return torch.zeros(0, dtype=torch.int64), 0 if is_integer else 0.0
    before = max((rank for rank in range(group.rank) if counts[rank]), default=None)
    after = min((rank for rank in range(group.rank + 1, group.size) if counts[rank]), default=None)
    line = _Line(group, *((before, after) if counts[group.rank] else (None, None)))
    path, recomputed = _decode(line, *scores)
    share = line.greatest(recomputed / max(1, counts[group.rank]))
    if share > _FORGETS and group.rank == 0:
        warnings.warn(f"viterbi: the chain of {sum(counts)} steps does not forget its past: on some rank {share:.0%} of the "
                      "steps were computed again in sequence, where more ranks do not help", RuntimeWarning, stacklevel=2)
    return torch.from_numpy(path), _score(emissions, transitions, initial, path, group, is_integer)


def _decode(line, emissions, transitions, initial):
    """Return this rank's part of the path, and how many steps it computed more than once."""
    chain = Chain(emissions, transitions) if len(emissions) else None
    zeros = np.zeros(len(transitions), transitions.dtype)
    if chain:
        chain.forward(relative(initial + emissions[0]) if line.before is None else chain.first_after(zeros))
    has_changed, assumed = chain is not None, zeros
    while line.greatest(has_changed):
        vector = line.pass_on(chain and chain.last_K, zeros, FORWARD)
        has_changed = vector is not None and (vector != assumed).any() and chain.begin_otherwise(chain.first_after(vector))
        assumed = vector
    state, has_changed = chain and int(chain.last_K.argmax()), chain is not None
    if chain:
        chain.backward(state)
    end_K = chain and chain.last_K
    while line.greatest(has_changed):
        later = line.pass_on(chain and chain.states_LB[0, :1].astype(np.int64), np.zeros(1, np.int64), BACKWARD)
        found = state if later is None else chain.state_before(end_K, int(later[0]))
        has_changed = found != state and chain.end_otherwise(found)
        state = found
    return (chain.path_T, chain.recomputed) if chain else (np.zeros(0, np.int64), 0)


class _Line:
    """The ranks that have steps, each with its neighbours."""

    def __init__(self, group, before, after):
        self.group, self.before, self.after = group, before, after

    def pass_on(self, values, like, kind):
        """Send values to the neighbour in the direction of ``kind``; return those that come in, None at the end."""
        to, source = (self.after, self.before) if kind == FORWARD else (self.before, self.after)
        tag, incoming = tag_of(kind), None
        if source is not None:
            incoming = irecv((len(like),), _wire(like), self.group, source, tag)
        outgoing = None if to is None else isend(_wire(values), self.group, to, tag)
        received = None if incoming is None else incoming.wait().numpy().astype(like.dtype)
        if outgoing is not None:
            outgoing.wait()
        return received

    def greatest(self, value):
        """Return the greatest value of all ranks."""
        return float(allreduce(torch.tensor(float(value), dtype=torch.float64), self.group, "max"))


def _wire(values):
    """Return numbers as what travels: all types here are exact in double precision."""
    return torch.from_numpy(values.astype(np.float64))


def _array(scores):
    return scores.detach().cpu().numpy() if isinstance(scores, torch.Tensor) else np.asarray(scores)


def _check(emissions, transitions, initial):
    states = len(initial) if initial.ndim == 1 else 0
    if not states or transitions.shape != (states, states) or emissions.ndim != 2 or emissions.shape[1] != states:
        raise ShapeError(f"viterbi: emissions {list(emissions.shape)}, transitions {list(transitions.shape)}, initial "
                         f"{list(initial.shape)}: must be [T, K], [K, K] and [K], with K at least 1")
    for name, scores in (("emissions", emissions), ("transitions", transitions), ("initial", initial)):
        if scores.dtype.kind == "f" and not (scores < np.inf).all():
            raise NumbersError(f"viterbi: {name} hold nan or +inf: scores are numbers, or -inf for what is forbidden")


def _as_integers(emissions, transitions, initial, group):
    """Return the ranks' numbers of steps, all scores as integers of one type, and whether they were given so."""
    given = emissions, transitions, initial
    mine = (len(emissions), list(map(_span, given)), all(scores.dtype.kind in "iub" for scores in given),
            all(map(_is_whole, given)), any(scores.dtype.kind == "f" and bool(np.isinf(scores).any()) for scores in given))
    counts, spans, integer, whole, infinite = zip(*group.comm.allgather(mine))
    if any(span[1:] != spans[0][1:] for span in spans):
        raise ConfigError("viterbi: transitions or initial differ between ranks: give the same to all")
    steps = [span[0] for span, count in zip(spans, counts) if count] or [(0, 0)]
    lows, highs = zip((min(low for low, _ in steps), max(high for _, high in steps)), *spans[0][1:])
    ranges = [high - low for low, high in zip(lows, highs)]
    bound = 2 * (max(ranges[1:]) + ranges[0])  # of a vector, a transition and a step's scores together
    shift, dtype = 0, np.dtype(np.float64)
    if not all(whole):  # where much is forbidden, vectors spread further than one step's scores do
        shift = (_FORBIDDEN_BITS if any(infinite) else _EXACT_BITS) - math.frexp(bound)[1]
    elif bound >= 2**_EXACT_BITS:
        raise ConfigError(f"viterbi: integers {bound // 2} apart: must be less than 2**{_EXACT_BITS - 1}, to be exact")
    elif not any(infinite):
        dtype = next((kind for kind in map(np.dtype, ("int8", "int16", "int32")) if bound <= np.iinfo(kind).max), dtype)
    return counts, [_rounded(scores, high, shift, dtype) for scores, high in zip(given, highs)], all(integer)


def _span(scores):
    """Return the least and the greatest of scores that are not forbidden, as numbers of Python."""
    if scores.dtype.kind == "f" and not np.isfinite(scores).all():
        scores = scores[np.isfinite(scores)]
    return (scores.min().item(), scores.max().item()) if scores.size else (0, 0)


def _is_whole(scores):
    return scores.dtype.kind != "f" or bool((np.rint(scores) == scores).all())


def _rounded(scores, greatest, shift, dtype):
    """Return scores less the greatest of them as integers, ``2**shift`` times as large."""
    if shift:
        return np.rint(np.ldexp(scores.astype(np.float64) - greatest, shift))
    exact = np.float64 if scores.dtype.kind == "f" else np.int64
    return np.subtract(scores, greatest, out=np.empty(scores.shape, dtype), dtype=exact, casting="unsafe")


def _score(emissions, transitions, initial, path, group, is_integer):
    """Add up the scores of the path, of integers exactly."""
    add, steps = (sum if is_integer else math.fsum), np.arange(len(path))
    mine = [*emissions[steps, path].tolist(), *transitions[path[:-1], path[1:]].tolist()]
    ends = group.comm.allgather((int(path[0]), int(path[-1]), add(mine)) if len(path) else None)
    ends = [end for end in ends if end]
    joints = [transitions[last, first].item() for (_, last, _), (first, _, _) in zip(ends, ends[1:])]
    return add([initial[ends[0][0]].item(), *joints, *(end[2] for end in ends)])
