"""What is stored for a KV block and under which name.

A value is a 64-byte header and the block's raw bytes; a name is derived from everything that decides those bytes.
Nothing is pickled. A value that was not written by a worker of this deployment, for this very name, does not verify.
"""

import hmac
import struct
from dataclasses import asdict, dataclass

import msgspec
from blake3 import blake3

FORMAT = 1
MAGIC = b"OGKV"
HEADER = struct.Struct("<4sHHQ32s16x")
"""Magic, format, codec (0: raw), payload size in bytes, keyed BLAKE3 of name and payload. 64 bytes."""
PREFIX = b"kv:"
SEEN_PREFIX = b"kvseen:"


@dataclass(frozen=True)
class Layout:
    """Everything that decides the bytes of a block, beside its tokens. Two engines share blocks only if all is equal.

    vLLM's own block hash covers tokens, adapter name and path, and `cache_salt`; it knows neither the model nor how
    this machine lays out K and V inside a block (on CPU that depends on the instruction set).
    """

    platform: str
    attention: str
    """Attention backend, and on CPU its instruction set layout."""
    model: str
    """Digest of the checkpoint's files."""
    dtype: str
    kv_dtype: str
    quantization: str
    layers: tuple[str, ...]
    tokens_per_block: int
    blocks_per_chunk: int
    kv_layout: str
    row_bytes: int
    """One chunk of all ranks, padding included."""
    tensor_parallel: int
    pipeline_parallel: int
    context_parallel: int
    hash_algorithm: str
    overrides: str
    """Changes to the model made on the command line (rope scaling, hf_overrides)."""
    vllm: str
    """Major and minor version."""
    format: int = FORMAT

    def namespace(self) -> bytes:
        """16 bytes that name this layout."""
        return blake3(msgspec.json.encode(asdict(self), order="sorted")).digest(16)


class Sealer:
    """Names and headers of one deployment (`secret`) and one layout (`namespace`)."""

    def __init__(self, secret: str, namespace: bytes) -> None:
        self._key = blake3(secret.encode(), derive_key_context="owngpt kv blocks v1").digest()
        self._namespace = namespace

    def name(self, offload_key: bytes, adapter: bytes = b"") -> bytes:
        """The redis key of a block; `adapter` is the digest of the LoRA adapter's files, empty without one."""
        hashed = blake3(self._namespace, key=self._key)
        hashed.update(len(offload_key).to_bytes(2, "little") + offload_key + adapter)
        return PREFIX + self._namespace.hex().encode() + b":" + hashed.hexdigest(24).encode()

    def seal(self, name: bytes, payload: memoryview) -> bytes:
        """The header for a payload."""
        return HEADER.pack(MAGIC, FORMAT, 0, len(payload), self._digest(name, payload))

    def verifies(self, name: bytes, header: bytes, payload: memoryview) -> bool:
        """Whether header and payload are what some worker sealed under this name."""
        magic, version, codec, size, digest = HEADER.unpack(header)
        return (
            (magic, version, codec, size) == (MAGIC, FORMAT, 0, len(payload))
            and hmac.compare_digest(digest, self._digest(name, payload))
        )

    def _digest(self, name: bytes, payload: memoryview) -> bytes:
        return blake3(name, key=self._key).update(payload).digest()
