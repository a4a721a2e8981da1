"""Texts to calibrate with and texts to measure on: the owner's rows, or this project's own documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import dataset
from services.local.errors import UserError
from services.local.plan import ROOT

PIECE_CHARS = 1200
"""Of a document: some 300 tokens."""
MEASURED_EVERY = 3
"""One text of so many is not calibrated with, but measured on."""
LEAST = 6


class Split(NamedTuple):
    """Rows with `text` or `messages`."""

    calibrated: list[dict[str, Any]]
    measured: list[dict[str, Any]]


def split(data: Path | None) -> Split:
    """What to calibrate with, and what to measure on. Raises UserError for a file that is none."""
    rows = documents() if data is None else owned(data)
    return Split([row for at, row in enumerate(rows) if at % MEASURED_EVERY], rows[::MEASURED_EVERY])


def owned(data: Path) -> list[dict[str, Any]]:
    """The rows of a training file. Raises UserError."""
    try:
        with open(data, "rb") as file:
            found = dataset.read(dataset.open_lines(file), min_examples=LEAST)
    except OSError as error:
        raise UserError(f"DATA={data}: {error.strerror}") from error
    if found.problems:
        raise UserError(f"DATA={data}: {dataset.summary(found.problems)}")
    return [{"messages": list(example.messages)} for example in found.examples]


def documents() -> list[dict[str, Any]]:
    """README and docs, in pieces that end with a paragraph."""
    return [
        {"text": piece}
        for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
        for piece in pieces(path.read_text().split("\n\n"))
    ]


def pieces(paragraphs: Sequence[str]) -> list[str]:
    """Paragraphs put together, each piece PIECE_CHARS or more; what is left at the end is dropped."""
    found, piece = [], ""
    for paragraph in paragraphs:
        piece += paragraph + "\n\n"
        if len(piece) >= PIECE_CHARS:
            found.append(piece)
            piece = ""
    return found
