"""The tables of the jobs service, and the few ways in which rows change. `migrations/` makes them.

A row of `files`, `jobs` and `batches` is a struct (`File`, `Job`, `Batch`: columns of the same names) and, for the last
two, a lease: whoever holds it works on it, and shows its token with every change.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)  # fmt: skip

from common.tuning import MAX_EVENTS

metadata = MetaData()


def _number() -> Column[int]:
    """The order in which rows came."""
    return Column("n", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True)


def _identity() -> tuple[Column[str], Column[str]]:
    id_ = Column("id", String(40), unique=True, nullable=False)
    return id_, Column("owner", String(64), nullable=False, index=True)


def _lease() -> tuple[Column[Any], ...]:
    return (
        Column("lease", String(40), nullable=False, default=""),
        Column("leased_until", Double, nullable=False, default=0.0),
        Column("attempts", Integer, nullable=False, default=0),
    )


files = Table(
    "files", metadata, _number(), *_identity(),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(24), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)  # fmt: skip

jobs = Table(
    "jobs", metadata, _number(), *_identity(), *_lease(),
    Column("queued_at", Double, nullable=False, default=0.0),
    Column("reported", BigInteger, nullable=False, default=0),
    Column("status", String(24), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("model", String(256), nullable=False),
    Column("training_file", String(40), nullable=False),
    Column("validation_file", String(40)),
    Column("suffix", String(64)),
    Column("seed", BigInteger, nullable=False),
    Column("hyperparameters", JSON, nullable=False),
    Column("metadata", JSON(none_as_null=True)),
    Column("wish", String(8), nullable=False),
    Column("fine_tuned_model", String(256)),
    Column("finished_at", BigInteger),
    Column("estimated_finish", BigInteger),
    Column("trained_tokens", BigInteger),
    Column("result_files", JSON, nullable=False),
    Column("error", JSON(none_as_null=True)),
)  # fmt: skip

job_events = Table(
    "job_events", metadata, _number(),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("body", JSON, nullable=False),
)  # fmt: skip

checkpoints = Table(
    "checkpoints", metadata, _number(),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("body", JSON, nullable=False),
)  # fmt: skip

batches = Table(
    "batches", metadata, _number(), *_identity(), *_lease(),
    Column("status", String(24), nullable=False, index=True),
    Column("ends", String(24), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(40), nullable=False),
    Column("completion_window", String(8), nullable=False),
    Column("results", String(40), nullable=False),
    Column("failures", String(40), nullable=False),
    Column("metadata", JSON(none_as_null=True)),
    Column("model", String(256)),
    Column("errors", JSON, nullable=False),
    Column("output_file_id", String(40)),
    Column("error_file_id", String(40)),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("usage", JSON, nullable=False),
    *(Column(f"{name}_at", BigInteger, nullable=False) for name in ("created", "expires")),
    *(Column(f"{name}_at", BigInteger) for name in (
        "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")),
)  # fmt: skip

batch_results = Table(
    "batch_results", metadata,
    Column("batch_id", ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("line", Integer, primary_key=True, autoincrement=False),
    Column("good", Boolean, nullable=False),
    Column("row", Text, nullable=False),
)  # fmt: skip
"""Results of batches that are not over: afterwards they are in files."""

Index("jobs_by_training_file", jobs.c.training_file)
Index("batches_by_input_file", batches.c.input_file_id)

Kind = TypeVar("Kind", bound=msgspec.Struct)


def columns(table: Table, kind: type[Kind]) -> list[Column[Any]]:
    """The columns that make a struct."""
    return [table.c[name] for name in kind.__struct_fields__]


def find(
    c: Connection, table: Table, kind: type[Kind], id_: str, owner: str | None = None, *, lock: bool = False
) -> Kind | None:
    """One row, of this owner if one is named; with `lock` it stays as it is until the transaction is over."""
    query = select(*columns(table, kind)).where(table.c.id == id_)
    if owner is not None:
        query = query.where(table.c.owner == owner)
    row = c.execute(query.with_for_update() if lock else query).one_or_none()
    return kind(**row._mapping) if row else None


def listed(c: Connection, table: Table, kind: type[Kind], owner: str) -> list[Kind]:
    """An owner's rows, newest first."""
    query = select(*columns(table, kind)).where(table.c.owner == owner).order_by(table.c.n.desc())
    return [kind(**row._mapping) for row in c.execute(query)]


def add(c: Connection, table: Table, thing: msgspec.Struct, **more: Any) -> None:
    """A new row."""
    c.execute(insert(table).values(**msgspec.to_builtins(thing), **more))


def move(
    c: Connection, table: Table, id_: str, allowed: Iterable[str], lease: str | None = None, *,
    only: ColumnElement[bool] | None = None, **fields: Any,
) -> str:
    """Change a row that is in an allowed state, leased by `lease` if that is named, and `only` if it is as that says.

    Returns 'ok'; else the state it is in, 'leased' when somebody else holds it, '' when it is not there.
    """
    query = update(table).where(table.c.id == id_, table.c.status.in_(tuple(allowed)))
    if only is not None:
        query = query.where(only)
    if lease is not None:
        query = query.where(table.c.lease == lease)
    if c.execute(query.values(**fields)).rowcount:
        return "ok"
    row = c.execute(select(table.c.status, table.c.lease).where(table.c.id == id_)).one_or_none()
    if row is None:
        return ""
    return "leased" if lease is not None and row.lease != lease else str(row.status)


def say(c: Connection, job_id: str, bodies: Iterable[dict[str, Any]]) -> None:
    """Events of a job; its oldest ones beyond MAX_EVENTS go."""
    rows = [{"job_id": job_id, "body": body} for body in bodies]
    if not rows:
        return
    c.execute(insert(job_events), rows)
    table = job_events.c
    last = select(table.n).where(table.job_id == job_id).order_by(table.n.desc()).offset(MAX_EVENTS).limit(1)
    if (n := c.execute(last).scalar()) is not None:
        c.execute(delete(job_events).where(table.job_id == job_id, table.n <= n))


KEPT_PER_KEY = 1000
"""Jobs, and batches, of one key that are over; the oldest beyond go, with all that was said about them."""


def forget_old(c: Connection, table: Table, owner: str, over: Iterable[str]) -> None:
    """Delete an owner's rows beyond KEPT_PER_KEY that are over."""
    ended = (table.c.owner == owner, table.c.status.in_(tuple(over)))
    last = select(table.c.n).where(*ended).order_by(table.c.n.desc()).offset(KEPT_PER_KEY).limit(1)
    if (n := c.execute(last).scalar()) is not None:
        c.execute(delete(table).where(*ended, table.c.n <= n))


def count(c: Connection, table: Table, *conditions: Any) -> int:
    """How many rows."""
    return int(c.execute(select(func.count()).select_from(table).where(*conditions)).scalar_one())
