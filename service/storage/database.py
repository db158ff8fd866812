"""The database: SQLite in WAL mode by default, PostgreSQL by URL; read and write transactions; migrations."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event

BUSY_SECONDS = 15
JOURNAL_BYTES = 64 * 1024 * 1024
SCRUB_BYTES = 256 * 1024 * 1024  # written anew in about two seconds


class Database:
    """`read()` and `write()` give a connection inside a transaction; a write commits at the end of its block."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _engine(url)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """On SQLite the transaction takes the write lock at its start, so that it never fails half-way for want of it."""
        with self.engine.connect() as connection:
            connection.execution_options(polyclip_begin="BEGIN IMMEDIATE")
            with connection.begin():
                yield connection

    @contextmanager
    def attempt(self) -> Iterator[Connection]:
        """`write` for what is not worth waiting for: on SQLite it fails at once where another one holds the write lock."""
        with self.engine.connect() as connection:
            connection.execution_options(polyclip_begin="BEGIN IMMEDIATE", polyclip_waits=False)
            with connection.begin():
                yield connection

    def migrate(self, lock: Path) -> None:
        """Brings the schema to the newest version; one process at a time, by a lock file."""
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
        config.attributes["engine"] = self.engine
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            command.upgrade(config, "head")

    def scrub(self, anew: bool) -> bool:
        """On SQLite: sees to it that nothing which has been deleted can be read in the files; False where it could not.

        `secure_delete` has overwritten it where it stood; copies may be left in the journal, which is emptied, and in unused
        parts of pages that were balanced: these go if the file is written `anew`, one of up to `SCRUB_BYTES`. Nobody else can
        write meanwhile.
        """
        if self.engine.dialect.name != "sqlite":
            return True
        connection = self.engine.raw_connection()
        try:
            cursor = connection.cursor()
            pages, size = (cursor.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
            anew = anew and pages * size <= SCRUB_BYTES
            if anew:
                cursor.execute("VACUUM")
            busy = bool(cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
            return anew and not busy
        except sqlite3.OperationalError:  # locked for too long, or the disk is full
            return False
        finally:
            connection.close()

    def close(self) -> None:
        self.engine.dispose()


def _engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS}, pool_size=16, max_overflow=48)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # BEGIN is ours, below
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")  # a commit is on disk when it returns
        cursor.execute(f"PRAGMA journal_size_limit={JOURNAL_BYTES}")  # what a long transaction has made larger shrinks again
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        waits = options.get("polyclip_waits", True)
        try:
            if not waits:
                connection.exec_driver_sql("PRAGMA busy_timeout=0")
            connection.exec_driver_sql(options.get("polyclip_begin", "BEGIN"))
        finally:
            if not waits:
                connection.exec_driver_sql(f"PRAGMA busy_timeout={1000 * BUSY_SECONDS}")

    return engine
