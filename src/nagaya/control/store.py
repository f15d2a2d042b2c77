"""The database."""

from __future__ import annotations

from pathlib import Path


class Store:
    @classmethod
    async def open(cls, where: Path | str) -> Store:
        """Open (and create or upgrade) the database: a path is SQLite, a URL is what it says.

        Raises DataTooNew, DatabaseLocked.
        """
        raise NotImplementedError
