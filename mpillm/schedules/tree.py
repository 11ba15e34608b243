"""The fixed binary tree in which ``numerics = "exact"`` adds things up.

Node ``i`` of level ``k`` covers the items of block ``i`` of ``2**k`` (see :mod:`mpillm.schedules.blocks`), so what a
rank of a power-of-two axis owns is always one whole branch: it adds its branch, the ranks add the rest in the same
tree, and the sum has the same bits on every layout.
"""

from mpillm.schedules.blocks import bounds


def split(total, start, stop):
    """Return where the tree over ``total`` items cuts the branch ``[start, stop)`` in two, or None for one item."""
    if stop - start < 2:
        return None
    blocks, index = 1, 0
    while True:
        middle = bounds(total, 2 * blocks, 2 * index)[1]
        low, high = bounds(total, blocks, index)
        if (low, high) == (start, stop) and low < middle < high:
            return middle
        blocks, index = 2 * blocks, 2 * index + (start >= middle)


def tree_sum(items, add, total=None, start=0):
    """Add ``items``, which are numbers ``start ...`` of ``total``, along the tree; ``None`` items count as nothing.

    Local. ``add(left, right)`` returns the sum. Returns ``None`` when every item is ``None``.
    """
    total = len(items) if total is None else total
    return _branch_sum(items, add, total, start, start, start + len(items)) if items else None


def _branch_sum(items, add, total, start, low, high):
    """Add the items of branch ``[low, high)``. Not a function within another that calls itself: that would be a cycle,
    which keeps all items until the garbage collector comes by."""
    if high - low == 1:
        return items[low - start]
    middle = split(total, low, high)
    left, right = (_branch_sum(items, add, total, start, *half) for half in ((low, middle), (middle, high)))
    if left is None or right is None:
        return left if right is None else right
    return add(left, right)


class TreeAccumulator:
    """Adds items that come one at a time, in any order, along the tree, holding as few as it can.

    ``add(left, right)`` may reuse ``left``'s storage. The items of one branch ``[start, stop)`` of ``total`` are
    expected; :attr:`value` is their sum once all came.
    """

    def __init__(self, total, start, stop, add):
        self.total, self.start, self.stop, self.add = total, start, stop, add
        self.partial = {}

    def push(self, index, item):
        """Take item number ``index``."""
        low, high, value = index, index + 1, item
        while (low, high) != (self.start, self.stop):
            parent, middle = self._parent(low, high)
            sibling = (middle, parent[1]) if low < middle else (parent[0], middle)
            if sibling not in self.partial:
                break
            other = self.partial.pop(sibling)
            value = self.add(value, other) if low < middle else self.add(other, value)
            low, high = parent
        self.partial[low, high] = value

    def _parent(self, low, high):
        """Find the smallest branch that strictly contains ``[low, high)``, and where it is cut."""
        first, last = self.start, self.stop
        while True:
            middle = split(self.total, first, last)
            half = (first, middle) if low < middle else (middle, last)
            if half == (low, high):
                return (first, last), middle
            first, last = half

    @property
    def value(self):
        """The finished sum."""
        return self.partial[self.start, self.stop]
