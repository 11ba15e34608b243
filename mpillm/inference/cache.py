"""Keys and values of many requests in blocks of one pool, and attention over them whose rows do not see each other.

A token of a prompt is computed in the tile of its block: queries of a whole block against all keys up to the block's end, rows
that are not there left empty. A generated token asks every block by itself, and the answers are put together by their weights
(as Dao et al. 2023 do over long rows). So what a token is computed with follows from its position alone: not from who shares
its pass, nor from how a prompt was cut into passes.

Legend: T tokens, H query heads, K key/value heads, G query heads that ask one of them, N head width, P positions of a block,
R generated tokens, M blocks of the longest, B blocks that are asked.
"""

import math
import mmap
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch


def block_size(head_dim):
    """Return how many positions a block has. Local.

    The kernel of attention keeps for each query a score a position, a maximum, a sum and ``head_dim`` numbers, one behind the
    other. Where these fill whole groups of 64 bytes, the memory of every thread begins at one; else results depend on the
    thread that computes them.
    """
    return 62 - head_dim % 16


class KeyValuePool:
    """Room for keys and values on this rank. Local.

    Parameters
    ----------
    num_blocks, block_size : int
    """

    def __init__(self, num_blocks, block_size):
        self.num_blocks, self.block_size, self._kept = num_blocks, block_size, {}

    def of(self, owner, k_TKN):
        """Return the keys and values ``[2, positions of all blocks, K, N]`` of a part of a layer."""
        if owner not in self._kept:
            self._kept[owner] = _zeros((2, self.num_blocks * self.block_size, *k_TKN.shape[1:]), k_TKN)
        return self._kept[owner]

    @property
    def block_bytes(self):
        """The bytes of a block in all parts of layers that have asked so far."""
        return sum(kept[:, :self.block_size].nbytes for kept in self._kept.values())


@dataclass(frozen=True)
class Tiles:
    """Pieces of prompts in the same block of their rows, which see the same positions.

    Attributes
    ----------
    start, stop : int
        Which of all tiles of the pass these are.
    blocks : Tensor or (int, int)
        ``[tiles, blocks that are seen]``; or the first block and the step from tile to tile, where these and what each sees lie
        in the pool one behind the other.
    is_seen : Tensor
        ``[P, positions]``, added to scores.
    """

    start: int
    stop: int
    blocks: torch.Tensor | tuple
    is_seen: torch.Tensor

    def of(self, kept):
        """Return the keys and values ``[2, tiles, positions, K, N]``, where they lie if they can be."""
        _, _, heads, width = kept.shape
        size, positions = self.is_seen.shape
        if isinstance(self.blocks, tuple):
            first, step = (block * size * kept.stride(1) for block in self.blocks)
            return kept.as_strided((2, self.stop - self.start, positions, heads, width),
                                   (kept.stride(0), step, *kept.stride()[1:]), first)
        return kept.unflatten(1, (-1, size))[:, self.blocks].flatten(2, 3)


@dataclass(frozen=True)
class Asked:
    """Blocks that generated tokens ask: all up to the last one, where they lie in the pool, or some of them. What is found in
    those that nobody asks is not looked at."""

    rows: torch.Tensor  # [B]: who asks, among the R
    blocks: slice | torch.Tensor
    mask: torch.Tensor  # [B, 1, 1, P]


@dataclass(frozen=True)
class Singles:
    """Generated tokens of a pass, what they ask, and where among all answers theirs are."""

    rows: torch.Tensor | None  # [R]; None where they are all tokens of the pass
    asked: list
    places: torch.Tensor  # [R, M], in the order of positions
    lacks: torch.Tensor | None  # [R, M, 1, 1]: minus infinity where a token sees fewer blocks; None where all see as many


class Pages:
    """What the layers ask for attention in one pass. Local.

    Parameters
    ----------
    pool : KeyValuePool
    pieces : list of mpillm.inference.scheduler.Piece
    window : int or None
        How many positions a token sees, itself included.
    like : Tensor
        Whose dtype and device masks have.
    """

    def __init__(self, pool, pieces, window, like):
        self.pool, self._size, self._like, self._window = pool, pool.block_size, like, window
        starts = np.cumsum([0, *(len(piece.tokens) for piece in pieces)])
        self.tokens = int(starts[-1])
        self.positions = np.concatenate([np.arange(p.start, p.start + len(p.tokens)) for p in pieces])
        blocks = np.concatenate([np.asarray(p.blocks)[np.arange(p.start, p.start + len(p.tokens)) // self._size]
                                 for p in pieces])
        self._slots = self._index(blocks * self._size + self.positions % self._size)
        self._copies = [(p.source * self._size, p.blocks[p.start // self._size] * self._size, p.start % self._size)
                        for p in pieces if p.source is not None]
        self._tiles, self._tile_rows = self._find_tiles([(p, int(row)) for p, row in zip(pieces, starts) if p.is_prompt])
        self._singles = self._find_singles([(p, int(row)) for p, row in zip(pieces, starts) if not p.is_prompt])
        self._where = self._index(self._find_answers())

    def attend(self, owner, q_BHSN, k_BKSN, v_BKSN):
        """Keep keys and values of the pass's tokens and return what each sees: ``[1, H, T, N]``, ``[1, K, T, N]`` twice
        → ``[1, H, T, N]``."""
        q_THN, *new = (x[0].transpose(0, 1) for x in (q_BHSN, k_BKSN, v_BKSN))
        kept = self.pool.of(owner, new[0])
        for own, x_TKN in zip(kept, new):
            own.index_copy_(0, self._slots, x_TKN)
        for source, target, count in self._copies:  # one after the other: what is copied may be a copy
            kept[:, target:target + count] = kept[:, source:source + count]
        q_TKGN = q_THN.unflatten(1, (kept.shape[2], -1))
        found = self._attend_tiles(q_TKGN, kept) if self._tiles else []
        if self._singles is not None:
            rows = self._singles.rows
            found.append(_attend_singles(self._singles, q_TKGN if rows is None else q_TKGN[rows], kept))
        found = found[0] if len(found) == 1 else torch.cat(found)
        return (found[self._where] if self._tiles else found).flatten(1, 2).transpose(0, 1)[None]

    def _attend_tiles(self, q_TKGN, kept):
        """Return the answers of all tiles, ``[tiles * P, K, G, N]`` for those in each place."""
        group = q_TKGN.shape[2]
        rows = torch.cat((q_TKGN, q_TKGN.new_zeros(1, *q_TKGN.shape[1:])))[self._tile_rows]  # [tiles, P, K, G, N]
        queries, found = rows.permute(0, 2, 3, 1, 4).flatten(2, 3), []  # [tiles, K, G * P, N]
        for tiles in self._tiles:
            keys, values = tiles.of(kept).transpose(2, 3)
            mask = tiles.is_seen if group == 1 else tiles.is_seen.repeat(group, 1)
            answer, _ = attention(queries[tiles.start:tiles.stop], keys, values, mask.expand(len(keys), 1, -1, -1))
            found.append(answer.unflatten(2, (group, self._size)).permute(0, 3, 1, 2, 4).flatten(0, 1))
        return found

    def _find_answers(self):
        """Return where the answer of each token of the pass is, those of tiles first."""
        rows = self._tile_rows.flatten().cpu().numpy() if self._tiles else np.zeros(0, np.int64)
        places, count = np.zeros(self.tokens + 1, np.int64), len(rows)
        places[rows] = np.arange(count)
        if self._singles is not None and self._singles.rows is not None:
            singles = self._singles.rows.cpu().numpy()
            places[singles] = count + np.arange(len(singles))
        return places[:-1]

    def _find_tiles(self, pieces):
        """Group the tiles of prompts by their place."""
        places = {}
        for piece, row in pieces:
            stop = piece.start + len(piece.tokens)
            for place in range(piece.start // self._size, -(-stop // self._size)):
                rows = np.arange(place * self._size, (place + 1) * self._size)
                rows = np.where((rows >= piece.start) & (rows < stop), rows - piece.start + row, self.tokens)
                first = self._first_block(place * self._size)
                places.setdefault(place, []).append((piece.blocks[first:place + 1], rows))
        found, all_rows = [], []
        for place, tiles in sorted(places.items()):
            blocks, rows = zip(*tiles)
            queries = np.arange(place * self._size, (place + 1) * self._size)
            keys = np.arange(self._first_block(place * self._size) * self._size, (place + 1) * self._size)
            found.append(Tiles(len(all_rows), len(all_rows) + len(rows), self._lying(np.array(blocks)),
                               self._mask(queries[:, None], keys)))
            all_rows += rows
        return found, self._index(np.array(all_rows))

    def _lying(self, blocks):
        """Return the first of some blocks and the step from tile to tile if they lie one behind the other, or an index."""
        step = int(blocks[1, 0] - blocks[0, 0]) if len(blocks) > 1 else 0
        steps = np.arange(len(blocks))[:, None] * step + np.arange(blocks.shape[1])
        is_lying = step >= 0 and (blocks == blocks[0, 0] + steps).all()
        return (int(blocks[0, 0]), step) if is_lying else self._index(blocks)

    def _find_singles(self, pieces):
        """Pair generated tokens with the blocks that they see."""
        rows, pair_rows, pair_blocks, positions, starts = [], [], [], [], []
        for piece, row in pieces:
            for i, position in enumerate(range(piece.start, piece.start + len(piece.tokens))):
                seen = range(self._first_block(position), position // self._size + 1)
                pair_rows += [len(rows)] * len(seen)
                pair_blocks += [piece.blocks[block] for block in seen]
                positions += [position] * len(seen)
                starts += [block * self._size for block in seen]
                rows.append(row + i)
        if not rows:
            return None
        blocks, who = np.array(pair_blocks), np.array(pair_rows)
        keys = np.array(starts)[:, None] + np.arange(self._size)
        mask = self._mask(np.array(positions)[:, None], keys)[:, None, None]
        asked, answers = self._find_asked(blocks, who, mask)
        counts = np.bincount(who)
        nth = np.arange(counts.max())
        is_there = nth < counts[:, None]
        pairs = (np.cumsum(counts) - counts)[:, None] + np.where(is_there, nth, 0)
        lacks = None if is_there.all() else self._added(is_there)[..., None, None]
        is_whole = len(rows) == self.tokens
        return Singles(None if is_whole else self._index(rows), asked, self._index(answers[pairs]), lacks)

    def _find_asked(self, blocks, who, mask):
        """Return how pairs are asked, and where the answer of each is: the first who asks a block where that lies, if those
        that are asked lie close together, and the others."""
        distinct, first = np.unique(blocks, return_index=True)
        span = int(distinct[-1]) + 1
        if 2 * len(distinct) < span:
            return [Asked(self._index(who), self._index(blocks), mask)], np.arange(len(blocks))
        owner, spread = np.zeros(span, np.int64), mask.new_zeros(span, *mask.shape[1:])
        owner[distinct], spread[distinct] = who[first], mask[first]
        asked, answers = [Asked(self._index(owner), slice(span), spread)], blocks.copy()
        rest = np.setdiff1d(np.arange(len(blocks)), first)
        if len(rest):
            asked.append(Asked(self._index(who[rest]), self._index(blocks[rest]), mask[rest]))
            answers[rest] = span + np.arange(len(rest))
        return asked, answers

    def _first_block(self, position):
        """Return the first block that a position sees something of."""
        return 0 if self._window is None else max(0, position - self._window + 1) // self._size

    def _mask(self, queries, keys):
        """Return what is added to scores: 0 for a key that is seen, else minus infinity."""
        is_seen = keys <= queries
        if self._window is not None:
            is_seen &= keys > queries - self._window
        return self._added(is_seen)

    def _added(self, is_seen):
        return torch.from_numpy(np.where(is_seen, 0, -np.inf)).to(self._like)

    def _index(self, values):
        return torch.from_numpy(np.asarray(values, np.int64)).to(self._like.device)


def _attend_singles(singles, q_RKGN, kept):
    """Return ``[R, K, G, N]``."""
    blocks, answers = kept.unflatten(1, (-1, singles.asked[0].mask.shape[-1])).transpose(2, 3), []
    for asked in singles.asked:
        keys, values = blocks[:, asked.blocks]
        answers.append(attention(q_RKGN[asked.rows], keys, values, asked.mask.expand(-1, -1, q_RKGN.shape[2], -1)))
    found, weights = answers[0] if len(answers) == 1 else (torch.cat(parts) for parts in zip(*answers))
    if singles.places.shape[1] == 1:
        return found[singles.places[:, 0]]
    found, weights = found[singles.places], weights[singles.places]  # [R, M, K, G, N] and without N
    if singles.lacks is not None:
        weights = weights + singles.lacks
    weights = torch.exp(weights - weights.amax(1, keepdim=True))
    total, weights = weights[:, 0].clone(), weights.to(found.dtype)[..., None]
    summed = found[:, 0] * weights[:, 0]
    for i in range(1, weights.shape[1]):  # in the order of positions
        total += weights[:, i, ..., 0]
        summed.addcmul_(found[:, i], weights[:, i])
    return summed.div_(total[..., None])


def _zeros(shape, like):
    """Return zeros that take memory only once something is written to them; large pages of it, where the system has some."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, max(1, math.prod(shape) * like.element_size()), flags=mmap.MAP_PRIVATE)
    with suppress(AttributeError, OSError):  # not every system knows of them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype, count=math.prod(shape)).view(shape)


def attention(q, k, v, mask):
    """Return softmax attention and the logarithm of the sum of exponentials of each query. Local.

    Parameters
    ----------
    q : Tensor, shape (B, K, Q, N)
    k, v : Tensor, shape (B, K, S, N)
    mask : Tensor, shape (B, 1, Q, S)
        Added to scores; sees something for every query that is looked at.
    """
    if q.device.type == "cpu" and len(q) * q.shape[1] == 1:
        # The library's products inside would share a lone piece of work among threads, with other bits: give it company
        found, weights = attention(*(x.expand(2, -1, -1, -1) for x in (q, k, v, mask)))
        return found[:1], weights[:1]
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1]) + mask
    weights = torch.logsumexp(scores, -1)
    return torch.matmul(torch.exp(scores - weights[..., None]).to(v.dtype), v), weights
