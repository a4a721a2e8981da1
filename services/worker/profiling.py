"""One look into the engine: vLLM's profiler over a load of its own, while the worker is out of rotation.

    python -m services.worker.profiling --concurrent 8      # beside a running worker, with its environment

Whoever may write into PROFILE_DIR may ask: a wish is a file there. The agent takes it, drains, profiles STEPS engine
steps, draws a flame graph of the engine's Python, goes back into rotation, and says in `result.json` what lies where.
Each profile replaces the one before it.
"""

import argparse
import asyncio
import contextlib
import fcntl
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Literal

import httpx
import msgspec
from loguru import logger

from common.files import write_whole
from common.tasks import end_tasks
from services.worker.settings import WorkerSettings

STEPS = 20
"""Engine steps that are recorded."""
MAX_BYTES = 64 * 2**20
"""Of a trace; a larger one is thrown away."""
FLAME_S = 5
LOOK_EVERY_S = 1.0
TAKEN_WITHIN_S = 30.0
"""A wish that no worker took by then is forgotten."""
LONGEST_S = 600.0
"""Out of rotation for a profile, whatever the engine does."""
PATIENCE_S = 300.0
"""For the engine's answers, and for the trace, which it writes while everything stands still."""
WISH, RESULT, TRACE, FLAME = "wish.json", "result.json", "trace.json.gz", "flame.svg"
WORDS = "the quick brown fox jumps over the lazy dog and runs into the deep dark wood where nobody lives "


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be looked at."""

    concurrent: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    """Requests at once."""
    prompt_words: Annotated[int, msgspec.Meta(ge=1, le=4000)] = 64
    load: Literal["decode", "mixed"] = "decode"
    """decode: from when all prompts are read; mixed: from the first prompt on."""
    id: str = ""
    """By which whoever asks knows the answer."""
    at: float = 0.0
    """When it was wished, seconds since 1970."""


class Result(msgspec.Struct, frozen=True):
    """What came of it. Files are beside it."""

    wish: Wish
    error: str = ""
    trace: str = ""
    flame: str = ""
    no_flame: str = ""
    """Why there is no flame graph."""
    took_s: float = 0.0


def arguments(folder: Path) -> list[str]:
    """vLLM's flags: it can be told to profile, STEPS steps at most, and does nothing until then."""
    said = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder.absolute() / "traces"),
        "torch_profiler_with_stack": False,
        "torch_profiler_record_shapes": True,
        "ignore_frontend": True,
        "max_iterations": STEPS,
    }
    return ["--profiler-config", json.dumps(said)]


class Profiler:
    """Waits for wishes, and fulfils them."""

    def __init__(self, settings: WorkerSettings, folder: Path, pid: Callable[[], int]) -> None:
        self._settings, self._folder, self._pid = settings, folder, pid
        self._wish: Wish | None = None
        with contextlib.suppress(OSError):  # without it nobody can wish; that keeps no worker from serving
            folder.mkdir(parents=True, exist_ok=True)

    async def wished(self) -> None:
        """Until there is a wish. One that cannot be read is answered, one that nobody waits for forgotten."""
        path = self._folder / WISH
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                raw = path.read_bytes()
                path.unlink()  # before anything is done: what kills the engine is not done again
                wish = msgspec.json.decode(raw, type=Wish)
            except FileNotFoundError:
                continue
            except (OSError, msgspec.MsgspecError) as error:
                self._say(Result(Wish(), error=f"{path}: {error}"))
                continue
            if time.time() - wish.at < TAKEN_WITHIN_S:
                self._wish = wish
                return

    async def run(self) -> None:
        """Fulfil it. What failed is said, and raises nothing; so is what was cut off."""
        wish, began = self._wish or Wish(), time.monotonic()
        result = Result(wish, error="it was cut off: the worker stops, or others wait for its turn")
        try:
            async with (
                asyncio.timeout(LONGEST_S),
                httpx.AsyncClient(
                    base_url=f"http://127.0.0.1:{self._settings.engine_port}",
                    timeout=PATIENCE_S,
                    limits=httpx.Limits(max_connections=None),
                    headers={"authorization": f"Bearer {self._settings.worker_token}"},
                ) as http,
            ):
                await self._trace(http, wish)
                no_flame = await self._flame(http, wish)
            result = Result(wish, trace=TRACE, flame="" if no_flame else FLAME, no_flame=no_flame)
        except httpx.HTTPStatusError as error:
            result = Result(wish, error=f"{error}: {error.response.text[:300]}")
        except (httpx.HTTPError, OSError) as error:
            result = Result(wish, error=f"{type(error).__name__}: {error}")
        finally:
            took_s = round(time.monotonic() - began, 1)
            logger.info("profiled", error=result.error, took_s=took_s)
            self._say(msgspec.structs.replace(result, took_s=took_s))

    def _say(self, result: Result) -> None:
        with contextlib.suppress(OSError):  # a full disk: whoever waits gives up after a while
            write_whole([msgspec.json.encode(result)], self._folder / RESULT)

    async def _trace(self, http: httpx.AsyncClient, wish: Wish) -> None:
        """Raises httpx.HTTPError, OSError."""
        traces = self._folder / "traces"
        for old in traces.glob("*"):
            old.unlink()
        await self._load(http, wish, 4 * STEPS)  # warm; what the engine refuses, it refuses here
        async with self._recording(http) as record:
            if wish.load == "mixed":
                await record()
            begun = await self._first_tokens(http)
            asking = asyncio.create_task(self._load(http, wish, 4 * STEPS))
            try:
                if wish.load == "decode":
                    await self._all_decode(http, begun + wish.concurrent, asking)
                    await record()
                await asking
            finally:
                await end_tasks([asking])
        found = max(traces.glob("*.json.gz"), key=lambda file: file.stat().st_size, default=None)
        if found is None:
            raise OSError("the engine wrote no trace")
        if found.stat().st_size > MAX_BYTES:
            found.unlink()
            raise OSError(f"the trace was larger than {MAX_BYTES // 2**20} MiB; ask for fewer requests at once")
        found.replace(self._folder / TRACE)
        for rest in traces.glob("*"):
            rest.unlink()

    @contextlib.asynccontextmanager
    async def _recording(self, http: httpx.AsyncClient) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Gives what starts the recording; then it is over, whatever happened: no client's step is recorded."""

        async def start() -> None:
            await http.post("/stop_profile")  # of one that was cut off; of none it says nothing
            (await http.post("/start_profile")).raise_for_status()

        try:
            yield start
        finally:
            stopping = asyncio.ensure_future(http.post("/stop_profile"))
            with contextlib.suppress(httpx.HTTPError):
                await asyncio.shield(stopping)

    async def _load(self, http: httpx.AsyncClient, wish: Wish, tokens: int) -> None:
        """Requests at once, of one length. Raises httpx.HTTPError."""
        words = (WORDS * (1 + wish.prompt_words // 18)).split()[: wish.prompt_words]

        async def ask(number: int) -> None:
            asked = {
                "model": self._settings.served_name,
                "prompt": f"{number} {time.monotonic_ns()} {' '.join(words)}",
                "max_tokens": tokens,
                "ignore_eos": True,
                "temperature": 0,
            }
            (await http.post("/v1/completions", json=asked)).raise_for_status()

        await asyncio.gather(*(ask(number) for number in range(wish.concurrent)))

    async def _all_decode(self, http: httpx.AsyncClient, wanted: float, asking: asyncio.Task[None]) -> None:
        """Until the engine has read every prompt, by its own count of first tokens (or all have ended)."""
        while not asking.done() and await self._first_tokens(http) < wanted:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.05)

    async def _first_tokens(self, http: httpx.AsyncClient) -> float:
        """Answers of which the engine has ever made a first token."""
        text = (await http.get("/metrics")).text
        name = "vllm:time_to_first_token_seconds_count"
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    async def _flame(self, http: httpx.AsyncClient, wish: Wish) -> str:
        """Draw FLAME while it works; why not, if not."""

        async def work() -> None:
            while True:
                await self._load(http, wish, 4 * STEPS)

        told = ["record", "--subprocesses", "--duration", str(FLAME_S), "--rate", "100"]
        told += ["--output", str(self._folder / FLAME), "--pid", str(self._pid())]
        try:
            spy = await asyncio.create_subprocess_exec(
                str(Path(sys.executable).parent / "py-spy"),
                *told,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            return f"py-spy does not start beside this worker: {error.strerror}"
        asking = asyncio.create_task(work())
        try:
            _, said = await asyncio.wait_for(spy.communicate(), FLAME_S + 60)
            if spy.returncode:
                return said.decode(errors="replace").strip()[-300:] or f"py-spy ended with {spy.returncode}"
            return "" if not asking.done() else "the engine stopped answering meanwhile"
        except TimeoutError:
            return "py-spy did not end"
        finally:
            if spy.returncode is None:
                spy.kill()
            asking.cancel()  # what runs is given up: its client is gone
            await asyncio.wait([asking])


def ask(folder: Path, wish: Wish, patience_s: float = 900.0) -> Result:
    """Wish for a profile, and wait for it.

    Raises TimeoutError when no agent takes it, or none is done with it; OSError, also when somebody else waits.
    """
    wish = msgspec.structs.replace(wish, id=secrets.token_hex(8), at=time.time())
    deadline = time.monotonic() + patience_s
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(f"somebody else profiles this worker right now ({folder})") from error
        write_whole([msgspec.json.encode(wish)], folder / WISH)
        try:
            while time.monotonic() < deadline:
                with contextlib.suppress(FileNotFoundError):
                    found = msgspec.json.decode((folder / RESULT).read_bytes(), type=Result)
                    if found.wish.id == wish.id:
                        return found
                if time.time() - wish.at > TAKEN_WITHIN_S and (folder / WISH).exists():
                    raise TimeoutError(f"no worker looks into {folder}: does it run, awake, with PROFILE_DIR set?")
                time.sleep(0.2)
            raise TimeoutError(f"no result in {folder} after {patience_s:.0f} s; the worker's log says why")
        finally:
            (folder / WISH).unlink(missing_ok=True)


def main() -> None:
    """The command beside a worker."""
    parser = argparse.ArgumentParser(prog="python -m services.worker.profiling", description=__doc__.split("\n")[0])
    parser.add_argument("--concurrent", type=int, default=1, help="requests at once")
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--load", choices=("decode", "mixed"), default="decode")
    told = parser.parse_args()
    folder = WorkerSettings().profile_dir
    if folder is None:
        sys.exit("profiling: PROFILE_DIR is not set")
    try:
        wish = msgspec.convert(vars(told), Wish)
        print(msgspec.json.format(msgspec.json.encode(ask(folder, wish))).decode())
    except (msgspec.ValidationError, TimeoutError, OSError) as error:
        sys.exit(f"profiling: {error}")


if __name__ == "__main__":
    main()
