"""The database: SQLite in WAL mode by default, PostgreSQL by URL; read and write transactions; migrations.

A write transaction locks rows in one order, which keeps PostgreSQL free of deadlocks: tenant, collection, video, alert, task.
What it needs of an earlier kind it locks before it changes a row of a later one; new rows are inserted when the locks are held.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DontWrapMixin

from service.errors import PolyclipError

BUSY_SECONDS = 15  # that a statement waits for another's lock
STEPS = 100_000  # of SQLite's machine, about a millisecond, after which a reader that may be ended is asked
CONNECTIONS = 48
KEPT_CONNECTIONS = 16  # stay open when nobody uses them
WAIT_SECONDS = 10.0
PREPARING = 7011859  # the number of the advisory lock that one process at a time holds
JOURNAL_BYTES = 64 * 1024 * 1024
SCRUB_BYTES = 256 * 1024 * 1024  # written anew in about two seconds


class InvalidText(PolyclipError, DontWrapMixin, ValueError):
    """A text holds NUL or half a character (a lone surrogate): PostgreSQL stores neither, SQLite not the latter."""

    code, status, hint = "invalid_request", 422, "leave out NUL and half surrogate pairs"

    def __init__(self, text: str) -> None:
        super().__init__(f"a text holds NUL or half of a surrogate pair, which cannot be stored: {text!r:.80}")
        self.text = text


class Database:
    """`read()` and `write()` give a connection inside a transaction; a write commits at the end of its block.

    At most `connections` are open at once; whoever has waited `wait` seconds for one gets sqlalchemy.exc.TimeoutError. Every
    statement may raise InvalidText for what it is given.
    """

    def __init__(self, url: str, connections: int = CONNECTIONS, wait: float = WAIT_SECONDS) -> None:
        self.url = url
        self.engine = _engine(url, connections, wait)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def read_until(self, ended: Callable[[], bool], seconds: float) -> Iterator[Connection]:
        """`read`, whose statements fail with a DBAPIError soon after `ended` (SQLite) or so many seconds (PostgreSQL)."""
        with self.read() as connection:
            if self.engine.dialect.name != "sqlite":
                connection.exec_driver_sql(f"SET LOCAL statement_timeout = {max(1, int(1000 * seconds))}")
                yield connection
                return
            driver = connection.connection.driver_connection
            driver.set_progress_handler(ended, STEPS)  # type: ignore[union-attr]
            try:
                yield connection
            finally:
                driver.set_progress_handler(None, 0)  # type: ignore[union-attr]

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

    @contextmanager
    def alone(self, lock: Path) -> Iterator[None]:
        """Holds up every other process that asks for the same: by a lock of PostgreSQL's, on SQLite by the file `lock`."""
        if self.engine.dialect.name == "sqlite":
            with lock.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
            return
        with self.engine.connect() as connection, connection.begin():
            connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({PREPARING})")
            yield

    def migrate(self, lock: Path) -> None:
        """Brings the schema to the newest version; one process at a time."""
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
        config.attributes["engine"] = self.engine
        with self.alone(lock):
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


def check_text(value: Any) -> None:
    """Raises InvalidText for a text that cannot be stored, in lists and in keys and values of objects too."""
    if isinstance(value, str):
        if "\0" in value or not (value.isascii() or _whole(value)):
            raise InvalidText(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key)
            check_text(item)
    elif isinstance(value, list | tuple):
        for item in value:
            check_text(item)


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json(value: Any) -> str:
    check_text(value)
    return json.dumps(value)


def _engine(url: str, connections: int, wait: float) -> Engine:
    kept = min(KEPT_CONNECTIONS, connections)
    bounds = {"pool_size": kept, "max_overflow": connections - kept, "pool_timeout": wait, "json_serializer": _json}
    if not url.startswith("sqlite"):
        own = {} if "options" in make_url(url).query else {"options": f"-c lock_timeout={BUSY_SECONDS}s"}
        engine = create_engine(url, pool_pre_ping=True, connect_args=own, **bounds)
    else:
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS}, **bounds)
        _configure_sqlite(engine)

    @event.listens_for(engine, "before_cursor_execute")
    def _check(connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        check_text(parameters)

    return engine


def _configure_sqlite(engine: Engine) -> None:
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
