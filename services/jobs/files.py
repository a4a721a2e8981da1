"""The Files API: bytes on a volume, records in the database. A file exists once its record does, and never half.

https://platform.openai.com/docs/api-reference/files
"""

import asyncio
import contextlib
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, func, or_, select

from common import errors
from common.database import Database
from common.files import File, Purpose, is_id
from common.tuning import FINISHED
from services.jobs import tables
from services.jobs.batch import OVER
from services.jobs.upload import Incoming

UPLOADS: tuple[Purpose, ...] = ("fine-tune", "batch")
ORPHAN_S = 3600.0
"""A file without a record is a crash's, unless it is younger than this: then its record may be on its way."""


class Files:
    """Files of all owners. Each owner has so many and so many bytes; the disk keeps `min_free_bytes` for others."""

    def __init__(
        self, database: Database, folder: Path, max_bytes: int, max_per_key: int, max_stored_bytes: int = 1 << 62,
        min_free_bytes: int = 0,
    ) -> None:
        self._database, self.folder = database, folder
        self._max_bytes, self._max_per_key = max_bytes, max_per_key
        self._max_stored_bytes, self._min_free_bytes = max_stored_bytes, min_free_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, file: File) -> Path:
        """Where the bytes are."""
        return self.folder / file.id

    async def admit(self, owner: str, size_bytes: int) -> None:
        """Before an upload is read: raises ApiError when there is no room for it."""
        if size_bytes > self._max_bytes:
            raise too_large(self._max_bytes)
        free = (await asyncio.to_thread(shutil.disk_usage, self.folder)).free
        if free - size_bytes < self._min_free_bytes:
            raise errors.Unavailable(
                f"The disk of the files has {free} bytes free, and {self._min_free_bytes} stay free (MIN_FREE_BYTES).",
                code="disk_full",
            )
        await self._database.run(lambda c: self._within_limits(c, owner, size_bytes))

    async def add(self, incoming: Incoming, filename: str, purpose: Purpose, owner: str) -> File:
        """Keep a file. Raises InvalidRequest when it is empty or the owner has too many, BodyTooLarge, OSError."""
        file = File(incoming.id, owner, clean_name(filename), purpose, incoming.bytes, int(time.time()))
        await asyncio.to_thread(incoming.keep)

        def keep(c: Connection) -> None:
            self._within_limits(c, owner, file.bytes)
            tables.add(c, tables.files, file)

        try:
            if file.bytes == 0:
                raise errors.InvalidRequest("The file is empty.", param="file", code="empty_file")
            if file.bytes > self._max_bytes:
                raise too_large(self._max_bytes)
            await self._database.run(keep)
        except errors.ApiError:
            await asyncio.to_thread(self.path(file).unlink)
            raise
        return file

    def _within_limits(self, c: Connection, owner: str, size_bytes: int) -> None:
        table = tables.files
        query = select(func.count(), func.coalesce(func.sum(table.c.bytes), 0)).where(table.c.owner == owner)
        count, stored = c.execute(query).one()
        if count >= self._max_per_key:
            raise errors.InvalidRequest(
                f"There are {count} files already (MAX_FILES_PER_KEY={self._max_per_key}); delete some first.",
                code="too_many_files",
            )
        if stored + size_bytes > self._max_stored_bytes:
            raise errors.InvalidRequest(
                f"Your files have {stored} bytes; with this one they would have more than MAX_STORED_BYTES_PER_KEY="
                f"{self._max_stored_bytes}. Delete some first.", code="storage_full",
            )

    async def get(self, file_id: str, owner: str, param: str | None = None) -> File:
        """A file of this owner. Raises NotFound; of somebody else's file, too."""
        return await self._database.run(lambda c: find(c, file_id, owner, param))

    async def owned(self, owner: str) -> list[File]:
        """An owner's files, newest first."""
        return await self._database.run(lambda c: tables.listed(c, tables.files, File, owner))

    async def delete(self, file_id: str, owner: str) -> None:
        """The record first: from then on nobody finds it. Raises NotFound, Conflict while a job or batch needs it."""

        def forget(c: Connection) -> None:
            find(c, file_id, owner)
            if user := in_use(c, file_id):
                raise errors.Conflict(
                    f"{user} reads the file {file_id} and is not over; cancel it first.", code="file_in_use"
                )
            c.execute(delete(tables.files).where(tables.files.c.id == file_id))

        await self._database.run(forget)
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread((self.folder / file_id).unlink)

    async def sweep(self) -> int:
        """Remove what crashes left. Returns how many files that were."""
        old = await asyncio.to_thread(_older, self.folder, time.time() - ORPHAN_S)
        known = await self._database.run(lambda c: set(c.execute(select(tables.files.c.id)).scalars()))
        orphans = [path for path in old if path.name not in known]
        for path in orphans:
            path.unlink(missing_ok=True)
        return len(orphans)


def find(c: Connection, file_id: str, owner: str, param: str | None = None) -> File:
    """A file of this owner, which nobody deletes before the transaction is over. Raises NotFound."""
    file = tables.find(c, tables.files, File, file_id, owner, lock=True) if is_id(file_id, "file") else None
    if file is None:
        raise errors.NotFound(f"There is no file {file_id!r}.", param=param, code="file_not_found")
    return file


def in_use(c: Connection, file_id: str) -> str | None:
    """Who still reads a file: the id of a job or batch that is not over."""
    jobs, batches = tables.jobs.c, tables.batches.c
    reads = or_(jobs.training_file == file_id, jobs.validation_file == file_id)
    job = c.execute(select(jobs.id).where(reads, jobs.status.not_in(FINISHED)).limit(1)).scalar()
    query = select(batches.id).where(batches.input_file_id == file_id, batches.status.not_in(OVER)).limit(1)
    return job or c.execute(query).scalar()


def _older(folder: Path, than: float) -> list[Path]:
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_mtime < than:
                found.append(path)
    return found


def too_large(limit_bytes: int) -> errors.ApiError:
    """The error for a file that is."""
    error = errors.BodyTooLarge(limit_bytes)
    error.message = f"The file is larger than the limit of {limit_bytes} bytes (MAX_FILE_BYTES)."
    return error


def clean_name(name: str) -> str:
    """A client's file name for showing it again: no folders, no control characters, at most 255 characters."""
    plain = "".join(c for c in name.replace("\\", "/").rpartition("/")[2] if c.isprintable())
    return plain[:255] or "file"


def page(items: Iterable[Any], after: str | None, limit: int) -> dict[str, object]:
    """OpenAI's list: what follows the item `after`, at most `limit`. `items` are public objects in order."""
    found = list(items)
    if after is not None:
        at = next((i for i, item in enumerate(found) if item["id"] == after), None)
        if at is None:
            raise errors.InvalidRequest(f"There is no {after!r} in this list.", param="after", code="invalid_cursor")
        found = found[at + 1 :]
    shown = found[:limit]
    return {
        "object": "list",
        "data": shown,
        "has_more": len(found) > limit,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }
