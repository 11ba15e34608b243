"""What reducing gradients over the data axis adds to a step, and where their buckets are best cut."""

import math
from itertools import pairwise

import numpy as np

from mpillm.planner.buckets import arrival_s, bucket_cuts
from mpillm.planner.hierarchy import fastest_s
from mpillm.planner.workload import ITEM_BYTES, layer_parameters
from mpillm.schedules.pipeline import label


class Reduction:
    """Prices the sums over the data axis, for layouts of one configuration on one machine. Local.

    Parameters
    ----------
    config : Config
    machine : Machine
    work : callable
        ``work(layout, mode)`` returns what a layer with one way to recompute costs a microbatch, and the head.
    """

    def __init__(self, config, machine, work):
        self.config, self.machine, self._work = config, machine, work
        self._wide = max(4, ITEM_BYTES[config.train.dtype])  # of gradients
        cuts = config.layout.bucket_cuts
        self._given = None if cuts == "auto" else cuts

    def keeps_one_copy(self, layout):
        """Tell whether data ranks share one copy of the weights. Local."""
        return self.machine.shares_memory and layout.zero == 1 and self._inside(layout) == layout.data

    def price_s(self, layout, parameters, most_layers):
        """Return the seconds that it adds: there and back, less what backward hides of the way there.

        Hidden is what has arrived when backward ends, if every layer has its bucket. ``parameters`` and layers are
        those of the fullest rank.
        """
        if layout.data == 1:
            return 0.0
        one_way_s, n_bytes = self._one_way_s(layout), parameters * self._wide
        there_s = one_way_s(n_bytes)
        back_s = 0.0 if self.keeps_one_copy(layout) else self._one_way_s(layout, "allgather")(n_bytes)
        if self._overlaps(layout) and self._given != ():
            model = self.config.model
            count = most_layers if layout.pipeline == 1 and not model.tie_embeddings else most_layers - 1
            last = (layer_parameters(model) + model.vocab_size * model.hidden_size) / layout.tensor * self._wide
            modes = {layout.recompute} if isinstance(layout.recompute, str) else set(layout.recompute)
            hidden_s = count * min(self._completes_s(self._work(layout, mode)[0], layout) for mode in modes)
            there_s = max(there_s - hidden_s, one_way_s(last))
        return there_s + back_s

    def played(self, layout, sizes, ends_s, parameters):
        """Return the cuts of buckets, chosen unless given, and the seconds from the pipeline's end to all gradients.

        Local. ``sizes`` are the layers of every stage, ``ends_s`` the end of its last action. Returns ``None`` for the
        seconds where nothing overlaps, which :meth:`price_s` knows as well. What is sent and received beside backward
        holds it up where processors drive the network.
        """
        if not self._overlaps(layout):
            return self._given or (), None
        n_bytes, data = parameters * self._wide, layout.data
        there_s, back_s = (self._one_way_s(layout, op)(n_bytes) for op in ("reduce_scatter", "allgather"))
        cuts, arrived_s = self._play_buckets(layout, sizes, ends_s)
        exposed_s = arrived_s - max(ends_s)
        hidden_bytes = n_bytes * (data - 1) / data * max(0.0, 1 - exposed_s / there_s)
        busy_s = 2 * hidden_bytes * self._level(layout).busy_s_per_byte
        return cuts, exposed_s + busy_s + back_s

    def bucket_bytes(self, layout, sizes, cuts):
        """Return the bytes of the buckets that ``cuts`` make, by stage, each in the order of backward. Local."""
        found = []
        for start, stop in pairwise(np.cumsum([0, *sizes]).tolist()):
            places, _, n_bytes = self._gradients(layout, start, stop, 0.0)
            found += [sum(n_bytes[low:high]) for low, high in pairwise((0, *_begins(places, cuts), len(places)))]
        return found

    def _level(self, layout):
        """Return the level over which the data axis reaches."""
        return self.machine.level_for(layout.stride("data") * layout.data)

    def _inside(self, layout):
        """Return the data ranks that share a node."""
        return min(layout.data, max(1, self.machine.ranks_per_node // layout.stride("data")))

    def _overlaps(self, layout):
        """Tell whether gradients are reduced beside backward: where no two data ranks share a node, whose cores would
        have to do it."""
        return self._inside(layout) == 1 < layout.data and self.config.train.numerics != "exact"

    def _one_way_s(self, layout, op="reduce_scatter"):
        """Return the function from bytes to seconds of a half of an allreduce over the data axis: for each number of
        bytes by the algorithm that is best for so many."""
        machine, inside, level = self.machine, self._inside(layout), self._level(layout)
        outside = math.ceil(layout.data / inside)
        return lambda n_bytes: (fastest_s(op, machine.levels[0], inside, n_bytes)
                                + fastest_s(op, level, outside, n_bytes / inside))

    def _completes_s(self, work, layout):
        """Return the seconds from one gradient to the next in the action that completes them."""
        is_split = layout.schedule.startswith("zb") or label(layout.schedule) != layout.schedule
        return work.weight_s + (0.0 if is_split else work.input_s)

    def _play_buckets(self, layout, sizes, ends_s):
        """Return the cuts of buckets and when the last one of any rank has arrived. A rank's stages follow each other
        last to first."""
        cuts, free_s, time_s = set(), {}, self._one_way_s(layout)
        starts = np.cumsum([0, *sizes]).tolist()
        for stage, (start, stop) in reversed(list(enumerate(pairwise(starts)))):
            places, ready_s, n_bytes = self._gradients(layout, start, stop, ends_s[stage])
            free = free_s.get(stage % layout.pipeline, 0.0)
            if self._given is None:
                own, end_s = bucket_cuts(ready_s, n_bytes, time_s, free)
                cuts |= {places[i - 1] for i in own}
            else:
                end_s = arrival_s(_begins(places, self._given), ready_s, n_bytes, time_s, free)
            free_s[stage % layout.pipeline] = end_s
        return tuple(sorted(cuts)) if self._given is None else self._given, max(free_s.values())

    def _gradients(self, layout, start, stop, end_s):
        """Return for layers ``[start, stop)`` with their ends, in the order of backward: the layer that each gradient
        belongs to (-1 the embedding), when it is ready if the last is at ``end_s``, and its bytes."""
        model, modes = self.config.model, layout.recompute
        modes = (modes,) * model.num_layers if isinstance(modes, str) else modes
        table, each = model.vocab_size * model.hidden_size, layer_parameters(model)
        found = [(stop, self._work(layout, "none")[1], table)] * (stop == model.num_layers)
        found += [(place, self._work(layout, modes[place])[0], each) for place in range(stop - 1, start - 1, -1)]
        after = np.cumsum([self._completes_s(work, layout) for _, work, _ in found])
        if start == 0:
            found, after = found + [(-1, None, table)], np.append(after, after[-1])
        places, _, counts = zip(*found)
        return places, end_s - after[-1] + after, [count / layout.tensor * self._wide for count in counts]


def _begins(places, cuts):
    """Return at which of the gradients of these layers another bucket begins."""
    return [i for i in range(1, len(places)) if places[i - 1] in cuts]
