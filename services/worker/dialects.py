"""How engines differ on the wire: where they tell their numbers, and what they call them.

Sources: docs/engines.md.
"""

from typing import NamedTuple

import msgspec

ENGINE, SLOTS = b"x-owngpt-engine", b"x-owngpt-slots"
"""Headers by which a front tells the agent what it has recognised."""
NUMBERS_PATH = "/owngpt/numbers"
"""Where a front hands on its engine's own metrics, or says that they did not come."""
LLAMACPP_FAILS = (b"Context size", b"decode", b"Compute error", b"out of memory")
"""In the errors of llama.cpp that are its own: its other 500s are mistakes in a request."""


class Dialect(NamedTuple):
    """One engine's."""

    metrics_path: str = ""
    """Empty: it has none."""
    metrics: tuple[bytes, bytes, bytes, bytes, bytes, bytes] = (b"",) * 6
    """Steps, waiting requests, KV use, tokens read, those from a cache, tokens made. Empty: it does not tell."""
    salted: tuple[str, ...] = ()
    """Routes on which it takes a `cache_salt`: elsewhere two keys that send one prompt share its KV blocks."""
    slots: int = 64
    """Requests that it is taken to run at once, when MAX_NUM_SEQS does not say."""
    cached_apart: bool = False
    """Whether the tokens read are told without those from a cache."""


SALTED_BY_VLLM = ("chat", "completions", "responses", "messages", "embeddings")
"""The rest of its routes reads no KV blocks."""
VLLM = Dialect("/metrics", (
    b"vllm:iteration_tokens_total_count", b"vllm:num_requests_waiting", b"vllm:kv_cache_usage_perc",
    b"vllm:prompt_tokens_total", b"vllm:prompt_tokens_cached_total", b"vllm:generation_tokens_total",
), SALTED_BY_VLLM)  # fmt: skip
_DIALECTS = {
    "vllm": VLLM,
    "attached": VLLM._replace(salted=()),
    "llamacpp": Dialect("/metrics", (
        b"llamacpp:n_decode_total", b"llamacpp:requests_deferred", b"", b"llamacpp:prompt_tokens_total",
        b"llamacpp:prompt_tokens_cached_total", b"llamacpp:tokens_predicted_total",
    ), slots=8, cached_apart=True),
    "sglang": Dialect("/metrics", (
        b"", b"sglang:num_queue_reqs", b"sglang:token_usage", b"sglang:prompt_tokens_total",
        b"sglang:cached_tokens_total", b"sglang:generation_tokens_total",
    ), ("chat", "completions")),
    "trtllm": Dialect("/prometheus/metrics", (
        b"", b"trtllm_num_requests_waiting", b"trtllm_kv_cache_utilization", b"trtllm_prompt_tokens_total",
        b"trtllm_prompt_cached_tokens_total", b"trtllm_generation_tokens_total",
    ), ("chat",)),
}  # fmt: skip
_OWNERS = {"vllm": "vllm", "llamacpp": "llamacpp", "sglang": "sglang", "tensorrt_llm": "trtllm"}
"""`owned_by` of the models that a server lists -> what runs there."""


class _Owned(msgspec.Struct):
    owned_by: str = ""


class _Owners(msgspec.Struct):
    data: list[_Owned] = []


class _Caps(msgspec.Struct):
    supports_tools: bool = False


class Props(msgspec.Struct):
    """What llama.cpp says of itself at /props."""

    total_slots: int = 0
    chat_template_caps: _Caps = msgspec.field(default_factory=_Caps)

    @property
    def engine(self) -> str:
        """Its name in `common/engines.py`: without a place for tools in the model's template they are dropped."""
        return "llamacpp+tools" if self.chat_template_caps.supports_tools else "llamacpp"


def base(engine: str) -> str:
    """What ENGINE names, of a name that says more."""
    return engine.partition("+")[0]


def find(engine: str) -> Dialect:
    """The dialect of an engine that ENGINE names, or `recognise`."""
    return _DIALECTS[base(engine)]


def recognise(engine: str, listing: bytes) -> str:
    """What runs at an address of which only `attached` is known, by its answer to GET /v1/models."""
    if engine != "attached":
        return engine
    try:
        owners = [entry.owned_by for entry in msgspec.json.decode(listing, type=_Owners).data]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return engine
    return next((_OWNERS[owner] for owner in owners if owner in _OWNERS), engine)
