"""Files of the Files API, for whoever makes one: the bytes whole on disk; then the jobs service makes them a file."""

import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

Purpose = Literal["fine-tune", "batch", "batch_output", "fine-tune-results"]

PARTIAL = ".partial"
PIECE_BYTES = 1024 * 1024
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


def pieces(source: BinaryIO) -> Iterator[bytes]:
    """What is left of an open file, a piece at a time."""
    return iter(lambda: source.read(PIECE_BYTES), b"")


class Whole:
    """A file that is on the disk itself, all of it, or not at all: opened, written, then `keep`, or `drop`.

    All of it raises OSError.
    """

    def __init__(self, target: Path) -> None:
        self._target, self._partial = target, target.with_suffix(PARTIAL)
        self._file: BinaryIO | None = None
        self.bytes = 0

    def write(self, data: bytes) -> None:
        """Some more. The first one opens it."""
        if self._file is None:
            self._file = open(self._partial, "wb")  # noqa: SIM115 - closed by keep or drop
        self.bytes += self._file.write(data)

    def keep(self) -> None:
        """From now on it is there, under its name."""
        self.write(b"")
        assert self._file is not None  # noqa: S101 - just written
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        replace(self._partial, self._target)

    def drop(self) -> None:
        """Leave nothing of what was not kept."""
        if self._file is not None:
            self._file.close()
        self._partial.unlink(missing_ok=True)


def write_whole(chunks: Iterable[bytes], target: Path) -> int:
    """Write `target`, all of it or nothing. Returns the size in bytes. Raises OSError."""
    whole = Whole(target)
    try:
        for chunk in chunks:
            whole.write(chunk)
        whole.keep()
    finally:
        whole.drop()
    return whole.bytes


def replace(source: Path, target: Path) -> None:
    """Rename, on the disk itself: after a power cut the new name is there, or the old one."""
    os.replace(source, target)
    sync_folder(target.parent)


def sync_tree(folder: Path) -> None:
    """Bring everything in a folder to the disk, and its names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
