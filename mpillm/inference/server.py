"""OpenAI's HTTP interface of an engine: a program of Starlette in a thread of rank 0, which calls no MPI."""

import asyncio
import hmac
import json
import time
from contextlib import suppress
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from mpillm.errors import ConfigError, MpillmError
from mpillm.files import to_json
from mpillm.inference.live import Chosen, Closed, Stream
from mpillm.inference.openai import CHAT, COMPLETION, Answers, wanted
from mpillm.inference.tasks import Generation
from mpillm.inference.text import Text

LOOK_S = 0.1  # between two looks whether a client is still there, or the service is to end
NEW_TOKENS = 16  # where a body says nothing, as OpenAI's


@dataclass(frozen=True)
class Limits:
    """Of one body and of all that wait: bytes, requests, seconds of an answer, seconds to finish when asked to stop."""

    body_bytes: int = 4 << 20
    requests: int = 1024
    answer_s: float = 600.0
    drain_s: float = 60.0


class AsyncStream(Stream):
    """A stream that a coroutine reads."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()

    def put(self, news):
        """Take news from the main thread."""
        with suppress(RuntimeError):  # nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, news)

    async def news(self):
        """Return the next :class:`Chosen`, or the result; raise the error that ends the stream."""
        found = await self._queue.get()
        if isinstance(found, Exception):
            raise found
        return found

    async def whole(self):
        """Return the result."""
        while isinstance(found := await self.news(), Chosen):
            pass
        return found


class Refused(Exception):
    """What is answered in place of what was asked for."""

    def __init__(self, status, message, headers=None):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.response = JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status,
                                     headers=headers)


class Server:
    """Answers HTTP until it is told to stop.

    Parameters
    ----------
    engine : Engine
    name : str
        Of the model.
    key : str or None
        Without it anybody may ask.
    limits : Limits
    """

    def __init__(self, engine, name, key=None, limits=Limits()):
        self._engine, self._name, self._key, self._limits = engine, name, key, limits
        self._task = Generation(engine, NEW_TOKENS, 1.0, 0)
        self._counts, self._tokens, self._started_s = {}, 0, int(time.time())
        self.app = Starlette(routes=[
            Route("/v1/completions", self._answering(COMPLETION), methods=["POST"]),
            Route("/v1/chat/completions", self._answering(CHAT), methods=["POST"]),
            Route("/v1/models", self._models), Route("/v1/models/{name:path}", self._models),
            Route("/health", self._health), Route("/metrics", self._metrics)])

    def run(self, sockets, is_asked_to_stop):
        """Serve until ``is_asked_to_stop()``, then finish what has begun. In a thread."""
        server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning", lifespan="off", access_log=False,
                                               timeout_graceful_shutdown=int(self._limits.drain_s)))

        async def serve():
            serving = asyncio.ensure_future(server.serve(sockets))
            while not serving.done() and not is_asked_to_stop() and not self._engine.desk.is_closed:
                await asyncio.sleep(LOOK_S)
            server.should_exit = True
            await serving

        asyncio.run(serve())

    def _answering(self, kind):
        async def answer(request):
            try:
                response = await self._answer(kind, request)
            except Refused as refused:
                response = refused.response
            self._counts[response.status_code] = self._counts.get(response.status_code, 0) + 1
            return response
        return answer

    async def _answer(self, kind, request):
        self._check_key(request)
        body = await self._body(request)
        try:
            what = await asyncio.to_thread(wanted, kind, body, self._task, self._limits.requests)
        except ConfigError as error:
            raise Refused(400, str(error)) from None
        if len(self._engine.desk) + len(what.requests) > self._limits.requests:
            raise Refused(429, f"{len(self._engine.desk)} requests wait, no more than {self._limits.requests} may: come again",
                          {"Retry-After": "1"})
        streams, answers = self._submit(what.requests), Answers(what, self._name, self._engine.tokenizer)
        if what.streams:
            return StreamingResponse(self._events(streams, answers), media_type="text/event-stream")
        try:
            results = await self._all(streams, request)
        except MpillmError as error:
            raise Refused(500, str(error)) from None
        finally:
            _cancel(streams)
        self._tokens += sum(len(result.tokens) for result in results)
        return JSONResponse(answers.whole(results))

    def _submit(self, requests):
        streams = []
        try:
            for request in requests:
                streams.append(self._engine.submit(request, AsyncStream))
        except MpillmError as error:
            _cancel(streams)
            raise Refused(503 if isinstance(error, Closed) else 400, str(error)) from None
        return streams

    async def _all(self, streams, request):
        """Return all results, unless the client leaves or it takes too long."""
        waiting = asyncio.gather(*(stream.whole() for stream in streams))
        until_s = time.monotonic() + self._limits.answer_s
        while not waiting.done():
            await asyncio.wait([waiting], timeout=LOOK_S)
            if not waiting.done() and (time.monotonic() > until_s or await request.is_disconnected()):
                waiting.cancel()
                raise Refused(504, f"no answer within {self._limits.answer_s:g} s")
        return await waiting

    async def _events(self, streams, answers):
        """Yield the lines of a stream; when the client leaves, its requests end."""
        results, news = [None] * len(streams), asyncio.Queue()

        async def pass_on(index, stream):
            text, is_first = Text(self._engine.tokenizer, stream.request.stop), True
            while isinstance(found := await stream.news(), Chosen):
                if piece := text.add(found.token):
                    news.put_nowait(answers.piece(index, piece, is_first))
                    is_first = False
            results[index] = found
            news.put_nowait(answers.piece(index, text.rest(found.text), is_first, found))

        async def all_():
            await asyncio.gather(*(pass_on(*each) for each in enumerate(streams)))

        working = asyncio.ensure_future(all_())
        working.add_done_callback(lambda _: news.put_nowait(None))
        try:
            while (piece := await news.get()) is not None:
                yield _event(piece)
            if error := working.exception():
                yield _event({"error": {"message": str(error), "type": "server_error", "param": None, "code": 500}})
            elif answers.wanted.includes_usage:
                yield _event(answers.last(results))
            yield "data: [DONE]\n\n"
        finally:
            working.cancel()
            _cancel(streams)
            self._tokens += sum(len(result.tokens) for result in results if result is not None)

    async def _body(self, request):
        data = bytearray()
        try:
            async for part in request.stream():
                data += part
                if len(data) > self._limits.body_bytes:
                    raise Refused(413, f"the body has more than {self._limits.body_bytes} bytes")
        except ClientDisconnect:
            raise Refused(400, "the client has left") from None
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON ({error})") from None

    def _check_key(self, request):
        given = request.headers.get("authorization", "")
        if self._key is not None and not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            raise Refused(401, "the key is missing or wrong: send it as `Authorization: Bearer KEY`")

    async def _models(self, request):
        one = {"id": self._name, "object": "model", "created": self._started_s, "owned_by": "mpillm"}
        if request.path_params.get("name", self._name) != self._name:
            return Refused(404, f"there is one model, {self._name}").response
        return JSONResponse({"object": "list", "data": [one]} if "name" not in request.path_params else one)

    async def _health(self, request):
        return JSONResponse({"status": "ok"}, 503 if self._engine.desk.is_closed else 200)

    async def _metrics(self, request):
        scheduler = self._engine.replica.scheduler
        lines = [*_metric("mpillm_requests_total", "counter", {f'{{status="{status}"}}': count
                                                               for status, count in sorted(self._counts.items())}),
                 *_metric("mpillm_generated_tokens_total", "counter", {"": self._tokens}),
                 *_metric("mpillm_requests_open", "gauge", {"": len(self._engine.desk)}),
                 *_metric("mpillm_cache_blocks_used", "gauge", {"": scheduler.used_blocks}),
                 *_metric("mpillm_cache_blocks", "gauge", {"": scheduler.num_blocks})]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


def _metric(name, kind, values):
    return [f"# TYPE {name} {kind}", *(f"{name}{labels} {value}" for labels, value in values.items())]


def _event(value):
    return f"data: {to_json(value)}\n\n"


def _cancel(streams):
    for stream in streams:
        stream.cancel()
