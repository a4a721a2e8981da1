"""Files of the Files API, for whoever makes one: the bytes whole on disk, then the record that makes them a file.

Who makes bytes of its own moves them to FILES_DIR/{id} itself; `registration` is the same for all.
"""

import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from common.redis.names import file_key, files_key
from common.redis.scripts import REGISTER

Purpose = Literal["fine-tune", "batch", "batch_output", "fine-tune-results"]

PARTIAL = ".partial"
COPY_BYTES = 1024 * 1024
_ID = re.compile(r"[a-z]{2,12}-[0-9a-f]{24}")


class File(msgspec.Struct):
    """An uploaded or produced file. Its bytes are FILES_DIR/{id}."""

    id: str
    owner: str
    filename: str
    purpose: Purpose
    bytes: int
    created_at: int

    def public(self) -> dict[str, object]:
        """In OpenAI's shape."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


def new_id(kind: str) -> str:
    """An id that is also a safe file name."""
    return f"{kind}-{secrets.token_hex(12)}"


def is_id(text: str, kind: str) -> bool:
    """Whether a client's text has the shape of our ids of this kind; nothing else ever becomes a path or a key."""
    return text.startswith(kind + "-") and _ID.fullmatch(text) is not None


def write_whole(source: BinaryIO, target: Path) -> int:
    """Copy to `target`, on the disk itself, all of it or nothing. Returns the size in bytes. Raises OSError."""
    partial = target.with_suffix(PARTIAL)
    try:
        with open(partial, "xb") as file:
            shutil.copyfileobj(source, file, COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return size


def registration(file: File) -> tuple[Any, ...]:
    """Arguments of EVAL that make a file exist, once its bytes are there."""
    return (REGISTER, 2, file_key(file.id), files_key(file.owner), msgspec.json.encode(file), file.id,
            f"{time.time():.6f}")
