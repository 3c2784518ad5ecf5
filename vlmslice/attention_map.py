"""Where a model looked: the attention of each token of an answer over the visual tokens, in pixels of the image.

Legend: A tokens of the answer, M visual tokens of the image, H heads, L prompt and answer.

A token is chosen at the place before it, so that is where its attention is read. With the connector `cross_attention`
it is that of the looking layers, whose weights over the visual tokens and over "nothing" sum to 1 (see
`cross_attention`); other models look at visual tokens as at any other token of the prompt, and "nothing" is then the
weight of all that is no image. Attention shows what a layer had at hand, not why the answer came out as it did (Jain
and Wallace, 2019, "Attention is not Explanation", https://arxiv.org/abs/1902.10186).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from vlmslice.attention_guide import guided_layers
from vlmslice.connectors import query_grid
from vlmslice.errors import VlmSliceError
from vlmslice.image_loading import ImageSource, load_image
from vlmslice.inference import MAX_NEW_TOKENS, Assistant
from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.slicing import SlicePlan, View
from vlmslice.spatial_schema import LOCATION_TOKENS


class AttentionError(VlmSliceError, ValueError):
    """A model gives no attention to show."""


class Part(NamedTuple):
    """A word, a character or a point of an answer.

    Attributes:
        label: The text; points are numbered.
        tokens: Numbers of its tokens.
        weights: `float64[M]`, the mean of theirs.
    """

    label: str
    tokens: tuple[int, ...]
    weights: np.ndarray


@dataclass(frozen=True)
class AttentionMap:
    """The attention of an answer over one image.

    Attributes:
        plan: How the image was cut.
        question: What was asked.
        answer: The answer, without special tokens.
        pieces: The text of each token of the answer, its end not included; empty where a character goes on in the next
            token, and the number of a row or column where the answer points.
        is_location: For each token, whether it is such a number.
        weights: `float64[A, M]`; with `nothing`, each row sums to 1.
        nothing: `float64[A]`, the weight of what is no image.
        boxes: `float64[M, 4]` top, left, bottom, right of each visual token in px of the image; they tile what is kept
            of each view, and reach beyond the image where the view does.
        views: `int64[M]`, number of each token's view in `plan.views`.
    """

    plan: SlicePlan
    question: str
    answer: str
    pieces: tuple[str, ...]
    is_location: tuple[bool, ...]
    weights: np.ndarray
    nothing: np.ndarray
    boxes: np.ndarray
    views: np.ndarray

    def parts(self, by: str = "word") -> list[Part]:
        """The answer in words or characters, without the spaces between; a point is one part.

        Args:
            by: `word` or `character`.

        Raises:
            AttentionError: `by` is neither.
        """
        if by not in ("word", "character"):
            raise AttentionError(f"the answer is asked for by {by!r}; expected 'word' or 'character'")
        return [
            Part(label, tokens, self.weights[list(tokens)].mean(axis=0))
            for label, tokens in _group(self.pieces, self.is_location, by == "word")
        ]

    def heat(self, weights: np.ndarray, height: int, width: int) -> np.ndarray:
        """The attention over the image, at any resolution.

        Each token's weight is spread evenly over its box, so the sum is that of the weights, less what falls beyond the
        image.

        Args:
            weights: `float64[M]`.
            height: Of the map.
            width: Likewise.

        Returns:
            `float64[height, width]`.
        """
        image_height, image_width = self.plan.image_size
        scale = np.array([height / image_height, width / image_width] * 2)
        heat = np.zeros((height, width))
        for (top, left, bottom, right), weight in zip(self.boxes * scale, weights, strict=True):
            if weight > 0:
                rows, cols = _cover(top, bottom, height), _cover(left, right, width)
                _add(heat, rows, cols, weight / ((bottom - top) * (right - left)))
        return heat


def attend(
    assistant: Assistant,
    image: ImageSource,
    question: str,
    *,
    policy: str | None = None,
    max_visual_tokens: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = (0,),
) -> AttentionMap:
    """Answers a question about an image, and tells what each token of the answer looked at.

    Args:
        assistant: The model and its processor.
        image: What `load_image` takes.
        question: As in `Assistant.ask`.
        policy: As in `Assistant.ask`.
        max_visual_tokens: As in `Assistant.ask`.
        max_new_tokens: As in `Assistant.ask`.
        layers: Numbers of the looking layers (with other connectors, of the language layers) to average; by default
            those that the guide loss teaches, see `attention_guide.guided_layers`.
        heads: Numbers of the heads to average, None for all; by default the first, which the guide loss teaches to
            look at what the next token is read from. Of a model trained without that loss, all heads tell more.

    Raises:
        AttentionError: There are no such layers or heads, or the answer is empty.
        ImageError: The image cannot be loaded.
        SlicingError: The image cannot be planned as asked.
    """
    model, processor = assistant.model, assistant.processor
    [(plan,)], inputs = assistant._encode([([load_image(image)], question)], policy, max_visual_tokens)
    prompt_length = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        weights_LHAM = _look_again(model, dict(inputs) | {"input_ids": ids}, prompt_length)
    weights_LHAM = weights_LHAM[_choose("layer", layers, guided_layers(len(weights_LHAM)), len(weights_LHAM))]
    num_heads = weights_LHAM.shape[1]
    weights_LHAM = weights_LHAM[:, _choose("head", heads, range(num_heads), num_heads)]
    answer_ids = ids[0, prompt_length:].tolist()
    ends = _as_list(model.generation_config.eos_token_id)
    if answer_ids and answer_ids[-1] in ends:
        answer_ids.pop()
    if not answer_ids:
        raise AttentionError("the answer is empty, so nothing was looked at for it; ask something else")
    weights_AM = weights_LHAM.mean(dim=(0, 1))[: len(answer_ids)].double().cpu().numpy()
    pieces, is_location = _spell_pieces(processor.tokenizer, answer_ids, processor.location_token_id)
    boxes, views = locate_tokens(
        plan, model.config.slicing["merge_size"], model.config.slicing["tokens_per_view"]
    )
    return AttentionMap(
        plan,
        question,
        processor.tokenizer.decode(answer_ids, skip_special_tokens=True),
        pieces,
        is_location,
        weights_AM,
        1 - weights_AM.sum(axis=1),
        boxes,
        views,
    )


def locate_tokens(
    plan: SlicePlan, merge_size: int, tokens_per_view: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Where the visual tokens of an image lie on it, in the order in which the model receives them.

    Args:
        plan: Of the image.
        merge_size: Patches along a side of the block that becomes a token.
        tokens_per_view: Of a resampler with learned queries, which are spread evenly; else None.

    Returns:
        `float64[M, 4]` top, left, bottom, right in px of the image, and `int64[M]` numbers of views in `plan.views`.
    """
    boxes, views = [], []
    for number, view in enumerate(plan.views):
        rows, cols = (
            (view.patch_grid[0] // merge_size, view.patch_grid[1] // merge_size)
            if tokens_per_view is None
            else query_grid(tokens_per_view)
        )
        top, left, bottom, right = view.token_box or (0, 0, rows, cols)
        found = [
            _cell_box(view, row, col, rows, cols) for row in range(top, bottom) for col in range(left, right)
        ]
        boxes += found
        views += [number] * len(found)
    return np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(views, dtype=np.int64)


def _cell_box(view: View, row: int, col: int, rows: int, cols: int) -> tuple[float, float, float, float]:
    """One of rows x cols equal cells of a view, in px of the image."""
    high, wide = view.size[0] / rows, view.size[1] / cols
    return view.box_to_image((row * high, col * wide, (row + 1) * high, (col + 1) * wide))


def _look_again(model: VlmSliceForConditionalGeneration, inputs: dict, prompt_length: int) -> torch.Tensor:
    """`[layers, H, A, M]` weights with which the tokens of the answer were chosen, in one run over all of them."""
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if model.config.coverage_penalty:
        return _look_step_by_step(model, inputs, prompt_length)
    if model.cross_attention is not None:
        attentions = model(**inputs, use_cache=False, output_attentions=True).cross_attentions
        # The last of the keys is "nothing".
        return torch.stack([layer[0, :, prompt_length - 1 : -1, :-1] for layer in attentions])
    before = model.language_model.config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})  # no other gives weights
    try:
        attentions = model(**inputs, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation({"text_config": before})
    if not attentions or attentions[0] is None:
        raise AttentionError(
            f"{type(model.language_model).__name__} gives no attention weights; expected a language model with the "
            "attention implementation 'eager'"
        )
    is_visual = inputs["input_ids"][0] == model.config.image_token_id
    return torch.stack([layer[0, :, prompt_length - 1 : -1][..., is_visual] for layer in attentions])


def _look_step_by_step(
    model: VlmSliceForConditionalGeneration, inputs: dict, prompt_length: int
) -> torch.Tensor:
    """The same where each token changes what the next may look at, see `coverage`."""
    assert model.cross_attention is not None
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    points = model._last_points(ids)
    step = {"input_ids": ids[:, :prompt_length], **inputs}
    weights, memory, cache = [], None, None
    for length in range(prompt_length, ids.shape[1]):
        outputs = model(
            **step,
            attention_mask=mask[:, :length],
            past_key_values=cache,
            use_cache=True,
            output_attentions=True,
        )
        weights.append(torch.stack([layer[0, :, -1, :-1] for layer in outputs.cross_attentions]))
        cache = outputs.past_key_values
        memory = memory or model.cross_attention.hold_back(
            outputs.visual_memory, model.config.coverage_penalty
        )
        step = {"input_ids": ids[:, length : length + 1], "visual_memory": memory}
        if points is not None:
            step["last_points"] = points[:, length : length + 1]
    return torch.stack(weights, dim=2)


def _choose(kind: str, chosen: Sequence[int] | None, default: Sequence[int], number: int) -> list[int]:
    chosen = list(default if chosen is None else chosen)
    wrong = [index for index in chosen if not 0 <= index < number]
    if wrong or not chosen:
        raise AttentionError(
            f"there is no {kind} {wrong[0]} to look at" if wrong else f"there is no {kind} to look at"
        ) from None
    return chosen


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else ids


def _spell_pieces(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], location_token_id: int | None
) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """The text that each token adds, and whether it is a location; see `AttentionMap.pieces`."""
    pieces, is_location = [], []
    pending: list[int] = []
    for token in ids:
        number = -1 if location_token_id is None else token - location_token_id
        is_location.append(0 <= number < len(LOCATION_TOKENS))
        if is_location[-1]:
            pieces.append(str(number))
            continue
        pending.append(token)
        text = str(tokenizer.decode(pending, skip_special_tokens=True))
        if (
            text.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < 4
        ):  # bytes of a character yet to come
            text = ""
        else:
            pending = []
        pieces.append(text)
    return tuple(pieces), tuple(is_location)


def _group(
    pieces: Sequence[str], is_location: Sequence[bool], by_word: bool
) -> list[tuple[str, tuple[int, ...]]]:
    """Labels and tokens of each part: a point is two locations, words end at spaces, characters with their text."""
    parts: list[tuple[str, tuple[int, ...]]] = []
    text, num_points = "", 0
    tokens: list[int] = []

    def end() -> None:
        nonlocal text, tokens
        if text.strip():
            parts.append((text.strip(), tuple(tokens)))
        text, tokens = "", []

    for index, (piece, is_one) in enumerate(zip(pieces, is_location, strict=True)):
        if tokens and (is_one != is_location[index - 1] or piece[:1].isspace()):
            end()
        if is_one:
            num_points += not tokens
            text = f"point {num_points}"
        else:
            text += piece
        tokens.append(index)
        is_whole = len(tokens) == 2 if is_one else piece[-1:].isspace() or (piece and not by_word)
        if is_whole:
            end()
    end()
    return parts


def _cover(start: float, end: float, length: int) -> tuple[int, np.ndarray]:
    """First cell and, from there, the share of each of `length` cells that lies between start and end."""
    start, end = max(start, 0.0), min(end, float(length))
    if end <= start:
        return 0, np.zeros(0)
    first, last = int(start), min(int(np.ceil(end)), length)
    edges = np.clip(np.arange(first, last + 1), start, end)
    return first, np.diff(edges)


def _add(
    heat: np.ndarray, rows: tuple[int, np.ndarray], cols: tuple[int, np.ndarray], density: float
) -> None:
    (top, down), (left, across) = rows, cols
    heat[top : top + len(down), left : left + len(across)] += density * down[:, None] * across
