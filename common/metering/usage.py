"""Usage as engines spell it."""

import msgspec


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


class Carrier(msgspec.Struct):
    """Whatever carries usage: a body, a chunk, or an event with the object inside."""

    usage: Usage | None = None
    response: Holder | None = None
    message: Holder | None = None
    count: int | None = None


decode_carrier = msgspec.json.Decoder(Carrier).decode


def only_usage(event: bytes) -> bool:
    """Whether an SSE event is the one that holds nothing but usage."""
    return b'"choices":[]' in event and b'"usage":{' in event
