"""``mpillm serve``: answer requests over HTTP."""

import ipaddress
import os
import socket
from pathlib import Path

import click

from mpillm.cli.options import CONTEXT, parse_overrides
from mpillm.errors import OK, ConfigError, DataError, agreed

KEY_VARIABLE = "MPILLM_API_KEY"


@click.command("serve", context_settings=CONTEXT)
@click.argument("path", metavar="RUN", type=click.Path())
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[--SECTION.KEY VALUE]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="address of rank 0 to listen on")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free")
@click.option("--key-file", type=click.Path(), metavar="FILE",
              help=f"holds the key that clients must send; else the variable {KEY_VARIABLE} does, if it is set")
@click.option("--name", metavar="NAME", help="of the model; by default that of the folder")
@click.option("--data", type=click.IntRange(1), metavar="D", help="copies of the model; by default one a rank")
@click.option("--max-requests", default=1024, show_default=True, type=click.IntRange(1), help="that may be open at a time")
@click.option("--max-body", default=4 << 20, show_default=True, type=click.IntRange(1), help="bytes of a request")
@click.option("--max-seconds", default=600.0, show_default=True, help="of an answer that is not streamed")
@click.option("--drain-seconds", default=60.0, show_default=True, help="to finish what has begun when asked to stop")
def command(path, rest, host, port, key_file, name, data, max_requests, max_body, max_seconds, drain_seconds):
    """Answer requests in OpenAI's form with the newest weights of RUN; under mpirun or srun on all ranks.

    Rank 0 listens. SIGUSR1 or SIGTERM ends it: it takes nothing more, finishes what has begun, and leaves with 0.
    """
    from mpillm.comm.world import comm_world
    from mpillm.guard.stop import StopRequest
    from mpillm.inference.engine import Engine

    try:
        from mpillm.inference.server import Limits, Server
    except ImportError as error:
        raise ConfigError(f"mpillm serve needs starlette and uvicorn ({error}): pip install 'mpillm[serve]'") from None
    comm, stop = comm_world(), StopRequest()
    with agreed(comm, "serve"):
        key, listener = _listen(host, port, key_file) if comm.rank == 0 else (None, None)
    engine = Engine(path, comm, parse_overrides(rest) | ({} if data is None else {"layout.data": data}))
    limits = Limits(max_body, max_requests, max_seconds, drain_seconds)

    def client():
        if engine.caveat:
            click.echo(f"mpillm serve: results may depend on what is computed beside: {engine.caveat}", err=True)
        address, number = listener.getsockname()[:2]
        if key is None and not ipaddress.ip_address(address).is_loopback:
            click.echo(f"mpillm serve: {address} is open to others, and no key is asked for: give --key-file", err=True)
        address = f"[{address}]" if ":" in address else address
        click.echo(f"mpillm serve: http://{address}:{number}/v1, {comm.size} ranks, {engine.mesh.size('data')} replicas",
                   err=True)
        Server(engine, name or Path(path).resolve().name, key, limits).run([listener], stop.asked)

    engine.live(client)
    stop.settle()
    engine.free()
    return OK


def _listen(host, port, key_file):
    """Return the key and a socket that listens."""
    key = os.environ.get(KEY_VARIABLE)
    if key_file is not None:
        key = Path(key_file).read_text(encoding="utf-8").strip()
    if key == "":
        raise ConfigError(f"--key-file {key_file} or {KEY_VARIABLE}: the key is empty")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise DataError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from None
    return key, listener
