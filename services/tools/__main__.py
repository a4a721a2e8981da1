"""`make quantize`, `make compare`, `make profile`: python -m services.tools COMMAND --help."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from services.local.errors import UserError
from services.local.plan import ROOT
from services.tools.compare import command as comparing
from services.tools.compare.recipe import read as read_recipe
from services.tools.profile import command as profiling
from services.tools.quantize import command as quantizing
from services.worker.profiling import Wish

app = typer.Typer(
    help="What an owner does with models beside serving them.", no_args_is_help=True, add_completion=False
)


@app.callback()
def tools() -> None:
    """What an owner does with models beside serving them."""


@app.command()
def quantize(
    model: Annotated[
        str, typer.Option(envvar="MODEL", help="A name in models.yaml, bundled, a folder, a hub name.")
    ] = "",
    method: Annotated[str, typer.Option(envvar="METHOD", help="w8a8, gptq or awq.")] = "",
    data: Annotated[
        Path | None, typer.Option(envvar="DATA", help="JSONL of your own questions, to calibrate with.")
    ] = None,
    most_loss: Annotated[float, typer.Option(envvar="MAX_PERPLEXITY_LOSS", min=0, help="0.05: five percent.")] = 0.05,
) -> None:
    """Make a smaller copy of a model, measure what it lost and gained, and enter it in models.yaml."""
    quantizing.quantize(model, method.strip().lower(), data, most_loss, Console())


@app.command("profile")
def look_into(
    worker: Annotated[
        str, typer.Option(envvar="WORKER", help="Its program's name (make top); else one with a stand-in.")
    ] = "",
    concurrent: Annotated[int, typer.Option(envvar="N", min=1, max=256, help="Requests at once.")] = 1,
    prompt_words: Annotated[int, typer.Option(min=1, max=4000, help="Words in each prompt.")] = 64,
    load: Annotated[str, typer.Option(envvar="LOAD", help="decode, or mixed: prompts too.")] = "decode",
    force: Annotated[
        bool, typer.Option(envvar="FORCE", help="Even if nobody else serves its models meanwhile.")
    ] = False,
    of: Annotated[Path | None, typer.Option(envvar="TRACE", help="Only read this trace.")] = None,
) -> None:
    """Take one worker out of rotation, look into its engine, and put it back."""
    console = Console()
    if of is not None:
        profiling.show(of, console)
        return
    try:
        wish = msgspec.convert({"concurrent": concurrent, "prompt_words": prompt_words, "load": load}, Wish)
    except msgspec.ValidationError as error:
        raise UserError(str(error)) from error
    profiling.profile(worker, wish, force, console)


@app.command("compare")
def side_by_side(
    models: Annotated[str, typer.Option(envvar="MODELS", help='Of the running stack, or URL=MODEL: "one two".')] = "",
    recipe: Annotated[str, typer.Option(envvar="RECIPE", help="An entry of RECIPES instead.")] = "",
    recipes: Annotated[Path, typer.Option(envvar="RECIPES", help="The file.")] = ROOT / "examples/compare.yaml",
    rounds: Annotated[int, typer.Option(envvar="ROUNDS", min=1, max=50, help="With MODELS.")] = 3,
) -> None:
    """The same load against several models or endpoints, in turns; an HTML report."""
    chosen = read_recipe(recipes, recipe) if recipe else comparing.recipe_of(models, rounds)
    comparing.compare(chosen, Console())


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
