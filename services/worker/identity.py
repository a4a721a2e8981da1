"""What a model is: a digest of its files, so that nothing computed with one checkpoint is ever used for another."""

import functools
import os
from pathlib import Path

from blake3 import blake3

IGNORED = frozenset({".cache", ".git", "README.md", ".gitattributes", "LICENSE"})


@functools.cache
def model_digest(model: str, revision: str | None = None) -> str:
    """Digest of a checkpoint folder's files, or of a hub model's snapshot. Raises OSError when it is not here."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    return _folder_digest(folder)


def adapter_digest(path: str) -> bytes:
    """Digest of a LoRA adapter's folder; of an adapter that is no folder, something that nobody else has."""
    if not Path(path).is_dir():
        return os.urandom(16)
    try:
        files = sorted(Path(path).iterdir())
        return _known(path, tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files))
    except OSError:  # it is being replaced right now
        return os.urandom(16)


@functools.lru_cache(maxsize=1024)
def _known(path: str, state: tuple[tuple[str, int, int], ...]) -> bytes:
    """One reading for each state of the files."""
    return bytes.fromhex(_folder_digest(Path(path)))


def _folder_digest(folder: Path) -> str:
    """BLAKE3 over names and contents. The hub's cache links to files named by their content: the name is enough."""
    whole = blake3()
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        if not file.is_file() or set(relative.parts) & IGNORED:
            continue
        whole.update(f"{relative}\0".encode())
        target = Path(os.readlink(file)) if file.is_symlink() else None
        if target is not None and target.parent.name == "blobs":
            whole.update(target.name.encode())
        else:
            content = blake3(max_threads=blake3.AUTO)
            if file.stat().st_size:
                content.update_mmap(file)
            whole.update(content.digest())
    return whole.hexdigest(16)
