"""Whether rows of a pass see each other on this launch's processors, tried with a layer and the head of the model itself."""

from hashlib import sha256

import torch

from mpillm.inference.cache import KeyValuePool, Pages, block_size
from mpillm.inference.replica import batch_of
from mpillm.inference.scheduler import Piece

SHORT, CUT, GENERATED = 20, 7, 5  # tokens of a prompt, and of a part of it; another is longer than a block


def warm_up(model, stage):
    """Run every layer once, so that its weights are packed, and give up what they were packed from.

    Collective over the tensor axis.

    Returns
    -------
    int
        The bytes of a block of keys and values on this rank.
    """
    like = next(stage.parameters())
    pool = KeyValuePool(1, block_size(model.head_dim))
    pages = Pages(pool, [Piece(0, 0, (0,), (0,), True)], model.window, like)
    batch, x_TD = batch_of(model, pages, like), like.new_zeros(1, model.hidden_size)
    with torch.no_grad():
        for layer in stage.layers:
            layer(x_TD, batch)
            _release(layer, stage.split)
        if stage.is_last:
            stage.logits(x_TD, batch)
            _release(stage.head, stage.split)
    return pool.block_bytes


def rows_apart(model, stage, groups):
    """Tell what depends on what shares a pass, in words, or return "" if nothing does.

    Collective over the ranks of ``groups``.

    Parameters
    ----------
    model : mpillm.model.description.Model
    stage : TransformerStage
        Behind :func:`warm_up`.
    groups : list of Group
        Data ranks, which must compute the same bits, and all ranks, which must agree.
    """
    data, world = groups
    threads, digests = torch.get_num_threads(), {}
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            digests[count] = [_digest(rows) for rows in _trials(model, stage)]
    finally:
        torch.set_num_threads(threads)
    found = ""
    if len(set(digests[1] + digests[threads])) > 1:
        found = f"with {threads} threads rows of a pass see each other" if len(set(digests[1])) == 1 else "rows see each other"
    elif len(set(data.comm.allgather(digests[1][0]))) > 1:
        found = "replicas compute other bits"
    return next(filter(None, world.comm.allgather(found)), "")


def _trials(model, stage):
    """Yield what the layer gives for the same rows in passes that are cut in other ways."""
    like, size = next(stage.parameters()), block_size(model.head_dim)
    long = size + 8
    generator = torch.Generator().manual_seed(0)
    rows = {number: torch.randn(length, model.hidden_size, generator=generator, dtype=torch.float64).to(like)
            for number, length in ((0, long + GENERATED), (1, SHORT + GENERATED))}
    prompts = {0: long, 1: SHORT}
    blocks = {0: (2, 1), 1: (0,)}
    whole = [[(0, 0, long), (1, 0, SHORT)],
             *([(0, long + i, long + i + 1), (1, SHORT + i, SHORT + i + 1)] for i in range(GENERATED))]
    apart = [[(0, 0, size), (1, 0, CUT)], [(1, CUT, SHORT), (0, size, long)],
             *([(number, prompts[number] + i, prompts[number] + i + 1)] for i in range(GENERATED) for number in (0, 1))]
    together = [[(1, 0, SHORT)], [(0, 0, long)],
                [(1, SHORT, SHORT + GENERATED), (0, long, long + 2)], [(0, long + 2, long + GENERATED)]]
    for passes in (whole, apart, together):
        pool, found = KeyValuePool(3, size), {number: torch.zeros_like(x) for number, x in rows.items()}
        for parts in passes:
            pieces = [Piece(number, start, (0,) * (stop - start), blocks[number][:-(-stop // size)],
                            start < prompts[number]) for number, start, stop in parts]
            pages = Pages(pool, pieces, model.window, like)
            batch = batch_of(model, pages, like)
            with torch.no_grad():
                y = _computed(stage, torch.cat([rows[number][start:stop] for number, start, stop in parts]), batch)
            lengths = [stop - start for _, start, stop in parts]
            for (number, start, _), part in zip(parts, y.split(lengths)):
                found[number] = _put(found[number], part, start)
        yield torch.cat([found[0], found[1]])


def _put(rows, part, start):
    """Return rows with a part in its place, made as wide as it."""
    if rows.shape[1] != part.shape[1]:
        rows = part.new_zeros(len(rows), part.shape[1])
    rows[start:start + len(part)] = part
    return rows


def _computed(stage, x_TD, batch):
    """Return what a layer and, at the end of the model, the head make of rows."""
    if len(stage.layers):
        x_TD = stage.layers[0](x_TD, batch)
    return stage.logits(x_TD, batch) if stage.is_last else x_TD


def _digest(rows):
    return sha256(rows.cpu().view(torch.uint8).numpy()).hexdigest()


def _release(module, split):
    """Give up the matrices of a module, where products have copies of their own."""
    if split.multiply.copies:
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.new_empty(0)
