"""Who computes what in the next pass: requests in, passes out, keys and values kept in blocks of a pool. Pure.

A request is a row of tokens. Some of them have keys and values in the pool, the rest is still to be computed; the last one
answers with the next token. A pass takes one token of every request that goes on, and pieces of prompts in the room that its
budget leaves, so that a long prompt holds nobody up (Agrawal et al. 2024). Requests join and leave between passes (Yu et al.
2022). When the pool is full the youngest request gives its blocks back and is computed once more later (Kwon et al. 2023).
Passes are carried out in the order in which they are decided, so blocks may change hands before a pass is back.

Prompts that begin alike share the blocks in which they are equal. Where they part within a block, the later one gets a copy of
the positions before (copy on write).
"""

import hashlib
import heapq
from array import array
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from mpillm.errors import ConfigError

AGE = attrgetter("number")
ENOUGH_PASSES = 4  # full of what waits


class Piece(NamedTuple):
    """Consecutive tokens of one request in a pass.

    Attributes
    ----------
    request : int
        Number of the request.
    start : int
        Position of the first token.
    tokens : tuple of int
    blocks : tuple of int
        Of the pool: those of all positions from 0 to the last of the piece.
    is_prompt : bool
        Whether the tokens are of the prompt. Generated ones are always computed as if each came alone.
    targets : tuple of int
        Tokens whose log-probabilities are asked for, by consecutive rows from ``target_row`` of the piece on.
    alternatives : tuple of int
        The same of the last row.
    chooses : bool
        Whether the last token is answered with the next one.
    source : int or None
        Block that holds what the first block of the piece lacks before ``start``: copied once the pass has written its own.
    """

    request: int
    start: int
    tokens: tuple
    blocks: tuple
    is_prompt: bool
    targets: tuple = ()
    target_row: int = 0
    chooses: bool = False
    source: int | None = None
    alternatives: tuple = ()


@dataclass(eq=False)
class Sequence:
    """A request as the scheduler sees it: ``computed`` of its ``tokens`` have, or are about to have, keys and values."""

    number: int
    tokens: list
    limit: int
    scored_from: int
    prompt_length: int
    alternatives: tuple = ()
    computed: int = 0
    blocks: list = field(default_factory=list)  # none while it waits
    digests: list = field(default_factory=lambda: [b""])  # of the first 0, 1, 2 … blocks of the prompt, as far as asked for
    is_in_flight: bool = False  # the piece that completes the row as it is now is under way
    is_cancelled: bool = False

    @property
    def wanted(self):
        """How many tokens are to be computed before something is chosen: the last one of a row that is only scored is not."""
        return len(self.tokens) - self.is_only_scored

    @property
    def is_only_scored(self):
        """Whether nothing is to be generated."""
        return self.limit == self.prompt_length

    @property
    def sharable(self):
        """How many positions at most others may have computed: behind them something is asked for."""
        return min(self.prompt_length, self.scored_from, self.wanted) - 1


class Scheduler:
    """Decides pass after pass. Local, and the same for the same calls.

    Parameters
    ----------
    num_blocks, block_size : int
        Of the pool: positions in a block.
    budget : int
        Tokens of a pass at most, if that is not less than a block.
    batch : int
        Requests at most that are worked on at a time. Older ones go first.
    in_flight : int
        Passes that may be on their way at a time: each gets its share of the requests.
    shares_prefixes : bool
        Whether equal beginnings of prompts are computed once.
    """

    def __init__(self, num_blocks, block_size, budget, batch, in_flight=1, shares_prefixes=True):
        self.block_size, self.num_blocks = block_size, num_blocks
        self.budget, self.batch, self.in_flight = max(budget, block_size), batch, in_flight
        self.shares_prefixes = shares_prefixes
        self.waiting, self.running, self._sequences = deque(), [], {}
        self._free = list(range(num_blocks))
        self._users = [0] * num_blocks
        self._known, self._entry_of = {}, {}  # by the digest of what is before: sorted (tokens, block); and by block
        self._idle = OrderedDict()  # those of them that nobody uses now, the first to be forgotten first
        self._lent = []  # blocks that the pass at hand copies from
        self._room = self.preempted = self.shared_tokens = 0

    def __len__(self):
        """Return how many requests are not done."""
        return len(self._sequences)

    @property
    def has_room(self):
        """Whether what waits is less than a few passes take, so that a new request would soon be computed."""
        return sum(len(sequence.tokens) for sequence in self.waiting) < ENOUGH_PASSES * self.budget

    def add(self, number, tokens, limit, scored_from=None, alternatives=()):
        """Take a request.

        Parameters
        ----------
        number : int
            Names it; larger than all before.
        tokens : sequence of int
            The prompt, at least one; two if nothing is to be generated.
        limit : int
            Length at which the row ends; that of the prompt if nothing is to be generated.
        scored_from : int, optional
            Position of the first token whose log-probability is asked for, at least 1.
        alternatives : tuple of int
            Where nothing is to be generated: tokens that are asked for in the place of the last one, too.

        Raises
        ------
        ConfigError
            If its keys and values would not fit into the whole pool.
        """
        self.check(limit)
        scored_from = len(tokens) if scored_from is None else scored_from
        sequence = self._sequences[number] = Sequence(
            number, list(tokens), limit, scored_from, len(tokens), alternatives)
        self.waiting.append(sequence)

    def check(self, limit):
        """Refuse a row of ``limit`` tokens that the pool cannot hold."""
        if self._count(limit - 1) > self.num_blocks:
            raise ConfigError(f"{limit} tokens need {self._count(limit - 1)} blocks of {self.block_size} keys and values, the "
                              f"pool has {self.num_blocks}: shorten the request, or raise inference.cache_bytes")

    def next_pass(self):
        """Return the pieces of the next pass, or an empty list if nothing can be computed before a pass comes back."""
        generating = sum(1 for sequence in self.running if sequence.computed >= sequence.prompt_length)
        going_on, behind, pieces = [], [], []
        for sequence in self.running:
            if not sequence.is_in_flight:
                is_behind = sequence.computed < max(sequence.prompt_length, len(sequence.tokens) - 1)
                (behind if is_behind else going_on).append(sequence)
        kept = self.block_size if behind else 0  # so that prompts get on, however many others there are
        self._room = self.budget - kept
        for sequence in going_on[:-(-generating // self.in_flight)]:
            pieces += self._pieces(sequence)
        self._room += kept
        for sequence in behind:
            pieces += self._pieces(sequence)
        while self.waiting and len(self.running) < self.batch and self._room > 0 and (sequence := self._admit()):
            pieces += self._pieces(sequence)
        self._release(self._lent)
        self._lent = []
        return pieces

    def commit(self, pieces, chosen):
        """Take what a pass gave.

        Parameters
        ----------
        pieces : list of Piece
            Of the pass.
        chosen : dict of int to (int, bool)
            By request that chose: the token, and whether the row ends with it.

        Returns
        -------
        list of int
            The requests that are done now.
        """
        done = []
        for piece in pieces:
            sequence = self._sequences.get(piece.request)
            if sequence is None or piece.start + len(piece.tokens) < sequence.wanted:
                continue  # cancelled meanwhile, or more of it is to come
            sequence.is_in_flight = ends = False
            if piece.chooses:
                token, ends = chosen[piece.request]
                sequence.tokens.append(token)
            if ends or sequence.is_cancelled or len(sequence.tokens) >= sequence.limit:
                self._finish(sequence)
                done.append(piece.request)
        return done

    def cancel(self, number):
        """Drop a request: at once, or when the pass that it is in comes back. Return whether at once."""
        sequence = self._sequences.get(number)
        if sequence is None:
            return True
        if sequence.is_in_flight:
            sequence.is_cancelled = True
            return False
        self._finish(sequence)
        return True

    @property
    def used_blocks(self):
        """How many blocks somebody uses."""
        return self.num_blocks - len(self._free) - len(self._idle)

    def _pieces(self, sequence):
        """Return what a request computes in this pass, within the room: of its prompt, then of what was generated."""
        if not sequence.blocks:
            return []  # preempted while this pass was decided
        self._share(sequence, self._known_blocks(sequence))
        pieces, wanted = [], sequence.wanted
        while sequence.computed < wanted:
            is_prompt = sequence.computed < sequence.prompt_length
            source, known = self._find(sequence, sequence.computed) if is_prompt else (None, 0)
            start = sequence.computed + known
            end = min(wanted, sequence.prompt_length) if is_prompt else wanted
            stop = min(end, start + self._room)
            if is_prompt and stop < end:
                stop -= stop % self.block_size  # whole blocks, whose rows are computed together
            if stop <= start:
                break
            if known:
                self._use(source)
                self._lent.append(source)
            if not self._reserve(sequence, stop):
                break
            self.shared_tokens += known
            first = max(start + 1, sequence.scored_from)
            pieces.append(Piece(
                sequence.number, start, tuple(sequence.tokens[start:stop]), tuple(sequence.blocks[:self._count(stop)]),
                is_prompt, tuple(sequence.tokens[first:min(stop + 1, sequence.prompt_length)]), first - 1 - start,
                stop == len(sequence.tokens), source if known else None,
                sequence.alternatives if stop == wanted else ()))
            self._room -= stop - start
            sequence.computed, sequence.is_in_flight = stop, stop == wanted
            if is_prompt:
                self._remember(sequence, start, stop)
        return pieces

    def _admit(self):
        """Let the oldest waiting request in, and return it, if the pool has room for all it has and one token more."""
        sequence = self.waiting[0]
        known = self._known_blocks(sequence)
        idle = sum(1 for block in known if not self._users[block])
        missing = self._count(min(len(sequence.tokens) + 1, max(sequence.limit - 1, 1))) - len(known)
        if missing > len(self._free) + len(self._idle) - idle:
            return None
        self.waiting.popleft()
        insort(self.running, sequence, key=AGE)
        self._share(sequence, known)
        self._reserve(sequence, sequence.wanted)  # now, because others would fill what the rest of a long prompt needs
        return sequence

    def _reserve(self, sequence, stop):
        """Give a request blocks up to position ``stop``, if need be those of younger ones; return whether it has them."""
        while len(sequence.blocks) < self._count(stop):
            if self._free:
                block = heapq.heappop(self._free)  # the lowest, so that those in use lie close together
            elif self._idle:
                block, _ = self._idle.popitem(last=False)
                self._forget(block)
            else:
                younger = self.running[self.running.index(sequence) + 1:]
                youngest = next((other for other in reversed(younger) if not other.is_in_flight), None)
                if youngest is None:
                    return False
                self._preempt(youngest)
                continue
            self._users[block] = 1
            sequence.blocks.append(block)
        return True

    def _preempt(self, sequence):
        """Send a request back to those that wait."""
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=AGE)
        self._release(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0
        self.preempted += 1

    def _finish(self, sequence):
        del self._sequences[sequence.number]
        (self.running if sequence.blocks else self.waiting).remove(sequence)
        if not sequence.is_only_scored and sequence.blocks:
            for block in sequence.blocks[sequence.prompt_length // self.block_size:]:  # that were generated into
                self._forget(block)
        self._release(sequence.blocks)

    def _release(self, blocks):
        for block in reversed(blocks):  # ends of prompts are forgotten before their beginnings
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._entry_of:
                    self._idle[block] = None
                else:
                    heapq.heappush(self._free, block)

    def _use(self, block):
        self._users[block] += 1
        self._idle.pop(block, None)

    def _known_blocks(self, sequence):
        """Return the blocks that hold what comes next of a prompt already; one token at least is left to compute."""
        found, start = [], sequence.computed
        while start + self.block_size <= sequence.sharable:
            block, count = self._find(sequence, start)
            if count < self.block_size:
                break
            found.append(block)
            start += self.block_size
        return found

    def _share(self, sequence, known):
        """Let a request go on behind known blocks, in the place of those that it would have filled itself."""
        place = slice(sequence.computed // self.block_size, sequence.computed // self.block_size + len(known))
        for block in known:
            self._use(block)
        self._release(sequence.blocks[place])
        sequence.blocks[place] = known
        sequence.computed += len(known) * self.block_size
        self.shared_tokens += len(known) * self.block_size

    def _find(self, sequence, start):
        """Return the block that holds most of what comes of a prompt from position ``start`` on, where a block begins, and how
        many positions that are."""
        most = min(self.block_size, sequence.sharable - start)
        if not self.shares_prefixes or start % self.block_size or most <= 0:
            return None, 0
        entries = self._known.get(self._digest(sequence, start), ())
        tokens = tuple(sequence.tokens[start:start + most])
        place = bisect_left(entries, (tokens,))  # what is likest stands beside it
        found = [(_equal(tokens, known), block) for known, block in entries[max(0, place - 1):place + 1]]
        count, block = max(found, default=(0, None))
        return block, count

    def _remember(self, sequence, start, stop):
        """Note what blocks of a prompt hold behind a piece of it: what is computed later may read them."""
        if not self.shares_prefixes:
            return
        for first in range(start - start % self.block_size, stop, self.block_size):
            digest, tokens = self._digest(sequence, first), tuple(sequence.tokens[first:min(first + self.block_size, stop)])
            entries = self._known.setdefault(digest, [])
            place = bisect_left(entries, (tokens,))
            if place == len(entries) or entries[place][0][:len(tokens)] != tokens:
                block = sequence.blocks[first // self.block_size]
                entries.insert(place, (tokens, block))
                self._entry_of[block] = digest, tokens

    def _forget(self, block):
        """Forget what a block holds."""
        digest, tokens = self._entry_of.pop(block, (None, None))
        if tokens is not None:
            entries = self._known[digest]
            del entries[bisect_left(entries, (tokens, block))]
            if not entries:
                del self._known[digest]

    def _digest(self, sequence, start):
        """Return what names the tokens of a prompt before position ``start``, where a block begins."""
        place, digests = start // self.block_size, sequence.digests
        while len(digests) <= place:
            tokens = array("q", sequence.tokens[(len(digests) - 1) * self.block_size:len(digests) * self.block_size]).tobytes()
            digests.append(hashlib.blake2b(digests[-1] + tokens, digest_size=16).digest())
        return digests[place]

    def _count(self, tokens):
        return -(-tokens // self.block_size)


def _equal(left, right):
    """Return how many tokens two rows have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))
