"""What this process works on: rows of a table, leased for a while and renewed. Two never work on the same one.

Whoever finds a lease that has run out takes it over; a token that no longer fits changes nothing (`tables.move`).
"""

import secrets
import time

from sqlalchemy import Connection, Table, select, update

from common.database import Database

LEASE_S = 10.0
RENEW_EVERY_S = 2.0


class LeaseLost(Exception):
    """Somebody else works on it now; whatever was not written yet is not ours to write."""


class Leases:
    """The leases of one process on the rows of `table` that are in one of `states`."""

    def __init__(self, database: Database, table: Table, states: tuple[str, ...]) -> None:
        self._database, self._table, self._states = database, table, states
        self.token = secrets.token_hex(16)
        self.held: set[str] = set()

    def until(self) -> float:
        """When a lease that begins now runs out, in Unix time."""
        return time.time() + LEASE_S

    async def take(self, most: int) -> dict[str, int]:
        """Take what nobody works on, the oldest first: {id: how often it was taken since it last got further}."""
        if most <= 0:
            return {}

        def look(c: Connection) -> dict[str, int]:
            table, taken = self._table.c, {}
            free = (table.status.in_(self._states), table.leased_until < time.time())
            for row in c.execute(select(table.id, table.attempts).where(*free).order_by(table.n).limit(most)).all():
                mine = {"lease": self.token, "leased_until": self.until(), "attempts": row.attempts + 1}
                if c.execute(update(self._table).where(table.id == row.id, *free).values(mine)).rowcount:
                    taken[row.id] = row.attempts + 1
            return taken

        taken = await self._database.run(look)
        self.held |= taken.keys()
        return taken

    async def renew(self) -> dict[str, str]:
        """Keep what is held now: {id: status}; the status is empty for what was lost."""
        asked = tuple(self.held)
        if not asked:
            return {}
        mine = (self._table.c.lease == self.token, self._table.c.id.in_(asked))

        def keep(c: Connection) -> dict[str, str]:
            c.execute(update(self._table).where(*mine).values(leased_until=self.until()))
            found = c.execute(select(self._table.c.id, self._table.c.status).where(*mine))
            return dict.fromkeys(asked, "") | {row.id: row.status for row in found}

        return await self._database.run(keep)

    async def let_go(self, id_: str) -> None:
        """Somebody else may take it at once; that this one stopped was no failed try."""
        self.held.discard(id_)
        table = self._table.c
        mine, back = (table.lease == self.token, table.id == id_), {"leased_until": 0.0, "attempts": table.attempts - 1}
        await self._database.run(lambda c: c.execute(update(self._table).where(*mine).values(back)))
