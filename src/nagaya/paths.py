"""Where things live, and how to name a socket there. Light: the command line imports it on every start."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOCKET_PATH_MAX: Final = 107
"""Bytes in sun_path (unix(7)); longer paths go through /proc/self/fd, see :func:`socket_path`."""


@dataclass(frozen=True, slots=True)
class Paths:
    """The three places of one installation; ``--data DIR`` puts them all under DIR."""

    data: Path
    """What must be kept: database, images, machines."""
    runtime: Path
    """What belongs to running processes: sockets, process records, serial logs."""
    config: Path
    """``nagaya.toml``."""

    @classmethod
    def resolve(cls, data: str | os.PathLike[str] | None = None, environ: Mapping[str, str] = os.environ) -> Paths:
        """Where things are: ``data``, else ``NAGAYA_DATA``, else the system's (as root) or the user's places."""
        chosen = data or environ.get("NAGAYA_DATA")
        if chosen:
            root = Path(chosen).expanduser().absolute()
            return cls(root, root / "run", root / "nagaya.toml")
        if os.geteuid() == 0:
            return cls(Path("/var/lib/nagaya"), Path("/run/nagaya"), Path("/etc/nagaya/nagaya.toml"))
        home = Path(environ.get("HOME") or "~").expanduser()
        share = Path(environ.get("XDG_DATA_HOME") or home / ".local/share") / "nagaya"
        runtime = Path(environ["XDG_RUNTIME_DIR"]) / "nagaya" if environ.get("XDG_RUNTIME_DIR") else share / "run"
        config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "nagaya"
        return cls(share, runtime, config / "nagaya.toml")

    @property
    def database(self) -> Path:
        return self.data / "nagaya.db"

    @property
    def images(self) -> Path:
        return self.data / "images"

    @property
    def machines(self) -> Path:
        """One directory per machine id: its disks and its identity."""
        return self.data / "machines"

    @property
    def machines_runtime(self) -> Path:
        """One directory per machine id: sockets, process record, exit record, logs."""
        return self.runtime / "machines"

    @property
    def socket(self) -> Path:
        """The API for local clients."""
        return self.runtime / "api.sock"

    @property
    def server_lock(self) -> Path:
        return self.data / "server.lock"

    @property
    def server_log(self) -> Path:
        return self.data / "server.log"


@contextlib.contextmanager
def socket_path(path: Path) -> Iterator[str]:
    """A name for a unix socket that fits ``sun_path``, valid inside the block, however long ``path`` is."""
    if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
