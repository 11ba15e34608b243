"""The scheduler of inference against a machine of the test's own, over random traces.

The machine knows nothing of how the scheduler decides. Each slot of its pool holds a position and a digest of the row up to
there, as keys and values do. It carries passes out in order and hands answers back later, as a pipeline does.
"""

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from mpillm.errors import ConfigError
from mpillm.inference.scheduler import Scheduler

ALPHABET = 3  # few tokens, so that beginnings of prompts are often equal
TRACES = 10_000


@dataclass
class Row:
    """A request as the machine sees it."""

    number: int
    tokens: list
    limit: int
    scored_from: int | None = None
    ends_at: int | None = None
    alternatives: tuple = ()
    targets: dict = field(default_factory=dict)
    is_answered: bool = True
    is_cancelled: bool = False

    def __post_init__(self):
        self.prompt_length, self.digests, self.asked_instead = len(self.tokens), [], ()

    @property
    def last(self):
        """Position behind the last token that must be computed before the row is answered."""
        return len(self.tokens) - (self.limit == self.prompt_length)

    def content(self, position):
        """What the slot of a position must hold."""
        while len(self.digests) <= position:
            i = len(self.digests)
            self.digests.append(hash((self.digests[-1] if i else 0, i, self.tokens[i])))
        return position, self.digests[position]


class Machine:
    """Plays requests through a scheduler and objects to whatever must not be."""

    def __init__(self, scheduler_class=Scheduler, in_flight=1, **settings):
        self.scheduler = scheduler_class(in_flight=in_flight, **settings)
        self.num_blocks, self.size, self.batch = (settings[name] for name in ("num_blocks", "block_size", "batch"))
        self.budget, self.in_flight = max(settings["budget"], self.size), in_flight
        self.rows, self.under_way, self.slots = {}, deque(), [None] * (self.num_blocks * self.size)
        self.computed_tokens = self.copied = self.passes = self.longest_wait = 0
        self._oldest = self._oldest_since = 0

    def add(self, row):
        self.rows[row.number] = row
        self.scheduler.add(row.number, list(row.tokens), row.limit, row.scored_from, row.alternatives)

    def cancel(self, number):
        row = self.rows[number]
        at_once = self.scheduler.cancel(number)
        assert at_once or not row.is_answered
        if at_once:
            del self.rows[number]
        row.is_cancelled = True

    def send(self):
        """Send a pass off; return whether there was one."""
        pieces = self.scheduler.next_pass()
        self.check_pool()
        if pieces:
            self.passes += 1
            self.under_way.append((pieces, self.carry_out(pieces)))
            self.check_oldest()
        else:
            assert self.under_way or not self.rows, "a halt"
        return bool(pieces)

    def carry_out(self, pieces):
        """Do what a pass says; return the chosen tokens, and the scored rows that are through."""
        assert sum(len(piece.tokens) for piece in pieces) <= self.budget
        written, chosen, through = {}, {}, []
        for piece in pieces:
            row = self.rows[piece.request]
            self.check_piece(piece, row)
            for i in range(piece.start, piece.start + len(piece.tokens)):
                slot, content = piece.blocks[i // self.size] * self.size + i % self.size, row.content(i)
                assert written.setdefault(slot, content) == content, "two rows in a slot"
                self.slots[slot] = content
        self.copy(pieces, written)
        for piece in pieces:
            row, stop = self.rows[piece.request], piece.start + len(piece.tokens)
            for i in range(stop):
                assert self.slots[piece.blocks[i // self.size] * self.size + i % self.size] == row.content(i), "not its own"
            for i, token in enumerate(piece.targets, piece.start + piece.target_row + 1):
                assert piece.start < i <= stop and token == row.tokens[i]
                row.targets[i] = token
            row.asked_instead = row.asked_instead or piece.alternatives
            assert not piece.alternatives or stop == row.last
            assert piece.chooses == (stop == row.last == len(row.tokens))
            if piece.chooses:
                row.is_answered = False
                chosen[piece.request] = row.content(stop - 1)[1] % ALPHABET, len(row.tokens) + 1 == row.ends_at
            elif stop == row.last:
                row.is_answered = False
                through.append(piece.request)
            self.computed_tokens += len(piece.tokens)
        return chosen, through

    def copy(self, pieces, written):
        """Copy what pieces lack of their first block, once all have written theirs."""
        for piece in pieces:
            if piece.source is not None:
                assert piece.is_prompt and piece.start % self.size and piece.source not in piece.blocks
                first = piece.blocks[piece.start // self.size] * self.size
                for i in range(piece.start % self.size):
                    assert written.setdefault(first + i, "a copy") == "a copy", "two rows in a slot"
                    self.slots[first + i] = self.slots[piece.source * self.size + i]
                self.copied += piece.start % self.size

    def check_piece(self, piece, row):
        stop = piece.start + len(piece.tokens)
        assert list(piece.tokens) == row.tokens[piece.start:stop] and piece.start < stop <= row.last
        assert row.is_answered or row.limit == row.prompt_length, "asked before the last answer is there"
        assert len(piece.blocks) == len(set(piece.blocks)) == -(-stop // self.size)
        assert 0 <= min(piece.blocks) <= max(piece.blocks) < self.num_blocks
        if piece.is_prompt:
            assert (piece.start % self.size == 0) == (piece.source is None) and stop <= row.prompt_length
            assert stop % self.size == 0 or stop == min(row.prompt_length, row.last)
        else:
            assert piece.start >= row.prompt_length and piece.source is None

    def check_pool(self):
        running = self.scheduler.running
        assert len(running) <= self.batch and len(self.scheduler) == len(self.rows)
        used = {block for sequence in running for block in sequence.blocks}
        assert len(used) == self.scheduler.used_blocks <= self.num_blocks

    def check_oldest(self):
        oldest = min(self.rows, default=None)
        if oldest != self._oldest:
            self._oldest, self._oldest_since = oldest, self.passes
        self.longest_wait = max(self.longest_wait, self.passes - self._oldest_since)

    def receive(self):
        """Take the answers of the earliest pass under way."""
        pieces, (chosen, through) = self.under_way.popleft()
        done = {number for number in through if number in self.rows}
        for number, (token, ends) in chosen.items():
            assert number in self.rows, "dropped while its answer was under way"
            row = self.rows[number]
            row.tokens.append(token)
            row.is_answered = True
            if ends or row.is_cancelled or len(row.tokens) == row.limit:
                done.add(number)
        found = self.scheduler.commit(pieces, chosen)
        assert len(found) == len(done) and set(found) == done
        for number in done:
            self.check_end(self.rows.pop(number))

    def check_end(self, row):
        if not row.is_cancelled:
            first = row.prompt_length if row.scored_from is None else row.scored_from
            assert sorted(row.targets) == list(range(first, row.prompt_length)), "targets are missing"
            assert len(row.tokens) in (row.limit, row.ends_at) and row.asked_instead == row.alternatives

    def drain(self):
        """Go on until nothing is left, as the leader of a replica does."""
        while self.rows:
            if len(self.under_way) == self.in_flight or not self.send():
                self.receive()
        while self.under_way:
            self.receive()
        self.check_pool()
        assert self.scheduler.used_blocks == 0


def random_rows(rng, count, longest):
    """Return rows of at most so many tokens, many of which begin alike."""
    themes = [[rng.randrange(ALPHABET) for _ in range(longest)] for _ in range(2)]
    rows = []
    for number in range(count):
        kind, length = rng.choice(("generated", "generated", "scored", "both")), rng.randint(1, longest)
        if kind == "scored":
            length = max(length, 2)
        prompt = rng.choice(themes)[:rng.randint(0, length)]
        prompt += [rng.randrange(ALPHABET) for _ in range(length - len(prompt))]
        limit = length if kind == "scored" else rng.randint(length + 1, longest + 1)
        scored_from = rng.randint(1, length) if kind != "generated" else None
        if kind == "scored":
            scored_from = min(scored_from, length - 1)
        ends_at = rng.randint(length + 1, limit) if limit > length and rng.random() < 0.3 else None
        rows.append(Row(number, prompt, limit, scored_from, ends_at, (5, 6) if kind == "scored" and number % 2 else ()))
    return rows


def play(rng, in_flight, scheduler_class=Scheduler):
    """Play a random trace with arrivals and cancellations at any moment; return the machine and the longest row."""
    size, num_blocks = rng.randint(1, 4), rng.randint(2, 12)
    machine = Machine(scheduler_class, in_flight, num_blocks=num_blocks, block_size=size, budget=rng.randint(1, 16),
                      batch=rng.randint(1, 6), shares_prefixes=rng.random() < 0.8)
    longest = min(num_blocks * size, 30)
    coming, leaves = deque(random_rows(rng, rng.randint(1, 12), max(longest, 2))), rng.choice((0, 0, 0.1))
    while coming:
        event = rng.random()
        if event < 0.3:
            machine.add(coming.popleft())
        elif event < 0.7 and len(machine.under_way) < in_flight:
            machine.send()
        elif machine.under_way:
            machine.receive()
        if machine.rows and rng.random() < leaves:
            machine.cancel(rng.choice(list(machine.rows)))
    machine.drain()
    return machine, longest


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_random_traces(in_flight):
    reached = Counter()
    for seed in range(-(-TRACES // 3)):
        machine, longest = play(random.Random(3 * seed + in_flight), in_flight)
        assert machine.longest_wait <= 2 * in_flight * (longest + 1)
        reached["preempted"] += machine.scheduler.preempted
        reached["copied"] += machine.copied
        reached["shared"] += machine.scheduler.shared_tokens - machine.copied
    assert min(reached.values()) > 1000  # the corners were visited


def test_each_prefix_is_computed_once():
    for seed in range(1000):
        rng, size, in_flight = random.Random(seed), random.Random(seed).randint(1, 4), seed % 3 + 1
        rows = random_rows(rng, rng.randint(2, 12), 30)
        machine = Machine(in_flight=in_flight, num_blocks=sum(-(-row.limit // size) for row in rows), block_size=size,
                          budget=rng.randint(1, 16), batch=rng.randint(1, 6))
        seen, shared = set(), 0
        for row in rows:
            firsts = [tuple(row.tokens[:stop]) for stop in range(size, row.prompt_length + 1, size) if stop <= row.last]
            most = min(row.prompt_length, row.last, row.scored_from or row.prompt_length) - 1
            shared += size * sum(first in seen for first in firsts[:most // size])
            seen.update(firsts)
            machine.add(row)
            for _ in range(rng.randint(0, 3)):
                if len(machine.under_way) < in_flight and machine.rows and machine.send() and rng.random() < 0.5:
                    machine.receive()
        machine.drain()
        assert machine.scheduler.shared_tokens >= shared  # what does not fit into a pass may let a younger one go first


def test_each_beginning_is_computed_once_to_the_token():
    for seed in range(1000):
        rng, in_flight = random.Random(seed), seed % 3 + 1
        rows = [row for row in random_rows(rng, rng.randint(2, 20), 30) if row.limit == row.prompt_length]
        machine = Machine(in_flight=in_flight, num_blocks=1000, block_size=rng.randint(1, 7), budget=1000,
                          batch=rng.randint(1, 6))
        computed, before = 0, []
        for row in rows:
            tokens, most = row.tokens[:row.last], min(row.last, row.scored_from) - 1
            computed += row.last - max((equal(tokens[:most], other) for other in before), default=0)
            before.append(tokens)
            machine.add(row)
            if len(machine.under_way) < in_flight and rng.random() < 0.3:
                machine.send()
        machine.drain()
        assert machine.computed_tokens == computed


def equal(left, right):
    return next((i for i in range(min(len(left), len(right))) if left[i] != right[i]), min(len(left), len(right)))


def test_choices_of_one_token_cost_a_row_each():
    machine = Machine(num_blocks=100, block_size=10, budget=64, batch=8)
    for number in range(4):
        machine.add(Row(number, [*range(37), 100 + number], 38, scored_from=37))
    assert machine.send() and machine.computed_tokens == 37 + 3
    machine.drain()
    machine.add(Row(4, [*range(37), 200], 38, scored_from=37))  # also behind those that are gone
    machine.drain()
    assert machine.computed_tokens == 37 + 4 and machine.passes == 2


def test_a_prefix_that_takes_several_passes_is_computed_once():
    machine = Machine(num_blocks=1000, block_size=4, budget=18, batch=64)
    for number in range(20):
        machine.add(Row(number, [1] * 100 + [number % ALPHABET, number // ALPHABET], 103))
    machine.drain()
    assert machine.scheduler.shared_tokens - machine.copied == 19 * 100
    assert machine.computed_tokens == 100 + 20 * 2 - machine.copied


@pytest.mark.parametrize("budget", [4, 7, 8, 20])
@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_a_long_prompt_gets_on_beside_an_endless_stream_of_short_ones(budget, in_flight):
    machine = Machine(in_flight=in_flight, num_blocks=100, block_size=4, budget=budget, batch=8)
    for number in range(8):
        machine.add(Row(number, [number % ALPHABET], 10 + number))
    machine.add(Row(8, [0] * 80, 90))
    number = 9
    while 8 in machine.rows and machine.passes < 500:
        while len(machine.rows) < 16:
            machine.add(Row(number, [number % ALPHABET], 5 + number % 7))
            number += 1
        if len(machine.under_way) == in_flight or not machine.send():
            machine.receive()
    assert 8 not in machine.rows
    machine.drain()


def test_a_long_prompt_holds_nobody_up():
    scheduler = Scheduler(num_blocks=100, block_size=4, budget=10, batch=8)
    for number in range(3):
        scheduler.add(number, [number], 50)
    scheduler.commit(scheduler.next_pass(), {number: (0, False) for number in range(3)})
    scheduler.add(3, range(10, 29), 50)
    cuts = [[(0, 1), (1, 1), (2, 1), (3, length)] for length in (4, 4, 4, 7)]
    for cut in cuts:
        pieces = scheduler.next_pass()
        assert [(piece.request, len(piece.tokens)) for piece in pieces] == cut
        scheduler.commit(pieces, {piece.request: (0, False) for piece in pieces if piece.chooses})
    assert [piece.request for piece in scheduler.next_pass()] == [0, 1, 2, 3]


def test_passes_under_way_at_a_time_share_the_requests():
    scheduler = Scheduler(num_blocks=100, block_size=4, budget=20, batch=8, in_flight=2)
    for number in range(5):
        scheduler.add(number, [number], 50)
    scheduler.commit(scheduler.next_pass(), {number: (0, False) for number in range(5)})
    passes = [scheduler.next_pass() for _ in range(3)]
    assert [[piece.request for piece in pieces] for pieces in passes] == [[0, 1, 2], [3, 4], []]


def test_the_youngest_gives_its_blocks_back_and_goes_on_later():
    machine = Machine(num_blocks=4, block_size=2, budget=8, batch=3)
    for number in range(3):
        machine.add(Row(number, [number, number], 7))
    order = []
    while machine.rows:
        before = set(machine.rows)
        machine.send()
        machine.receive()
        order += before - set(machine.rows)
    assert order == [0, 1, 2]
    assert machine.scheduler.preempted == 2


def test_a_row_that_does_not_fit_is_refused():
    scheduler = Scheduler(num_blocks=3, block_size=4, budget=8, batch=1)
    scheduler.add(0, [0], 13)  # nothing is kept of the last token
    with pytest.raises(ConfigError, match="14 tokens need 4 blocks of 4 .* pool has 3.*cache_bytes"):
        scheduler.add(1, [0], 14)
    assert len(scheduler) == 1


class ForgetsOtherUsers(Scheduler):
    def _release(self, blocks):
        for block in blocks:
            self._users[block] = 1
        super()._release(blocks)


class SharesAllOfAPrompt(Scheduler):
    def _find(self, sequence, start):
        scored_from, sequence.scored_from = sequence.scored_from, sequence.prompt_length
        found = super()._find(sequence, start)
        sequence.scored_from = scored_from
        return found


class CopiesWhatIsNotThere(Scheduler):
    def _find(self, sequence, start):
        block, count = super()._find(sequence, start)
        return block, count + (0 < count < min(self.block_size, sequence.sharable - start))


class GivesAwayWhatIsLent(Scheduler):
    def _reserve(self, sequence, stop):
        self._release(self._lent)
        self._lent = []
        return super()._reserve(sequence, stop)


class RemembersWhatIsGone(Scheduler):
    def _forget(self, block):
        if block in self._entry_of:
            known = {digest: list(entries) for digest, entries in self._known.items()}
            super()._forget(block)
            self._known = known


class NamesBlocksByTheirPlace(Scheduler):
    def _digest(self, sequence, start):
        return start


class AsksAgainBeforeTheAnswer(Scheduler):
    def next_pass(self):
        for sequence in self.running:
            sequence.is_in_flight = False
        return super().next_pass()


class NeverPreempts(Scheduler):
    def _reserve(self, sequence, stop):
        is_full = self._count(stop) > len(sequence.blocks) and not self._free and not self._idle
        return not is_full and super()._reserve(sequence, stop)


class KeepsBlocks(Scheduler):
    def _finish(self, sequence):
        sequence.blocks = sequence.blocks[:-1] or sequence.blocks
        super()._finish(sequence)


@pytest.mark.parametrize("mutant", [ForgetsOtherUsers, SharesAllOfAPrompt, CopiesWhatIsNotThere, GivesAwayWhatIsLent,
                                    RemembersWhatIsGone, NamesBlocksByTheirPlace, AsksAgainBeforeTheAnswer, NeverPreempts,
                                    KeepsBlocks])
def test_the_machine_finds_what_is_wrong(mutant):
    with pytest.raises(AssertionError):
        for seed in range(500):
            play(random.Random(seed), 2, mutant)
