"""The database, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import alembic.config
import alembic.script
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from nagaya.control import store as tables
from nagaya.control.store import REVISIONS, Store, events, machines, metadata
from nagaya.errors import DatabaseLocked, DataTooNew, StartupError

pytest_plugins = ("tests.postgres_fixtures", "tests.store_fixtures")


async def seqs(store: Store) -> list[int]:
    async with store.read() as connection:
        return list((await connection.execute(sa.select(events.c.seq).order_by(events.c.seq))).scalars())


async def test_the_schema_that_migrations_make_is_the_one_the_code_uses(store: Store) -> None:
    def differences(connection: sa.Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async with store.write() as tx:
        assert await tx.raw.run_sync(differences) == []


def test_the_code_knows_every_migration() -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(tables.__file__).parent / "migrations"))
    scripts = alembic.script.ScriptDirectory.from_config(config)
    assert tuple(script.revision for script in scripts.walk_revisions())[::-1] == REVISIONS


async def test_a_store_is_the_same_when_it_is_opened_again(where: Path | str) -> None:
    first = await Store.open(where)
    async with first.write() as tx:
        await tx.event("test", "thing", "1", "one", data={"größe": 1})
    await first.close()
    second = await Store.open(where)
    try:
        assert second.instance == first.instance
        assert await seqs(second) == [1]
    finally:
        await second.close()


async def test_a_database_of_a_newer_version_is_refused_with_both_revisions(where: Path | str) -> None:
    store = await Store.open(where)
    async with store.write() as tx:
        await tx.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    await store.close()
    with pytest.raises(DataTooNew) as refused:
        await Store.open(where)
    assert refused.value.details == {"found": "9999", "known": REVISIONS[-1]}
    assert "9999" in refused.value.message


async def test_a_file_that_is_no_database_is_refused_in_words(tmp_path: Path) -> None:
    database = tmp_path / "nagaya.db"
    database.write_text("this was a database once\n")
    with pytest.raises(StartupError, match="file is not a database") as refused:
        await Store.open(database)
    assert str(database) in refused.value.message
    assert refused.value.hint


async def test_a_database_that_another_process_writes_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "nagaya.db"
    await (await Store.open(path)).close()
    monkeypatch.setattr(tables, "BUSY_MS", 50)
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseLocked, match="another process"):
            await Store.open(path)
        other.execute("ROLLBACK")


async def test_a_url_of_sqlite_is_opened_as_its_path_is(tmp_path: Path) -> None:
    store = await Store.open(f"sqlite+aiosqlite:///{tmp_path / 'nagaya.db'}")
    try:
        async with store.read() as connection:
            assert (await connection.execute(sa.text("PRAGMA journal_mode"))).scalar() == "wal"
            assert (await connection.execute(sa.text("PRAGMA synchronous"))).scalar() == 2
    finally:
        await store.close()


async def test_what_a_failed_write_began_is_not_seen(store: Store) -> None:
    async def fail() -> None:
        async with store.write() as tx:
            await tx.event("test", "thing", None, None)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()
    assert await seqs(store) == []
    async with store.write() as tx:
        await tx.event("test", "thing", None, None)
    assert len(await seqs(store)) == 1


async def test_a_write_that_is_cancelled_leaves_nothing_and_blocks_nobody(store: Store) -> None:
    inside = asyncio.Event()

    async def write() -> None:
        async with store.write() as tx:
            await tx.event("test", "thing", None, None)
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(write())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with store.write() as tx:
        await tx.event("test", "thing", "after", None)
    assert len(await seqs(store)) == 1


async def test_two_writers_never_lose_an_update(store: Store) -> None:
    async def raise_counter() -> None:
        for _ in range(10):
            async with store.write() as tx:
                row = (await tx.execute(sa.select(tables.meta).where(tables.meta.c.key == "n"))).one()
                await asyncio.sleep(0)
                await tx.execute(
                    tables.meta.update().where(tables.meta.c.key == "n").values(value=str(int(row.value) + 1))
                )

    async with store.write() as tx:
        await tx.execute(tables.meta.insert().values(key="n", value="0"))
    await asyncio.gather(raise_counter(), raise_counter(), raise_counter())
    async with store.read() as connection:
        assert (
            await connection.execute(sa.select(tables.meta.c.value).where(tables.meta.c.key == "n"))
        ).scalar() == "30"


async def test_a_reader_never_sees_a_later_event_before_an_earlier_one(where: Path | str, store: Store) -> None:
    """Two servers write; whoever reads at any moment sees the feed without holes that fill later."""
    other = await Store.open(where)
    done = asyncio.Event()

    async def write(writer: Store, label: str) -> None:
        for _ in range(25):
            async with writer.write() as tx:
                await tx.event("test", "thing", label, None)
                await asyncio.sleep(0.001 if label == "slow" else 0)

    async def read() -> None:
        seen: list[int] = []
        while not done.is_set():
            found = await seqs(store)
            assert found[: len(seen)] == seen
            seen = found

    reader = asyncio.create_task(read())
    try:
        await asyncio.gather(write(store, "slow"), write(other, "fast"))
    finally:
        done.set()
        await other.close()
    await reader
    assert len(await seqs(store)) == 50


async def test_a_waiter_is_woken_by_the_commit_that_touches_its_object_and_by_no_other(store: Store) -> None:
    with store.feed.watch("a") as a, store.feed.watch("b") as b, store.feed.watch() as everything:
        async with store.write() as tx:
            await tx.event("test", "thing", "a", None)
            assert not a.is_set()
        assert a.is_set()
        assert everything.is_set()
        assert not b.is_set()


async def test_moments_come_back_as_they_went_in(store: Store) -> None:
    moment = datetime(2026, 7, 1, 12, 30, 15, 123456, tzinfo=UTC)
    async with store.write() as tx:
        await tx.execute(tables.nodes.insert().values(name="n", state="up", seen_at=moment))
    async with store.read() as connection:
        query = sa.select(tables.nodes.c.name).where(tables.nodes.c.seen_at > moment - timedelta(microseconds=1))
        assert (await connection.execute(query)).scalar() == "n"
        assert (await connection.execute(sa.select(tables.nodes.c.seen_at))).scalar() == moment


async def test_old_events_are_forgotten_and_their_numbers_not_used_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "EVENTS_KEPT", 3)
    for _ in range(5):
        async with store.write() as tx:
            await tx.event("test", "thing", None, None)
    await store.prune()
    assert await seqs(store) == [3, 4, 5]
    monkeypatch.setattr(tables, "EVENTS_KEPT", 0)
    await store.prune()
    async with store.write() as tx:
        await tx.event("test", "thing", None, None)
    assert await seqs(store) == [6]


async def test_the_queries_that_run_all_the_time_use_an_index(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "nagaya.db")
    working = sa.select(machines).where(machines.c.observed_generation < machines.c.generation)
    claims = sa.select(machines.c.claim_mib).where(machines.c.node == "n", machines.c.holds)
    disks = sa.select(sa.func.sum(machines.c.disk_mib)).where(machines.c.node == "n", machines.c.disk_mib.is_not(None))
    due = sa.select(machines.c.id).where(machines.c.restart_at <= datetime.now(UTC))
    active = sa.select(tables.tasks.c.id).where(tables.tasks.c.ended_at.is_(None))
    try:
        async with store.read() as connection:
            for query in (working, claims, disks, due, active):
                text = str(query.compile(dialect=sa.dialects.sqlite.dialect(), compile_kwargs={"literal_binds": True}))

                rows = (await connection.raw.exec_driver_sql("EXPLAIN QUERY PLAN " + text)).all()
                assert all("USING" in row[3] for row in rows), (text, rows)
    finally:
        await store.close()


async def test_closing_ends_every_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    store = await Store.open(tmp_path / "nagaya.db")
    async with store.read() as one, store.read() as two:
        await one.execute(sa.select(1))
        await two.execute(sa.select(1))
    await store.close()
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in left)
