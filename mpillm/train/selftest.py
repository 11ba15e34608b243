"""Whether this launch's kernels keep the promise of ``numerics = "exact"``, and by which way of products, tried on the
model's own shapes.

The promise rests on facts that hold for the kernels of a CPU type and torch build, or do not: products of equal shapes
have equal bits wherever their operands lie; row-wise operations give a row the same bits whichever rows lie beside it;
an optimiser gives a shard the same bits as the whole; neither the number of threads nor the rank makes a difference.
"""

from dataclasses import dataclass
from functools import partial
from hashlib import sha256

import torch
from torch.nn.functional import scaled_dot_product_attention

from mpillm.comm.group import Group
from mpillm.comm.single import SingleComm
from mpillm.errors import ConfigError, agreed
from mpillm.model.parameters import layer_parameters
from mpillm.nn.norm import make_norm
from mpillm.nn.positions import visible
from mpillm.nn.products import WAYS, add_product
from mpillm.nn.split import TensorSplit
from mpillm.schedules.blocks import ALIGNMENT, counts, loss_chunks
from mpillm.train.optimizers import state_kinds, update

USE_FAST, ONE_THREAD = "use train.numerics = fast", "set OMP_NUM_THREADS=1"


@dataclass(frozen=True)
class Report:
    """What a rank found: the operation that does not repeat and what helps (empty if all repeat), a digest of all bits."""

    operation: str
    remedy: str
    bits: str


def check_exact(config, comm):
    """Refuse ``exact`` if kernels give different bits where it needs equal ones; return the way of products to take.

    Collective over ``comm``; what it takes and raises is what :func:`choose_way` does.
    """
    _insist(config, comm, comm.allgather(_report(partial(_operations, config))))
    return choose_way(config, comm)


def choose_way(config, comm, rows=None):
    """Return the first way of products, a name in :data:`mpillm.nn.products.WAYS`, that keeps the promise on all ranks.

    Collective over ``comm``: every rank tries its own processor, and whether its number of threads makes a difference.

    Parameters
    ----------
    config : Config
        Resolved.
    comm : Comm
    rows : iterable of int, optional
        Numbers of tokens that are computed together; those of training if left out.

    Raises
    ------
    ConfigError
        On every rank, if kernels give different bits where equal ones are needed, naming the operation, or if ranks
        differ in their bits.
    CollectiveError
        On every rank instead, if kernels fail on some ranks only.
    """
    first = None
    for way, multiply in WAYS.items():
        reports = comm.allgather(_report(partial(_products, config, multiply, rows)))
        # Threads do not choose: layouts whose ranks have more or fewer of them take one way
        if len({report.bits for report in reports}) == 1 and USE_FAST not in {report.remedy for report in reports}:
            _insist(config, comm, reports)
            return way
        first = first or reports
    return _insist(config, comm, first)


def _report(trials):
    """Carry ``trials`` out with one thread and with all."""
    threads, found = torch.get_num_threads(), {}
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            found[count] = [(operation, _bits(one), _bits(other)) for operation, one, other in trials()]
    finally:
        torch.set_num_threads(threads)
    digest = sha256(b"".join(one for _, one, _ in found[1])).hexdigest()
    for (operation, one, other), (_, threaded, _) in zip(found[1], found[threads]):
        if one != other:
            return Report(operation, USE_FAST, digest)
        if one != threaded:
            return Report(f"{operation} with {threads} threads", ONE_THREAD, digest)
    return Report("", "", digest)


def _bits(x):
    return sha256(x.detach().contiguous().numpy()).digest()


def _insist(config, comm, reports):
    """Raise what the reports of all ranks complain of, if anything."""
    mine = reports[comm.rank]
    with agreed(comm, "self-test of train.numerics = exact"):
        if mine.operation:
            raise ConfigError(
                f"train.numerics = exact: {mine.operation} in {config.train.dtype} does not repeat bit for bit on this "
                f"processor with torch {torch.__version__}: {mine.remedy}")
    others = [rank for rank, report in enumerate(reports) if report.bits != reports[0].bits]
    if others:
        raise ConfigError(
            f"train.numerics = exact: ranks {others} of {comm.size} compute other bits than rank 0: start all on one type "
            f"of processor with one build of torch, or {USE_FAST}")


def _draws(train):
    """Return a function that draws tensors of a shape."""
    dtype, generator = getattr(torch, train.dtype), torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _rows(train):
    """Return the numbers of tokens of a microbatch: of all, and of the last of a batch."""
    last = train.global_batch % train.microbatch or train.microbatch
    return {sequences * train.seq_len for sequences in (train.microbatch, last)}


def _products(config, multiply, rows):
    """Yield ``(operation, result, the same with operands at odd addresses)`` of all products."""
    model, blocks, draw = config.model, config.train.exact_blocks, _draws(config.train)
    groups = {n * model.head_dim for n in counts(model.num_kv_heads, blocks)}
    heads = {n * model.num_heads // model.num_kv_heads for n in groups}
    layers = groups | heads | {*counts(model.ffn_size, blocks)}
    if model.inputs == "patches":
        layers |= {*counts(model.patch_size, blocks)}
    labels = {model.outputs_per_label * n for n in counts(model.head_size // model.outputs_per_label, blocks)}
    shapes = set()
    for tokens in rows or _rows(config.train):
        answers = tokens if model.pooling == "none" else tokens // config.train.seq_len
        chunks = [answers] if model.head == "values" else counts(answers, loss_chunks(answers, model.head_size))
        shapes |= {(tokens, width) for width in layers} | {(chunk, width) for chunk in chunks for width in labels}
        if model.head == "masked" or model.pooler:
            shapes |= {(block, model.hidden_size) for block in counts(tokens, blocks)}
    if not _is_offered(multiply, draw(1, 1)):
        yield "a product", torch.zeros(1), torch.ones(1)
        return
    for tokens, width in sorted(shapes):
        x, weight = draw(tokens, model.hidden_size), draw(width, model.hidden_size)
        y = multiply(x, weight.t())
        yield "a product", y, multiply(_moved(x), _moved(weight).t())
        yield "a product backward", multiply(y, weight), multiply(_moved(y), _moved(weight))
        yield ("a weight's gradient", add_product(weight.clone(), y.t(), x, multiply),
               add_product(_moved(weight), _moved(y).t(), _moved(x), multiply))


def _is_offered(multiply, x):
    """Tell whether this build of torch has the way for the type of ``x``."""
    try:
        multiply(x, x)
    except (AttributeError, RuntimeError):
        return False
    return True


def _operations(config):
    """Yield ``(operation, result, the same computed otherwise)`` of what is no product."""
    model, train, draw = config.model, config.train, _draws(config.train)
    x = draw(train.microbatch * train.seq_len, model.hidden_size)
    block = x[:max(1, len(x) // train.exact_blocks)]
    yield "attention", *_attention(config, draw)
    yield from _norm(x, block, model)
    yield "a sum over tokens", block.sum(0), _moved(block).sum(0)
    yield "a sum over columns", *_by_rows(lambda rows: rows.double().square().sum(1), x)
    yield "a softmax", *_by_rows(lambda rows: rows.sub(rows.amax(1, keepdim=True)).exp().sum(1), x)
    masters = torch.promote_types(x.dtype, torch.float32)
    yield "the optimiser on a shard", *_optimizer(train, draw(8 * ALIGNMENT).to(masters))


def _attention(config, draw):
    """Return output and gradients of a block of heads, twice.

    Its operands have just been computed, each in memory of its own: their alignment is always the same.
    """
    model, train = config.model, config.train
    heads = max(counts(model.num_kv_heads, train.exact_blocks)) * model.num_heads // model.num_kv_heads
    operands = [draw(train.microbatch, train.seq_len, heads, model.head_dim) for _ in range(4)]
    documents = torch.zeros(1, train.seq_len) if config.data.mask_documents else None
    mask, is_causal = visible(model, 0, train.seq_len, documents_BS=documents), model.attention == "causal"

    def attend():
        *inputs, gradient = (x.clone().transpose(1, 2).requires_grad_() for x in operands)
        out = scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=is_causal and mask is None)
        return torch.stack([out, *torch.autograd.grad(out, inputs, gradient.detach())])

    return attend(), attend()


def _norm(x, block, model):
    """Yield a norm's output of some rows among all and alone, and the gradients of a block here and elsewhere."""
    split = TensorSplit(Group(SingleComm()), dtype=x.dtype, blocks=1)
    norm = make_norm(layer_parameters(model), "attention_norm", split, model)
    for weight in norm.parameters():
        torch.nn.init.ones_(weight)

    def gradients(block):
        norm.zero_grad()
        inputs = block.detach().requires_grad_()
        norm(inputs, len(inputs)).backward(block.flip(1))
        return torch.cat([inputs.grad, *(weight.grad[None] for weight in norm.parameters())])

    part = _part(x)
    yield "a norm", norm(x, len(x)).detach()[part], norm(x[part], len(x[part])).detach()
    yield "a norm backward", gradients(block), gradients(_moved(block))


def _optimizer(train, gradient):
    """Return the weights after two steps on a whole and on its halves."""

    def updated(parts):
        weights, steps = [torch.ones_like(part) for part in parts], [torch.zeros(()) for _ in parts]
        state = {kind: [torch.zeros_like(part) for part in parts] for kind in state_kinds(train)}
        for _ in range(2):
            update(train, train.lr, train.weight_decay, weights, parts, state, steps)
        return torch.cat(weights)

    return updated([gradient]), updated(list(gradient.chunk(2)))


def _by_rows(function, x):
    return function(x)[_part(x)], function(x[_part(x)].clone())


def _part(x):
    return slice(len(x) // 3, max(len(x) // 3 + 1, 2 * len(x) // 3))


def _moved(x):
    """Copy to memory of another alignment."""
    room = torch.empty(x.numel() + 3, dtype=x.dtype)
    return room[3:].copy_(x.reshape(-1)).view(x.shape)
