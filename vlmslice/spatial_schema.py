"""SlicePlan -> the text that tells a language model where the pieces of an image lie; sole home of special tokens.

An image stands in a chat as one placeholder and is spelled out once its plan is known. A (2, 3) grid with an
overview of 2 visual tokens and slices of 1 visual token each becomes (line breaks only for the eye; `.` is one
`<|image|>` placeholder, to be replaced by one visual token)::

    <|image_start|> <|overview|> . .
                    <|slice|> .  <|slice|> .  <|slice|> .  <|row|>
                    <|slice|> .  <|slice|> .  <|slice|> .  <|row|>
    <|image_end|>

A (1, 1) grid has one view that covers the image, hence neither tag: `<|image_start|> . . <|image_end|>`. The order
is that of `SlicePlan.views`: overview first, then slices row by row, each row closed by `<|row|>`. So the k-th
`<|image|>` of a prompt always belongs to the k-th visual token of its images, in training and in inference alike.

A chat is a sequence of messages, `<|role|>content<|end|>`, and `<|assistant|>` asks for an answer. Nothing but
special tokens separates messages, so the ids of a prompt are a strict prefix of the ids of prompt and answer.

An answer that counts points first: row and column of the patch that holds the centre of each object, in the order of
rows and then columns, and after them the number: `<|2|><|5|><|2|><|9|>2`. Patches are those of the canvas that the
slices tile (`SlicePlan.to_canvas`). Location tokens are left out of the decoded answer, as all special tokens are.
(Counting by pointing: Deitke et al., 2024, "Molmo and PixMo", https://arxiv.org/abs/2409.17146.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AddedToken, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from vlmslice.slicing import SlicePlan

IMAGE_TOKEN = "<|image|>"
IMAGE_START = "<|image_start|>"
IMAGE_END = "<|image_end|>"
OVERVIEW_START = "<|overview|>"
SLICE_START = "<|slice|>"
ROW_END = "<|row|>"

USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SYSTEM = "<|system|>"
END = "<|end|>"
PAD = "<|pad|>"

SPECIAL_TOKENS = (
    PAD,
    END,
    USER,
    ASSISTANT,
    SYSTEM,
    IMAGE_TOKEN,
    IMAGE_START,
    IMAGE_END,
    OVERVIEW_START,
    SLICE_START,
    ROW_END,
)
"""Every token of the schema, in the order of their ids."""

LOCATION_TOKENS = tuple(f"<|{number}|>" for number in range(256))
"""Rows and columns of patches, in which an answer may point at the image; a tokenizer need not have them."""

ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}<|user|>
    {%- elif message['role'] == 'assistant' -%}<|assistant|>
    {%- elif message['role'] == 'system' -%}<|system|>
    {%- else -%}{{ raise_exception("unknown role '" ~ message['role'] ~ "'; expected system, user or assistant") }}
    {%- endif -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for block in message['content'] -%}
            {%- if block['type'] == 'text' and block['text'] is string -%}
                {{- block['text'] -}}
            {%- elif block['type'] == 'image' -%}<|image|>
            {%- elif block['type'] == 'points' and message['role'] == 'assistant' -%}
                {%- for row, col in block['points'] -%}<|{{ row | int }}|><|{{ col | int }}|>{%- endfor -%}
            {%- else -%}{{ raise_exception("bad content block of type '" ~ block['type'] ~ "'; expected text or image") }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    <|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""  # noqa: E501  # a line of jinja
"""Jinja template of a chat. Roles are listed one by one and points made numbers: a text pasted into `<|...|>` could
forge any token."""


def spell_image() -> str:
    """Spells one image whose visual tokens stay out of the prompt (connector `cross_attention`): one placeholder."""
    return IMAGE_START + IMAGE_TOKEN + IMAGE_END


def spell_plan(plan: SlicePlan) -> str:
    """Spells one image: placeholders between the tags that say where each view lies.

    It holds exactly `plan.num_visual_tokens` placeholders, whatever the plan. See the module's docstring for a
    worked example.
    """
    if plan.grid == (1, 1):
        return IMAGE_START + IMAGE_TOKEN * plan.num_visual_tokens + IMAGE_END
    pieces = [IMAGE_START]
    if plan.overview is not None:
        pieces.append(OVERVIEW_START + IMAGE_TOKEN * plan.overview.num_visual_tokens)
    num_rows, num_cols = plan.grid
    for row in range(num_rows):
        views = plan.slices[row * num_cols : (row + 1) * num_cols]
        pieces.extend(SLICE_START + IMAGE_TOKEN * view.num_visual_tokens for view in views)
        pieces.append(ROW_END)
    pieces.append(IMAGE_END)
    return "".join(pieces)


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds the schema's tokens to any tokenizer and makes `<|end|>` and `<|pad|>` its end and padding tokens.

    The language model that owns the tokenizer must then grow its embeddings to `len(tokenizer)` and stop at
    `tokenizer.eos_token_id`.

    Returns:
        The number of tokens that were new.
    """
    num_before = len(tokenizer)
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS], special_tokens=True
    )
    named = {"eos_token": END, "pad_token": PAD}
    others = [token for token in SPECIAL_TOKENS if token not in named.values()]
    tokenizer.add_special_tokens(
        {**named, "extra_special_tokens": others}, replace_extra_special_tokens=False
    )
    return len(tokenizer) - num_before


def build_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the chat template for a tokenizer: `CHAT_TEMPLATE`, opened by its start token if it uses one.

    A language model pretrained with a start token on every text (Llama, Gemma) reads poorly without it; one whose
    tokenizer defines a start token but does not write it (SmolLM2, GPT-2) has never seen it there.
    """
    if tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return "{{- bos_token -}}\n" + CHAT_TEMPLATE
    return CHAT_TEMPLATE
