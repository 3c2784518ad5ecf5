"""Answers that are JSON of a given schema: at each step, tokens that would break it cannot be chosen.

Constrained decoding (Willard and Louf, 2023, https://arxiv.org/abs/2307.09702); llguidance tells what may follow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import LogitsProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlmslice.answer_schemas import SchemaError

# A schema allows blanks between any two parts, as many as one likes, and so a model may write them for ever.
_WHITESPACE = " ?"


class JSONSchemaLogitsProcessor(LogitsProcessor):
    """Leaves each answer of a batch only the tokens by which it stays, or becomes, JSON of the schema.

    Made anew for each call of `generate`, as it follows the answers along; not for beam search, which reorders them.
    """

    def __init__(
        self,
        schema: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        eos_token_id: int | Sequence[int] | None = None,
    ):
        """Compiles the schema.

        Args:
            schema: A JSON schema, see https://json-schema.org.
            tokenizer: Of the model.
            eos_token_id: What may end an answer, by default the tokenizer's.

        Raises:
            SchemaError: The schema is wrong or uses what llguidance does not know, or the tokenizer is not a fast one.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise SchemaError(
                f"answers by a JSON schema need a fast tokenizer, got {type(tokenizer).__name__}; save the model with "
                "a PreTrainedTokenizerFast"
            )
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        self._tokenizer = from_tokenizer(tokenizer, eos_token=ends or None)
        try:
            self._grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), defaults={"whitespace_pattern": _WHITESPACE}
            )
        except ValueError as error:
            raise _not_followed(schema, str(error)) from error
        is_wrong, messages = LLMatcher.validate_grammar_with_warnings(self._grammar, self._tokenizer)
        if is_wrong:
            raise _not_followed(schema, messages[0])
        self._matchers: list[LLMatcher] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Sets the scores, (batch, vocabulary), of all other tokens to minus infinity."""
        if not self._matchers:  # the first step: all ids are the prompt's
            self._matchers = [LLMatcher(self._tokenizer, self._grammar) for _ in range(len(input_ids))]
        else:
            for matcher, last in zip(self._matchers, input_ids[:, -1].tolist(), strict=True):
                if not matcher.is_stopped():
                    matcher.consume_token(last)
        allowed = torch.zeros(scores.shape, dtype=torch.bool)
        for row, matcher in enumerate(self._matchers):
            if problem := matcher.get_error():
                raise RuntimeError(f"the answer cannot be held to its schema: {problem}")
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            width = min(len(bits), scores.shape[1])
            allowed[row, :width] = torch.from_numpy(bits[:width]).bool()
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)


def _not_followed(schema: dict[str, Any], problem: str) -> SchemaError:
    return SchemaError(
        f"the JSON schema {json.dumps(schema)[:80]} cannot be followed: {problem.splitlines()[0]}; expected one as on "
        "https://json-schema.org, such as {'type': 'object', 'properties': {'total': {'type': 'string'}}}"
    )
