"""Which release wrote a state folder. A newer one's is refused; the services bring an older one's up."""

from pathlib import Path

from common.files import write_whole
from services.local.errors import UserError

STATE_VERSION = 2
"""1: before databases and models.yaml (no file says so). Raise it with a change that an older release cannot read."""


def check_version(state: Path) -> None:
    """Write down this release's version. Raises UserError for a newer one's state."""
    file = state / "version"
    said = file.read_text().strip() if file.exists() else "1"
    if not said.isdigit() or int(said) > STATE_VERSION:
        raise UserError(f"{state} was written by a newer release (state version {said}; this one knows "
                        f"{STATE_VERSION}). Use that release, another STATE_DIR, or restore a backup from before.")
    write_whole([f"{STATE_VERSION}\n".encode()], file)
