"""A program's own tables: SQLite on its disk by default, Postgres by URL. Each table belongs to one program.

What is committed survives kill -9 and, with a disk that keeps what it has synced, a power cut (WAL, synchronous=FULL).
Statements run in threads, never on the event loop. A database that is away, or a full disk, is a `DatabaseAway`.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout

WAIT_S = 30
"""How long a transaction waits for the one before it, and for a connection."""
THREADS = 8
VACUUM_PAGES = 25_000
"""Returned to the disk at once: 100 MB."""
MIGRATION_LOCK = 0x6F776E  # any number, the same in all processes
DATABASE_URL = r"^(sqlite:///.|postgresql\+psycopg://)"

Found = TypeVar("Found")


class DatabaseAway(OSError):
    """The database cannot be reached, or cannot write. Later it may; nothing of the transaction happened."""


class StateTooNew(Exception):
    """The tables are a newer release's; the message says so."""


class Database:
    """One database. `migrations` is the folder of the Alembic scripts that make its tables."""

    def __init__(self, url: str, migrations: Path) -> None:
        self._migrations, self.sqlite = migrations, make_url(url).get_backend_name() == "sqlite"
        wait: dict[str, Any] = {"timeout": WAIT_S} if self.sqlite else {
            "connect_timeout": WAIT_S, "tcp_user_timeout": WAIT_S * 1000,
            "options": f"-c statement_timeout={2 * WAIT_S}s -c lock_timeout={WAIT_S}s",
        }
        self._threads = ThreadPoolExecutor(THREADS, "database")  # its own: slow reads of files hold none of these
        self._engine = create_engine(url, connect_args=wait, pool_timeout=WAIT_S, pool_pre_ping=not self.sqlite)
        if self.sqlite:
            event.listen(self._engine, "connect", _set_up)
            event.listen(self._engine, "begin", _begin)

    def migrate(self) -> None:
        """Bring the tables to this release, from whichever they are at. Raises DatabaseAway, StateTooNew."""
        def upgrade(connection: Connection) -> None:
            if not self.sqlite:  # SQLite's transaction is a lock already
                connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": MIGRATION_LOCK})
            config = Config()
            config.set_main_option("script_location", str(self._migrations))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                if "locate revision" not in str(error):
                    raise
                raise StateTooNew(f"The database is of a newer release than this one ({error}). Use that release, or a "
                                  "backup from before.") from error

        self.transact(upgrade)

    def transact(self, work: Callable[[Connection], Found]) -> Found:
        """What `work` returns, in a transaction: all of it or nothing. Raises DatabaseAway, IntegrityError."""
        try:
            with self._engine.begin() as connection:
                return work(connection)
        except IntegrityError:
            raise
        except (DBAPIError, PoolTimeout) as error:
            raise DatabaseAway(str(getattr(error, "orig", None) or error)) from error

    async def run(self, work: Callable[[Connection], Found]) -> Found:
        """`transact` in a thread. A caller that is cancelled does not wait for it; it happens, or not, all the same."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.transact, work)

    def tidy(self) -> None:
        """Give room that nobody uses any more back to the disk. Blocks; raises DatabaseAway."""
        if self.sqlite:
            with contextlib.closing(self._engine.raw_connection()) as connection:
                try:  # as a script: `execute` takes one step, and each frees one page
                    connection.executescript(
                        f"PRAGMA incremental_vacuum({VACUUM_PAGES}); PRAGMA wal_checkpoint(TRUNCATE);"
                    )
                except sqlite3.Error as error:
                    raise DatabaseAway(str(error)) from error

    def close(self) -> None:
        """At the end."""
        self._threads.shutdown(cancel_futures=True)
        self._engine.dispose()


def _set_up(connection: Any, _: object) -> None:
    """A new SQLite connection. The driver's own idea of transactions is off; `_begin` says when one begins."""
    connection.isolation_level = None
    for pragma in (
        "auto_vacuum=INCREMENTAL", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON",
        "journal_size_limit=67108864",
    ):  # fmt: skip
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    """At once as a writer: a reader that becomes one may find that another was faster, and fails."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")
