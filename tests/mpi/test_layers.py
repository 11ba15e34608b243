"""Every layer split over 1 to 4 tensor ranks against the same mathematics in plain PyTorch on one process."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_all
from tiny import tiny, train
from torch.utils._python_dispatch import TorchDispatchMode

from mpillm.comm import Group, allgather, allreduce
from mpillm.comm.group import as_group
from mpillm.comm.single import SingleComm
from mpillm.config import Model
from mpillm.nn import (
    Attention,
    ColumnParallelLinear,
    RowParallelLinear,
    TensorSplit,
    TransformerStage,
    VocabularyEmbedding,
    VocabularyHead,
)
from mpillm.nn.attention import Batch, rotary_tables
from mpillm.nn.init import initial_values, initialise
from mpillm.nn.norm import RMSNorm
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


def whole_weight(layer):
    """The whole weight, drawn as every rank draws its part, with room for a gradient."""
    shard = layer.weight.shard
    count = torch.Size(shard.shape).numel()
    return torch.from_numpy(initial_values(shard.name, 1, 0, count, shard.std)).view(shard.shape).requires_grad_()


def ready(*layers):
    for layer in layers:
        for parameter in layer.parameters():
            initialise(parameter, 1)
    return [whole_weight(layer) for layer in layers]


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
    """Hold the weight gradients of this rank, summed where they are partial, against the whole ones."""
    for layer, whole in zip(layers, wholes):
        shard, grad = layer.weight.shard, layer.weight.grad
        grad = allreduce(grad, comm) if shard.is_partial_grad else grad
        near(grad.reshape(-1), whole.grad.reshape(-1)[shard.start:shard.stop], f"gradient of {shard.name}", comm)


@pytest.mark.parametrize("units", [1, 9])
def test_column_and_row_linear(comm, split, units):
    """As they are used: column behind ``enter``, row before ``leave``; 3 features a unit, empty blocks with 1 unit."""
    column = ColumnParallelLinear("column", split, WIDTH, units, 3, std=1.0)
    row = RowParallelLinear("row", split, 5, units, 3, std=1.0)
    w, v = ready(column, row)
    x, dy = draw(TOKENS, WIDTH).requires_grad_(), draw(TOKENS, 5, seed=1)
    hidden = x @ w.T
    wanted = hidden @ v
    wanted.backward(dy)

    own = held(x.detach(), split).clone().requires_grad_()
    y = column(split.enter(own, TOKENS)[0])
    low, high = (3 * unit for unit in bounds(units, split.size, split.rank))
    near(y, hidden[:, low:high], "column", comm)
    out = split.leave([row(y)])
    near(out, held(wanted, split), "row", comm)
    out.backward(held(dy, split))
    near(own.grad, held(x.grad, split), "gradient of x", comm)
    check_weights([column, row], [w, v], comm)


@pytest.mark.parametrize("vocab_size", [3, 257])
def test_embedding(comm, split, vocab_size):
    embedding = VocabularyEmbedding("embedding", split, vocab_size, WIDTH, std=1.0)
    (w,) = ready(embedding)
    tokens = torch.randint(0, vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    tokens[3:6] = tokens[0]
    dy = draw(TOKENS, WIDTH)
    F.embedding(tokens, w).backward(dy)
    y = split.collect(embedding(tokens))
    near(y, held(w.detach()[tokens], split), "rows", comm, 0)
    y.backward(held(dy, split))
    check_weights([embedding], [w], comm)


def head_and_reference(split, vocab_size, scale=1.0, size=1.0):
    """Return a head with its input, and the whole weight and input after plain PyTorch's loss and backward."""
    head = VocabularyHead("head", split, vocab_size, WIDTH, std=size)
    initialise(head.weight, 1)
    w, x = whole_weight(head), draw(TOKENS, WIDTH).requires_grad_()
    targets = torch.randint(0, vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(2))
    wanted = scale * F.cross_entropy(x @ w.T, targets, reduction="sum")
    wanted.backward()
    return head, x, w, targets, wanted


@pytest.mark.parametrize(("vocab_size", "chunk_rows"), [(3, 100), (257, 8)])
def test_head_loss(comm, split, vocab_size, chunk_rows, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * vocab_size * chunk_rows)
    head, x, w, targets, wanted = head_and_reference(split, vocab_size, scale=0.37)
    own = held(x.detach(), split).clone().requires_grad_()
    found = head.loss(split.spread(own, TOKENS), targets, 0.37)
    near(found, wanted, "loss", comm)
    (2 * found).backward()  # a gradient other than one
    near(own.grad / 2, held(x.grad, split), "gradient of x", comm)
    head.weight.grad /= 2
    check_weights([head], [w], comm)
    with torch.no_grad():
        near(head.loss(split.spread(own, TOKENS), targets, 0.37), wanted, "loss without gradients", comm)
        near(head.logits(split.spread(own, TOKENS)), x.detach() @ w.detach().T, "logits", comm)


@pytest.mark.parametrize("is_flat", [False, True])
def test_losses_in_flight(comm, split, is_flat):
    """As in a pipeline: three forwards before the first backward, and then a fourth. In flat storage, which takes the
    weight's gradient from forward; else each keeps its own."""
    head, x, w, targets, _ = head_and_reference(split, 257)
    own = held(x.detach(), split).clone().requires_grad_()
    if is_flat:
        head.weight.main_grad = torch.zeros_like(head.weight)
    losses = [head.loss(split.spread(own, TOKENS), targets, scale) for scale in (1.0, 0.25, 0.5)]
    for loss in losses[::-1]:
        loss.backward()
    loss = head.loss(split.spread(own, TOKENS), targets, 2.0)
    split.weight_gradients.keep()
    loss.backward()
    split.weight_gradients.take()()
    with torch.no_grad():
        head.loss(split.spread(own, TOKENS), targets, 1.0)
    if is_flat:
        with pytest.raises(ValueError, match="scale"):
            (2 * head.loss(split.spread(own, TOKENS), targets, 0.0)).backward()
        head.weight.grad = head.weight.main_grad
    head.weight.grad /= 3.75
    check_weights([head], [w], comm)
    near(own.grad / 3.75, held(x.grad, split), "gradient of x", comm)


def test_head_loss_of_large_logits(comm, split):
    head, x, _, targets, wanted = head_and_reference(split, 257, size=1e4)
    near(head.loss(split.spread(held(x.detach(), split), TOKENS), targets, 1.0), wanted, "loss", comm)


def test_the_head_s_gradient_does_not_depend_on_chunks_in_bfloat16(comm, monkeypatch):
    """Many chunks that each add little to the same row, which a sum in bfloat16 would lose."""
    vocab_size, width, tokens = 9, 2, 1024
    found = []
    for rows in (tokens, 1):
        monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * vocab_size * rows)
        head = VocabularyHead("head", TensorSplit(Group(as_group(comm).comm), dtype=torch.bfloat16), vocab_size, width)
        initialise(head.weight, 1)
        head.weight.main_grad = torch.zeros(head.weight.shape)
        x = torch.ones(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        head.loss(x, torch.zeros(tokens, dtype=torch.int64), 1.0).backward()
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
    head = VocabularyHead("head", split, vocab_size, width)
    initialise(head.weight, 1)
    x = draw(tokens, width).to(dtype).requires_grad_()
    with Largest() as largest:
        head.loss(x, torch.arange(tokens), 1.0).backward()
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
    attention = Attention("attention", split, model, 1.0, recompute=heads == 6)
    layers = [attention.query, attention.key, attention.value, attention.output]
    for layer in layers:
        initialise(layer.weight, 1)
    wq, wk, wv, wo = wholes = [whole_weight(layer) for layer in layers]
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

    batch = Batch(sequences, positions, *rotary_tables(4, range(positions), 100.0, torch.float64))
    own = held(x.detach(), split).clone().requires_grad_()
    y = split.leave(attention(split.enter(own, TOKENS), batch))
    near(y, held(wanted, split), "output", comm)
    y.backward(held(dy, split))
    near(own.grad, held(x.grad, split), "gradient of x", comm)
    check_weights(layers, wholes, comm)


def test_norm(comm, split):
    norm = RMSNorm("norm", split, WIDTH, 1e-5)
    norm.weight.data.copy_(draw(WIDTH, seed=3))
    w, x = draw(WIDTH, seed=3).requires_grad_(), draw(TOKENS, WIDTH).requires_grad_()
    F.rms_norm(x, (WIDTH,), w, 1e-5).backward(draw(TOKENS, WIDTH, seed=1))
    own = held(x.detach(), split).clone().requires_grad_()
    y = norm(own, TOKENS)
    near(y, held(F.rms_norm(x, (WIDTH,), w, 1e-5), split), "norm", comm)
    y.backward(held(draw(TOKENS, WIDTH, seed=1), split))
    near(own.grad, held(x.grad, split), "gradient of x", comm)
    check_weights([norm], [w], comm)


def stage_gradients(comm, model, sequence_parallel, recompute, keep=False, mask=None, blocks=None):
    """Return loss and gradients, by name and start, of a whole model on this rank's split."""
    group = Group(as_group(comm).comm, "tensor", "any" if blocks is None else "tree")
    split = TensorSplit(group, sequence_parallel, blocks, torch.float64)
    stage = TransformerStage(model, split, 0, model.num_layers, recompute)
    for parameter in stage.parameters():
        initialise(parameter, 0)
        parameter.grad = torch.zeros_like(parameter)
    batch = Batch(3, 7, *rotary_tables(model.head_dim, range(7), model.rope_theta, torch.float64), mask)
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
    reference, mask, starts = Reference(model, 0), None, None
    if documents:
        starts = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [3] * 7, [3, 4, 5, 6, 7, 8, 9]])
        mask = ((starts[:, :, None] == starts[:, None, :]) & torch.ones(7, 7, dtype=torch.bool).tril())[:, None]
    reference.loss(TEXT[:, :-1], TEXT[:, 1:], starts).backward()
    for sequence_parallel, recompute in ((False, "full"), (True, ("selective", "none"))):
        _, grads = stage_gradients(comm, model, sequence_parallel, recompute, mask=mask)
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
    batch = Batch(2, 7, *rotary_tables(8, range(7), 1e4, torch.float64))
    with torch.no_grad():
        found = stage.logits(stage(tokens.reshape(-1), batch), batch)
        near(found, Reference(model, 0).logits(tokens).flatten(0, 1), "logits", comm)
    rows = allgather(found.reshape(1, -1), comm)
    assert_all(all(torch.equal(row, rows[0]) for row in rows), "differ between ranks", comm)
