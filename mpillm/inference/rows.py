"""Requests on their way: given to the scheduler as it has room, gathered token by token, finished. On the leader."""

from mpillm.inference.requests import Result


class Source:
    """Where the requests of a replica come from.

    Attributes
    ----------
    is_done : bool
        Whether there will be none any more.
    is_stopped : bool
        Whether those that are worked on are to be dropped: they are delivered as they are, as cancelled.
    """

    is_done = is_stopped = False

    def look(self):
        """Do what is to be done before each pass, on every rank of the replica."""

    def cancelled(self):
        """Return the keys of requests that are to be dropped, of those that were taken. On the leader."""
        return ()

    def wait(self):
        """Rest before the next look, as there is nothing to do. On the leader."""

    def take(self, busy):
        """Return a key and the next :class:`~mpillm.inference.requests.Request`, or None, where ``busy`` are worked on. On the
        leader."""
        raise NotImplementedError


class Rows:
    """The requests of a replica.

    Parameters
    ----------
    source : Source
    tokenizer : tokenizer
    max_seq_len : int
    deliver : callable
        Gets each key with its :class:`~mpillm.inference.requests.Result`.
    show : callable, optional
        Gets the key, each token as it is chosen, and if they were asked for its log-probability and the likeliest tokens.
    """

    def __init__(self, source, tokenizer, max_seq_len, deliver, show=None):
        self.source, self.tokenizer, self.max_seq_len, self.deliver, self.show = source, tokenizer, max_seq_len, deliver, show
        self._ends, self._keys, self._asked, self._results, self._next = {tokenizer.end, *tokenizer.ends}, {}, {}, {}, 0

    def feed(self, scheduler):
        """Give the scheduler what it may work on."""
        self.source.look()
        cancelled = set(self.source.cancelled())
        for number, key in list(self._keys.items()) if cancelled or self.source.is_stopped else ():
            if self.source.is_stopped or key in cancelled:
                self.cancel(number, scheduler)
        while scheduler.has_room and (found := self.source.take(len(scheduler))) is not None:
            key, request = found
            number, length = self._next, len(request.prompt)
            self._next += 1
            limit = max(length, min(length + request.max_tokens, self.max_seq_len))
            self._keys[number], self._asked[number], self._results[number] = key, request, Result(request.id)
            is_scored = request.scored_from is not None and request.scored_from < length
            if limit == length and not is_scored:
                self.finish(number)
            else:
                scheduler.add(number, request.prompt, limit, request.scored_from, request.alternatives)

    def cancel(self, number, scheduler):
        """Drop a request: at once, or when the pass that it is in comes back."""
        self._results[number].finish_reason = "cancelled"
        if scheduler.cancel(number):
            self.finish(number)

    def is_done(self, scheduler):
        """Tell whether nothing is left to do."""
        return not len(scheduler) and self.source.is_done

    def choice(self, piece):
        """Return how a piece's request chooses, at which position, and what stands there if that matters."""
        request = self._asked[piece.request]
        is_penalised = request.sampling.repetition_penalty != 1
        seen = [*request.prompt, *self._results[piece.request].tokens] if is_penalised else ()
        return request.sampling, piece.start + len(piece.tokens), seen

    def take(self, number, token, logprob, likeliest):
        """Take a chosen token; return whether the row ends with it."""
        request, result = self._asked[number], self._results[number]
        if result.finish_reason == "cancelled":
            return True
        if token in self._ends and not request.ignore_ends:
            result.finish_reason = "stop"
            return True
        result.tokens.append(token)
        if logprob is not None:
            result.logprobs.append(logprob)
            result.top_logprobs.append(likeliest)
        if self.show is not None:
            self.show(self._keys[number], token, logprob, likeliest)
        if request.stop:
            text = self._text(result)
            places = [place for place in map(text.find, request.stop) if place >= 0]
            if places:
                result.text, result.finish_reason = text[:min(places)], "stop"
                return True
        return False

    def score(self, number, start, found, alternatives):
        """Take log-probabilities of the prompt from position ``start`` on, each with whether it is the largest, and those of
        alternatives; what comes once more is the same."""
        if number in self._asked:
            result, place = self._results[number], start - self._asked[number].scored_from
            result.scores[place:place + len(found)] = [value for value, _ in found]
            result.is_greedy &= all(is_first for _, is_first in found)
            result.alternatives = alternatives

    def finish(self, number):
        """Deliver a result."""
        result = self._results.pop(number)
        del self._asked[number]
        if result.text is None:
            result.text = self._text(result)
        self.deliver(self._keys.pop(number), result)

    def _text(self, result):
        return self.tokenizer.decode(result.tokens).decode(errors="replace")
