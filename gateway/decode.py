"""The body of a request, decoded once and only as far as the decision needs.

The original bytes go to the worker; unknown fields are the engine's business. A known field with an impossible
value is refused here with its name, so that nobody waits for a worker to hear it.
"""

import re
from typing import Annotated

import msgspec

from common.errors import InvalidRequest, NotFound
from common.metering.usage import StreamOptions
from common.routes import ROUTES

RawJson = msgspec.Raw
Count = Annotated[float, msgspec.Meta(ge=0, le=2**31 - 1, multiple_of=1)]
"""A number of tokens, which some clients write as 100.0."""
MAX_PROMPTS = 1024
"""Prompts or texts in one request. Each is a request to the engine, and the gateway counts them as one."""


class Ask(msgspec.Struct):
    """The fields of any generation request that the gateway looks at."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    max_output_tokens: Count | None = None
    n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    best_of: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    priority: int | None = None
    previous_response_id: RawJson = RawJson(b"null")
    store: RawJson = RawJson(b"null")
    background: RawJson = RawJson(b"null")
    conversation: RawJson = RawJson(b"null")
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    messages: RawJson = RawJson(b"")
    prompt: RawJson = RawJson(b"")
    input: RawJson = RawJson(b"")
    documents: RawJson = RawJson(b"")
    queries: RawJson = RawJson(b"")
    items: RawJson = RawJson(b"")
    text_1: RawJson = RawJson(b"")
    text_2: RawJson = RawJson(b"")
    data_1: RawJson = RawJson(b"")
    data_2: RawJson = RawJson(b"")
    chat_template: RawJson = RawJson(b"")

    @property
    def prefix(self) -> bytes:
        """The bytes a prompt begins with, as sent (empty when there is none)."""
        return bytes(self.messages or self.prompt or self.input)

_decoder = msgspec.json.Decoder(Ask)
_FIRST = re.compile(rb'\[\s*(["\[{])')
_SCORED = ("documents", "queries", "items", "text_1", "text_2", "data_1", "data_2")
"""Each of which may be many texts, or objects."""
_DIGITS = bytes(48 if 48 <= byte <= 57 else 32 for byte in range(256))
"""`bytes.translate`: every digit a 0, anything else a blank."""
_MANY_DIGITS = b"0" * 19
MAX_LONG_NUMBERS = 20_000
"""Numbers of so many digits in one request, in texts or outside: each is looked at."""
_NUMBER = re.compile(rb"[0-9]+([.eE]?)")
_FRACTION = (b".", b"e", b"E", b"+")
"""Before digits that are no integer's."""
_NOT_BRACKETS = bytes(set(range(256)) - set(b'"[{'))
_FIELD = re.compile(r"\$\.([A-Za-z_][\w.]*)")
_MISSING = re.compile(r"missing required field `(\w+)`")


def _count(said: RawJson, *, objects: bool = False) -> int:
    """How many prompts there are: an array of texts, of arrays of token ids or of conversations; else one.

    An array of `objects` counts where they are what is scored; elsewhere they are the turns of one conversation.

    Counted in the bytes of valid JSON: an object for each of two million numbers would hold everybody up.
    """
    if len(said) <= MAX_PROMPTS or (first := _FIRST.match(said)) is None:
        return 1
    if first[1] == b"{":
        return _count_outside(said, b"{") if objects else 1
    if first[1] == b"[":
        return _count_outside(said, b"[") - 1
    return _unescaped(said).count(b'"') // 2


def _unescaped(json: bytes) -> bytes:
    """Valid JSON without its escapes of quotes: every quote that is left begins or ends a string."""
    return bytes(json).replace(b"\\\\", b"").replace(b'\\"', b"")


def _count_outside(json: bytes, bracket: bytes) -> int:
    """How often a bracket stands outside of strings. Those without any go first: there may be millions of them."""
    left = _unescaped(json).translate(None, _NOT_BRACKETS).replace(b'""', b"")
    return sum(part.count(bracket) for part in left.split(b'"')[::2])


def _refuse_large_integers(body: bytes) -> None:
    """Raise for an integer over 64 bits: engines hand their requests on in 64 bits, and fail, whatever field it is in.

    That failure would look like a worker's, and every worker would be asked in turn.
    """
    clean = _unescaped(body)
    digits, at, quotes = clean.translate(_DIGITS), 0, 0
    for _ in range(MAX_LONG_NUMBERS):
        found = digits.find(_MANY_DIGITS, at)
        if found < 0:
            return
        quotes += clean.count(b'"', at, found)
        if quotes % 2:  # in a text: on to its end
            at = clean.find(b'"', found)
            continue
        number = _NUMBER.match(clean, found)
        assert number is not None  # noqa: S101 - there are digits
        at, before = number.end(), clean[found - 1 : found]
        if number[1] or before in _FRACTION or (before == b"-" and clean[found - 2 : found - 1] in _FRACTION):
            continue  # no integer
        value = int(number[0][:40])
        if value > 2**63 - (before != b"-"):
            shown = (before if before == b"-" else b"") + number[0][:40]
            raise InvalidRequest(f"The number {shown.decode()} is larger than 64 bits hold.", code="invalid_value")
    raise InvalidRequest(f"More than {MAX_LONG_NUMBERS} numbers of 19 digits and more.", code="invalid_value")


def decode(path: str, body: bytes, max_n: int) -> Ask:
    """The `Ask` in a body.

    Raises InvalidRequest naming the field, NotFound for a path that takes no body.
    """
    if path not in ROUTES:
        raise NotFound(f"There is nothing at {path}.")
    if not body:
        raise InvalidRequest("The request has no body; send a JSON object.", code="empty_body")
    try:
        if not body.isascii():
            body.decode()
        ask = _decoder.decode(body)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _MISSING.search(text) or _FIELD.search(text)
        field = found[1] if found else None
        reason = text.split(" - at ")[0].replace("`float` that's a multiple of 1.0", "a whole number")
        raise InvalidRequest(f"{field or 'The body'}: {reason}.", param=field, code="invalid_value") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid UTF-8 (byte {error.start}).", code="invalid_json"
        ) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    many = ["prompt", "input", *_SCORED]
    if ROUTES[path][0] == "embeddings":  # vLLM takes several conversations there
        many.append("messages")
    for field in many:
        if (said := getattr(ask, field)) and (prompts := _count(said, objects=field in _SCORED)) > MAX_PROMPTS:
            raise InvalidRequest(f"{field}: {prompts} are over the limit of {MAX_PROMPTS} in one request.", param=field)
    for field, count in (("n", ask.n), ("best_of", ask.best_of)):
        if count is not None and count > max_n:
            raise InvalidRequest(f"{field}: {count} is over the limit of {max_n} (MAX_N).", param=field)
    if ask.priority:
        raise InvalidRequest("priority: requests are served in their order; leave it out.", param="priority")
    if bytes(ask.chat_template) not in (b"", b"null"):
        raise InvalidRequest("chat_template: templates from requests are not accepted.", param="chat_template")
    if _MANY_DIGITS in body.translate(_DIGITS):
        _refuse_large_integers(body)
    needs = ROUTES[path][1]
    if needs and not any(getattr(ask, field) for field in needs):
        raise InvalidRequest(
            f"{needs[0]}: missing required field `{needs[0]}`.", param=needs[0], code="missing_required_parameter"
        )
    if ask.messages and bytes(ask.messages)[:1] != b"[":
        raise InvalidRequest("messages: Expected `array`.", param="messages", code="invalid_value")
    return ask
