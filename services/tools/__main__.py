"""`make quantize`, `make compare`, `make profile`: python -m services.tools COMMAND --help."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.local.errors import UserError
from services.tools.quantize import command as quantizing

app = typer.Typer(help="What an owner does with models beside serving them.", no_args_is_help=True, add_completion=False)


@app.callback()
def tools() -> None:
    """What an owner does with models beside serving them."""


@app.command()
def quantize(
    model: Annotated[str, typer.Option(envvar="MODEL", help="A name in models.yaml, bundled, a folder, a hub name.")] = "",
    method: Annotated[str, typer.Option(envvar="METHOD", help="w8a8, gptq or awq.")] = "",
    data: Annotated[Path | None, typer.Option(envvar="DATA", help="JSONL of your own questions, to calibrate with.")] = None,
    most_loss: Annotated[float, typer.Option(envvar="MAX_PERPLEXITY_LOSS", min=0, help="0.05: five percent.")] = 0.05,
) -> None:
    """Make a smaller copy of a model, measure what it lost and gained, and enter it in models.yaml."""
    quantizing.main(model, method, data, most_loss)


def main() -> None:
    """The command; a user's mistake is one line and status 1."""
    try:
        app()
    except UserError as error:
        Console(stderr=True, highlight=False).print("[bold red]owngpt:[/] ", end="")
        Console(stderr=True, highlight=False).print(str(error), markup=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
