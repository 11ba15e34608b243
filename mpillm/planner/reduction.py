"""What reducing gradients over the data axis adds to a step, and where their buckets are best cut."""

import math
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np

from mpillm.planner.buckets import bucket_cuts
from mpillm.planner.collective_costs import collective_s
from mpillm.planner.counts import ITEM_BYTES, trained_sizes
from mpillm.planner.timeline import BucketTimes


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
        self._half_s = lru_cache(None)(self._make_half_s)

    def keeps_one_copy(self, layout):
        """Tell whether data ranks share one copy of the weights. Local."""
        return self.machine.shares_memory and layout.zero == 1 and self._inside(layout) == layout.data

    def in_window(self, layout):
        """Tell whether gradients lie in windows: where data ranks share a node that has them. Local."""
        measured = self.machine.levels[0].measured("reduce_scatter", in_window=True)
        return self._inside(layout) > 1 and bool(self.machine.shares_memory or measured and measured.in_window)

    def price_s(self, layout, parameters, most_layers, is_split):
        """Return the seconds that it adds to the pipeline's, less what backward hides of it. Local.

        Hidden is what has arrived when backward ends, if every layer has its bucket. ``parameters``, those that are trained,
        and layers are those of the fullest rank; ``is_split`` tells whether input and weight halves are actions of their own.
        """
        if layout.data == 1:
            return 0.0
        half_s = partial(self._half_s, "reduce_scatter", layout.data, layout.stride("data"))
        added_s = half_s(parameters * self._wide)
        if self.overlaps(layout) and self.config.layout.bucket_cuts != ():
            sizes = self._sizes(layout)
            count = most_layers if layout.pipeline == 1 and not sizes.shared else most_layers - 1
            last = (sizes.layers[0] + sizes.first) * self._wide
            modes = {layout.recompute} if isinstance(layout.recompute, str) else set(layout.recompute)
            hidden_s = count * min(_completes_s(self._work(layout, mode)[0], is_split) for mode in modes)
            added_s = max(added_s - hidden_s, half_s(last))
        return added_s + self.gathered_s(layout, parameters)

    def gathered_s(self, layout, parameters):
        """Return the seconds in which reduced gradients are gathered: where each data rank needs all of them. Local."""
        if layout.zero and self.config.train.numerics != "exact":
            return 0.0
        return self._half_s("allgather", layout.data, layout.stride("data"), parameters * self._wide)

    def weights_s(self, layout, parameters):
        """Return the seconds that updated weights take to the other data ranks. Local."""
        if not layout.zero or self.keeps_one_copy(layout):
            return 0.0
        n_bytes = parameters * ITEM_BYTES[self.config.train.dtype]
        return self._half_s("allgather", layout.data, layout.stride("data"), n_bytes, in_window=False)

    def overlaps(self, layout):
        """Tell whether gradients are reduced beside backward: where no two data ranks share a node, whose cores would
        have to do it, and nothing is frozen. Local."""
        train = self.config.train
        return self._inside(layout) == 1 < layout.data and train.numerics != "exact" and not train.freeze

    def level(self, layout):
        """Return the level over which the data axis reaches. Local."""
        return self.machine.level_for(layout.stride("data") * layout.data)

    def cuts(self, layout, sizes, pace, ends_s, is_split):
        """Return where buckets end so that the last one arrives first. Local.

        Of every stage, ``sizes`` are its layers, ``pace`` how many times as long as on a rank of speed 1 they take, and
        ``ends_s`` when its gradients are complete. A rank's stages follow each other last to first.
        """
        found, free_s = set(), {}
        time_s = partial(self._make_half_s, "reduce_scatter", layout.data, layout.stride("data"))
        starts = np.cumsum([0, *sizes]).tolist()
        for stage, (start, stop) in reversed(list(enumerate(pairwise(starts)))):
            places, left_s, n_bytes = self._gradients(layout, start, stop, is_split)
            rank = stage % layout.pipeline
            ready_s = ends_s[stage] - left_s * pace[stage]
            own, free_s[rank] = bucket_cuts(ready_s, n_bytes, time_s, free_s.get(rank, 0.0))
            found |= {places[i - 1] for i in own}
        return tuple(sorted(found))

    def buckets(self, layout, sizes, pace, cuts, is_split):
        """Return the buckets that ``cuts`` make, of every stage in the order of its backward; a matrix that embedding and
        head share always has its own. Local."""
        data, time_s = layout.data, partial(self._half_s, "reduce_scatter", layout.data, layout.stride("data"))
        byte_s = 2 * (data - 1) / data * self.level(layout).busy_s_per_byte  # what is sent and what is received
        cuts = {*cuts, 0, sum(sizes)} if self.config.model.tie_embeddings else {*cuts}
        found = []
        for factor, (start, stop) in zip(pace, pairwise(np.cumsum([0, *sizes]).tolist())):
            places, left_s, n_bytes = self._gradients(layout, start, stop, is_split)
            ends = [i for i in range(1, len(places)) if places[i - 1] in cuts] + [len(places)]
            sums = [sum(n_bytes[low:high]) for low, high in pairwise((0, *ends))]
            found.append(tuple(BucketTimes(n, float(left_s[end - 1] * factor), float(time_s(n)), n * byte_s)
                               for n, end in zip(sums, ends)))
        return tuple(found)

    def _inside(self, layout):
        """Return the data ranks that share a node."""
        return _together(self.machine, layout.data, layout.stride("data"))

    def _make_half_s(self, op, data, stride, n_bytes, in_window=True):
        """Return the seconds of a half of an allreduce over data ranks so far apart; inside a node of what lies in its
        window, as gradients do where there is one."""
        machine, inside = self.machine, _together(self.machine, data, stride)
        return (collective_s(op, machine.levels[0], inside, n_bytes, in_window)
                + collective_s(op, machine.level_for(stride * data), math.ceil(data / inside), n_bytes / inside))

    def _gradients(self, layout, start, stop, is_split):
        """Return for layers ``[start, stop)`` with their ends, in the order of backward: the layer that each gradient
        belongs to (-1 the embedding), what backward has still to do when it is complete, and its bytes."""
        num_layers, modes, sizes = self.config.model.num_layers, layout.recompute, self._sizes(layout)
        modes = (modes,) * num_layers if isinstance(modes, str) else modes
        _, head, embedding = self._work(layout, "none")
        found = [(stop, head, sizes.last)] * (stop == num_layers)
        found += [(place, self._work(layout, modes[place])[0], sizes.layers[place]) for place in range(stop - 1, start - 1, -1)]
        found += [(-1, embedding, sizes.first)] * (start == 0)
        after = np.cumsum([_completes_s(work, is_split) for _, work, _ in found])
        places, _, counts = zip(*found)
        return places, after[-1] - after, [count * self._wide for count in counts]

    def _sizes(self, layout):
        """Return what the fullest tensor rank trains of the parameters."""
        train = self.config.train
        return trained_sizes(self.config.model, train.freeze, layout.tensor, train.numerics == "exact")


def _together(machine, count, stride):
    """Return how many of some ranks so far apart share a node."""
    return min(count, max(1, machine.ranks_per_node // stride))


def _completes_s(work, is_split):
    """Return the seconds from one gradient to the next in the action that completes them."""
    return work.weight_s + (0.0 if is_split else work.input_s)
