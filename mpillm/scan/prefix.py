"""Scans and reductions of an associative operator over a sequence that is spread over ranks, in any way.

Reduce, exchange, scan: every rank combines its elements to the nodes of :mod:`mpillm.scan.dyadic`, one allgather brings the
outermost of them to all ranks, and every rank scans its own part from what lies before. Nothing is combined twice, but the
few nodes across the borders of ranks. The order in which elements are combined depends on their place in the sequence alone,
so that the results have the same bits at any rank count.

For ``n`` elements of ``m`` bytes on ``p`` ranks a rank combines about ``2 n / p`` pairs, and up to ``2 p log2(n / p)`` of the
exchange. It sends at most ``2 log2(n / p) m`` bytes to each other rank, backward as many of gradients.
"""

import functools
from itertools import accumulate

import torch

from mpillm.autograd.regions import allgather_to, gather_from
from mpillm.comm.group import as_group
from mpillm.errors import ShapeError
from mpillm.scan.dyadic import halves, pieces


def scan(operator, x, comm):
    """Combine each element with all before it.

    Collective over ``comm``, as is backward.

    Parameters
    ----------
    operator : Operator
        From :mod:`mpillm.scan.operators`, or your own.
    x : Tensor or tuple of Tensor, shapes (n_i, ...), sharded(0)
        This rank's elements along dim 0, any number of them and none too; those of rank 0 come first.
    comm : Comm or Group

    Returns
    -------
    Tensor or tuple of Tensor, same shapes, sharded(0)

    Raises
    ------
    ShapeError
        On every rank, if tensors do not have one dtype, one number of elements a rank, and otherwise equal shapes, or if the
        operator does not take the dtype.

    Notes
    -----
    One allgather of a short object and one of at most ``2 log2(n_i) + 1`` elements a rank; backward one reduce_scatter of
    these. The same bits at any rank count and any division.
    """
    shared = _Shared(operator, x, comm, allgather_to)
    return shared.result(shared.prefixes(shared.start + 1, shared.stop))


def exclusive_scan(operator, x, comm):
    """Combine all elements before each; the first gets the identity.

    Collective over ``comm``. Parameters, results, errors and cost are those of :func:`scan`; the operator needs an identity.
    """
    _check_identity(operator)
    shared = _Shared(operator, x, comm, allgather_to)
    found = shared.prefixes(shared.start, shared.stop - 1)
    if shared.start == 0 and shared.stop > 0:
        first = shared.identity()
        found = first if found is None else tuple(map(torch.cat, zip(first, found)))
    return shared.result(found)


def reduce(operator, x, comm):
    """Combine all elements of all ranks into one, which every rank gets.

    Collective over ``comm``; backward sends nothing.

    Parameters and errors are those of :func:`scan`; no elements at all give the identity.

    Returns
    -------
    Tensor or tuple of Tensor, shapes (...), replicated
    """
    shared = _Shared(operator, x, comm, gather_from)
    found = tuple(part[0] for part in shared.tied(shared.total()))
    return found if shared.is_tuple else found[0]


class _Shared:
    """The nodes of this rank's part, and after the exchange those of all ranks that it does not make itself."""

    def __init__(self, operator, x, comm, movement):
        self.operator, self.is_tuple, self.group = operator, isinstance(x, tuple), as_group(comm)
        self.own = x if self.is_tuple else (x,)
        counts = self._agree_on_counts()
        self.start = sum(counts[:self.group.rank])
        self.stop, self.num_elements = self.start + counts[self.group.rank], sum(counts)
        self.levels = self._combined_upward()
        self._exchange(counts, movement)

    def combine(self, left, right):
        """Combine tuples of tensors as the operator does."""
        if self.is_tuple:
            return tuple(self.operator.combine(left, right))
        return (self.operator.combine(left[0], right[0]),)

    def identity(self):
        """Return one element that changes nothing, as a tuple."""
        _check_identity(self.operator)
        like = tuple(part.new_zeros((1, *part.shape[1:])) for part in self.own)
        found = self.operator.identity(like if self.is_tuple else like[0])
        return tuple(found) if self.is_tuple else (found,)

    def prefixes(self, low, high, level=0):
        """Return, for every ``m`` from ``low`` to ``high`` but 0, the first ``m`` nodes of a level as one; None for none.

        An even number of nodes is half as many of the level above; for an odd one the last is added.
        """
        low = max(low, 1)
        if high < low:
            return None
        odd = low | 1
        nodes = self._even_nodes(level, odd - 1, high)
        if high == 1:
            return nodes
        offset, alone = max(low // 2, 1), int(low == 1)  # nothing is before a node that is alone
        above = self.prefixes(low // 2, high // 2, level + 1)
        even = _cut(above, (low + 1) // 2 - offset, None)
        if nodes is None:
            return even
        number, before = len(nodes[0]) - alone, odd // 2 + alone - offset
        added = self.combine(_cut(above, before, before + number), _cut(nodes, alone, None)) if number else _cut(nodes, 1, None)
        return tuple(_woven(low, *parts) for parts in zip(even, added, _cut(nodes, 0, alone)))

    def total(self):
        """Return all elements of all ranks as one, as a tuple."""
        nodes = [self.node(*piece) for piece in reversed(pieces(0, self.num_elements))]
        return functools.reduce(self.combine, nodes) if nodes else self.identity()

    def result(self, found):
        """Return this rank's elements as the caller gave them, also if there are none."""
        found = self.tied(self.own if found is None else found)
        return found if self.is_tuple else found[0]

    def tied(self, found):
        """Let backward enter the exchange on every rank, also where nothing of other ranks was used."""
        if self.gathered.requires_grad:
            return tuple(_Tie.apply(part, self.gathered) for part in found)
        return found

    def node(self, level, index):
        """Return one node that is not within this rank's part: out of the exchange, or combined here."""
        if (level, index) not in self._foreign:
            row = self._rows.get((level, index))
            self._foreign[level, index] = (
                self.combine(self.node(level - 1, 2 * index), self.node(level - 1, 2 * index + 1)) if row is None else
                tuple(flat.view(1, *part.shape[1:]) for part, flat in zip(self.own, self.gathered[row].split(self._widths))))
        return self._foreign[level, index]

    def _even_nodes(self, level, first, stop):
        """Return the nodes ``first``, ``first + 2``, ... before ``stop`` of a level; None for none."""
        if first >= stop:
            return None
        start, own = self.levels[level] if level < len(self.levels) else (stop, None)
        found = [self.node(level, index) for index in range(first, min(start, stop), 2)]
        mine = max(first, start + start % 2)
        if mine < stop and own is not None:
            found.append(tuple(part[mine - start:stop - start:2] for part in own))
        return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found)))

    def _combined_upward(self):
        """Return ``(index of the first, nodes)`` for every level on which a node lies within this rank's part."""
        levels, start, stop, nodes = [], self.start, self.stop, self.own
        while start < stop:
            levels.append((start, nodes))
            (first, last), inside = halves(start, stop), nodes
            if first >= last:
                break
            left, right = 2 * first - start, 2 * last - start
            nodes = self.combine(tuple(part[left:right:2] for part in inside),
                                 tuple(part[left + 1:right:2] for part in inside))
            start, stop = first, last
        return levels

    def _exchange(self, counts, movement):
        """Bring the outermost nodes of all ranks here, in rows of one tensor."""
        borders = [pieces(stop - count, stop) for count, stop in zip(counts, accumulate(counts))]
        num_rows = max(map(len, borders))
        self._rows = {piece: rank * num_rows + row for rank, border in enumerate(borders) for row, piece in enumerate(border)}
        self._widths, self._foreign = [part.shape[1:].numel() for part in self.own], {}
        rows = [torch.cat([part[:0].reshape(0, width) for part, width in zip(self.own, self._widths)], 1)]  # gradients go on
        for level, index in borders[self.group.rank]:
            start, nodes = self.levels[level]
            rows.append(torch.cat([part[index - start].reshape(1, -1) for part in nodes], 1))
        rows.append(rows[0].new_zeros(num_rows - len(rows) + 1, sum(self._widths)))
        sent = torch.cat(rows)
        self.gathered = movement(sent, self.group, size=num_rows * self.group.size)

    def _agree_on_counts(self):
        """Return how many elements each rank has, or raise on all of them the same."""
        described = [(str(part.dtype), tuple(part.shape[1:]), part.shape[:1]) for part in self.own]
        told = self.group.comm.allgather((self.operator.name, described))
        name, first = told[0]
        counts = [parts[0][2][0] if parts and parts[0][2] else 0 for _, parts in told]
        for rank, (other, parts) in enumerate(told):
            alike = [part[:2] for part in parts] == [part[:2] for part in first] and other == name
            if not alike or not parts or len({(part[0], part[2]) for part in parts}) != 1 or not parts[0][2]:
                raise ShapeError(f"scan of {other}: rank {rank} has {_spelled(parts)}, rank 0 {_spelled(first)}: every element "
                                 "must have the same shapes, all tensors one dtype, and a rank as many elements in each")
        if self.operator.dtypes == "float" and not self.own[0].dtype.is_floating_point:
            raise ShapeError(f"scan of {name}: {first[0][0]}: takes floating point numbers")
        return counts


class _Tie(torch.autograd.Function):
    """A tensor as it is, with a gradient of zero for another, whose own backward is a collective."""

    @staticmethod
    def forward(ctx, x, other):
        ctx.other = other.shape, other.dtype, other.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        shape, dtype, device = ctx.other
        return grad, torch.zeros(shape, dtype=dtype, device=device)


def _check_identity(operator):
    if operator.identity is None:
        raise ShapeError(f"scan of {operator.name}: the operator has no identity, which an exclusive scan and the reduction of "
                         "nothing need: give it one")


def _cut(parts, start, stop):
    return tuple(part[start:stop] for part in parts)


def _woven(low, even, odd, alone):
    """Return what belongs to the numbers from ``low`` on: that of 1 is ``alone``, if there is one."""
    out = even.new_empty((len(even) + len(odd) + len(alone), *even.shape[1:]))
    out[:len(alone)] = alone
    out[2 if len(alone) else 1 - low % 2::2] = odd
    out[low % 2::2] = even
    return out


def _spelled(parts):
    return ", ".join(f"{dtype} {[*number, *shape]}" for dtype, shape, number in parts) or "no tensor"
