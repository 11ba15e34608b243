"""What a layer and the output head cost a microbatch: seconds, and bytes kept."""

from typing import NamedTuple

from mpillm.planner.collective_costs import collective_s
from mpillm.planner.counts import FFN_MATRICES
from mpillm.schedules.blocks import loss_chunks

# A score is written, scaled with softmax, dropped out and read again; softmax, its mask and the dropped are kept.
SCORES_TOUCHED, SCORES_KEPT = 6, 5  # items, bytes (Korthikanti et al. 2022)
CAUSAL_BLOCK = 256  # positions: of the scores that nobody sees, kernels leave out whole blocks (PyTorch's for CPUs, 2.13)
BACKWARD_BYTES = 1.5  # an elementwise backward reads two tensors and writes one, its forward reads one and writes one


class ActionTimes(NamedTuple):
    """Seconds of forward, input and weight half."""

    forward_s: float
    input_s: float
    weight_s: float


def layer_work(model, machine, level, seq_len, tokens, tensor, item_bytes, recompute, sequence_parallel,
               is_masked=False):
    """Price a layer for a microbatch on one tensor rank.

    Local. Products at the machine's rate for their sizes; attention at the rate for its head size;
    elementwise work by the bytes it moves, the scores among them where they are kept as a matrix (``kind = "gpt"``);
    two allreduces (or their halves) forward and two backward; recompute repeats the forward, or its attention, before
    the backward (Korthikanti et al. 2022).

    Parameters
    ----------
    model : mpillm.config.Model
    machine : Machine
    level : Level
        Over which tensor ranks reach each other.
    seq_len, tokens : int
        Of a sequence, and of the microbatch.
    tensor : int
        Tensor ranks.
    item_bytes : int
        Of an activation or a weight.
    recompute : {"none", "selective", "full"}
    sequence_parallel : bool
    is_masked : bool
        Whether attention is told by a mask who sees whom, and so computes all scores.

    Returns
    -------
    ActionTimes
    """
    h, heads, keys = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    ups = FFN_MATRICES[model.kind] - 1
    shapes = ((h, (heads + 2 * keys) / tensor), (heads / tensor, h), (h, ups * model.ffn_size / tensor),
              (model.ffn_size / tensor, h))
    products, inputs, weights = (sum(map(machine.product_s, *zip(*sizes))) for sizes in (
        [(tokens, k, n) for k, n in shapes], [(tokens, n, k) for k, n in shapes], [(k, tokens, n) for k, n in shapes]))
    # Half of the scores are computed for nothing where no causal kernel leaves them out.
    whole_scores = 4 if model.kind == "gpt" else 4 / (1 + min(1, CAUSAL_BLOCK / seq_len)) if is_masked else 2
    attention = whole_scores * tokens * seq_len * heads / tensor / (
        machine.attention_flops_per_s or machine.matmul_flops_per_s(model.head_dim))
    whole = tokens * h * item_bytes
    split = tensor if sequence_parallel else 1
    inner = tokens * ((2 * heads + 2 * keys) + (ups + 1) * model.ffn_size) / tensor * item_bytes
    scores = tokens * seq_len * model.num_heads / tensor if model.kind == "gpt" else 0.0
    touched = 2 * (6 * whole / split + inner) + SCORES_TOUCHED * item_bytes * scores
    elementwise = touched / (machine.elementwise_bytes_per_s or machine.memory_bytes_per_s)
    ops = ("reduce_scatter", "allgather") if sequence_parallel else ("allreduce",)
    meetings = len(ops) if tensor > 1 else 0
    talk = 2 * (sum(collective_s(op, level, tensor, whole) for op in ops) + meetings * level.skew_s)
    forward = machine.with_call(products + attention + elementwise) + talk
    again_s = attention + SCORES_TOUCHED * item_bytes * scores / machine.memory_bytes_per_s
    again = {"none": 0.0, "selective": again_s, "full": forward}[recompute]
    backward = (machine.with_call(inputs + 2 * attention + BACKWARD_BYTES * elementwise)
                + talk * (1.25 if sequence_parallel else 1))
    return ActionTimes(forward, backward + again, weights)


def head_work(model, machine, level, tokens, tensor, item_bytes, sequence_parallel):
    """Price the output head and the loss of a microbatch on one tensor rank.

    Local. Its forward makes the gradients of input and weight too, so that no logits are kept. What is left is to add
    up the input's over tensor ranks, and to add the weight's, in float32, to those of other microbatches.

    Parameters
    ----------
    model, machine, level, tokens, tensor, item_bytes, sequence_parallel
        As for :func:`layer_work`.

    Returns
    -------
    ActionTimes
    """
    columns = model.vocab_size / tensor
    product = machine.product_s(tokens, model.hidden_size, columns)
    loss = 8 * tokens * columns * item_bytes / (machine.elementwise_bytes_per_s or machine.memory_bytes_per_s)
    adding = 3 * 4 * model.hidden_size * columns / machine.memory_bytes_per_s

    def talk(op, n_bytes):
        return collective_s(op, level, tensor, n_bytes) + (level.skew_s if tensor > 1 else 0.0)

    whole = tokens * model.hidden_size * item_bytes
    chunks = loss_chunks(tokens, model.vocab_size, "cuda" if machine.wave else "cpu")
    # The largest logit; the sum of exponentials and the target's logit.
    losses = chunks * sum(talk("allreduce", numbers * tokens / chunks * max(4, item_bytes)) for numbers in (1, 2))
    entered = talk("allgather", whole) if sequence_parallel else 0.0
    summed = talk("reduce_scatter" if sequence_parallel else "allreduce", whole)
    return ActionTimes(3 * product + loss + losses + entered, summed, adding)
