"""Rendered task samples -> one training batch, with cell labels for the dense loss and places for the guide loss."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import torch
from transformers import BatchFeature

from vlmslice.attention_guide import NOTHING
from vlmslice.connectors import query_grid
from vlmslice.data.collator import IGNORED, VlmSliceCollator
from vlmslice.data.dense import CELLS_PER_SIDE, HEADS, label_cells
from vlmslice.data.samples import Place, Turn
from vlmslice.data.sight import Cell, find_sight
from vlmslice.data.tasks import TaskSample
from vlmslice.processing import VlmSliceProcessor
from vlmslice.slicing import SlicePlan, View
from vlmslice.spatial_schema import IMAGE_TOKEN, LOCATION_TOKENS

Point = tuple[Cell, int]
"""Where an object that is counted is shown: patch of the canvas, and number of the visual token that sees it."""


class TaskCollator:
    """`VlmSliceCollator` for `TaskSample`s, with what the renderer knows besides.

    - `label_NAME`: `int64[V, T, cells]` for every name in `dense`, some of `HEADS`, following the very plan by which
      the image processor cuts the picture
    - `guide_entries`, `guide_shares`: see `attention_guide.guide_loss`; left out with `guide=False`. The place of a
      character, or of an object that is counted, is the visual token that sees its centre (see `sight`). The second
      head is shown all objects that are counted and, at the words of the question, what they name. After the last
      object there is no next one: with the connector `cross_attention` the first head is then shown `NOTHING`. Needs a
      tokenizer with one id per UTF-8 byte of questions and answers.

    Answers that count point at the objects first; left out with `points=False`, for a tokenizer without location
    tokens.

    `canvas_side` moves the canvas of half of the pictures about in a square of so many patches: small pictures, which
    teach most per second, then teach the places of large ones, too. A picture is always moved alike.
    """

    def __init__(
        self,
        processor: VlmSliceProcessor,
        dense: Collection[str] = tuple(HEADS),
        guide: bool = True,
        points: bool = True,
        canvas_side: int = 0,
    ):
        self.processor = processor
        self.points = points
        self.canvas_side = canvas_side
        self.dense = dense
        self.guide = guide
        self._conversations = VlmSliceCollator(processor)
        self._image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def __call__(self, samples: Sequence[TaskSample]) -> BatchFeature:
        plans = [
            self.processor.image_processor.plan(s.scene.image.height, s.scene.image.width) for s in samples
        ]
        shifts = [self._shift(sample, plan) for sample, plan in zip(samples, plans, strict=True)]
        points = [
            [self._sorted_points(turn, plan, shift) if self.points else [] for turn in sample.turns]
            for sample, plan, shift in zip(samples, plans, shifts, strict=True)
        ]
        batch = self._conversations(
            [
                {
                    "messages": sample.messages([[cell for cell, _ in shown] for shown in points_of_turns]),
                    "images": [sample.scene.image],
                }
                for sample, points_of_turns in zip(samples, points, strict=True)
            ]
        )
        # Top and left, and again bottom and right, of every view of a picture.
        moves = [(*shift, *shift) for shift, plan in zip(shifts, plans, strict=True) for _ in plan.views]
        batch["canvas_boxes"] = batch["canvas_boxes"] + torch.tensor(moves)
        if self.dense:
            batch.update(self._cell_labels(samples, plans, batch["pixel_values"].shape[:2]))
        if self.guide:
            batch.update(self._guide(samples, plans, points, batch["input_ids"], batch["labels"]))
        return batch

    def _shift(self, sample: TaskSample, plan: SlicePlan) -> Cell:
        """By how many patches the canvas of a picture is moved down and to the right."""
        rng = random.Random(f"{sample.question}{sample.answer}{plan.image_size}")
        if rng.random() < 0.5:
            return 0, 0
        rows, cols = plan.canvas_boxes[-1][2:]
        return rng.randint(0, max(0, self.canvas_side - rows)), rng.randint(
            0, max(0, self.canvas_side - cols)
        )

    def _cell_labels(
        self, samples: Sequence[TaskSample], plans: list[SlicePlan], shape: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        labels = {name: torch.zeros(*shape, CELLS_PER_SIDE**2, dtype=torch.int64) for name in self.dense}
        views = [
            (sample.scene, view) for sample, plan in zip(samples, plans, strict=True) for view in plan.views
        ]
        for row, (scene, view) in enumerate(views):
            cells_of_names = label_cells(scene, view.box, view.patch_grid)
            for name in self.dense:
                cells = cells_of_names[name]
                labels[name][row, : len(cells)] = torch.from_numpy(cells)
        return {f"label_{name}": value for name, value in labels.items()}

    def _guide(
        self,
        samples: Sequence[TaskSample],
        plans: list[SlicePlan],
        points: list[list[list[Point]]],
        input_ids: torch.Tensor,
        labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        entries, shares = [], []
        for row, (sample, plan, points_of_turns) in enumerate(zip(samples, plans, points, strict=True)):
            # With the connector `cross_attention` it is not a position but the number of a visual token.
            placeholders = (
                range(plan.num_visual_tokens)
                if self.processor.one_placeholder
                else _positions(input_ids[row] == self._image_id)
            )
            answers = _runs(_positions(labels[row] != IGNORED))
            for turn, shown, answer in zip(sample.turns, points_of_turns, answers, strict=True):
                for head, position, token, share in self._guide_turn(turn, plan, shown, answer):
                    key = NOTHING if token == NOTHING else placeholders[token]
                    entries.append([row, head, position, key])
                    shares.append(share)
        return {
            "guide_entries": torch.tensor(entries, dtype=torch.int64).reshape(-1, 4),
            "guide_shares": torch.tensor(shares, dtype=torch.float32),
        }

    def _guide_turn(
        self, turn: Turn, plan: SlicePlan, shown: list[Point], answer: list[int]
    ) -> Iterator[tuple[int, int, int, float]]:
        """Head, position, number of a visual token or `NOTHING`, and its share, of a turn.

        Raises:
            ValueError: the answer has more or fewer ids than points and bytes.
        """
        if shown or any(turn.places):
            counted = [token for _, token in shown]
            tokens_of_ids = [[token] for token in counted for _ in ("row", "column")]
            for character, places in zip(turn.answer, turn.places or [[] for _ in turn.answer], strict=True):
                tokens = [find_sight(plan, place, self._token_grid).token for place in places]
                tokens_of_ids += [tokens] * len(character.encode())
            if len(answer) != len(tokens_of_ids) + 1:
                raise ValueError(
                    f"the answer {turn.answer!r} has {len(answer)} ids, expected two per point, one per byte and the "
                    "end; leave `places` out of samples for this tokenizer, and pass points=False"
                )
            for position, tokens in zip(answer, tokens_of_ids, strict=False):
                for head, guided in enumerate((tokens, counted)):
                    for token, number in Counter(guided).items():
                        yield head, position - 1, token, number / len(guided)
        for positions, centers in _question_guide(turn, answer[0]):
            seen = Counter(find_sight(plan, center, self._token_grid).token for center in centers)
            for position in positions:
                for token, number in seen.items():
                    yield 1, position, token, number / len(centers)
        if (shown or turn.mentions) and self.processor.one_placeholder:
            yield 0, answer[2 * len(shown)] - 1, NOTHING, 1.0

    def _sorted_points(self, turn: Turn, plan: SlicePlan, shift: Cell) -> list[Point]:
        """Patch of the canvas and visual token of each object that the answer points at, in the order of pointing.

        Raises:
            ValueError: a patch lies beyond the location tokens.
        """
        sights = [find_sight(plan, center, self._token_grid) for center in turn.points]
        points = [((cell[0] + shift[0], cell[1] + shift[1]), token) for token, cell in sights]
        furthest = max((part for cell, _ in points for part in cell), default=0)
        if furthest >= len(LOCATION_TOKENS):
            raise ValueError(
                f"an object lies in row or column {furthest} of the canvas, expected less than {len(LOCATION_TOKENS)}; "
                "lower max_aspect of the pictures or max_visual_tokens of the processor"
            )
        return sorted(points)

    def _token_grid(self, view: View) -> tuple[int, int]:
        image_processor = self.processor.image_processor
        if image_processor.tokens_per_view is not None:
            return query_grid(view.num_visual_tokens)
        rows, cols = view.patch_grid
        return rows // image_processor.merge_size, cols // image_processor.merge_size


def _question_guide(turn: Turn, answer: int) -> list[tuple[list[int], list[Place]]]:
    """Positions of the question's bytes, with the objects to be seen there.

    At the bytes of a mention it is what this mention names, after the last of them what is counted: of "Count the red
    rings." at `red` all that is red, at `rings` all rings, at the full stop the red rings.

    Args:
        turn: with or without mentions.
        answer: position of the answer's first id; `<|end|><|assistant|>` stand before it.
    """
    if not turn.mentions:
        return []
    first_byte = answer - 2 - len(turn.question.encode())
    spans = [(mention.start, mention.end, mention.points) for mention in turn.mentions]
    spans.append((spans[-1][1], len(turn.question), turn.points))
    return [
        ([first_byte + len(turn.question[:character].encode()) for character in range(start, end)], points)
        for start, end, points in spans
        if points
    ]


def _runs(positions: list[int]) -> list[list[int]]:
    """Positions split where they leave some out: 3 4 5 9 10 -> 3 4 5 and 9 10."""
    runs: list[list[int]] = []
    for position in positions:
        if not runs or position != runs[-1][-1] + 1:
            runs.append([])
        runs[-1].append(position)
    return runs


def _positions(mask: torch.Tensor) -> list[int]:
    return torch.nonzero(mask)[:, 0].tolist()
