"""The composition root: ``python -m nagaya.main server`` runs everything on one host in one process.

Guests are not its children and never end with it. It owns the data directory through a lock file; SIGTERM and SIGINT
end it in order, anything harsher is made good at the next start.
"""

from __future__ import annotations

import gc

gc.disable()  # nothing that is loaded below is ever freed; looking through it costs a sixth of the server's start

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import structlog

from nagaya import host
from nagaya.api.app import create_app
from nagaya.api.server import serve
from nagaya.cli import output
from nagaya.control.plane import Plane
from nagaya.control.store import Store
from nagaya.errors import DatabaseLocked, InvalidInput, NagayaError
from nagaya.host import Paths
from nagaya.node.service import Service
from nagaya.settings import Settings

log = structlog.get_logger("nagaya")


def parse_listen(text: str) -> tuple[str, int]:
    """``127.0.0.1:8006`` or ``[::1]:8006``. Raises InvalidInput."""
    address, colon, port = text.rpartition(":")
    if not colon or not address or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidInput(f"{text!r} is no address to listen on", hint="Give it as HOST:PORT: --listen 127.0.0.1:8006")
    return address.strip("[]"), int(port)


def take_lock(paths: Paths) -> host.Lock:
    """Become the one server of this data directory. Raises DatabaseLocked naming the other one."""
    lock = host.Lock(paths.server_lock)
    if not lock.acquire(json.dumps({"pid": os.getpid(), "socket": str(paths.socket)})):
        raise DatabaseLocked(
            f"Another server uses {paths.data} (it says: {lock.holder() or 'nothing yet'})",
            hint="One directory has one server. Use that one, end it, or give this one another directory",
            command="nagaya down",
        )
    return lock


async def run_server(paths: Paths, settings: Settings, listen: tuple[str, int] | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    for directory in (paths.data, paths.runtime):
        host.own_directory(directory)
    lock = take_lock(paths)
    try:
        store = await Store.open(paths.database)
        node = Service(paths, settings)
        plane = Plane(
            store,
            node,
            settings.ratios,
            stop.set,
            data=str(paths.data),
            listen=[f"unix:{paths.socket}", *([f"http://{listen[0]}:{listen[1]}"] if listen else [])],
        )
        try:
            await node.start()
            await plane.start()
            gc.freeze()
            gc.enable()
            await serve(
                create_app(plane),
                socket=paths.socket,
                listen=listen,
                token_file=paths.data / "api.token",
                stop=stop,
            )
        finally:
            await plane.stop()
            await node.stop()
    finally:
        lock.release()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nagaya.main", description="Run a Nagaya server in the foreground.")
    roles = parser.add_subparsers(dest="role", required=True)
    server = roles.add_parser("server", help="everything on this host: API, control plane and node")
    server.add_argument("--data", type=Path, help="keep everything under this directory")
    server.add_argument("--listen", help="also answer on HOST:PORT, to clients that have the token")
    arguments = parser.parse_args(argv)

    os.umask(0o077)  # what machines' users may read is said where it is made
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper("iso"),
            # Plain tracebacks: the default ones print local variables, secrets among them.
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), repr_native_str=True, exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        paths = Paths.resolve(arguments.data)
        settings = Settings.load(paths)
        listen = parse_listen(arguments.listen) if arguments.listen else None
        asyncio.run(run_server(paths, settings, listen))
    except NagayaError as error:
        output.error(error)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
