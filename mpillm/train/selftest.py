"""Whether this machine's kernels keep the promise of ``numerics = "exact"``, tried on the model's own shapes.

The promise rests on facts that hold for the kernels of a CPU type and torch build, or do not: products of equal shapes
have equal bits wherever their operands lie; row-wise operations give a row the same bits whichever rows lie beside it;
an optimiser gives a shard the same bits as the whole.
"""

import torch

from mpillm.comm.group import Group
from mpillm.comm.single import SingleComm
from mpillm.errors import ConfigError
from mpillm.nn.norm import RMSNorm
from mpillm.nn.split import TensorSplit
from mpillm.train.optimizers import state_kinds, update
from mpillm.train.storage import ALIGNMENT


def check_exact(config):
    """Refuse ``exact`` if kernels give different bits where it needs equal ones.

    Local: every rank tries its own processor.

    Parameters
    ----------
    config : Config
        Resolved.

    Raises
    ------
    ConfigError
        On the rank whose kernels fail, naming the operation.
    """
    threads, found = torch.get_num_threads(), {}
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            found[count] = list(_trials(config))
    finally:
        torch.set_num_threads(threads)
    for (operation, one, other), (_, threaded, _) in zip(found[1], found[threads]):
        if not torch.equal(one, other):
            _refuse(config, operation, "use train.numerics = fast")
        if not torch.equal(one, threaded):
            _refuse(config, f"{operation} with {threads} threads", "set OMP_NUM_THREADS=1")


def _refuse(config, what, remedy):
    raise ConfigError(
        f"train.numerics = exact: {what} in {config.train.dtype} does not repeat bit for bit on this processor with "
        f"torch {torch.__version__}: {remedy}"
    )


def _trials(config):
    """Yield ``(operation, result, the same computed otherwise)``."""
    model, train = config.model, config.train
    dtype, generator = getattr(torch, train.dtype), torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = draw(train.microbatch * train.seq_len, model.hidden_size)
    yield from _products(x, [draw(-(-size // train.exact_blocks), model.hidden_size)
                             for size in (model.ffn_size, model.num_heads * model.head_dim, model.vocab_size)])
    block = x[:max(1, len(x) // train.exact_blocks)]
    yield from _norm(x, block, model.norm_eps)
    yield "a sum over tokens", block.sum(0), _moved(block).sum(0)
    yield "a sum over columns", *_by_rows(lambda rows: rows.double().square().sum(1), x)
    yield "a softmax", *_by_rows(lambda rows: rows.sub(rows.amax(1, keepdim=True)).exp().sum(1), x)
    masters = torch.promote_types(dtype, torch.float32)
    yield "the optimiser on a shard", *_optimizer(train, draw(8 * ALIGNMENT).to(masters))


def _products(x, weights):
    """Yield products forward and backward, each twice: with operands here, and at odd addresses."""
    for weight in weights:
        y = x @ weight.t()
        yield "a product", y, _moved(x) @ _moved(weight).t()
        yield "a product backward", y @ weight, _moved(y) @ _moved(weight)
        yield "a weight's gradient", y.t() @ x, _moved(y).t() @ _moved(x)


def _norm(x, block, eps):
    """Yield a norm's output of some rows among all and alone, and the gradients of a block here and elsewhere."""
    norm = RMSNorm("self-test", TensorSplit(Group(SingleComm()), dtype=x.dtype, blocks=1), x.shape[1], eps)
    torch.nn.init.ones_(norm.weight)

    def gradients(block):
        norm.weight.grad, inputs = None, block.detach().requires_grad_()
        norm(inputs, len(inputs)).backward(block.flip(1))
        return torch.cat([inputs.grad, norm.weight.grad[None]])

    part = _part(x)
    yield "RMSNorm", norm(x, len(x)).detach()[part], norm(x[part], len(x[part])).detach()
    yield "RMSNorm backward", gradients(block), gradients(_moved(block))


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
