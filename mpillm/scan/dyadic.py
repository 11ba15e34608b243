"""Which blocks of a sequence are combined, in an order that no division over ranks changes.

Node ``i`` of level ``k`` is the block of elements ``i * 2**k`` to ``(i + 1) * 2**k``; it combines its two halves. The first
``m`` elements are the nodes that the bits of ``m`` name, combined from left to right. A rank makes every node that lies within
its part; of those, the ones whose parents do not, at most two a level, are all that other ranks need of it.
"""


def pieces(start, stop):
    """Return the nodes ``(level, index)`` that cover ``start`` to ``stop`` and have no parent there. Local.

    >>> pieces(3, 9)
    [(0, 3), (0, 8), (2, 1)]
    """
    found, level = [], 0
    while start < stop:
        if start % 2:
            found.append((level, start))
            start += 1
        if stop % 2 and start < stop:
            found.append((level, stop - 1))
            stop -= 1
        start, stop, level = start // 2, stop // 2, level + 1
    return found


def halves(start, stop):
    """Return ``(first, last)``: nodes ``first`` to ``last`` of the level above lie within ``start`` to ``stop``. Local."""
    return -(-start // 2), stop // 2
