"""How engines differ on the wire: where they tell their numbers, and what they call them.

Sources: docs/engines.md.
"""

from typing import NamedTuple


class Dialect(NamedTuple):
    """One engine's."""

    metrics_path: str = ""
    """Empty: it has none."""
    metrics: tuple[bytes, bytes, bytes, bytes, bytes, bytes] = (b"",) * 6
    """Steps, waiting requests, KV use, tokens read, those from a cache, tokens made. Empty: it does not tell."""
    salted: tuple[str, ...] = ()
    """Routes on which it takes a `cache_salt`: elsewhere two keys that send one prompt share its KV blocks."""


VLLM = (
    b"vllm:iteration_tokens_total_count", b"vllm:num_requests_waiting", b"vllm:kv_cache_usage_perc",
    b"vllm:prompt_tokens_total", b"vllm:prompt_tokens_cached_total", b"vllm:generation_tokens_total",
)
_DIALECTS = {
    "llamacpp": Dialect("/metrics", (
        b"llamacpp:n_decode_total", b"llamacpp:requests_deferred", b"", b"llamacpp:prompt_tokens_total",
        b"llamacpp:prompt_tokens_cached_total", b"llamacpp:tokens_predicted_total",
    )),
    "sglang": Dialect("/metrics", (
        b"", b"sglang:num_queue_reqs", b"sglang:token_usage", b"sglang:prompt_tokens_total",
        b"sglang:cached_tokens_total", b"sglang:generation_tokens_total",
    ), ("chat", "completions")),
    "trtllm": Dialect("/prometheus/metrics", (
        b"", b"trtllm_num_requests_waiting", b"trtllm_kv_cache_utilization", b"trtllm_prompt_tokens_total",
        b"trtllm_prompt_cached_tokens_total", b"trtllm_generation_tokens_total",
    ), ("chat",)),
    # Steps are left out: a server elsewhere is not started anew by us, whatever it does.
    **dict.fromkeys(("attached", "vllm"), Dialect("/metrics", (b"", *VLLM[1:]))),
}


def find(engine: str) -> Dialect:
    """The dialect of an engine that ENGINE names."""
    return _DIALECTS[engine]
