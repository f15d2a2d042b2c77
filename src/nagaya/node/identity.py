"""User ids for machines: every machine runs under its own, so that none can touch another's files or processes.

Only a server that runs as root can hand them out. A claim is a file under ``/run/nagaya-uids`` named by the id and
holding the machine's directory; it keeps two installations on one host apart. A claim whose machine is gone is void.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nagaya import host
from nagaya.errors import OutOfResources

CLAIMS: Final = Path("/run/nagaya-uids")


@dataclass(frozen=True, slots=True)
class Identities:
    """The range of ids this server may hand out; the group id of a machine equals its user id."""

    base: int
    count: int
    claims: Path = CLAIMS

    def claim(self, directory: Path, preferred: int | None) -> int:
        """An id that belongs to the machine in ``directory`` alone; ``preferred`` is the one it had before.

        Raises OutOfResources when the range is used up.
        """
        self.claims.mkdir(mode=0o700, exist_ok=True)
        with host.exclusively(self.claims):
            if preferred is not None and self._take(preferred, directory):
                return preferred
            start = int.from_bytes(os.urandom(4)) % self.count
            for step in range(self.count):
                uid = self.base + (start + step) % self.count
                if not _exists(uid) and self._take(uid, directory):
                    return uid
        raise OutOfResources(
            f"All {self.count} user ids for machines ({self.base}–{self.base + self.count - 1}) are in use",
            hint="Widen jail.uid_count in the configuration, or delete machines",
        )

    def restore(self, machines: Path) -> None:
        """Claim again what the machines in this directory have: they outlive a boot of the host, and claims do not.

        Else a new machine could be given the id that owns the disk of one at rest. A machine's directory has its id as
        group.
        """
        self.claims.mkdir(mode=0o700, exist_ok=True)
        with host.exclusively(self.claims):
            claimed = set(os.listdir(self.claims))
            for entry in os.scandir(machines):
                uid = entry.stat(follow_symlinks=False).st_gid
                if self.base <= uid < self.base + self.count and str(uid) not in claimed:
                    self._take(uid, Path(entry.path))

    def when_unused(self, do: Callable[[], None]) -> None:
        """Do it if no machine of this host, of whatever installation, has an id of the range.

        Nobody can claim one meanwhile: what ``do`` takes away is not taken from under a machine that starts.
        """
        with host.exclusively(self.claims):
            if not any(self.base <= int(entry) < self.base + self.count for entry in os.listdir(self.claims)):
                do()

    def release(self, directory: Path, uid: int) -> None:
        """Give an id back; a claim of somebody else's is left alone."""
        claim = self.claims / str(uid)
        if _owner(claim) == str(directory):
            claim.unlink(missing_ok=True)

    def _take(self, uid: int, directory: Path) -> bool:
        claim = self.claims / str(uid)
        for _ in range(2):
            try:
                descriptor = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                owner = _owner(claim)
                if owner == str(directory):
                    return True
                if owner is not None and not (owner and Path(owner).exists()):  # an empty one was cut off
                    claim.unlink(missing_ok=True)
                    continue
                return False
            with os.fdopen(descriptor, "w") as file:
                file.write(str(directory))
            return True
        return False


def _owner(claim: Path) -> str | None:
    try:
        return claim.read_text()
    except FileNotFoundError:
        return None


def _exists(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True
