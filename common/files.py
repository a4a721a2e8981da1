"""Files: their records and names, for whoever makes one."""

import re
import secrets
from typing import Literal

import msgspec

Purpose = Literal["fine-tune", "batch", "batch_output", "fine-tune-results"]

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
