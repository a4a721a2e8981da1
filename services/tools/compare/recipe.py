"""What is compared, under which load: an entry of a file like examples/compare.yaml."""

from pathlib import Path
from typing import Annotated

import msgspec
import yaml
from msgspec import Meta, field

from services.local.errors import UserError

MAX_SIDES = 6


class Side(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An endpoint and a model. Without `url`: the running stack, with its own key."""

    model: str
    label: str = ""
    """Its name in the report; without one, the model's."""
    url: Annotated[str, Meta(pattern=r"^(https?://[^/\s]+(/\S*)?)?$")] = ""
    key_file: str = ""
    flags: str = ""
    """How it was started, for the report: nobody can ask an endpoint that."""

    @property
    def shown(self) -> str:
        """Its name in the report."""
        return self.label or self.model


class Lengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tokens of prompts and answers: about so many, up to `spread` of it more or less; or those of a recorded trace."""

    prompt_tokens: Annotated[int, Meta(ge=1, le=100_000)] = 128
    answer_tokens: Annotated[int, Meta(ge=1, le=8192)] = 64
    spread: Annotated[float, Meta(ge=0, lt=1)] = 0.5
    trace: str = ""
    """JSONL with `prompt_tokens` and `completion_tokens` a line."""


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a good request keeps: goodput counts these alone."""

    ttft_ms: Annotated[int, Meta(gt=0)] = 1000
    tpot_ms: Annotated[int, Meta(gt=0)] = 100


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One comparison. Sampling is greedy on every side, and every answer as long as was asked for."""

    sides: Annotated[list[Side], Meta(min_length=1, max_length=MAX_SIDES)]
    closed: list[Annotated[int, Meta(ge=1, le=1024)]] = field(default_factory=lambda: [1, 16])
    """Requests at once: the next is sent when one is answered."""
    open: list[Annotated[float, Meta(gt=0, le=1000)]] = []
    """Requests a second, Poisson, whether answered or not."""
    requests: Annotated[int, Meta(ge=1, le=10_000)] = 32
    """In a round, of each load; in a closed one between two and eight for each at once."""
    rounds: Annotated[int, Meta(ge=1, le=50)] = 3
    lengths: Lengths = Lengths()
    slo: Slo = Slo()
    tokenizer: str = ""
    """A folder or hub name, to count tokens with; without one, that of the first model that is here."""


def read(path: Path, name: str) -> Recipe:
    """The entry called `name`, paths made absolute. Raises UserError."""
    try:
        found = msgspec.convert(yaml.safe_load(path.read_text()), dict[str, Recipe])
    except OSError as error:
        raise UserError(f"RECIPES={path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UserError(f"RECIPES={path}: {error}") from error
    if name not in found:
        raise UserError(f"RECIPE={name}: {path} has {', '.join(found)}.")
    recipe = found[name]
    if not recipe.closed and not recipe.open:
        raise UserError(f"RECIPE={name}: {path}: there is no load, neither closed nor open.")
    base = path.parent
    sides = [msgspec.structs.replace(side, key_file=_absolute(base, side.key_file)) for side in recipe.sides]
    lengths = msgspec.structs.replace(recipe.lengths, trace=_absolute(base, recipe.lengths.trace))
    return msgspec.structs.replace(recipe, sides=sides, lengths=lengths)


def _absolute(base: Path, path: str) -> str:
    return str((base / Path(path).expanduser()).resolve()) if path else ""
