"""What the agent asks of an engine, whatever it is.

Every engine has our middleware inside or before it. What an engine cannot tell is zero, what it cannot do is None.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import httpx
import msgspec

from common.workers import Model
from services.worker.middleware import LOAD_PATH
from services.worker.settings import WorkerSettings

ANSWER_TIMEOUT_S = 1.0
LOAD_TIMEOUT_S = 60.0


class EngineSilent(Exception):
    """The engine did not answer, or not in a way that can be read."""


class Numbers(NamedTuple):
    """An engine's state as heartbeats carry it. `steps` only says whether it makes any."""

    steps: float | None = 0.0
    """None: it does not tell, and is never seen to be stuck."""
    waiting: int = 0
    kv_use: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class Load(msgspec.Struct, frozen=True):
    """Requests inside now, and those of them that are no batch's."""

    in_flight: int = 0
    interactive: int = 0
    reading: int = 0
    """Clients that have not read everything of an answer that is made."""
    keeps: bool = False
    """Whether answers worth keeping are stored now."""


class Entry(msgspec.Struct):
    """A model in /v1/models."""

    id: str
    max_model_len: int | None = None
    created: int = 0
    parent: str | None = None
    root: str | None = None
    meta: dict[str, object] | None = None

    @property
    def longest(self) -> int:
        """Tokens in its longest sequence; 0: it does not say. llama.cpp says it elsewhere than vLLM and SGLang."""
        context = (self.meta or {}).get("n_ctx")
        return self.max_model_len or (context if isinstance(context, int) else 0)

    @property
    def format(self) -> str:
        """How its weights are stored; empty: it does not say. llama.cpp does."""
        return str((self.meta or {}).get("ftype") or "")


class _Listing(msgspec.Struct):
    data: list[Entry]


class AdapterLoader(Protocol):
    """Loads and unloads LoRA adapters while the engine runs."""

    async def load(self, name: str, folder: str) -> bool:
        """Whether it is there now."""

    async def unload(self, name: str) -> bool:
        """Whether it is gone now."""

    async def names(self) -> set[str]:
        """Those that are there. Raises EngineSilent."""


class Engine(Protocol):
    """One engine. Methods that ask it raise EngineSilent."""

    name: str
    address: str
    """host:port as nginx and the gateway reach it."""
    slots: int
    """Requests it runs at once; 0: unknown."""
    elsewhere: bool
    """Whether somebody else runs it: what ails it is not mended by starting ours anew."""
    adapters: AdapterLoader | None

    def command(self) -> list[str]:
        """What starts it, or what of ours stands before it."""

    def environment(self) -> dict[str, str]:
        """What its process finds in its environment."""

    async def healthy(self) -> bool:
        """Whether it can answer requests. False instead of EngineSilent."""

    async def models(self) -> list[Model]:
        """What it serves, with the revision on which answers depend."""

    async def load(self) -> Load:
        """Asked several times a second."""

    async def numbers(self) -> Numbers:
        """Asked once a second."""

    async def sleep(self) -> bool:
        """Free the GPU and keep the process. False: it cannot, and its process is to be stopped."""

    async def wake(self) -> None:
        """After `sleep`. Raises EngineSilent."""

    def clean_up(self) -> None:
        """Remove what an engine that died may have left on this machine. Called before the start and after the end."""

    async def close(self) -> None:
        """Nobody asks any more."""


class Served:
    """What all engines have in common: our middleware answers for them, at the worker's port on this machine."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings, self.address = settings, settings.address
        self._http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{settings.engine_port}",
            headers={"authorization": f"Bearer {settings.worker_token}"}, timeout=ANSWER_TIMEOUT_S,
        )

    async def healthy(self) -> bool:
        """Whether it can answer requests."""
        try:
            await get(self._http, "/health")
        except EngineSilent:
            return False
        return True

    async def load(self) -> Load:
        """Asked several times a second. Raises EngineSilent."""
        try:
            return msgspec.json.decode(await get(self._http, LOAD_PATH), type=Load)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise EngineSilent(f"{LOAD_PATH}: {error}") from error

    async def close(self) -> None:
        """Nobody asks any more."""
        await self._http.aclose()


class Prometheus:
    """Reads numbers off an engine's /metrics: the sum of each metric's samples; of shares the largest."""

    def __init__(self, *names: bytes) -> None:
        self._take = [_largest if b"usa" in name or b"utili" in name else sum for name in names]
        self._patterns = [re.compile(rb"^%s(?:\{[^}]*\})? (\S+)" % name, re.M) for name in names]  # "" never matches

    def read(self, text: bytes) -> list[float]:
        """In the order of the names; 0.0 for a metric that is not there, or not a number yet. Raises EngineSilent."""
        try:
            samples = [[float(found) for found in pattern.findall(text)] for pattern in self._patterns]
        except ValueError as error:
            raise EngineSilent(f"/metrics: {error}") from error
        return [take(filter(math.isfinite, found)) for take, found in zip(self._take, samples, strict=True)]


def _largest(numbers: Iterable[float]) -> float:
    return max(numbers, default=0.0)


async def get(http: httpx.AsyncClient, path: str) -> bytes:
    """The body of a good answer. Raises EngineSilent."""
    return (await ask(http, path)).content


async def ask(http: httpx.AsyncClient, path: str) -> httpx.Response:
    """A good answer. Raises EngineSilent."""
    try:
        answer = await http.get(path)
    except httpx.HTTPError as error:
        raise EngineSilent(f"{path}: {type(error).__name__}") from error
    if not answer.is_success:
        raise EngineSilent(f"{path}: status {answer.status_code}")
    return answer


async def listed(http: httpx.AsyncClient) -> list[Entry]:
    """What the engine lists at /v1/models. Raises EngineSilent."""
    try:
        return msgspec.json.decode(await get(http, "/v1/models"), type=_Listing).data
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EngineSilent(f"/v1/models: {error}") from error
