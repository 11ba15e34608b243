"""The engine: many requests at once, on any number of ranks, with the same results."""

from collections import deque

import torch

from mpillm.comm.devices import pick_device
from mpillm.comm.group import as_group
from mpillm.comm.limits import keep_freed_memory, memory_bounds, memory_of_rank
from mpillm.comm.mesh import Mesh
from mpillm.comm.world import comm_world, set_threads
from mpillm.errors import CheckpointError, ConfigError, agreed, half_made, on_rank_0
from mpillm.inference.cache import block_size
from mpillm.inference.dealing import Counters, Dealer
from mpillm.inference.live import PATIENCE_S, Call, Closed, Desk, Live, Stream, short_turns
from mpillm.inference.opening import load_weights, open_model
from mpillm.inference.replica import Replica
from mpillm.inference.rows import Rows, Source
from mpillm.inference.scoring import Scored, answer_to, by_context, merged, score_of
from mpillm.inference.selftest import rows_apart, warm_up
from mpillm.nn.products import row_product
from mpillm.nn.split import TensorSplit
from mpillm.nn.transformer import TransformerStage

FREE_SHARE = 0.5  # of the memory that a rank may have, for keys and values


class Engine:
    """A model that is ready for requests.

    Collective over ``comm``, as are all methods.

    Parameters
    ----------
    path : str or Path
        A run directory, whose newest weights are taken, or a folder of Hugging Face weights.
    comm : Comm, optional
        Defaults to the world.
    overrides : dict, optional
        Values for keys of :data:`mpillm.inference.opening.OVERRIDES`. The layout of the run plays no part: without overrides
        every rank has the whole model and takes requests of its own.

    Attributes
    ----------
    config : Config
        Resolved.
    tokenizer : tokenizer
    device : torch.device
    weights_digest : str
        By which the weights are known again.
    caveat : str
        Why results may depend on who shares a pass; "" where they do not, which has been tried out.

    Raises
    ------
    MpillmError
        On every rank, if weights, configuration or tokenizer cannot be read, or the layout does not fit.

    Examples
    --------
    >>> engine = Engine("run")
    >>> request = Request("1", tuple(engine.tokenizer.encode("def ")), max_tokens=20)
    >>> print(engine.generate([request])[0].text)
    """

    def __init__(self, path, comm=None, overrides=None):
        keep_freed_memory()
        comm = as_group(comm_world() if comm is None else comm).comm
        with agreed(comm, f"open {path}"):
            source, self.config, self.tokenizer = open_model(path, overrides or {}, comm.size)
        self.weights_digest = on_rank_0(comm, f"read {path}", lambda: source.digest)
        model, train, layout = self.config.model, self.config.train, self.config.layout
        is_exact = train.numerics == "exact"
        self.threads = set_threads(comm)
        self.mesh = Mesh(comm, **layout.sizes(), order=layout.order, sums="tree" if is_exact else "any")
        with half_made(comm) as made:
            made.callback(self.mesh.free)
            self.device, dtype = pick_device(train.device, comm), getattr(torch, train.dtype)
            split = TensorSplit(self.mesh.group("tensor"), blocks=train.exact_blocks if is_exact else None, dtype=dtype,
                                device=self.device, multiply=row_product(self.device, dtype))
            place, cuts = self.mesh.coord("pipeline"), [0, *layout.stage_cuts, model.num_layers]
            stage = TransformerStage(model, split, cuts[place], cuts[place + 1])
            with agreed(comm, f"read {path}"):
                load_weights(stage, source)
            block_bytes = warm_up(model, stage)
            self.caveat = rows_apart(model, stage, [self.mesh.group("data"), self.mesh.world])
            blocks = self._num_blocks(block_bytes)
            self.desk = None
            self.replica = Replica(self.config, self.mesh, stage, blocks, self.tokenizer.vocab_size)

    def generate(self, requests, show=None):
        """Return a :class:`~mpillm.inference.requests.Result` for each request, in order, on every rank.

        Parameters
        ----------
        requests : list of Request
            The same on every rank.
        show : callable, optional
            Gets each token as it is chosen, where its replica's leader is.

        Raises
        ------
        ConfigError
            On every rank, before anything is computed, if a request cannot be carried out.
        CheckpointError
            On every rank, if the weights give logits that are not finite.
        """
        return self._carry_out(requests, [[place] for place in range(len(requests))], show)

    def score(self, pairs):
        """Return a :class:`~mpillm.inference.scoring.Score` for each of ``pairs``, in order, on every rank.

        What contexts have in common is computed once.

        Parameters
        ----------
        pairs : list of (context, continuation) or of str
            The same on every rank. Both of a pair are texts, or both rows of tokens. An empty context is the token that begins
            texts; of one that does not fit into the model the first tokens are dropped. A text by itself is scored from its
            first token on, in windows.

        Raises
        ------
        ConfigError
            On every rank, before anything is computed, if one cannot be scored.
        CheckpointError
            On every rank, if the weights give logits that are not finite.
        """
        scored = Scored(self.tokenizer, self.config.model.max_seq_len)
        asked = [scored.ask(pair) for pair in pairs]
        requests, places = merged([request for rows, _ in asked for request in rows])
        found = self._carry_out(requests, by_context(requests))
        results = (answer_to(*place, found) for place in places)
        return [score_of([next(results) for _ in rows], dropped) for rows, dropped in asked]

    def live(self, client):
        """Call ``client()`` in a thread of rank 0, and work on what it submits until it returns; return what it returned, on
        rank 0.

        It may start threads of its own. Whatever it has not waited for is dropped.

        Parameters
        ----------
        client : callable
            Any on other ranks.

        Raises
        ------
        MpillmError
            On every rank, what the client raised.
        CheckpointError
            On every rank, if the weights give logits that are not finite; every stream of the client raises it, too.
        """
        comm, call = self.mesh.world.comm, Call(client)
        with agreed(comm, "serve"):
            if self.replica.leads:
                self.desk = Desk(self.check, self.tokenizer) if comm.rank == 0 else None
                call.start(is_wanted=comm.rank == 0)
                live = Live(self.mesh.group("data").comm, self.desk, call.is_alive)
                try:
                    with short_turns():
                        self.serve(live, live.deliver, live.choose)
                except CheckpointError as error:
                    live.fail(error)
                    live.close()
                    call.join(PATIENCE_S)
                    raise
                except BaseException as error:  # of which the job ends: who waits should hear of it
                    if self.desk is not None:
                        self.desk.fail(Closed(f"the engine has failed: {error!r}"))
                    raise
                live.close()
                call.join(PATIENCE_S)
            else:
                self.replica.follow(lambda: None)
        with agreed(comm, "the client"):
            return call.result()

    def submit(self, request, make=Stream):
        """Return the :class:`~mpillm.inference.live.Stream` of a request. In the client of :meth:`live`, from any thread.

        Parameters
        ----------
        request : Request
        make : type
            Of the stream.

        Raises
        ------
        ConfigError
            If the request cannot be carried out.
        Closed
            If the engine takes no more.
        """
        if self.desk is None:
            raise Closed("Engine.submit is for the client of Engine.live, which runs on rank 0")
        return self.desk.submit(request, make)

    def serve(self, source, deliver, show=None):
        """Work on what a :class:`~mpillm.inference.rows.Source` gives on the leader of each replica, and ``deliver`` results
        there."""
        if self.replica.leads:
            self.replica.lead(Rows(source, self.tokenizer, self.config.model.max_seq_len, deliver, show))
        else:
            self.replica.follow(source.look)

    def _carry_out(self, requests, portions, show=None):
        """Return a result for each request; ``portions`` of their places go to one replica each."""
        if self.desk is not None and not self.desk.is_closed:
            raise ConfigError("generate and score take all ranks, and these work for the client of Engine.live: submit "
                              "requests there")
        for request in requests:
            self.check(request)
        found, comm = {}, self.mesh.world.comm
        costs = [sum(len(requests[place].prompt) + requests[place].max_tokens for place in portion) for portion in portions]
        with Counters(comm, 1) as counters:
            dealer = Dealer(counters, self.mesh.size("data"), costs, self.config.inference.batch)
            with agreed(comm, "generate"):
                self.serve(_Dealt(dealer, requests, portions), found.__setitem__,
                           show and (lambda key, token, *_: show(token)))
        found = dict(item for part in comm.allgather(found) for item in part.items())
        return [found[place] for place in range(len(requests))]

    def check(self, request):
        """Refuse a request that cannot be carried out. Local.

        Raises
        ------
        ConfigError
            If the prompt is empty, too long, or no row of the model's tokens; or more than the pool holds.
        """
        model, prompt = self.config.model, request.prompt
        if not prompt:
            raise ConfigError("the prompt has no tokens: give it one at least, such as the one that begins a text")
        if len(prompt) > model.max_seq_len + (request.max_tokens == 0):  # of a row that is scored the last is not computed
            raise ConfigError(f"the prompt has {len(prompt)} tokens, the model takes model.max_seq_len = {model.max_seq_len}: "
                              "give a shorter one")
        tokens = prompt + request.alternatives
        if not 0 <= min(tokens) <= max(tokens) < model.vocab_size:
            raise ConfigError(f"the prompt has tokens from {min(tokens)} to {max(tokens)}, the model knows 0 to "
                              f"{model.vocab_size - 1}: the tokenizer of the run is not the model's")
        self.replica.scheduler.check(min(len(prompt) + request.max_tokens, model.max_seq_len))

    def free(self):
        """Release the communicators. Once is enough."""
        self.mesh.free()

    def _num_blocks(self, block_bytes):
        """Return how many blocks every rank has room for."""
        model, settings, comm = self.config.model, self.config.inference, self.mesh.world.comm
        size = block_size(model.head_dim)
        most = settings.batch * -(-model.max_seq_len // size)
        room = settings.cache_bytes
        if not room:
            free, _ = memory_of_rank(comm, memory_bounds())
            room = FREE_SHARE * free
        blocks = min(comm.allgather(int(min(most, room / block_bytes) if block_bytes else most)))
        if blocks < 1:
            raise ConfigError(f"inference.cache_bytes = {settings.cache_bytes}: a block of {size} positions takes "
                              f"{block_bytes} bytes on rank {comm.rank}: raise it, or share the model among more ranks")
        return blocks


class _Dealt(Source):
    """Some of a list of requests, as the dealer gives them to this replica, in portions."""

    def __init__(self, dealer, requests, portions):
        self._dealer, self._requests, self._portions, self._waiting = dealer, requests, portions, deque()

    @property
    def is_done(self):
        return self._dealer.is_done and not self._waiting

    def take(self, busy):
        if not self._waiting and (dealt := self._dealer.take(busy)) is not None:
            self._waiting.extend(self._portions[dealt])
        if not self._waiting:
            return None
        place = self._waiting.popleft()
        return place, self._requests[place]
