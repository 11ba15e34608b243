"""Chains for tests, and what a loop over their steps gives."""

import itertools

import numpy as np


def draw(steps, states, seed=0, low=-9, high=1):
    """Return integer scores: of steps, transitions and the start. Small ranges make many ties."""
    random = np.random.default_rng(seed)
    return [random.integers(low, high, shape) for shape in ((steps, states), (states, states), states)]


def decode_in_sequence(emissions, transitions, initial):
    """Return path and score by Viterbi's algorithm, with back-pointers, the lowest of equal states."""
    vectors, pointers = initial + emissions[0], []
    for scores in emissions[1:]:
        sums = vectors[:, None] + transitions
        pointers.append(sums.argmax(0))
        vectors = sums.max(0) + scores
    path = [int(vectors.argmax())]
    for pointer in reversed(pointers):
        path.append(int(pointer[path[-1]]))
    return np.array(path[::-1]), vectors.max()


def every_path(emissions, transitions, initial):
    """Return the score of every path, by path."""
    steps, states = emissions.shape
    return {path: initial[path[0]] + sum(emissions[t, s] for t, s in enumerate(path))
            + sum(transitions[a, b] for a, b in zip(path, path[1:]))
            for path in itertools.product(range(states), repeat=steps)}
