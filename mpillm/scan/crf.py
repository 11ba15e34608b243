"""Linear-chain conditional random fields: one chain over ranks, or many chains of unequal lengths over data ranks.

The sum over all paths is a product of matrices over (log-sum-exp, +), so that ranks compute their parts at once. Unlike the
best path it cannot start from anything, so that on ``p`` ranks a part costs ``K`` times as much as in sequence: one chain over
ranks is for chains that no rank can hold, or for fewer states than ranks. Many chains are better spread whole.

Legend: T steps, K states, B chains.
"""

import torch

from mpillm.autograd.regions import copy_to, reduce_from
from mpillm.comm.group import as_group
from mpillm.errors import ShapeError, agreed
from mpillm.scan.operators import LOG_PLUS, log_sum_exp
from mpillm.scan.prefix import reduce


def crf_log_partition(emissions_TK, transitions_KK, initial_K, comm):
    """Return the logarithm of the sum over all paths of the exponential of their scores.

    Collective over ``comm``, as is backward.

    Parameters
    ----------
    emissions_TK : Tensor, shape (T_i, K), sharded(0)
        Scores of this rank's steps, in any number; those of rank 0 come first. -inf forbids.
    transitions_KK : Tensor, shape (K, K), replicated
        From the state of its row to that of its column.
    initial_K : Tensor, shape (K,), replicated
    comm : Comm or Group

    Returns
    -------
    Tensor, shape (), replicated
        Its gradients are the expected numbers of visits and of transitions. 0 for no steps at all.

    Raises
    ------
    ShapeError
        On every rank, if shapes or dtypes do not fit.

    Notes
    -----
    A rank computes ``T_i K**3`` exponentials, the first rank ``T_i K**2``; one allgather of ``K**2`` numbers; backward one
    allreduce of ``K**2 + K``. The bits depend on the division.
    """
    group = as_group(comm)
    counts = _checked(emissions_TK, transitions_KK, initial_K, group, 2)
    transitions, initial = _shared(transitions_KK, initial_K, group)
    parts = [(transitions + initial)[:0].reshape(0, *transitions.shape)]  # backward enters on every rank
    if len(emissions_TK):
        is_first = not any(counts[:group.rank])
        rows = (initial[None] if is_first else transitions) + emissions_TK[0]
        for scores in emissions_TK[1:]:
            rows = log_sum_exp(rows[:, :, None] + transitions, 1) + scores
        parts.append(rows.expand(transitions.shape)[None])
    return log_sum_exp(reduce(LOG_PLUS, torch.cat(parts), group)[0], 0)


def crf_marginals(emissions_TK, transitions_KK, initial_K, comm):
    """Return the probability of every state at this rank's steps.

    Collective over ``comm``. Parameters and errors are those of :func:`crf_log_partition`, whose gradient this is.

    Returns
    -------
    Tensor, shape (T_i, K), sharded(0)
        Without gradients.
    """
    with torch.enable_grad():
        emissions = emissions_TK.detach().requires_grad_()
        total = crf_log_partition(emissions, transitions_KK.detach(), initial_K.detach(), comm)
        return torch.autograd.grad(total, emissions)[0] if len(emissions) else emissions.detach()


def crf_path_score(emissions_TK, path_T, transitions_KK, initial_K, comm):
    """Return the score of one path; less :func:`crf_log_partition` it is the path's log-probability.

    Collective over ``comm``, as is backward. Parameters, errors and cost are those of :func:`crf_log_partition`.

    Parameters
    ----------
    path_T : Tensor of int64, shape (T_i,), sharded(0)

    Returns
    -------
    Tensor, shape (), replicated
    """
    group = as_group(comm)
    _checked(emissions_TK, transitions_KK, initial_K, group, 2)
    ends = group.comm.allgather(path_T[-1:].tolist())
    before = [state for end in ends[:group.rank] for state in end][-1:]
    transitions, initial = _shared(transitions_KK, initial_K, group)
    score = transitions[:0].sum() + initial[:0].sum()  # backward enters on every rank
    if len(path_T):
        states = torch.cat((path_T.new_tensor(before), path_T))
        score = score + emissions_TK.gather(1, path_T[:, None]).sum() + transitions[states[:-1], states[1:]].sum()
        score = score if before else score + initial[path_T[0]]
    return reduce_from(score, group)


def crf_log_likelihoods(emissions_BTK, paths_BT, lengths_B, transitions_KK, initial_K, comm):
    """Return the log-probability of a path through each of this rank's chains.

    Collective over ``comm``, as is backward; chains are computed where they are.

    Parameters
    ----------
    emissions_BTK : Tensor, shape (B_i, T_i, K), varying
    paths_BT : Tensor of int64, shape (B_i, T_i), varying
    lengths_B : Tensor of int64, shape (B_i,), varying
        From 1 to T_i: later steps count for nothing.
    transitions_KK, initial_K, comm
        As in :func:`crf_log_partition`. Their gradients sum over the chains of all ranks.

    Returns
    -------
    Tensor, shape (B_i,), varying

    Raises
    ------
    ShapeError
        On every rank, if shapes, dtypes or lengths do not fit.
    """
    group = as_group(comm)
    _checked(emissions_BTK, transitions_KK, initial_K, group, 3, lengths_B)
    transitions, initial = _shared(transitions_KK, initial_K, group)
    vectors, score = initial + emissions_BTK[:, 0], initial[paths_BT[:, 0]]
    within = torch.arange(emissions_BTK.shape[1], device=lengths_B.device) < lengths_B[:, None]
    for step in range(1, emissions_BTK.shape[1]):
        later = log_sum_exp(vectors[:, :, None] + transitions, 1) + emissions_BTK[:, step]
        vectors = torch.where(within[:, step, None], later, vectors)
        score = score + torch.where(within[:, step], transitions[paths_BT[:, step - 1], paths_BT[:, step]], 0)
    taken = emissions_BTK.gather(2, paths_BT[..., None])[..., 0]
    return score + torch.where(within, taken, 0).sum(1) - log_sum_exp(vectors, 1)


def _shared(transitions, initial, group):
    """Let the ranks use replicated scores, with one allreduce of both gradients."""
    both = copy_to(torch.cat((transitions, initial[None])), group)
    return both[:-1], both[-1]


def _checked(emissions, transitions, initial, group, dims, lengths=None):
    """Return the first size of the ranks' emissions, or raise on all of them."""
    with agreed(group.comm, "crf"):
        states = initial.shape[0] if initial.dim() == 1 else 0
        fits = states and transitions.shape == (states, states) and emissions.dim() == dims and emissions.shape[-1] == states
        if not fits or not emissions.dtype == transitions.dtype == initial.dtype or not initial.is_floating_point():
            raise ShapeError(f"crf: emissions {emissions.dtype} {list(emissions.shape)}, transitions {transitions.dtype} "
                             f"{list(transitions.shape)}, initial {initial.dtype} {list(initial.shape)}: must be "
                             f"[{'B, ' * (dims - 2)}T, K], [K, K] and [K] of one floating point type")
        if lengths is not None and len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= emissions.shape[1]:
            raise ShapeError(f"crf: lengths {int(lengths.min())} to {int(lengths.max())}: must be from 1 to "
                             f"{emissions.shape[1]}")
    return group.comm.allgather(len(emissions))
