"""What each engine takes of a request. A field that an engine would drop in silence is refused by its name.

vLLM is not among them: it has all our routes, and says itself what it does not know. Sources: docs/engines.md.
"""

from collections.abc import Mapping

import msgspec

OURS = frozenset((
    "user", "metadata", "store", "previous_response_id", "safety_identifier", "prompt_cache_key", "background",
))
"""What the stack sees to itself, and labels that change no answer: never refused, kept from who does not take it."""

_NOTHING: tuple[object, ...] = (None, False, [], {}, "")
"""Values that ask for nothing, in most fields."""
_ASKS_NOTHING: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("n", "best_of", "repetition_penalty", "length_penalty"), (None, 1)),
    **dict.fromkeys(("min_tokens", "top_logprobs", "min_p"), (None, 0)),
    **dict.fromkeys(("top_k", "truncate_prompt_tokens"), (None, 0, -1)),
    **dict.fromkeys(("parallel_tool_calls", "add_generation_prompt", "skip_special_tokens",
                     "spaces_between_special_tokens"), (None, True)),
    "encoding_format": (None, "float"),
    "service_tier": (None, "auto", "default"),
    "truncation": (None, "disabled"),
    "text": (None, {}, {"format": {"type": "text"}}),
}
_SHORT_BYTES = 64
"""A longer value asks for something."""

_TOOLS = "tools tool_choice parallel_tool_calls"
_SAMPLING = "stream stream_options temperature top_p stop seed n frequency_penalty presence_penalty logit_bias logprobs"
_CHAT = f"{_SAMPLING} messages max_tokens max_completion_tokens top_logprobs response_format tools tool_choice"
_TEXT = f"{_SAMPLING} prompt max_tokens"
_TURN = "input instructions stream stream_options max_output_tokens temperature top_p tools tool_choice reasoning"
_HINTS = "output_config cache_control context_management"
_COUNT = f"messages system tools tool_choice thinking {_HINTS}"
_MESSAGES = f"{_COUNT} max_tokens stream stop_sequences temperature top_p top_k"

_LLAMACPP = (
    "top_k min_p ignore_eos repeat_penalty repeat_last_n typical_p top_n_sigma xtc_probability xtc_threshold"
    " dynatemp_range dynatemp_exponent dry_multiplier dry_base dry_allowed_length dry_penalty_last_n"
    " dry_sequence_breakers mirostat mirostat_tau mirostat_eta min_keep samplers grammar json_schema n_probs"
    " cache_prompt return_tokens timings_per_token return_progress"
)
_SGLANG = (
    "top_k min_p min_tokens ignore_eos repetition_penalty stop_token_ids stop_regex no_stop_trim skip_special_tokens"
    " regex ebnf return_token_ids cache_salt"
)
_TRTLLM = (
    "top_k min_p min_tokens ignore_eos repetition_penalty length_penalty use_beam_search early_stopping best_of echo"
    " stop_token_ids include_stop_str_in_output skip_special_tokens spaces_between_special_tokens"
    " truncate_prompt_tokens add_special_tokens"
)
_TEMPLATES = "chat_template_kwargs reasoning_effort"

_TAKES = {
    "llamacpp+tools": {
        "/v1/chat/completions": f"{_CHAT} {_LLAMACPP} {_TEMPLATES} {_TOOLS} continue_final_message"
                                " add_generation_prompt",
        "/v1/completions": f"{_TEXT} {_LLAMACPP}",
        "/v1/responses": f"{_TURN} {_LLAMACPP} {_TOOLS}",
        "/v1/messages": _MESSAGES,
        "/v1/messages/count_tokens": _COUNT,
    },
    "sglang": {
        "/v1/chat/completions": f"{_CHAT} {_SGLANG} {_TEMPLATES} parallel_tool_calls continue_final_message",
        "/v1/completions": f"{_TEXT} {_SGLANG} echo response_format json_schema",
        "/v1/responses": f"{_TURN} text include parallel_tool_calls top_logprobs {_TEMPLATES} top_k min_p",
        "/v1/messages": _MESSAGES,
        "/v1/messages/count_tokens": _COUNT,
        "/v1/embeddings": "input dimensions",
        "/tokenize": "prompt messages add_special_tokens tools tool_choice chat_template_kwargs continue_final_message",
    },
    "trtllm": {
        "/v1/chat/completions": f"{_CHAT} {_TRTLLM} {_TEMPLATES} add_generation_prompt documents cache_salt",
        "/v1/completions": f"{_TEXT} {_TRTLLM} response_format",
        "/v1/responses": f"{_TURN} text top_logprobs",
    },
    # Any server with OpenAI's API: what OpenAI documents.
    "attached": {
        "/v1/chat/completions": f"{_CHAT} parallel_tool_calls reasoning_effort verbosity modalities audio prediction"
                                " service_tier web_search_options user metadata store",
        "/v1/completions": f"{_TEXT} best_of echo suffix user",
        "/v1/responses": f"{_TURN} text include parallel_tool_calls truncation top_logprobs max_tool_calls service_tier"
                         " user metadata",
        "/v1/embeddings": "input dimensions encoding_format user",
    },
}
LIMITED: dict[str, Mapping[str, frozenset[str]]] = {
    engine: {path: frozenset(fields.split()) for path, fields in paths.items()} for engine, paths in _TAKES.items()
}
# A model whose template has no place for tools: llama.cpp drops them.
LIMITED |= {"llamacpp": {path: takes.difference(_TOOLS.split()) for path, takes in LIMITED["llamacpp+tools"].items()}}
"""Engine -> the paths that it has -> the fields that it takes there, beside `model`."""

_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def asked(body: bytes) -> list[str]:
    """The fields of a body, a JSON object, that ask an engine for something, in their order. Raises MsgspecError."""
    return [
        name for name, value in _decode(body).items()
        if name != "model" and name not in OURS and _asks(name, value)
    ]  # fmt: skip


def _asks(name: str, value: msgspec.Raw) -> bool:
    if len(value) > _SHORT_BYTES:
        return True
    try:
        said = msgspec.json.decode(value)
    except msgspec.MsgspecError:  # half a surrogate pair, 1e999: JSON that only an engine can judge
        return True
    nothing = _ASKS_NOTHING.get(name, _NOTHING)
    return not any(said == each and isinstance(said, bool) == isinstance(each, bool) for each in nothing)


def missing(engine: str, path: str, fields: list[str]) -> str:
    """The path, or the first of the fields, that an engine does not have; empty: it takes them all."""
    takes = LIMITED.get(engine)
    if takes is None:
        return ""
    if path not in takes:
        return path
    return next((name for name in fields if name not in takes[path]), "")


def foreign(engine: str, path: str) -> frozenset[str]:
    """Fields of ours that an engine is not to see: it would refuse them."""
    return OURS - LIMITED.get(engine, {}).get(path, OURS)
