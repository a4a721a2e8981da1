"""The items of a conversation: what a request's `input` is to an engine, and to whoever lists it."""

from collections.abc import Sequence
from typing import Any

import msgspec

from common.responses.store import Link

Item = dict[str, Any]
_decode_raws = msgspec.json.Decoder(list[msgspec.Raw]).decode


class _Output(msgspec.Struct):
    output: list[msgspec.Raw] = []


_decode_output = msgspec.json.Decoder(_Output).decode


def read_input(said: msgspec.Raw) -> list[msgspec.Raw]:
    """The items of an `input`: a text is one message. Raises MsgspecError for anything else."""
    if bytes(said)[:1] == b'"':
        return [msgspec.Raw(b'{"type":"message","role":"user","content":' + bytes(said) + b"}")]
    return _decode_raws(said)


def flatten(links: Sequence[Link]) -> list[msgspec.Raw]:
    """Everything that was said, oldest first: what went in and what came out, turn by turn."""
    return [item for link in links for item in (*_decode_raws(link.items), *_decode_output(link.response).output)]


def listed(links: Sequence[Link], response_id: str) -> list[Item]:
    """The input of the last turn and all before it, as a listing shows items: each with an id, texts as parts."""
    *before, last = links
    items = [*flatten(before), *_decode_raws(last.items)]
    return [_shown(msgspec.json.decode(item), f"{response_id}_{at}") for at, item in enumerate(items)]


def _shown(item: Item, name: str) -> Item:
    said = {field: value for field, value in item.items() if value is not None}
    shown = {"id": f"item_{name}", "type": "message", **said}
    if shown["type"] == "message":
        shown.setdefault("status", "completed")
        if isinstance(text := shown.get("content"), str):
            kind = "output_text" if shown.get("role") == "assistant" else "input_text"
            shown["content"] = [{"type": kind, "text": text}]
    return shown
