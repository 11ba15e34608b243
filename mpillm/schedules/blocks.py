"""Block partitions: who owns which piece of ``n`` items.

Block ``i`` of ``p`` starts at ``i * n // p``. Sizes differ by at most one, any ``n >= 0`` works (blocks may be
empty), and partitions nest: the blocks of ``p`` are unions of the blocks of ``k * p``. The fixed binary tree of
``numerics = "exact"`` rests on that: node ``i`` of level ``k`` owns block ``i`` of ``2**k``.
"""

from functools import lru_cache

ALIGNMENT = 16  # elements on whose multiples every parameter and shard of the flat storage starts
# Float32 logits of a chunk, over the whole vocabulary: what stays in a core's cache; what keeps a GPU busy.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
# Of a part of a weight's gradient with its factor, twice: added while in the cache; more would come from the system.
SUM_BYTES = 2 << 20


def bounds(n, p, i):
    """Return ``(start, stop)`` of block ``i`` of ``n`` items in ``p`` blocks."""
    return i * n // p, (i + 1) * n // p


@lru_cache(maxsize=1024)
def all_bounds(n, p):
    """Return ``(start, stop)`` of all ``p`` blocks of ``n`` items."""
    return tuple(bounds(n, p, i) for i in range(p))


def counts(n, p):
    """Return the sizes of all ``p`` blocks of ``n`` items."""
    return [(i + 1) * n // p - i * n // p for i in range(p)]


def loss_chunks(tokens, vocab_size, device_type="cpu"):
    """Return in how many chunks of tokens, cut by :func:`bounds`, logits and loss are computed."""
    return max(1, -(-tokens * vocab_size * 4 // CHUNK_BYTES[device_type]))


def align(n, multiple):
    """Round ``n`` up to a multiple."""
    return -(-n // multiple) * multiple
