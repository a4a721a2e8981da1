"""The Files API: bytes on a volume, records in redis. A file exists once its record does, and never half.

https://platform.openai.com/docs/api-reference/files
"""

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from redis.asyncio import Redis

from common import errors
from common.files import File, Purpose, is_id, new_id, registration, write_whole
from common.redis.names import file_key, files_key

UPLOADS: tuple[Purpose, ...] = ("fine-tune", "batch")
ORPHAN_S = 3600.0
"""A file without a record is a crash's, unless it is younger than this: then its record may be on its way."""


class Files:
    """Files of all owners."""

    def __init__(self, redis: Redis, folder: Path, max_bytes: int, max_per_key: int) -> None:
        self._redis, self.folder = redis, folder
        self._max_bytes, self._max_per_key = max_bytes, max_per_key
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = str(folder)  # where a large upload waits: the same volume, not a small /tmp

    def path(self, file: File) -> Path:
        """Where the bytes are."""
        return self.folder / file.id

    async def add(self, source: BinaryIO, filename: str, purpose: Purpose, owner: str) -> File:
        """Keep a file. Raises InvalidRequest when it is empty, BodyTooLarge, or when the owner has too many."""
        if await self._redis.zcard(files_key(owner)) >= self._max_per_key:
            raise errors.InvalidRequest(
                f"There are {self._max_per_key} files already (MAX_FILES_PER_KEY); delete some first.",
                code="too_many_files",
            )
        file = File(new_id("file"), owner, clean_name(filename), purpose, 0, int(time.time()))
        file.bytes = await asyncio.to_thread(write_whole, source, self.path(file))
        if file.bytes == 0 or file.bytes > self._max_bytes:
            self.path(file).unlink()
            if file.bytes:
                raise too_large(self._max_bytes)
            raise errors.InvalidRequest("The file is empty.", param="file", code="empty_file")
        await self._redis.eval(*registration(file))
        return file

    async def get(self, file_id: str, owner: str, param: str | None = None) -> File:
        """A file of this owner. Raises NotFound; of somebody else's file, too."""
        raw = await self._redis.get(file_key(file_id)) if is_id(file_id, "file") else None
        file = msgspec.json.decode(raw, type=File) if raw else None
        if file is None or file.owner != owner:
            raise errors.NotFound(f"There is no file {file_id!r}.", param=param, code="file_not_found")
        return file

    async def owned(self, owner: str) -> list[File]:
        """An owner's files, newest first."""
        ids = await self._redis.zrevrange(files_key(owner), 0, -1)
        raws = await self._redis.mget([file_key(str(i)) for i in ids]) if ids else []
        return [msgspec.json.decode(raw, type=File) for raw in raws if raw]

    async def delete(self, file: File) -> None:
        """The record first: from then on nobody finds it."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(file_key(file.id))
            pipe.zrem(files_key(file.owner), file.id)
            await pipe.execute()
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(self.path(file).unlink)

    async def adopt(self, source: Path, file: File) -> None:
        """Keep a file that was produced here: moved, then known."""
        await asyncio.to_thread(os.replace, source, self.path(file))
        await self._redis.eval(*registration(file))

    async def sweep(self) -> int:
        """Remove what crashes left. Returns how many files that were."""
        old = time.time() - ORPHAN_S
        removed = 0
        for path in await asyncio.to_thread(lambda: list(self.folder.iterdir())):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and path.stat().st_mtime < old and not await self._redis.exists(file_key(path.name)):
                    path.unlink()
                    removed += 1
        return removed


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
