"""Every layer split over 1 to 4 tensor ranks against the same mathematics in plain PyTorch on one process."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_all
from tiny import tiny, train
from torch.utils._python_dispatch import TorchDispatchMode

from mpillm.comm import Group, allgather, allreduce
from mpillm.comm.group import as_group
from mpillm.comm.single import SingleComm
from mpillm.model.description import Model
from mpillm.model.parameters import Parameter, initial_values, layer_parameters
from mpillm.nn import Attention, ChoiceHead, ColumnParallelLinear, RowParallelLinear, TensorSplit, TransformerStage
from mpillm.nn.embedding import Table
from mpillm.nn.init import initialise
from mpillm.nn.norm import Norm
from mpillm.nn.positions import Batch, rotary_tables, visible
from mpillm.schedules.blocks import CHUNK_BYTES, bounds
from mpillm.train.engine import Engine
from mpillm.verify.reference import Reference

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

TOKENS, WIDTH = 21, 12  # nothing divides 21 but 3
TEXT = torch.randint(0, 257, (3, 8), generator=torch.Generator().manual_seed(0))
HEADS = [(5, 5), (5, 1), (6, 3), (6, 2)]  # as many key/value heads, fewer than ranks, groups across ranks


@pytest.fixture(params=[False, True], ids=["replicated", "sequence-parallel"])
def split(request, comm):
    return TensorSplit(Group(as_group(comm).comm, "tensor"), request.param, dtype=torch.float64)


def ready(*layers):
    """Draw this rank's parts of all parameters; return the whole ones, drawn alike, with room for gradients."""
    wholes = {}
    for parameter in (parameter for layer in layers for parameter in layer.parameters()):
        initialise(parameter, 1)
        whole = parameter.shard.whole
        values = torch.from_numpy(initial_values(whole, 1, 0, whole.size)).view(whole.shape)
        wholes[whole.name] = values.requires_grad_()
    return wholes


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def held(x, split):
    """What a rank holds of the activations between the parallel regions."""
    low, high = bounds(len(x), split.size, split.rank) if split.sequence_parallel else (0, len(x))
    return x[low:high]


def near(found, wanted, what, comm, tolerance=1e-12):
    same = found.shape == wanted.shape and torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)
    assert_all(same, f"{what}: {found.shape} {wanted.shape}", comm)


def check_weights(layers, wholes, comm):
    """Hold the gradients of this rank's parameters, summed where they are partial, against the whole ones."""
    for parameter in (parameter for layer in layers for parameter in layer.parameters()):
        shard, grad = parameter.shard, parameter.grad
        grad = allreduce(grad, comm) if shard.is_partial_grad else grad
        whole = wholes[shard.name].grad.reshape(-1)[shard.start:shard.stop]
        near(grad.reshape(-1), whole, f"gradient of {shard.name}", comm)


@pytest.mark.parametrize("units", [1, 9])
def test_column_and_row_linear(comm, split, units):
    """As they are used: column behind ``enter``, row before ``leave``; 3 features a unit, empty blocks with 1 unit."""
    threes = {"split": "query_heads", "unit": 3}
    column = ColumnParallelLinear(split, Parameter("w", (3 * units, WIDTH), 1.0, **threes),
                                  Parameter("a", (3 * units,), 1.0, **threes))
    row = RowParallelLinear(split, Parameter("v", (3 * units, 5), 1.0, **threes), Parameter("b", (5,), 1.0, split="tokens"))
    whole = ready(column, row)
    x, dy = draw(TOKENS, WIDTH).requires_grad_(), draw(TOKENS, 5, seed=1)
    hidden = x @ whole["w"].T + whole["a"]
    wanted = hidden @ whole["v"] + whole["b"]
    wanted.backward(dy)

    own = held(x.detach(), split).clone().requires_grad_()
    y = column(split.enter(own, TOKENS)[0])
    low, high = (3 * unit for unit in bounds(units, split.size, split.rank))
    near(y, hidden[:, low:high], "column", comm)
    out = row.leave([row(y)], TOKENS)
    near(out, held(wanted, split), "row", comm)
    out.backward(held(dy, split))
    near(own.grad, held(x.grad, split), "gradient of x", comm)
    check_weights([column, row], whole, comm)


@pytest.mark.parametrize("vocab_size", [3, 257])
def test_embedding(comm, split, vocab_size):
    embedding = Table(split, Parameter("w", (vocab_size, WIDTH), 1.0))
    whole = ready(embedding)
    tokens = torch.randint(0, vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    tokens[3:6] = tokens[0]
    dy = draw(TOKENS, WIDTH)
    F.embedding(tokens, whole["w"]).backward(dy)
    y = split.collect(embedding(tokens))
    near(y, held(whole["w"].detach()[tokens], split), "rows", comm, 0)
    y.backward(held(dy, split))
    check_weights([embedding], whole, comm)


def make_head(split, vocab_size, width=WIDTH, std=1.0, **model):
    """Return a head of logits by itself, with drawn weights, and the whole ones."""
    model = Model(width, 1, 1, 8, vocab_size=vocab_size, **model)
    table = {"head.weight": Parameter("head.weight", (vocab_size, width), std)}
    if model.head_bias:
        table["head.bias"] = Parameter("head.bias", (vocab_size,), std)
    head = ChoiceHead(split, model, table)
    return head, ready(head)


def head_and_reference(split, vocab_size, scale=1.0, std=1.0, **model):
    """Return a head with its input, and the whole weights and input after plain PyTorch's loss and backward; and the logits.
    """
    head, whole = make_head(split, vocab_size, std=std, **model)
    x = draw(TOKENS, WIDTH).requires_grad_()
    targets = torch.randint(0, vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(2))
    targets[4:9] = -100
    logits = F.linear(x, whole["head.weight"], whole.get("head.bias"))
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    wanted = scale * F.cross_entropy(logits, targets, reduction="sum")
    wanted.backward()
    return head, x, whole, targets, wanted, logits.detach()


@pytest.mark.parametrize(("vocab_size", "chunk_rows", "model"), [
    (3, 100, {}), (257, 8, {}), (3, 8, {"head_bias": True, "logit_softcap": 2.0}), (257, 8, {"head_bias": True}),
], ids=["few", "chunks", "few-bias-capped", "chunks-bias"])
def test_head_loss(comm, split, vocab_size, chunk_rows, model, monkeypatch):
    """A target below zero counts for nothing."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * vocab_size * chunk_rows)
    head, x, whole, targets, wanted, logits = head_and_reference(split, vocab_size, scale=0.37, **model)
    own = held(x.detach(), split).clone().requires_grad_()
    found = head(split.spread(own, TOKENS), targets, 0.37)
    near(found, wanted, "loss", comm)
    (2 * found).backward()  # a gradient other than one
    near(own.grad / 2, held(x.grad, split), "gradient of x", comm)
    for parameter in head.parameters():
        parameter.grad /= 2
    check_weights([head], whole, comm)
    with torch.no_grad():
        near(head(split.spread(own, TOKENS), targets, 0.37), wanted, "loss without gradients", comm)
        near(head.logits(split.spread(own, TOKENS)), logits, "logits", comm)


@pytest.mark.parametrize("is_flat", [False, True])
def test_losses_in_flight(comm, split, is_flat):
    """As in a pipeline: three forwards before the first backward, and then a fourth. In flat storage, which takes the
    weights' gradients from forward; else each keeps its own."""
    head, x, whole, targets, *_ = head_and_reference(split, 257, head_bias=True)
    own = held(x.detach(), split).clone().requires_grad_()
    for parameter in head.parameters() if is_flat else ():
        parameter.main_grad = torch.zeros_like(parameter)
    losses = [head(split.spread(own, TOKENS), targets, scale) for scale in (1.0, 0.25, 0.5)]
    for loss in losses[::-1]:
        loss.backward()
    loss = head(split.spread(own, TOKENS), targets, 2.0)
    split.weight_gradients.keep()
    loss.backward()
    split.weight_gradients.take()()
    with torch.no_grad():
        head(split.spread(own, TOKENS), targets, 1.0)
    if is_flat:
        with pytest.raises(ValueError, match="scale"):
            (2 * head(split.spread(own, TOKENS), targets, 0.0)).backward()
    for parameter in head.parameters():
        parameter.grad = (parameter.main_grad if is_flat else parameter.grad) / 3.75
    check_weights([head], whole, comm)
    near(own.grad / 3.75, held(x.grad, split), "gradient of x", comm)


def test_head_loss_of_large_logits(comm, split):
    head, x, _, targets, wanted, _ = head_and_reference(split, 257, std=1e4)
    near(head(split.spread(held(x.detach(), split), TOKENS), targets, 1.0), wanted, "loss", comm)


def test_the_head_s_gradient_does_not_depend_on_chunks_in_bfloat16(comm, monkeypatch):
    """Many chunks that each add little to the same row, which a sum in bfloat16 would lose."""
    vocab_size, width, tokens = 9, 2, 1024
    found = []
    for rows in (tokens, 1):
        monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * vocab_size * rows)
        head, _ = make_head(TensorSplit(Group(as_group(comm).comm), dtype=torch.bfloat16), vocab_size, width, 0.02)
        head.weight.main_grad = torch.zeros(head.weight.shape)
        x = torch.ones(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        head(x, torch.zeros(tokens, dtype=torch.int64), 1.0).backward()
        found.append(head.weight.main_grad)
    ok = torch.allclose(*found, rtol=0.02, atol=0.02 * float(found[0].abs().max()))
    assert_all(ok, found, comm)


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        found = [x.numel() for x in (out if isinstance(out, (list, tuple)) else [out]) if torch.is_tensor(x)]
        self.elements = max([self.elements, *found])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_rank_builds_more_logits_than_a_chunk_of_its_own(comm, dtype, monkeypatch):
    vocab_size, rows, width, tokens = 2570, 8, 2, 64
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * vocab_size * rows)
    split = TensorSplit(Group(as_group(comm).comm), dtype=dtype)
    head, _ = make_head(split, vocab_size, width)
    x = draw(tokens, width).to(dtype).requires_grad_()
    with Largest() as largest:
        head(x, torch.arange(tokens), 1.0).backward()
    own = -(-vocab_size // comm.size)
    assert_all(largest.elements <= rows * own, f"{largest.elements} > {rows} x {own}", comm)


def rotate(x, positions, theta):
    """Turn the pairs ``(i, i + N/2)`` of ``[S, N]`` by explicit 2 x 2 matrices."""
    half, out = x.shape[1] // 2, x.clone()
    for position in range(positions):
        for i in range(half):
            angle = torch.tensor(position * theta ** (-2 * i / x.shape[1]), dtype=torch.float64)
            turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
            out[position, [i, i + half]] = turn @ x[position, [i, i + half]]
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention(comm, split, heads, kv_heads):
    model = Model(WIDTH, 1, heads, 8, vocab_size=9, num_kv_heads=kv_heads, head_dim=4, rope_theta=100.0)
    table = {name: replace(parameter, std=1.0) for name, parameter in layer_parameters(model).items()}
    attention = Attention(split, model, table, is_recomputed=heads == 6)
    whole = ready(attention)
    wq, wk, wv, wo = (whole[f"layers.0.attention.{part}.weight"] for part in ("query", "key", "value", "output"))
    sequences, positions = 3, 7
    x, dy = draw(TOKENS, WIDTH).requires_grad_(), draw(TOKENS, WIDTH, seed=1)
    rows = []
    for sequence in x.view(sequences, positions, WIDTH):
        outs = []
        for head in range(heads):
            kv = head * kv_heads // heads
            q, k, v = (sequence @ w[4 * i:4 * i + 4].T for w, i in ((wq, head), (wk, kv), (wv, kv)))
            q, k = rotate(q, positions, 100.0), rotate(k, positions, 100.0)
            scores = (q @ k.T / 2).masked_fill(torch.ones(positions, positions).triu(1) > 0, -torch.inf)
            outs.append(scores.softmax(1) @ v)
        rows.append(torch.cat(outs, 1) @ wo)
    wanted = torch.cat(rows)
    wanted.backward(dy)

    batch = Batch(sequences, positions, *rotary_tables(model, range(positions), torch.float64))
    own = held(x.detach(), split).clone().requires_grad_()
    y = attention(own, batch)
    near(y, held(wanted, split), "output", comm)
    y.backward(held(dy, split))
    near(own.grad, held(x.grad, split), "gradient of x", comm)
    check_weights([attention], whole, comm)


@pytest.mark.parametrize("kind", ["rms", "rms-offset", "layer"])
def test_norm(comm, split, kind):
    weight, bias = (Parameter(name, (WIDTH,), 1.0, split="tokens") for name in "wb")
    norm = Norm(split, weight, bias if kind == "layer" else None, 1e-5, kind == "rms-offset")
    whole, x = ready(norm), draw(TOKENS, WIDTH).requires_grad_()
    if kind == "layer":
        wanted = F.layer_norm(x, (WIDTH,), whole["w"], whole["b"], 1e-5)
    else:
        wanted = F.rms_norm(x, (WIDTH,), whole["w"] + (kind == "rms-offset"), 1e-5)
    wanted.backward(draw(TOKENS, WIDTH, seed=1))
    own = held(x.detach(), split).clone().requires_grad_()
    y = norm(own, TOKENS)
    near(y, held(wanted, split), "norm", comm)
    y.backward(held(draw(TOKENS, WIDTH, seed=1), split))
    near(own.grad, held(x.grad, split), "gradient of x", comm)
    check_weights([norm], whole, comm)


def stage_gradients(comm, model, sequence_parallel, recompute, keep=False, documents=None, blocks=None):
    """Return loss and gradients, by name and start, of a whole model on this rank's split."""
    group = Group(as_group(comm).comm, "tensor", "any" if blocks is None else "tree")
    split = TensorSplit(group, sequence_parallel, blocks, torch.float64)
    stage = TransformerStage(model, split, 0, model.num_layers, recompute)
    for parameter in stage.parameters():
        initialise(parameter, 0)
        parameter.grad = torch.zeros_like(parameter)
    mask = visible(model, 0, 7, documents_BS=documents)
    batch = Batch(3, 7, *rotary_tables(model, range(7), torch.float64), mask)
    found = stage.loss(stage(TEXT[:, :-1].reshape(-1), batch), batch, TEXT[:, 1:].reshape(-1), 1 / 21)
    if keep:
        split.weight_gradients.keep()
    found.backward()
    if keep:
        assert all(not parameter.grad.any() for parameter in stage.parameters())
        split.weight_gradients.take()()
    grads = {(p.shard.name, p.shard.start): allreduce(p.grad, group) if p.shard.is_partial_grad else p.grad
             for p in stage.parameters()}
    return found.detach(), grads


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name in ("aten::mm", "aten::addmm_", "mkldnn::_linear_pointwise")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("numerics", "factors"), [("fast", 4), ("exact", 7)])
def test_weights_that_lie_together_are_one_product(comm, numerics, factors):
    """Forward, for the input's gradient and for the weights'; each block of ``exact`` has one for every weight."""
    if numerics == "exact" and comm.size == 3:
        pytest.skip("its blocks are a power of two")
    counts = []
    for layers in (1, 2):
        config = tiny({"model.num_layers": layers, "model.ffn_size": 192, "layout.tensor": comm.size, "train.global_batch": 1,
                       "train.microbatch": 1, "train.numerics": numerics}, comm.size)
        engine = Engine(config, comm)
        with Products() as products:
            train(engine, 1)
        engine.free()
        counts.append(products.count)
    blocks = config.train.exact_blocks // comm.size if numerics == "exact" else 1
    found = counts[1] - counts[0]
    assert_all(found == 3 * factors * blocks, f"{found} products a layer", comm)


@pytest.mark.parametrize(("heads", "kv_heads", "documents"), [(5, 1, True), (6, 3, False)])
def test_the_model_against_the_serial_reference(comm, heads, kv_heads, documents):
    model = Model(40, 2, heads, 54, vocab_size=257, num_kv_heads=kv_heads, head_dim=8)
    reference = Reference(model, 0)
    starts = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [3] * 7, [3, 4, 5, 6, 7, 8, 9]]) if documents else None
    reference.loss(TEXT[:, :-1], TEXT[:, 1:], starts).backward()
    for sequence_parallel, recompute in ((False, "full"), (True, ("selective", "none"))):
        _, grads = stage_gradients(comm, model, sequence_parallel, recompute, documents=starts)
        wrong = []
        for (name, start), grad in grads.items():
            whole = reference.parameters[name].grad.reshape(-1)[start:start + grad.numel()]
            if not torch.allclose(grad.reshape(-1), whole, rtol=1e-12, atol=1e-12):
                wrong.append(name)
        assert_all(not wrong, f"{sequence_parallel} {recompute}: {wrong}", comm)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_weight_gradients_that_wait_have_the_same_bits(comm, split, recompute):
    model = Model(40, 2, 5, 54, vocab_size=257)
    at_once, later = (stage_gradients(comm, model, split.sequence_parallel, recompute, keep)[1]
                      for keep in (False, True))
    assert_all(all(torch.equal(grad, later[key]) for key, grad in at_once.items()), "differs", comm)


@pytest.mark.parametrize("comm", [1, 2, 4], ids="{}-ranks".format, indirect=True)
def test_exact_blocks_give_equal_bits_at_any_split(comm):
    """Against the same blocks computed by one rank alone."""
    model = Model(40, 2, 5, 54, vocab_size=257)
    alone = stage_gradients(SingleComm(), model, False, "none", blocks=8)
    for sequence_parallel in (False, True):
        found, grads = stage_gradients(comm, model, sequence_parallel, "none", blocks=8)
        ok = torch.equal(found, alone[0])
        for (name, start), grad in grads.items():
            whole = alone[1][name, 0].reshape(-1)[start:start + grad.numel()]
            ok &= torch.equal(grad.reshape(-1), whole)
        assert_all(ok, f"{sequence_parallel}", comm)


def test_logits_are_replicated(comm):
    model = Model(40, 1, 5, 54, vocab_size=257)
    split = TensorSplit(Group(as_group(comm).comm), dtype=torch.float64)
    stage = TransformerStage(model, split, 0, 1)
    for parameter in stage.parameters():
        initialise(parameter, 0)
    tokens = torch.arange(14).view(2, 7)
    batch = Batch(2, 7, *rotary_tables(model, range(7), torch.float64))
    with torch.no_grad():
        found = stage.logits(stage(tokens.reshape(-1), batch), batch)
        near(found, Reference(model, 0).logits(tokens).flatten(0, 1), "logits", comm)
    rows = allgather(found.reshape(1, -1), comm)
    assert_all(all(torch.equal(row, rows[0]) for row in rows), "differ between ranks", comm)
