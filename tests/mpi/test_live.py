"""Requests from threads of rank 0 while others are worked on, also over HTTP; held against those that came at once."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from helpers import assert_all
from written import make_model, shared_run

from mpillm.errors import ConfigError, DataError, MpillmError
from mpillm.inference.engine import Engine
from mpillm.inference.live import Closed
from mpillm.inference.requests import Request, Sampling

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

LONG = Request("long", (1, 2, 3), 250, ignore_ends=True)


def requests():
    return [Request(str(i), [(7 * i + j) % 250 for j in range(3 + i)], 4 + 3 * i,
                    Sampling(0.9 * (i % 2), seed=i, logprobs=i % 3), ("\n", "e") if i % 4 == 3 else (), ignore_ends=True)
            for i in range(10)]


@pytest.fixture(params=["data", "pipeline"])
def engine(request, comm, comm_path):
    if comm.size == 1 and request.param == "pipeline":
        pytest.skip("one rank has one stage")
    run = shared_run(comm, comm_path, make_model(max_seq_len=300), dtype="float32")
    engine = Engine(run, comm, {f"layout.{request.param}": comm.size})
    yield engine
    engine.free()


def at_once(calls):
    """Return what functions return, each called in a thread of its own."""
    found = [None] * len(calls)

    def note(i, call):
        found[i] = call()

    threads = [threading.Thread(target=note, args=each) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def wait_until(condition, seconds=30):
    until_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.002)


def test_streams_give_what_a_batch_gives(comm, engine):
    wanted = engine.generate(requests())

    def client():
        def read(request):
            stream = engine.submit(request)
            return "".join(stream.texts()), stream.result()
        return at_once([lambda request=request: read(request) for request in requests()])

    found = engine.live(client)
    is_same = comm.rank > 0 or all(result == want and text == want.text for (text, result), want in zip(found, wanted))
    assert_all(is_same and (found is None) == (comm.rank > 0), found, comm)


def test_one_that_is_cancelled_leaves_nothing_behind(comm, engine):
    def client():
        streams = [engine.submit(LONG) for _ in range(2 * comm.size)]
        for stream in streams:
            next(iter(stream))
        for stream in streams:
            stream.cancel()
        return [stream.result() for stream in streams]

    found = engine.live(client) or []
    assert_all(all(r.finish_reason == "cancelled" and 0 < len(r.tokens) < LONG.max_tokens for r in found), found, comm)
    assert_all(engine.replica.scheduler.used_blocks == 0 and not len(engine.replica.scheduler), "blocks", comm)


def test_what_the_client_leaves_is_dropped(comm, engine):
    streams = []
    assert engine.live(lambda: streams.append(engine.submit(LONG))) is None
    assert_all(engine.replica.scheduler.used_blocks == 0, "blocks", comm)
    if comm.rank == 0:
        with pytest.raises(Closed, match="has ended"):
            streams[0].result(timeout_s=1)
        with pytest.raises(Closed, match="has ended"):
            engine.submit(LONG)
    assert len(engine.generate(requests())) == 10  # the engine goes on


def test_a_session_hears_nothing_of_the_one_before(comm, engine):
    wanted = engine.generate(requests())
    for _ in range(3):
        def client():
            return [engine.submit(request) for request in requests()][0].result().tokens  # the others are dropped

        def whole():
            streams = [engine.submit(request) for request in requests()]
            return [stream.result() for stream in streams]

        first, found = engine.live(client), engine.live(whole)
        is_same = comm.rank > 0 or (first == wanted[0].tokens and found == wanted)
        assert_all(is_same, found, comm)


def test_large_messages_on_their_way_hold_nobody_up(comm, engine):
    """When the service ends; of so many bytes that they are not sent before somebody receives."""
    wide = [replace(LONG, sampling=Sampling(logprobs=257)) for _ in range(48)]

    def client():
        for stream in [engine.submit(request) for request in wide][-2:]:
            next(iter(stream))

    engine.live(client)
    assert_all(engine.replica.scheduler.used_blocks == 0, "blocks", comm)


def test_a_bug_in_a_pass_reaches_who_waits(comm, engine):
    """And the error goes on, to end the job."""
    if comm.size > 1:
        pytest.skip("one rank shows it: others would be left waiting, until the launcher ends them")
    heard = []

    def fail(*_):
        raise RuntimeError("planted")

    engine.replica._carry_out = fail

    def client():
        with pytest.raises(Closed, match="planted"):
            engine.submit(LONG).result(timeout_s=60)
        heard.append(True)

    with pytest.raises(RuntimeError, match="planted"):
        engine.live(client)
    wait_until(lambda: heard)


def test_a_request_that_cannot_be_is_refused_where_it_is_made(comm, engine):
    def client():
        with pytest.raises(ConfigError, match="301 tokens"):
            engine.submit(Request("", [1] * 301, 1))
        with pytest.raises(ConfigError, match="submit requests there"):
            engine.generate(requests())
        return engine.submit(requests()[0]).result().tokens

    wanted = engine.generate(requests()[:1])[0].tokens
    assert_all(engine.live(client) in (wanted, None), wanted, comm)


def test_what_the_client_raises_all_raise(comm, engine):
    def client():
        engine.submit(LONG)
        raise DataError("no such file: notes")

    with pytest.raises(MpillmError, match="no such file: notes"):
        engine.live(client)


def test_nobody_works_while_nothing_comes(comm, engine):
    def client():
        engine.submit(requests()[0]).result()
        time.sleep(1)

    begin_s = time.process_time()
    engine.live(client)
    assert_all(time.process_time() - begin_s < 0.6, time.process_time() - begin_s, comm)


def post(port, path, body, key="secret"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    call = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(call, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_http(comm, engine):
    server = pytest.importorskip("mpillm.inference.server", reason="needs starlette and uvicorn: pip install 'mpillm[serve]'")
    asked = [request for request in requests() if not request.stop]
    wanted = engine.generate([Request(r.id, r.prompt, r.max_tokens, Sampling(r.sampling.temperature, seed=r.sampling.seed))
                              for r in asked])
    limits = server.Limits(body_bytes=5000, requests=30)

    def client():
        listener = socket.create_server(("127.0.0.1", 0))
        port, ends = listener.getsockname()[1], threading.Event()
        serving = threading.Thread(target=server.Server(engine, "tiny", "secret", limits).run, args=([listener], ends.is_set))
        serving.start()
        bodies = [{"prompt": list(r.prompt), "max_tokens": r.max_tokens, "temperature": r.sampling.temperature,
                   "seed": r.sampling.seed, "unheard_of": 1} for r in asked]
        whole = at_once([lambda body=body: post(port, "/v1/completions", body) for body in bodies])
        streamed = at_once([lambda body=body: post(port, "/v1/completions", {**body, "stream": True}) for body in bodies])
        for (status, text), (also, lines), want in zip(whole, streamed, wanted):
            choice, = json.loads(text)["choices"]
            events = [line.removeprefix("data: ") for line in lines.splitlines() if line]
            pieces = [json.loads(event)["choices"][0] for event in events[:-1]]
            assert (status, also, events[-1]) == (200, 200, "[DONE]")
            assert choice["text"] == "".join(piece["text"] for piece in pieces) == want.text
            assert choice["finish_reason"] == pieces[-1]["finish_reason"] == want.finish_reason
        statuses = [post(port, "/v1/completions", body, key)[0] for body, key in (
            ({"prompt": "a"}, "wrong"), (b"{", "secret"), (b"[1]", "secret"), ({"prompt": [999]}, "secret"),
            ({"prompt": "a", "temperature": -1}, "secret"), ({"prompt": "a" * 6000}, "secret"),
            ({"prompt": ["a"] * 31}, "secret"), ({"prompt": "a", "n": 10**9}, "secret"), ({"prompt": "a" * 302}, "secret"),
            ({"prompt": "a", "logprobs": 10**6}, "secret"))]
        assert statuses == [401, 400, 400, 400, 400, 413, 400, 400, 400, 400]
        assert post(port, "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})[0] == 400  # no template
        gone = socket.create_connection(("127.0.0.1", port))
        body = json.dumps({"prompt": "abc", "max_tokens": 280, "stream": True, "n": 3}).encode()
        gone.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: %d\r\n\r\n" %
                     len(body) + body)
        wait_until(lambda: len(engine.desk) == 3)
        assert post(port, "/v1/completions", {"prompt": ["a"] * 28})[0] == 429  # there is room for 27
        gone.close()
        wait_until(lambda: len(engine.desk) == 0)
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        assert 'mpillm_requests_total{status="401"} 1' in metrics and "mpillm_requests_open 0" in metrics
        late = []
        slow = threading.Thread(target=lambda: late.append(post(port, "/v1/completions", {"prompt": "ab", "max_tokens": 60})))
        slow.start()
        wait_until(lambda: len(engine.desk) == 1)
        ends.set()  # what has begun is finished
        slow.join()
        serving.join()
        assert late[0][0] == 200
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1)
        return True

    assert_all(engine.live(client) in (True, None), "served", comm)
    assert_all(engine.replica.scheduler.used_blocks == 0, "blocks", comm)


def test_weights_that_are_not_finite_end_every_stream(comm, engine):
    if comm.rank == comm.size - 1:
        norm = engine.replica.stage.norm
        norm.weight.data.fill_(float("nan"))

    def client():
        streams = [engine.submit(request) for request in requests()]
        for stream in streams:
            with pytest.raises(MpillmError, match="not finite"):
                stream.result(timeout_s=60)
        with pytest.raises(Closed, match="not finite"):
            engine.submit(LONG)

    with pytest.raises(MpillmError, match="not finite"):
        engine.live(client)
    assert_all(engine.replica.scheduler.used_blocks == 0, "blocks", comm)
