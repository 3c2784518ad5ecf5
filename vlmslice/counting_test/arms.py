"""The arms of the test: how a picture is sliced, and what the model is told about it.

Without the overview, the model gets the slices alone. Without the spatial schema it gets all views, but is not told
where the slices lie: no tag stands between visual tokens in the prompt, and every slice claims the upper left corner of
the canvas. Both are made by editing the inputs of a model, between its processor and itself, so a model is asked in all
arms as it is. Pictures that one view covers are the same in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmslice.errors import VlmSliceError, suggestion
from vlmslice.spatial_schema import OVERVIEW_START, ROW_END, SLICE_START

if TYPE_CHECKING:
    from vlmslice.modeling import VlmSliceForConditionalGeneration
    from vlmslice.processing import VlmSliceProcessor
    from vlmslice.slicing import SlicePlan

ARM_OPTIONS = ("no-overview", "no-schema")


class ArmError(VlmSliceError, ValueError):
    """An arm is unknown, or means nothing to a model."""


@dataclass(frozen=True)
class Arm:
    """One way of asking.

    Attributes:
        policy: Slicing policy; None for a model that slices as it likes, or not at all.
        overview: Whether the overview is shown beside several slices.
        schema: Whether the model is told where slices lie.
    """

    policy: str | None
    overview: bool = True
    schema: bool = True

    @property
    def name(self) -> str:
        """Such as "adaptive" or "adaptive, no overview"."""
        parts = [self.policy or "as it is"]
        parts += [] if self.overview else ["no overview"]
        parts += [] if self.schema else ["no schema"]
        return ", ".join(parts)

    @property
    def is_plain(self) -> bool:
        """Whether the model gets all that it usually gets."""
        return self.overview and self.schema


def build_arms(policies: Sequence[str | None], options: Sequence[str] = ()) -> list[Arm]:
    """For each policy the plain arm, and one for each option that is taken away.

    Args:
        policies: Names, or None; see `Arm`.
        options: Some of `ARM_OPTIONS`; "no-overview,no-schema" takes away both.
    """
    arms = []
    for policy in dict.fromkeys(policies):
        arms.append(Arm(policy))
        for option in dict.fromkeys(options):
            names = option.split(",")
            for name in names:
                if name not in ARM_OPTIONS:
                    raise ArmError(
                        f"there is no arm {name!r}{suggestion(name, ARM_OPTIONS)}; expected one of "
                        f"{', '.join(ARM_OPTIONS)}, or both joined by a comma"
                    )
            arms.append(Arm(policy, "no-overview" not in names, "no-schema" not in names))
    return arms


def check_arm(arm: Arm, model: VlmSliceForConditionalGeneration, processor: VlmSliceProcessor) -> None:
    """Raises if an arm would be no other than the plain one.

    Raises:
        ArmError: The model is never told where slices lie, so nothing can be taken away.
    """
    config = model.config
    vision = config.vision_config
    is_told = (
        not processor.one_placeholder
        or config.canvas_position
        or config.location_token_id is not None
        or vision.stem == "conv"
        or bool(vision.canvas_dilations)
    )
    if not arm.schema and not is_told:
        raise ArmError(
            f"arm {arm.name!r} means nothing to a model with the connector {config.connector!r} and without canvas "
            "positions, which is never told where slices lie; leave --arm no-schema out"
        )


def edit_inputs(
    inputs: Any, plans: Sequence[Sequence[SlicePlan]], arm: Arm, processor: VlmSliceProcessor
) -> Any:
    """The model inputs of an arm, made from those of the plain one.

    Args:
        inputs: Of B samples, as `VlmSliceProcessor` returns them; not changed.
        plans: Of the images of each sample.
        arm: What to take away.
        processor: That made the inputs.

    Returns:
        Inputs of the same form: fewer views without overviews, fewer ids without tags or the placeholders of overviews.
    """
    import torch

    if arm.is_plain:
        return inputs
    edited = type(inputs)(dict(inputs))
    of_images = [plan for of_sample in plans for plan in of_sample]
    if not arm.schema:
        boxes = inputs["canvas_boxes"]
        edited["canvas_boxes"] = boxes - boxes[:, [0, 1, 0, 1]]
    if not arm.overview:
        kept = torch.tensor(
            [view is not plan.overview for plan in of_images for view in plan.views],
            device=inputs["num_views"].device,
        )
        for name in ("pixel_values", "target_sizes", "canvas_boxes", "token_boxes"):
            if name in edited:
                edited[name] = edited[name][kept]
        has_overview = [plan.overview is not None for plan in of_images]
        edited["num_views"] = inputs["num_views"] - inputs["num_views"].new_tensor(has_overview)
    if not processor.one_placeholder:
        edited["input_ids"], edited["attention_mask"] = _drop_ids(inputs, arm, processor)
    return edited


def _drop_ids(inputs: Any, arm: Arm, processor: VlmSliceProcessor) -> tuple[Any, Any]:
    """ids and mask without the tags of the schema, or without overviews, padded on the left again."""
    import torch

    overview_start, slice_start, row_end = processor.tokenizer.convert_tokens_to_ids(
        [OVERVIEW_START, SLICE_START, ROW_END]
    )
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        row, in_overview = [], False
        for token in ids[mask.bool()].tolist():
            in_overview = token == overview_start or (in_overview and token == processor.image_token_id)
            is_tag = token in (overview_start, slice_start, row_end)
            if (in_overview and not arm.overview) or (is_tag and not arm.schema):
                continue
            row.append(token)
        rows.append(ids.new_tensor(row))
    pad = processor.tokenizer.pad_token_id
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    masks = [torch.ones_like(row) for row in rows]
    return padded, torch.nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_side="left")
