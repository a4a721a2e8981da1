"""What a model's family means to the agent: what of the engine it can use, and how it writes tool calls."""

from collections.abc import Mapping
from typing import Any

from loguru import logger

DECODERS = ("ForCausalLM", "LMHeadModel")
LLAMA_3_VOCABULARY = 128_256
DEFAULT_TOOL_PARSER = "hermes"


def is_decoder(said: Mapping[str, Any]) -> bool:
    """Whether it writes token after token, as adapters and the KV tier need. One that does not say is taken for one."""
    names = said.get("architectures") or ["?ForCausalLM"]
    if any(name.endswith(DECODERS) for name in names):
        return True
    if any(name.endswith("ForConditionalGeneration") for name in names):
        logger.warning("adapters and the KV tier are off: they are for models of text alone", architectures=names)
    return False


def tool_parser(said: Mapping[str, Any]) -> str:
    """vLLM's parser of the tool calls that this family writes. Others: TOOL_CALL_PARSER."""
    if said.get("model_type") == "mistral":
        return "mistral"
    if said.get("model_type") == "llama" and said.get("vocab_size") == LLAMA_3_VOCABULARY:
        return "llama3_json"
    return DEFAULT_TOOL_PARSER
