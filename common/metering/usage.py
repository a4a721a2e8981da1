"""What engines say in their bodies and events: usage, how a choice ended, errors."""

import msgspec

from common.records import Record


class StreamOptions(msgspec.Struct):
    """`stream_options` of the OpenAI API."""

    include_usage: bool | None = None


class Details(msgspec.Struct):
    """`prompt_tokens_details`, `input_tokens_details`."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """`usage` as chat, completions, responses and messages spell it."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: Details | None = None
    cache_read_input_tokens: int | None = None


class Holder(msgspec.Struct):
    """An object inside an event that has usage."""

    usage: Usage | None = None


class Choice(msgspec.Struct):
    """Of a choice, how it ended."""

    finish_reason: str | None = None


class Carrier(msgspec.Struct):
    """What may carry something for us: a body, a chunk, or an event with the object inside."""

    usage: Usage | None = None
    response: Holder | None = None
    message: msgspec.Raw = msgspec.Raw(b"")
    """Anthropic's object, which may hold usage; a text in error events."""
    choices: list[Choice] | None = None
    error: msgspec.Raw = msgspec.Raw(b"")
    type: str | None = None
    count: int | None = None

    @property
    def only_usage(self) -> bool:
        """An OpenAI chunk that holds nothing but usage."""
        return self.choices == [] and self.usage is not None

    @property
    def broken(self) -> bool:
        """An event that says that the stream failed, on any route."""
        return bytes(self.error) not in (b"", b"null") or self.type in ("error", "response.failed")


_decode = msgspec.json.Decoder(Carrier).decode
_decode_holder = msgspec.json.Decoder(Holder).decode


def read(data: bytes) -> Carrier | None:
    """What an engine says in a body or an event; None when it is no object of a known shape."""
    try:
        return _decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _read_holder(raw: msgspec.Raw) -> Holder | None:
    try:
        return _decode_holder(raw)
    except (msgspec.MsgspecError, RecursionError):
        return None


def note(record: Record, carrier: Carrier) -> None:
    """Take over into the record what a carrier says."""
    message = _read_holder(carrier.message) if bytes(carrier.message).startswith(b"{") else None
    for holder in (carrier, carrier.response, message):
        if holder is None or holder.usage is None:
            continue
        usage = holder.usage
        prompt = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
        details = usage.prompt_tokens_details or usage.input_tokens_details
        cached = details.cached_tokens if details else usage.cache_read_input_tokens
        done = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
        if prompt is not None:
            # Anthropic's input_tokens leaves out what came from the cache.
            record.prompt_tokens = prompt + (usage.cache_read_input_tokens or 0)
        if cached is not None:
            record.cached_tokens = cached
        if done is not None:
            record.completion_tokens = done
    if carrier.count is not None and record.route == "tokenize":
        record.prompt_tokens = carrier.count
    for choice in carrier.choices or ():
        if choice.finish_reason:
            record.finish_reason = choice.finish_reason[:32]
