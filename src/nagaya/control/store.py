"""The database: tables, transactions and the change feed. SQLite for one host, PostgreSQL for many.

There is one writer at a time: in this process by a lock, among processes by SQLite's own write lock
(``BEGIN IMMEDIATE``) or by an advisory lock of PostgreSQL that is held until the commit is visible. Writes are short,
and in return events become visible in the order of their ``seq`` (a follower that has seen 7 never misses a 6), and
what a transaction read for admission stays true until it commits.

Documents (a machine's spec, a task's results) are JSON text; what is searched or sorted has a column.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from nagaya import host
from nagaya.errors import DatabaseLocked, DataTooNew, StartupError

T = TypeVar("T")

REVISIONS: Final = ("0001",)
"""The database's revisions this program knows, oldest first; one file each in ``migrations/versions``."""

EVENTS_KEPT: Final = 100_000
AUDIT_KEPT: Final = 1_000_000
TASKS_KEPT: Final = 10_000
KEYS_KEPT: Final = timedelta(days=1)

BUSY_MS = 5000
"""How long a writer waits for another process before the database is held to be locked."""

_WRITER: Final = 0x6E616761
"""PostgreSQL's advisory lock that makes writers queue: "naga"."""


class Utc(sa.types.TypeDecorator[datetime]):
    """A moment, as microseconds since 1970 in UTC: sorts, compares and survives both databases alike."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> int | None:
        return None if value is None else (value - _EPOCH) // timedelta(microseconds=1)

    def process_result_value(self, value: int | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else _EPOCH + timedelta(microseconds=value)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

# Names sort by code point everywhere, so that a prefix is a range of the index.
_Name = sa.String(63).with_variant(sa.String(63, collation="C"), "postgresql")
_Seq = sa.BigInteger().with_variant(sa.Integer, "sqlite")

metadata = sa.MetaData(
    naming_convention={"ix": "%(table_name)s_%(column_0_name)s", "uq": "%(table_name)s_%(column_0_name)s_key"}
)

machines = sa.Table(
    "machines",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("name", _Name, nullable=False, unique=True),
    sa.Column("node", sa.String(63), nullable=False),
    sa.Column("image", sa.String(63), nullable=False),
    sa.Column("architecture", sa.String(16), nullable=False),
    sa.Column("mac", sa.String(17), nullable=False, unique=True),
    sa.Column("cpus", sa.Integer, nullable=False),
    sa.Column("memory_mib", sa.Integer, nullable=False),
    sa.Column("disk_mib", sa.Integer),
    # What admission counts: host memory that is promised to the machine, and whether the promise is in force.
    sa.Column("claim_mib", sa.Integer, nullable=False),
    sa.Column("holds", sa.Boolean, nullable=False),
    # Wanted.
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("desired", sa.String(16), nullable=False),
    sa.Column("stop_mode", sa.String(16), nullable=False),
    sa.Column("stop_deadline_s", sa.Float, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("incarnation", sa.Integer, nullable=False),
    sa.Column("provisioned", sa.Boolean, nullable=False),
    # Observed.
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("ready", sa.Boolean, nullable=False),
    sa.Column("observed_generation", sa.Integer, nullable=False),
    sa.Column("observed_incarnation", sa.Integer, nullable=False),
    sa.Column("observation", sa.Text, nullable=False),
    # The restart policy's memory.
    sa.Column("restarts", sa.Integer, nullable=False),
    sa.Column("restart_at", Utc),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("updated_at", Utc, nullable=False),
)


def _partial(name: str, where: sa.ColumnElement[bool], *columns: sa.ColumnElement[Any]) -> sa.Index:
    return sa.Index(name, *columns, sqlite_where=where, postgresql_where=where)


sa.Index("machines_state", machines.c.state, machines.c.name)
sa.Index("machines_image", machines.c.image, machines.c.architecture)
_partial("machines_work", machines.c.observed_generation < machines.c.generation, machines.c.node)
sa.Index("machines_claims", machines.c.node, machines.c.holds)
_partial("machines_disks", machines.c.disk_mib.is_not(None), machines.c.node, machines.c.disk_mib)
_partial("machines_restarts", machines.c.restart_at.is_not(None), machines.c.restart_at)

nodes = sa.Table(
    "nodes",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("facts", sa.Text),
    sa.Column("seen_at", Utc),
)

ACTIVE: Final = ("pending", "running", "undoing")
"""States of a task that has not ended."""

tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("object_id", sa.String(128)),
    sa.Column("object_name", sa.String(128)),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("input", sa.Text, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    # How many steps are done; while undoing, how many are left to undo.
    sa.Column("position", sa.Integer, nullable=False),
    # How often the step at hand was begun.
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("failed_at", sa.Integer),
    sa.Column("results", sa.Text, nullable=False),
    sa.Column("error", sa.Text),
    sa.Column("progress", sa.Float, nullable=False),
    sa.Column("message", sa.Text),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("updated_at", Utc, nullable=False),
    sa.Column("ended_at", Utc),
    sa.Index("tasks_age", "created_at", "id"),
    sa.Index("tasks_object", "object_id"),
)
_partial("tasks_active", tasks.c.ended_at.is_(None), tasks.c.created_at)

events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", _Seq, primary_key=True, autoincrement=True),
    sa.Column("at", Utc, nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("object_kind", sa.String(16), nullable=False),
    sa.Column("object_id", sa.String(128)),
    sa.Column("object_name", sa.String(128)),
    sa.Column("actor", sa.String(128)),
    sa.Column("data", sa.Text, nullable=False),
    sa.Index("events_object_id", "object_id", "seq"),
    sa.Index("events_object_name", "object_name", "seq"),
    sqlite_autoincrement=True,
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("seq", _Seq, primary_key=True, autoincrement=True),
    sa.Column("at", Utc, nullable=False),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("action", sa.String(32), nullable=False),
    sa.Column("object_kind", sa.String(16), nullable=False),
    sa.Column("object_id", sa.String(128)),
    sa.Column("object_name", sa.String(128)),
    sa.Column("result", sa.String(64), nullable=False),
    sa.Column("before", sa.Text),
    sa.Column("after", sa.Text),
    sa.Index("audit_object_id", "object_id", "seq"),
    sa.Index("audit_object_name", "object_name", "seq"),
    sqlite_autoincrement=True,
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("actor", sa.String(128), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("fingerprint", sa.String(128), nullable=False),
    sa.Column("task_id", sa.String(36)),
    sa.Column("status", sa.Integer),
    sa.Column("body", sa.LargeBinary),
    sa.Column("created_at", Utc, nullable=False, index=True),
)

meta = sa.Table(
    "meta", metadata, sa.Column("key", sa.String(64), primary_key=True), sa.Column("value", sa.Text, nullable=False)
)


def encode(value: object) -> str:
    """A document's column."""
    return msgspec.json.encode(value).decode()


def decode(text: str | None) -> Any:
    return None if text is None else msgspec.json.decode(text)


class Feed:
    """Wakes those who wait for a commit that touched an object. It carries no data: the tables do."""

    def __init__(self) -> None:
        self._waiting: dict[str | None, set[asyncio.Event]] = {}

    @contextmanager
    def watch(self, key: str | None = None) -> Iterator[asyncio.Event]:
        """An event that is set after every commit that touched ``key`` (None: after every commit with an event).

        Clear it before reading, so that nothing is missed between reading and waiting.
        """
        event = asyncio.Event()
        waiting = self._waiting.setdefault(key, set())
        waiting.add(event)
        try:
            yield event
        finally:
            waiting.discard(event)
            if not waiting:
                self._waiting.pop(key, None)

    def wake(self, keys: Iterable[str | None]) -> None:
        for key in keys:
            for event in self._waiting.get(key, ()):
                event.set()


async def unbroken(work: Coroutine[Any, Any, T]) -> T:
    """Await something that must not be cancelled half-way; a cancellation is raised when it has ended.

    A driver that is cancelled within a statement forgets its connection, and with it an open transaction and its lock.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        raise


class Connection:
    """A connection for reading; every statement sees the newest commits."""

    def __init__(self, raw: AsyncConnection) -> None:
        self.raw = raw

    async def execute(
        self, statement: sa.Executable, parameters: list[dict[str, Any]] | None = None
    ) -> sa.CursorResult[Any]:
        return await unbroken(self.raw.execute(statement, parameters))


class Transaction(Connection):
    """One write: statements and events become visible together, or not at all."""

    def __init__(self, raw: AsyncConnection) -> None:
        super().__init__(raw)
        self.touched: set[str | None] = set()
        self.committed: list[Callable[[], None]] = []
        """Called after the commit."""

    async def event(
        self,
        kind: str,
        object_kind: str,
        object_id: str | None,
        object_name: str | None,
        *,
        actor: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Add to the feed; whoever watches the object (or everything) is woken after the commit."""
        await self.execute(
            events.insert().values(
                at=host.now(),
                kind=kind,
                object_kind=object_kind,
                object_id=object_id,
                object_name=object_name,
                actor=actor,
                data=encode(data or {}),
            )
        )
        self.touched |= {None, object_id}


class Store:
    """The open database. ``instance`` names this installation for good."""

    def __init__(self, readers: AsyncEngine, writer: AsyncEngine) -> None:
        self._readers = readers
        self._writer = writer
        self._lock = asyncio.Lock()
        self.feed = Feed()
        self.instance = ""

    @classmethod
    async def open(cls, where: Path | str) -> Store:
        """Open the database, making or upgrading it; a path is SQLite, a string is an SQLAlchemy URL.

        Raises DataTooNew when a newer program has upgraded it, DatabaseLocked when another process writes to it,
        StartupError when it is damaged or no database.
        """
        url = sa.make_url(where) if isinstance(where, str) else sa.URL.create("sqlite", database=str(where))
        store = cls(*(_sqlite(url.database or "") if url.get_backend_name() == "sqlite" else _server(url)))
        try:
            await store._prepare(str(where))
        except sa.exc.DatabaseError as error:
            await store.close()
            raise StartupError(
                f"The database {where} cannot be used: {error.orig}",
                hint="Bring back a copy of it, or use other data (NAGAYA_DATA); machines that run are not touched",
            ) from error
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        """Ends the connections (and with SQLite their threads, without which the process would not end)."""
        await self._readers.dispose()
        await self._writer.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Connection]:
        """A connection for reading."""
        raw = await _connected(self._readers)
        try:
            yield Connection(raw)
        finally:
            await unbroken(raw.close())

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Transaction]:
        """The write transaction: nobody else writes until it ends. Commits at the end, unless an error leaves it."""
        async with self._lock:
            raw = await _connected(self._writer)
            try:
                await unbroken(_begun(raw))
                transaction = Transaction(raw)
                yield transaction
                await unbroken(raw.commit())
            finally:
                # Rolls back what was not committed.
                await unbroken(raw.close())
        self.feed.wake(transaction.touched)
        for call in transaction.committed:
            call()

    async def prune(self) -> None:
        """Forget the oldest events, audit records, ended tasks and idempotency keys beyond what is kept."""
        async with self.write() as tx:
            for table, kept in ((events, EVENTS_KEPT), (audit, AUDIT_KEPT)):
                newest = (await tx.execute(sa.select(sa.func.max(table.c.seq)))).scalar_one()
                await tx.execute(table.delete().where(table.c.seq <= (newest or 0) - kept))
            oldest = (
                await tx.execute(
                    sa.select(tasks.c.created_at).order_by(tasks.c.created_at.desc()).offset(TASKS_KEPT).limit(1)
                )
            ).scalar_one_or_none()
            if oldest is not None:
                await tx.execute(tasks.delete().where(tasks.c.ended_at.is_not(None), tasks.c.created_at <= oldest))
            await tx.execute(idempotency.delete().where(idempotency.c.created_at < host.now() - KEYS_KEPT))

    async def _prepare(self, where: str) -> None:
        try:
            async with self.write() as tx:
                found = await tx.raw.run_sync(_revision)
                if found is not None and found not in REVISIONS:
                    raise DataTooNew(
                        f"The database {where} has revision {found}, and this program knows up to {REVISIONS[-1]}",
                        hint="A newer version of Nagaya has upgraded it. Start that, or use other data (NAGAYA_DATA)",
                        details={"found": found, "known": REVISIONS[-1]},
                    )
                if found != REVISIONS[-1]:
                    await tx.raw.run_sync(_upgrade)
                instance = (
                    await tx.execute(sa.select(meta.c.value).where(meta.c.key == "instance"))
                ).scalar_one_or_none()
                if instance is None:
                    instance = str(uuid.uuid4())
                    await tx.execute(meta.insert().values(key="instance", value=instance))
                self.instance = instance
        except sa.exc.OperationalError as error:
            if "locked" in str(error.orig):
                raise DatabaseLocked(
                    f"The database {where} is being written by another process: {error.orig}",
                    hint="Another Nagaya server may use the same data; stop it, or start this one with --data DIR",
                    command="nagaya down",
                ) from error
            raise StartupError(
                f"The database {where} cannot be opened: {error.orig}",
                hint="See that its directory exists, belongs to this user and has room",
            ) from error


async def _connected(engine: AsyncEngine) -> AsyncConnection:
    raw = engine.connect()
    try:
        await unbroken(raw.start())
    except asyncio.CancelledError:
        await unbroken(raw.close())
        raise
    return raw


async def _begun(raw: AsyncConnection) -> None:
    await raw.begin()
    if raw.dialect.name == "postgresql":
        await raw.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITER)))


def _sqlite(path: str) -> tuple[AsyncEngine, AsyncEngine]:
    url = sa.URL.create("sqlite+aiosqlite", database=path)

    def connected(connection: Any, _: Any) -> None:
        # Python's sqlite3 would begin transactions by itself, and deferred ones: they fail when they turn to writing.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode = WAL", "synchronous = FULL", f"busy_timeout = {BUSY_MS}", "foreign_keys = ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    readers = create_async_engine(url, pool_size=4, max_overflow=0, pool_timeout=60)
    writer = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=60)
    for engine in (readers, writer):
        sa.event.listen(engine.sync_engine, "connect", connected)
    sa.event.listen(writer.sync_engine, "begin", begin)
    return readers, writer


def _server(url: sa.URL) -> tuple[AsyncEngine, AsyncEngine]:
    engine = create_async_engine(url, pool_size=8, max_overflow=0, pool_timeout=60, pool_pre_ping=True)
    return engine.execution_options(isolation_level="AUTOCOMMIT"), engine


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def _upgrade(connection: sa.Connection) -> None:
    # Imported here: a server whose database is up to date starts without it.
    import alembic.command
    import alembic.config

    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")
