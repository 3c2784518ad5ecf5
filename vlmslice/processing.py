"""Images and a chat -> model inputs; ids -> answer text.

The chat template leaves one `<|image|>` per image; `replace_image_token` spells each out by its slice plan (see
`spatial_schema`), so text and pixels always come from the same plan.

Text of a user can never become a control token. `apply_chat_template` marks each special token that a message spells
before it renders the chat, and the tokenizer encodes what is marked as plain text: transformers' control-token
sanitising, on by default here. Prompts, `pipeline("image-text-to-text")` and training all take this one way from
messages to ids. Two code points cannot pass it: U+F0000 and U+F0001, which transformers uses as the marks, are
dropped from messages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import _MARKED_RE, ImagesKwargs, MultiModalData, ProcessorMixin, TextKwargs
from transformers.utils.chat_template_utils import _get_control_token_patterns, mark_control_tokens

from vlmslice.errors import VlmSliceError
from vlmslice.slicing import SlicingConfig
from vlmslice.spatial_schema import (
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    LOCATION_TOKENS,
    SPECIAL_TOKENS,
    build_chat_template,
    spell_image,
    spell_plan,
)


class PlaceholderError(VlmSliceError, ValueError):
    """The images of a sample and its placeholders disagree.

    Attributes:
        sample_index: Position of the sample in its batch.
    """

    def __init__(self, message: str, sample_index: int):
        super().__init__(message)
        self.sample_index = sample_index


class TruncationError(VlmSliceError, ValueError):
    """Truncation to a maximum length would cut into the visual tokens of an image."""


class VlmSliceProcessor(ProcessorMixin):
    """Turns chats with images into model inputs, and generated ids back into text.

    ```python
    messages = [{"role": "user", "content": [{"type": "image", "path": "receipt.png"},
                                             {"type": "text", "text": "What is the total?"}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ```

    Called directly, `processor(images, text)` takes a rendered chat, in which control tokens count; text of a user
    belongs in a message. `images` is one image, a list in the order of the placeholders, or such a list per sample.

    Model inputs of B samples of L ids:

    - `input_ids`, `attention_mask`: `int64[B, L]`, padded on the left
    - `pixel_values`, `target_sizes`, `canvas_boxes`, `num_views`: see `view_packing.PackedViews`, over the images of
      the whole batch in order; absent if no sample has an image
    """

    text_kwargs = TextKwargs(
        add_special_tokens=False,  # the chat template writes them
        padding=True,
        padding_side="left",
        return_tensors="pt",
        sanitize_control_tokens=True,  # respects the marks that `apply_chat_template` sets
    )
    images_kwargs = ImagesKwargs(return_tensors="pt")

    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        one_placeholder: bool = False,
    ):
        """Joins the parts.

        Args:
            image_processor: A `VlmSliceImageProcessor` or `VlmSliceImageProcessorPil`.
            tokenizer: Any tokenizer that went through `spatial_schema.add_special_tokens`.
            chat_template: A jinja template; by default the one that `build_chat_template` makes for the tokenizer.
            one_placeholder: An image stands in the prompt as one placeholder instead of one for each visual token; for
                models with the connector `cross_attention`.
        """
        missing = sorted(set(SPECIAL_TOKENS) - set(tokenizer.get_added_vocab()))
        if missing:
            raise ValueError(
                f"the tokenizer lacks {', '.join(missing)}; expected every token of the spatial schema; "
                "call vlmslice.spatial_schema.add_special_tokens(tokenizer) first"
            )
        # transformers lets a tokenizer's own side win over `text_kwargs`, and generation needs the left one.
        tokenizer.padding_side = "left"
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.one_placeholder = one_placeholder
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or build_chat_template(tokenizer)
        )

    def apply_chat_template(  # type: ignore[override]  # the rest of the options is passed on
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        *,
        sanitize_control_tokens: bool = True,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Renders messages, and with `tokenize=True` encodes them and their images; see transformers' method.

        Control tokens spelled in messages become plain text. Without `tokenize=True` the rendered string keeps the
        (invisible) marks around them, so that handing it to this processor later is safe too.

        The marks are set here, not by transformers' own option of this name: that one leaves a control token that is
        spelled across two text blocks, and counts `<|ima<|pad|>ge|>` as a placeholder (5.23).

        Args:
            conversation: The messages of one chat, or a list of chats.
            chat_template: A template to use instead of the processor's.
            tools: As in transformers.
            documents: As in transformers.
            sanitize_control_tokens: `False` lets messages write control tokens.
            return_assistant_tokens_mask: As in transformers; not together with `sanitize_control_tokens`.
            processor_kwargs: Options of the call on the rendered chat.
            **kwargs: Further options of transformers' method.
        """
        if not sanitize_control_tokens:
            processor_kwargs = {**(processor_kwargs or {}), "sanitize_control_tokens": False}
        elif return_assistant_tokens_mask:
            raise ValueError(
                "return_assistant_tokens_mask needs character offsets, which sanitised text has not; take the labels "
                "of VlmSliceCollator, or pass sanitize_control_tokens=False for text that you trust"
            )
        else:
            template = self._resolve_chat_template(chat_template)
            control_tokens, _ = _get_control_token_patterns(self.tokenizer._get_control_tokens(template))
            conversation = _mark_messages(conversation, control_tokens)
            tools = mark_control_tokens(tools, control_tokens)
            documents = mark_control_tokens(documents, control_tokens)
        return super().apply_chat_template(
            conversation,
            chat_template,
            tools,
            documents,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )

    def validate_inputs(  # type: ignore[override]  # as above
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> None:
        """Checks that every sample has as many images as placeholders.

        transformers compares the sums over the batch, which lets two samples swap their images unnoticed.
        """
        if isinstance(text, list) and all(isinstance(sample, str) for sample in text):
            # A space in place of each marked token keeps the text around it from joining into a placeholder.
            text = [_MARKED_RE.sub(" ", sample) for sample in text]
            num_placeholders = [sample.count(IMAGE_TOKEN) for sample in text]
            num_images = _count_images(images, num_placeholders)
            for index, (expected, got) in enumerate(zip(num_placeholders, num_images, strict=True)):
                if got != expected:
                    raise PlaceholderError(
                        f"sample {index} of the batch has {got} images but {expected} image placeholders; "
                        "give each sample one image per placeholder, and as many lists of images as samples",
                        sample_index=index,
                    )
        super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that stands in for the placeholder of one image."""
        return spell_image() if self.one_placeholder else spell_plan(image_inputs["plans"][image_idx])

    @property
    def location_token_id(self) -> int | None:
        """Id of the first of `LOCATION_TOKENS`, after which the others follow; None without them."""
        return self.tokenizer.get_added_vocab().get(LOCATION_TOKENS[0])

    def find_points(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Row and column of each patch that an answer points at; see `spatial_schema`. A row without column is none."""
        first = self.location_token_id
        if first is None:
            return []
        found = [token - first for token in ids if 0 <= token - first < len(LOCATION_TOKENS)]
        return list(zip(found[::2], found[1::2], strict=False))

    @property
    def unused_input_names(self) -> list[str]:
        return ["plans"]

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        """Refuses a truncation that cut into an image or dropped one."""
        start, end = self.tokenizer.convert_tokens_to_ids([IMAGE_START, IMAGE_END])
        input_ids = text_inputs["input_ids"]
        for index, ids in enumerate(input_ids if isinstance(input_ids, list) else input_ids.tolist()):
            if ids.count(start) != ids.count(end):
                raise TruncationError(
                    f"truncation to {len(ids)} ids cuts into an image of sample {index}: {ids.count(start)} images "
                    f"begin but {ids.count(end)} end; raise max_length, or lower max_visual_tokens"
                )
        try:
            super()._check_special_mm_tokens(text, text_inputs, modalities)
        except ValueError as error:
            raise TruncationError(
                f"truncation drops visual tokens; raise max_length, or lower max_visual_tokens. {error}"
            ) from error

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders and views (rows of `pixel_values`) of images, from their (height, width) alone."""
        if image_sizes is None:
            return MultiModalData()
        options = self._merge_kwargs(**kwargs)["images_kwargs"]
        slicing = {
            field.name: options[field.name] for field in fields(SlicingConfig) if field.name in options
        }
        plans = [self.image_processor.plan(height, width, **slicing) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[1 if self.one_placeholder else plan.num_visual_tokens for plan in plans],
            num_image_patches=[len(plan.views) for plan in plans],
        )


def _mark_messages(conversation: Any, control_tokens: re.Pattern[str]) -> Any:
    """Marks the control tokens in the text of one chat or of several; images and their paths stay as they are.

    Neighbouring text blocks are joined first: of "<|ima" and "ge|>" neither is a control token, but rendered side by
    side they are one.
    """
    if not isinstance(conversation, dict):
        chats = getattr(conversation, "messages", conversation)
        return [_mark_messages(part, control_tokens) for part in chats]
    marked = {
        key: mark_control_tokens(value, control_tokens)
        for key, value in conversation.items()
        if key != "content"
    }
    content = conversation.get("content")
    if not isinstance(content, (list, tuple)):
        return {**marked, "content": mark_control_tokens(content, control_tokens)}
    blocks: list[Any] = []
    for block in content:
        if blocks and _is_text(blocks[-1]) and _is_text(block):
            blocks[-1] = {"type": "text", "text": blocks[-1]["text"] + block["text"]}
        else:
            blocks.append(block)
    return {
        **marked,
        "content": [
            mark_control_tokens(block, control_tokens) if _is_text(block) else block for block in blocks
        ],
    }


def _is_text(block: Any) -> bool:
    return isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str)


def _count_images(images: Any, num_placeholders: list[int]) -> list[int]:
    """Images of each sample; a flat list is dealt out by the placeholders, and the last sample takes what is left."""
    num_samples = len(num_placeholders)
    if (
        isinstance(images, (list, tuple))
        and images
        and all(isinstance(part, (list, tuple)) for part in images)
    ):
        counts = [len(part) for part in images]
        # Lists without a sample, or samples without a list, are a mismatch of the last sample.
        return [*counts, *[0] * num_samples][: num_samples - 1] + [sum(counts[num_samples - 1 :])]
    flat: Any = [] if images is None else make_flat_list_of_images(images)
    num_left = len(flat)
    counts = []
    for expected in num_placeholders[:-1]:
        counts.append(min(expected, num_left))
        num_left -= counts[-1]
    return [*counts, num_left]
