"""`make up`: prepare, start everything, show the way in, stop everything on Ctrl-C.

    python -m services.local up      # what `make up` calls
    python -m services.local env     # OPENAI_BASE_URL and OPENAI_API_KEY of the running stack, for eval
    python -m services.local key NAME
    python -m services.local top     # how the running stack is doing
"""

import os
import signal
import subprocess
import sys
import time
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from services.local import top
from services.local.commands import beside
from services.local.configs import write_configs
from services.local.errors import UserError
from services.local.models import bring_models
from services.local.plan import ROOT, Dials, Ports, pick_ports, read_dials
from services.local.room import check_room
from services.local.running import only_one, start, stop, wait_until_ready
from services.local.state_version import check_version

app = typer.Typer(help="OwnGPT as local processes.", no_args_is_help=True, add_completion=False)
app.add_typer(beside)
console = Console(highlight=False, stderr=False)


def prepare(dials: Dials, progress: Progress) -> Ports:
    """Folders, model, secrets, config files."""
    for folder in ("logs", "redis", "prometheus", "models", "files", "runs", "adapters"):
        (dials.state / folder).mkdir(exist_ok=True)
    dials.run_dir.mkdir(mode=0o711, exist_ok=True)  # nginx drops root: its workers pass through
    if dials.run_dir.stat().st_uid != os.getuid():
        raise UserError(f"{dials.run_dir} belongs to another user; remove it or set XDG_RUNTIME_DIR.")
    ports = pick_ports(dials)
    bring_models(dials, progress)
    made = subprocess.run([sys.executable, "-m", "services.secrets", str(dials.secrets)], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    if made.returncode:
        raise UserError(made.stderr.strip())
    write_configs(dials, ports)
    return ports


def first_key(dials: Dials) -> str:
    """The key made on the first start, kept in the state folder."""
    path = dials.state / "api_key"
    if not path.exists():
        made = keys(dials, "create", "first")
        partial = path.with_suffix(".partial")
        partial.touch(mode=0o600)
        partial.write_text(made + "\n")
        partial.rename(path)
    return path.read_text().strip()


def keys(dials: Dials, *words: str) -> str:
    """What `python -m gateway.keys` says about the running stack's keys. Raises UserError."""
    env = os.environ | {
        "REDIS_URL": dials.redis_url, "REDIS_PASSWORD_FILE": str(dials.secrets / "gateway/redis_password"),
    }
    made = subprocess.run([sys.executable, "-m", "gateway.keys", *words], cwd=ROOT, env=env,
                          capture_output=True, text=True, check=False)
    if made.returncode:
        said = made.stderr.strip() or f"it ended with {made.returncode}"
        raise UserError(f"{said}\nIs the stack running (make up)?" if "redis.sock" in said else said)
    return made.stdout.strip()


def show_way_in(dials: Dials, key: str, took_s: float) -> None:
    """The first screen: endpoint, key, a line to paste."""
    base = f"{dials.base}/v1"
    body = f'{{"model":"{dials.first.name}","messages":[{{"role":"user","content":"Say hello."}}],"max_tokens":40}}'
    console.print(f"\n[bold green]OwnGPT is up[/] ({took_s:.0f} s). Ctrl-C stops everything.\n", soft_wrap=True)
    console.print(f"  console    {dials.base}/      (chat, status, usage, fine-tuning)",
                  soft_wrap=True)
    console.print(f"  endpoint   {base}\n  API key    {key}\n  model      {dials.first.name}\n"
                  f"  logs       {dials.state}/logs\n", soft_wrap=True)
    if dials.tls is None and not dials.host.startswith("127."):
        console.print(f"[bold red]HOST={dials.host} without TLS_DIR: API keys, prompts and answers travel in clear to "
                      "whoever is on the way.[/] docs/hosts.md\n", soft_wrap=True)
    console.print("Paste into another terminal:\n", soft_wrap=True)
    console.print(f"  curl {base}/chat/completions -H 'Authorization: Bearer {key}' "
                  f"-H 'Content-Type: application/json' -d '{body}'\n", soft_wrap=True, markup=False)
    console.print('For the openai SDK:  eval "$(make env)"      How it is doing:  make top\n',
                  soft_wrap=True, markup=False)
    sys.stdout.flush()


@app.command()
def up() -> None:
    """Start the stack in the foreground. Dials: WORKERS, MODEL, PORT, HOST, KV_CACHE_GIB, STATE_DIR."""
    began = time.monotonic()
    dials = read_dials()
    dials.state.mkdir(parents=True, exist_ok=True)
    dials.state.chmod(0o700)  # keys, and what was uploaded
    check_version(dials.state)
    check_room(dials)
    ends = [signal.SIGINT, signal.SIGTERM]  # SIGINT, too: a background job of a shell ignores it
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it outlives its terminal
        ends.append(signal.SIGHUP)
    for number in ends:
        signal.signal(number, signal.default_int_handler)
    with only_one(dials):
        supervisor = None
        try:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            with Progress(*columns, console=console) as progress:
                ports = prepare(dials, progress)
                supervisor = start(dials, ports)
                wait_until_ready(dials, supervisor, progress)
                key = first_key(dials)
            (dials.state / "endpoint").write_text(f"{dials.base}/v1\n")
            show_way_in(dials, key, time.monotonic() - began)
            supervisor.wait()
            raise UserError(f"The supervisor stopped; see {dials.state}/logs/supervisord.log.")
        except KeyboardInterrupt:
            console.print("stopping ...")
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            if supervisor is not None:
                stop(supervisor)
                console.print("stopped.")


def way_in() -> tuple[str, str]:
    """Endpoint and first key of the stack that ran last. Raises UserError when none did."""
    state = read_dials().state
    try:
        return (state / "endpoint").read_text().strip(), (state / "api_key").read_text().strip()
    except OSError as error:
        raise UserError(f"There is no running stack in {state} yet; start it with: make up") from error


@app.command()
def env() -> None:
    """Print OPENAI_BASE_URL and OPENAI_API_KEY as exports: eval "$(make env)"."""
    endpoint, key = way_in()
    print(f"export OPENAI_BASE_URL={endpoint}\nexport OPENAI_API_KEY={key}")
    try:
        httpx.get(f"{endpoint.removesuffix('/v1')}/health", timeout=2)
    except httpx.HTTPError:
        print(f"owngpt: nobody answers at {endpoint} now; start the stack: make up", file=sys.stderr)


@app.command("top")
def show_top(
    once: Annotated[bool, typer.Option("--once", help="Print it once instead of watching.")] = False,
) -> None:
    """Watch workers, queue, KV blocks, GPU, tokens/s, cost and alerts. Ctrl-C ends it, not the stack."""
    endpoint, key = way_in()
    try:
        screen = Console(highlight=False)
        top.watch(endpoint, key, screen, once=once or not screen.is_terminal)
    except httpx.HTTPError as error:
        said = type(error).__name__
        raise UserError(f"The stack at {endpoint} does not answer ({said}). Is make up running?") from error
    except KeyboardInterrupt:
        pass


@app.command()
def key(name: Annotated[str, typer.Argument(help="Who the key is for.")]) -> None:
    """Make one more API key and print it, once."""
    if not name:
        raise UserError("Who is the key for? make key NAME=alice")
    print(keys(read_dials(), "create", name))


@app.command("keys")
def show_keys() -> None:
    """Show the API keys there are: id, date, name."""
    print(keys(read_dials(), "list"))


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="The key's id, as `keys` shows it.")]) -> None:
    """Make an API key useless within a second."""
    if not key_id:
        raise UserError("Which key? make keys shows their ids; then: make revoke ID=1a2b3c4d")
    print(keys(read_dials(), "revoke", key_id))


def main() -> None:
    """The command; a user's mistake is one line and status 1."""
    try:
        app()
    except UserError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]owngpt:[/] {error}", soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
