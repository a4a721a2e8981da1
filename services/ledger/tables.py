"""The tables of the ledger. `migrations/` makes them.

    usage    what a key has asked of a model on a day (UTC); key ALL is everybody     kept KEPT_DAYS
    costs    USD of a day                                                              kept KEPT_DAYS
    marks    `cursor`: the entry of the usage stream up to which everything is in `usage`; `entries`: how many entries
             the stream had had by then; `tick`: Unix time up to which money is counted; `turn`: of whoever counts now
"""

from datetime import date
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Date,
    Double,
    MetaData,
    String,
    Table,
    delete,
    insert,
    select,
    update,
)

ALL = "all"
KINDS = ("requests", "failed", "prompt_tokens", "cached_tokens", "completion_tokens")
KEPT_DAYS = 400

metadata = MetaData()

usage = Table(
    "usage", metadata,
    Column("day", Date, primary_key=True), Column("key", String(64), primary_key=True),
    Column("model", String(256), primary_key=True),
    *(Column(kind, BigInteger, nullable=False) for kind in KINDS),
)  # fmt: skip
costs = Table("costs", metadata, Column("day", Date, primary_key=True), Column("usd", Double, nullable=False))
marks = Table(
    "marks", metadata, Column("name", String(16), primary_key=True), Column("value", String(64), nullable=False)
)


def take_turn(c: Connection) -> None:
    """Nobody else counts before the transaction is over."""
    c.execute(select(marks.c.value).where(marks.c.name == "turn").with_for_update()).one()


def read_mark(c: Connection, name: str) -> str | None:
    """A mark."""
    value: str | None = c.execute(select(marks.c.value).where(marks.c.name == name)).scalar()
    return value


def write_mark(c: Connection, name: str, value: str) -> None:
    """Set a mark."""
    put(c, marks, {"name": name}, {"value": value})


def put(c: Connection, table: Table, where: dict[str, Any], values: dict[str, Any]) -> None:
    """Set columns of the row that is meant; it is made if it is not there."""
    found = [table.c[name] == value for name, value in where.items()]
    if not c.execute(update(table).where(*found).values(values)).rowcount:
        c.execute(insert(table).values({**where, **values}))


def raise_by(c: Connection, table: Table, where: dict[str, Any], amounts: dict[str, Any]) -> None:
    """Add to columns of the row that is meant; it is made if it is not there."""
    found = [table.c[name] == value for name, value in where.items()]
    more = {name: table.c[name] + amount for name, amount in amounts.items()}
    if not c.execute(update(table).where(*found).values(more)).rowcount:
        c.execute(insert(table).values({**where, **amounts}))


def forget(c: Connection, before: date) -> None:
    """Delete days that are old."""
    for table in (usage, costs):
        c.execute(delete(table).where(table.c.day < before))
