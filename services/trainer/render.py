"""An example as token ids and labels: what the model reads, and which tokens of it are learnt.

The chat template says both. For each learnt assistant message the conversation is rendered twice: up to it, with the
template's generation prompt (what the server would send to the model), and with it. What the second adds is the answer;
it is learnt up to and including the end-of-turn token, so that the tuned model knows when to stop. Everything else has
the label IGNORED. Works with any template that only appends; one that rewrites earlier turns is refused by name of the
line, never trained on wrongly.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from common.dataset import Dataset, Example, Problem

IGNORED = -100
"""The label that PyTorch's cross entropy leaves out."""


@dataclass(frozen=True)
class Encoded:
    """`input_ids` and `labels` of one example, equally long; `prompts` are the token ids before each learnt answer."""

    line: int
    input_ids: list[int]
    labels: list[int]
    prompts: tuple[tuple[int, list[int]], ...]
    """(index of the learnt message, what the server reads before it)"""

    @property
    def learnt(self) -> int:
        """How many tokens are learnt."""
        return sum(label != IGNORED for label in self.labels)


class NotRenderable(ValueError):
    """The chat template cannot show which tokens are the answer's."""


def as_served(example: Example) -> Example:
    """The example as vLLM hands it to the template: arguments of tool calls as objects, not as the text of one."""
    messages = []
    for message in example.messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            message = {**message, "tool_calls": [_parsed(call) for call in calls]}
        messages.append(message)
    return replace(example, messages=tuple(messages))


def _parsed(call: Any) -> Any:
    function = call["function"]  # `common.dataset` has seen to it
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    return {**call, "function": {**function, "arguments": json.loads(arguments) if arguments else {}}}


def encode(example: Example, tokenizer: Any) -> Encoded:
    """Token ids and labels of a whole example. Raises NotRenderable."""
    example = as_served(example)
    ends = end_of_turn(tokenizer)
    whole = _render(tokenizer, example, len(example.messages))
    labels = [IGNORED] * len(whole)
    prompts = []
    for at, learnt in enumerate(example.learnt):
        if not learnt:
            continue
        prefix = _render(tokenizer, example, at, generation=True)
        upto = _render(tokenizer, example, at + 1)
        if upto[: len(prefix)] != prefix or whole[: len(upto)] != upto:
            raise NotRenderable(
                f"messages[{at}]: the chat template rewrites earlier text, so its tokens cannot be told apart"
            )
        stop = max((i for i in range(len(prefix), len(upto)) if upto[i] in ends), default=None)
        if stop is None:
            raise NotRenderable(f"messages[{at}]: the chat template writes no end-of-turn token after it")
        labels[len(prefix) : stop + 1] = whole[len(prefix) : stop + 1]
        prompts.append((at, prefix))
    return Encoded(example.line, whole, labels, tuple(prompts))


def end_of_turn(tokenizer: Any) -> frozenset[int]:
    """Tokens at which the server stops: the tokenizer's end of sequence and the usual ends of a turn that it knows."""
    usual = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>")
    known = tokenizer.get_vocab()
    return frozenset({tokenizer.eos_token_id, *(known[token] for token in usual if token in known)} - {None})


def encode_all(found: Dataset, tokenizer: Any, max_tokens: int) -> tuple[list[Encoded], list[Problem], list[int]]:
    """Every example of a dataset: (encoded, problems, lines that were cut to `max_tokens`).

    A row whose learnt tokens would all be cut off is a problem, not an example without labels.
    """
    encoded, problems, cut = [], [], []
    for example in found.examples:
        try:
            one = encode(example, tokenizer)
        except NotRenderable as error:
            problems.append(Problem(example.line, "messages", "not_renderable", str(error)))
            continue
        except Exception as error:  # a template is a program of the model's author; it may raise anything
            problems.append(
                Problem(example.line, "messages", "not_renderable", f"the chat template refuses it: {error}")
            )
            continue
        if len(one.input_ids) > max_tokens:
            cut.append(example.line)
            one = Encoded(one.line, one.input_ids[:max_tokens], one.labels[:max_tokens], one.prompts)
            if not one.learnt:
                problems.append(
                    Problem(
                        example.line,
                        "messages",
                        "nothing_left",
                        f"the answer begins after token {max_tokens}, where the row is cut: nothing to learn",
                    )
                )
                continue
        encoded.append(one)
    return encoded, problems, cut


def longest(encoded: Iterable[Encoded], count: int = 3) -> list[tuple[int, int]]:
    """(line, tokens) of the longest rows."""
    return sorted(((one.line, len(one.input_ids)) for one in encoded), key=lambda pair: -pair[1])[:count]


def _render(tokenizer: Any, example: Example, count: int, *, generation: bool = False) -> list[int]:
    """Token ids of the first `count` messages."""
    rendered = tokenizer.apply_chat_template(
        list(example.messages[:count]),
        tools=list(example.tools) or None,
        add_generation_prompt=generation,
        tokenize=True,
        return_dict=False,
    )
    return list(rendered)
