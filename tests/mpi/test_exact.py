"""Bits and bytes: ``exact`` gives the same bits on every layout, ``fast`` in every run; what is held, what is sent."""

from collections import Counter
from itertools import groupby

import numpy as np
import pytest
import torch
from helpers import assert_all
from tiny import FAMILIES, GROUPED, alone, one_for_every_degrees, tiny, train, with_layout
from torch.utils._python_dispatch import TorchDispatchMode

from mpillm.comm import shared
from mpillm.comm.single import SingleComm
from mpillm.errors import MpillmError
from mpillm.nn.products import WAYS
from mpillm.planner.keys import describe
from mpillm.schedules.blocks import align, counts
from mpillm.train.engine import Engine

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

FROZEN = "frozen up to a layer and in parts behind it, learning rates by name"
EXACT = {"train.numerics": "exact", "train.dtype": "float32"}
MODELS = {
    "odd": {},
    "tied-and-shared-heads": {**GROUPED["shared"], "model.tie_embeddings": True, "model.num_layers": 4},
    "straddling-heads-and-documents": {**GROUPED["straddling"], "data.mask_documents": True, "model.num_layers": 4},
    **{name: {"model.num_layers": 4, **FAMILIES[name]}
       for name in ("llama3", "qwen3", "gpt2", "gpt_neox", "bert", "classes", "a pooler", "means", "tags", "values", FROZEN)},
}


def covers(engine, whole, comm):
    """Tell whether the ranks together hold every element of the whole weights."""
    held = {name: np.zeros(len(values), bool) for name, values in whole.items()}
    for name, ranges in engine.weight_ranges().items():
        for start, values in ranges:
            held[name][start:start + len(values)] = True
    return all(np.logical_or.reduce(flags).all() for flags in zip(*comm.allgather([*held.values()])))


@pytest.mark.parametrize("model", MODELS)
def test_exact_gives_the_bits_of_one_rank_on_every_layout(comm, model):
    """At 3 ranks only the pipeline admits them: the trees of the other axes are binary."""
    config = tiny({**EXACT, **MODELS[model]})
    history, whole = alone(config, comm, 3)
    layouts = one_for_every_degrees(config, comm.size)
    assert len(layouts) == {1: 1, 2: 3, 3: 1, 4: 6}[comm.size]
    for layout in layouts:
        engine = Engine(layout, comm)
        same = train(engine, 3) == history
        wrong = [name for name, ranges in engine.weight_ranges().items() for start, values in ranges
                 if not torch.equal(values, whole[name][start:start + len(values)])]
        ok = same and not wrong and covers(engine, whole, comm)
        engine.free()
        assert_all(ok, f"{describe(layout.layout)}: {same} {wrong}", comm)


def test_exact_does_not_depend_on_schedule_sharding_or_recompute(comm):
    config = tiny({**EXACT, "model.num_layers": 4})
    history, whole = alone(config, comm, 2)
    for schedule, recompute in (("gpipe", "full"), ("zb-h2", "selective"), ("1f1b", "none")):
        layout = with_layout(config, pipeline=comm.size, schedule=schedule, recompute=recompute)
        engine = Engine(layout.resolve(comm.size), comm)
        ok = train(engine, 2) == history
        ok &= all(torch.equal(values, whole[name][start:start + len(values)])
                  for name, ranges in engine.weight_ranges().items() for start, values in ranges)
        engine.free()
        assert_all(ok, schedule, comm)


def test_a_way_of_products_that_fails_on_one_rank_is_taken_by_none(comm, monkeypatch):
    """Also in float64, which oneDNN has no kernels for."""
    first, *others = WAYS
    config = tiny({**EXACT, "model.num_layers": 3, "train.dtype": "float64"})
    if comm.rank == comm.size - 1:
        monkeypatch.setitem(WAYS, first, lambda left, right: left @ right + left.data_ptr() % 64)
    with monkeypatch.context() as everywhere:
        everywhere.setitem(WAYS, first, lambda left, right: left @ right + left.data_ptr() % 64)
        history, whole = alone(config, comm, 2)
    for layout in one_for_every_degrees(config, comm.size):
        engine = Engine(layout, comm)
        ok = engine.way in others and train(engine, 2) == history
        ok &= all(torch.equal(values, whole[name][start:start + len(values)])
                  for name, ranges in engine.weight_ranges().items() for start, values in ranges)
        engine.free()
        assert_all(ok, f"{describe(layout.layout)}: {engine.way}", comm)


def test_ranks_whose_products_differ_are_refused_on_all(comm, monkeypatch):
    more = float(comm.rank == comm.size - 1 > 0)
    for way in WAYS:
        monkeypatch.setitem(WAYS, way, lambda left, right: (left[:, :, None] * right.contiguous()).sum(1) + more)
    layout = with_layout(tiny(EXACT), data=1, pipeline=comm.size, tensor=1).resolve(comm.size)
    if comm.size == 1:
        Engine(layout, comm).free()
        return
    with pytest.raises(MpillmError, match=rf"ranks \[{comm.size - 1}\] of {comm.size} compute other bits"):
        Engine(layout, comm)


def test_fast_would_fail_the_comparison():
    """The bits of fast depend on the blocks of a sum: the test above would see that."""
    runs = [Engine(tiny({**EXACT, "model.num_layers": 2, **changes}, 1), SingleComm())
            for changes in ({}, {"train.numerics": "fast"})]
    for engine in runs:
        train(engine, 2)
    weights = [engine.weight_ranges()["layers.0.ffn.up.weight"][0][1] for engine in runs]
    assert not torch.equal(*weights) and torch.allclose(*weights, atol=1e-3)


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        parts = out if isinstance(out, (list, tuple)) else [out]
        self.seen |= {tuple(x.shape) for x in parts if torch.is_tensor(x)}
        return out


class Formula:
    """What a rank of a layout holds and sends, from the sizes alone."""

    def __init__(self, engine):
        self.config, self.layout = engine.config, engine.config.layout
        self.model, self.is_exact = engine.config.model, engine.config.train.numerics == "exact"
        self.coord = {axis: engine.mesh.coord(axis) for axis in ("data", "pipeline", "tensor")}
        self.stages = {stage.index: range(stage.module.start, stage.module.stop) for stage in engine.stages}
        self.d, self.p, self.t = self.layout.data, self.layout.pipeline, self.layout.tensor
        self.item = 8 if engine.config.train.dtype == "float64" else 4
        self.sp = self.layout.sequence_parallel and self.t > 1
        self.is_one_copy = self.layout.zero == 1 and engine.mesh.group("data").node is not None
        self.is_cut = self.layout.bucket_cuts != ()
        self.is_whole_kv = not self.is_exact and self.t > self.model.num_kv_heads

    def mine(self, units):
        return counts(units, self.t)[self.coord["tensor"]]

    def layer(self):
        """Sizes of a layer's weights on this rank, and of those whose gradients are partial."""
        m, width = self.model, self.model.hidden_size
        group = m.num_heads // m.num_kv_heads
        heads = self.mine(m.num_heads) if self.is_whole_kv else self.mine(m.num_kv_heads) * group
        kv_heads = m.num_kv_heads if self.is_whole_kv else self.mine(m.num_kv_heads)
        split = [heads * m.head_dim * width] * 2 + [self.mine(m.ffn_size) * width] * 3
        shared, norms = [kv_heads * m.head_dim * width] * 2, [width] * 2
        return split + shared + norms, (shared if self.is_whole_kv else []) + (norms if self.sp else [])

    def buckets(self):
        """Return for every bucket: sizes of its weights, of the partial ones, and whether it is a tied copy.

        Without a plan there is one a stage where gradients are reduced at the end, else one a layer and end.
        """
        m, found, table = self.model, [], [self.mine(self.model.vocab_size) * self.model.hidden_size]
        last, apart = self.p * self.layout.chunks - 1, [] if self.model.tie_embeddings else table
        for index, layers in self.stages.items():
            parts = [(apart, [])] if index == 0 else []
            parts += [self.layer() for _ in layers]
            if index == last:
                parts.append(([m.hidden_size] + apart, [m.hidden_size] * self.sp))
            for _, together in groupby(enumerate(parts), lambda part: part[0] * self.is_cut):
                sizes, partial = zip(*(part for _, part in together))
                found += [(sum(sizes, []), sum(partial, []), False)] * any(sizes)
            if m.tie_embeddings:
                ends = sorted({0, last} & {index})
                found += [(table, [], end == last > 0 and 0 in self.stages) for end in ends]
        if m.tie_embeddings and last == 0:
            found.append((table, [], True))
        return found

    def elements(self):
        """Number of elements of all parameters on this rank, a tied copy counted once."""
        return sum(sum(sizes) for sizes, _, is_copy in self.buckets() if not is_copy)

    def whole_shapes(self):
        """Shapes that only a whole split weight has."""
        m = self.model
        rows = [m.vocab_size, m.ffn_size]
        if not self.is_exact or self.t <= m.num_kv_heads:  # exact does not divide a key/value group
            rows.append(m.num_heads * m.head_dim)
        return {shape for n in rows for shape in ((n, m.hidden_size), (m.hidden_size, n))} if self.t > 1 else set()

    def bytes(self):
        """Bytes sent in a training step by axis and operation."""
        sent = Counter()
        own = self.config.microbatch_bounds()[self.coord["data"]]
        for low, high in own:
            for index, layers in self.stages.items():
                self.add_stage(sent, index, len(layers), (high - low) * self.config.train.seq_len)
        self.add_gradients(sent, len(own))
        total, ranks = sum(map(len, self.config.microbatch_bounds())), self.d * self.p * self.t
        m = self.model
        rows = m.num_layers * (2 * m.num_heads * m.head_dim + 2 * m.num_kv_heads * m.head_dim + 3 * m.ffn_size + 2)
        rows += 1 + m.vocab_size * (1 if m.tie_embeddings else 2)
        sent["world", "allreduce"] = sum(allreduce(8 * n, ranks) for n in (total, rows if self.is_exact else 1))
        return Counter({key: n for key, n in sent.items() if n})

    def add_stage(self, sent, index, layers, tokens):
        """A microbatch of ``tokens`` through the layers of a stage and back."""
        last, width = self.p * self.layout.chunks - 1, self.model.hidden_size * self.item
        own = self.mine(tokens) if self.sp else tokens
        if self.p > 1:
            sent["pipeline", "send"] += ((index > 0) + (index < last)) * own * width
        # of activations: joined (forward spread and backward collect), added (the other way round)
        join = 2 * layers * 2 + (index == 0) + (index == last)
        add = join
        if self.layout.recompute == "full":  # all but the last sum of a layer, of which backward needs nothing
            join, add = join + 2 * layers, add + layers
        if self.sp:
            sent["tensor", "allgather"] += join * (self.t - 1) * own * width
            sent["tensor", "reduce_scatter"] += add * (tokens - own) * width
        else:  # joining is free one way and a sum the other way
            sums = 2 * layers * 2 + (index == 0) + (index == last) + layers * (self.layout.recompute == "full")
            sent["tensor", "allreduce"] += sums * allreduce(tokens * width, self.t)
        if index == last:  # the largest logit; the sum of exponentials and the target's logit
            sent["tensor", "allreduce"] += sum(allreduce(n * tokens * self.item, self.t) for n in (1, 2))

    def add_gradients(self, sent, microbatches):
        """Gradients of all buckets, and the weights back."""
        for sizes, partial, is_copy in self.buckets():
            size = align(sum(align(n, 16) for n in sizes), 16 * self.d) * self.item
            times = microbatches if self.is_exact else 1
            sent["tensor", "allreduce"] += times * allreduce(sum(align(n, 16) for n in partial) * self.item, self.t)
            others = size - size // self.d
            sent["data", "reduce_scatter"] += others
            is_gathered = self.is_exact or self.layout.zero == 0
            is_published = self.layout.zero == 1 and not is_copy and not self.is_one_copy
            sent["data", "allgather"] += others * (is_gathered + is_published)
            if self.model.tie_embeddings and self.p > 1 and sizes == [self.mine(self.model.vocab_size) * 40]:
                sent["pipeline", "send"] += size if is_gathered else size // self.d


def allreduce(n_bytes, ranks):
    return 2 * (n_bytes - n_bytes // ranks)


@pytest.mark.parametrize(("model", "numerics", "windows"), [
    ("odd", "fast", "1"), ("odd", "exact", "0"), ("tied-and-shared-heads", "fast", "0"),
    ("tied-and-shared-heads", "exact", "1"),
])
def test_what_a_rank_holds_and_sends(comm, model, numerics, windows, monkeypatch):
    """And that the same run again has the same bits; with shared memory there is one copy of the weights."""
    monkeypatch.setenv(shared.SWITCH, windows)
    config = tiny({**MODELS[model], **EXACT, "model.num_layers": 4, "train.numerics": numerics})
    for layout in one_for_every_degrees(config, comm.size):
        engine, again = Engine(layout, comm), Engine(layout, comm)
        formula = Formula(engine)
        parameters = [p for stage in engine.stages for p in stage.module.parameters()]
        held = sum(p.numel() for p in {p.data_ptr(): p for p in parameters}.values())
        with Shapes() as shapes:
            first = train(engine, 1)
        second = train(engine, 1, first=2)
        bits = [*first, *second] == train(again, 2)
        bits &= all(torch.equal(values, again.weight_ranges()[name][i][1])
                    for name, ranges in engine.weight_ranges().items() for i, (_, values) in enumerate(ranges))
        whole = shapes.seen & formula.whole_shapes()
        twice = {key: 2 * n for key, n in formula.bytes().items()}
        sent = {key: n for key, n in engine.mesh.recorder.sent_bytes.items() if n}
        for one in (engine, again):
            one.free()
        ok = bits and held == formula.elements() and not whole and sent == twice
        assert_all(ok, f"{describe(layout.layout)}: {bits}, {held} {formula.elements()}, {whole}, {sent} {twice}", comm)
