"""What a layer, the embedding and the output head cost a microbatch in seconds."""

from typing import NamedTuple

from mpillm.machine import Level
from mpillm.planner.collective_costs import collective_s
from mpillm.planner.counts import ALL_TRAINED, crossings, divided_norms, ends, layer_rows, matrices, num_answers
from mpillm.schedules.blocks import loss_chunks

# A score is written, scaled with softmax, dropped out and read again; softmax, its mask and the dropped are kept.
SCORES_TOUCHED, SCORES_KEPT = 6, 5  # items, bytes (Korthikanti et al. 2022)
CAUSAL_BLOCK = 256  # positions: of the scores that nobody sees, kernels leave out whole blocks (PyTorch's for CPUs, 2.13)
BACKWARD_BYTES = 1.5  # an elementwise backward reads two tensors and writes one, its forward reads one and writes one
LOGITS_TOUCHED, CAP_TOUCHED = 8, 4  # items of a logit: by the loss; by a cap, which is a tanh and its slope
# Items of a number: that is looked up; that is added to another, as to a row's gradient; that a norm reads twice and writes.
LOOKUP_TOUCHED, SUM_TOUCHED, NORM_TOUCHED = 2, 3, 3
TRANSFORM_TOUCHED = 6  # items: what the product of a masked head's transform writes, its activation and its norm; a pooler less


class ActionTimes(NamedTuple):
    """Seconds of forward, input and weight half."""

    forward_s: float
    input_s: float
    weight_s: float


class TensorRanks(NamedTuple):
    """The ranks that split a layer: how many they are, over which level they reach each other, whether activations between
    their regions are sharded by tokens, and whether numerics are exact."""

    size: int
    level: Level
    sequence_parallel: bool = False
    is_exact: bool = False

    def meeting_s(self, op, n_bytes):
        """Return the seconds of a collective in which ranks that compute in between wait for each other. Local."""
        return collective_s(op, self.level, self.size, n_bytes) + (self.level.skew_s if self.size > 1 else 0.0)

    def passing_s(self, n_bytes):
        """Return the seconds of giving every rank all of an activation and of adding up their parts of one, each of which
        is the backward of the other. Local."""
        if self.sequence_parallel:
            return self.meeting_s("allgather", n_bytes), self.meeting_s("reduce_scatter", n_bytes)
        return 0.0, self.meeting_s("allreduce", n_bytes)


def layer_work(model, machine, ranks, seq_len, tokens, item_bytes, recompute, is_masked=False, trained=ALL_TRAINED):
    """Price a layer for a microbatch on one tensor rank.

    Local. Products at the machine's rate for their sizes; attention at the rate for its head size; elementwise work by the
    bytes it moves, the scores among them where the machine keeps them as a matrix; what ranks pass each other where they
    enter and leave what is split, and the squares of norms whose width they divide; recompute repeats the forward, or its
    attention, before the backward (Korthikanti et al. 2022).

    Parameters
    ----------
    model : mpillm.model.description.Model
    machine : Machine
    ranks : TensorRanks
    seq_len, tokens : int
        Of a sequence, and of the microbatch.
    item_bytes : int
        Of an activation or a weight.
    recompute : {"none", "selective", "full"}
    is_masked : bool
        Whether attention is told by a mask who sees whom.
    trained : LayerTrained
        Other products have no weight half, and a layer without backward has a forward alone.

    Returns
    -------
    ActionTimes
    """
    rows = layer_rows(model, ranks.size, ranks.is_exact)
    queries, keys = rows["attention.query.weight"], rows["attention.key.weight"]
    shapes = list(_products(model.hidden_size, rows))
    products, inputs = (sum(map(machine.product_s, *zip(*sizes))) for sizes in (
        [(tokens, k, n) for k, n in shapes], [(tokens, n, k) for k, n in shapes]))
    weights = sum(machine.product_s(k, tokens, n) for (k, n), is_trained in zip(shapes, trained) if is_trained)
    # A causal kernel leaves out scores that nobody sees; its rate is that of a half of them.
    if machine.keeps_scores:
        whole_scores = 4
    elif is_masked or model.attention == "bidirectional":
        whole_scores = 4 / (1 + min(1, CAUSAL_BLOCK / seq_len))
    else:
        whole_scores = 2
    attention = whole_scores * tokens * seq_len * queries / (
        machine.attention_flops_per_s or machine.matmul_flops_per_s(model.head_dim))
    whole = tokens * model.hidden_size * item_bytes
    inner = tokens * item_bytes * (sum(rows.values()) + (queries + keys) * (model.qk_norm != "none"))
    scores = tokens * seq_len * queries / model.head_dim * machine.keeps_scores
    touched = (2 * (6 * whole / (ranks.size if ranks.sequence_parallel else 1) + inner)
               + SCORES_TOUCHED * item_bytes * scores)
    elementwise = touched / (machine.elementwise_bytes_per_s or machine.memory_bytes_per_s)
    given, added = ranks.passing_s(whole)
    enters, leaves, _ = crossings(model)
    count = divided_norms(model, ranks.size, ranks.is_exact)
    squares = ranks.meeting_s("allreduce", count * tokens * max(4, item_bytes)) if count else 0.0
    forward = machine.with_call(products + attention + elementwise) + enters * given + leaves * added + squares
    again_s = attention + SCORES_TOUCHED * item_bytes * scores / machine.memory_bytes_per_s
    if not trained.has_backward:
        return ActionTimes(forward, 0.0, 0.0)
    again = {"none": 0.0, "selective": again_s, "full": forward}[recompute]
    backward = (machine.with_call(inputs + 2 * attention + BACKWARD_BYTES * elementwise)
                + (leaves * given + enters * added) * (1.25 if ranks.sequence_parallel else 1) + squares)
    return ActionTimes(forward, backward + again, weights)


def _products(width, rows):
    """Yield inner size and columns of a layer's products, of weights that read the same input as one."""
    for half in ("attention", "ffn"):
        *inward, outward = (count for name, count in rows.items() if name.startswith(half))
        yield width, sum(inward)
        yield outward, width


def embedding_work(model, machine, ranks, tokens, item_bytes, is_trained=True):
    """Price what stands before the first layer for a microbatch on one tensor rank.

    Local. Rows are looked up, and gradients added to them, by the bytes that this moves; patches are a product. Ranks add up
    what each has of it; a norm is of the tokens of a rank.

    Parameters
    ----------
    model, machine, ranks, tokens, item_bytes
        As for :func:`layer_work`.
    is_trained : bool
        Whether any of it is; there is no backward otherwise.

    Returns
    -------
    ActionTimes
    """
    whole = tokens * model.hidden_size * item_bytes
    per_byte_s = 1 / (machine.elementwise_bytes_per_s or machine.memory_bytes_per_s)
    given, added = ranks.passing_s(whole)
    norm = NORM_TOUCHED * whole / (ranks.size if ranks.sequence_parallel else 1) * per_byte_s * model.embedding_norm
    has_words, has_rows = model.inputs == "tokens", model.positions == "learned"
    lookups = has_words + has_rows
    forward = (LOOKUP_TOUCHED * lookups + SUM_TOUCHED * has_rows) * whole * per_byte_s
    weight = SUM_TOUCHED * lookups * whole * per_byte_s
    if not has_words:
        inner = model.patch_size / ranks.size
        forward += machine.product_s(tokens, inner, model.hidden_size)
        weight += machine.product_s(inner, tokens, model.hidden_size)
    return ActionTimes(forward + added + norm, is_trained * (given + BACKWARD_BYTES * norm), is_trained * weight)


def head_work(model, machine, ranks, seq_len, tokens, item_bytes, gradients=(True, True)):
    """Price the output head and the loss of a microbatch on one tensor rank.

    Local. Its forward makes the gradients of input and weight too, so that no logits are kept. What is left is to add
    up the input's over tensor ranks, and to add the weight's, in float32, to those of other microbatches. A transform
    before it is a product of its own on the tokens of a rank.

    Parameters
    ----------
    model, machine, ranks, seq_len, tokens, item_bytes
        As for :func:`layer_work`.
    gradients : (bool, bool)
        Whether there is one of the weight, and one of the input.

    Returns
    -------
    ActionTimes
    """
    *transforms, words = matrices(ends(model)[1])
    width, columns = model.hidden_size, words.shape[0] / ranks.size
    elementwise_bytes_per_s = machine.elementwise_bytes_per_s or machine.memory_bytes_per_s
    rows = num_answers(model, seq_len, tokens)
    product = machine.product_s(rows, width, columns)
    touched = LOGITS_TOUCHED + CAP_TOUCHED * (model.logit_softcap > 0)
    loss = touched * rows * columns * item_bytes / elementwise_bytes_per_s
    adding = 3 * 4 * width * columns / machine.memory_bytes_per_s
    whole = tokens * width * item_bytes
    chunks = loss_chunks(rows, words.shape[0], "cuda" if machine.wave else "cpu")
    # The largest logit; the sum of exponentials and the target's logit.
    losses = chunks * sum(ranks.meeting_s("allreduce", numbers * rows / chunks * max(4, item_bytes))
                          for numbers in (1, 2))
    given, added = ranks.passing_s(whole)
    own = tokens / (ranks.size if ranks.sequence_parallel else 1)
    transform = sum(machine.product_s(own, width, matrix.shape[0]) for matrix in transforms)
    between = len(transforms) * TRANSFORM_TOUCHED * own * width * item_bytes / elementwise_bytes_per_s
    of_weight, of_input = gradients
    return ActionTimes((1 + of_weight + of_input) * product + loss + losses + given + transform + between,
                       of_input * (added + transform + BACKWARD_BYTES * between), of_weight * adding + of_input * transform)
