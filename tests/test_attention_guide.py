"""The guide loss, and the places that the collator gives it."""

import math

import pytest
import torch
from PIL import Image

from tests.tiny_models import CONNECTORS, tiny_config, tiny_model, tiny_slicing
from vlmslice import VlmSliceImageProcessorPil, VlmSliceProcessor
from vlmslice.attention_guide import NOTHING, guide_loss, guided_layers
from vlmslice.data.collator import IGNORED
from vlmslice.data.counting import plural
from vlmslice.data.fonts import FontLibrary, matplotlib_font_dir
from vlmslice.data.samples import TaskSample
from vlmslice.data.scenes import Scene
from vlmslice.data.shapes import COLORS
from vlmslice.data.sight import find_sight
from vlmslice.data.task_collator import TaskCollator
from vlmslice.data.tasks import Curriculum, TaskConfig, TaskDataset
from vlmslice.spatial_schema import LOCATION_TOKENS
from vlmslice.tokenization import build_byte_tokenizer


def build_collator(connector: str = "spatial_resampler", dense: tuple[str, ...] = ()) -> TaskCollator:
    image_processor = VlmSliceImageProcessorPil(**tiny_slicing(connector).to_dict())
    processor = VlmSliceProcessor(
        image_processor, build_byte_tokenizer(), one_placeholder=connector == "cross_attention"
    )
    return TaskCollator(processor, dense)


def draw(task: str, num_samples: int, **config) -> list:
    steps = [Curriculum(num_samples, TaskConfig(megapixels=(0.004, 0.03), **config), {task: 1.0})]
    dataset = TaskDataset(steps, FontLibrary("eval", [matplotlib_font_dir()]), group=4)
    return [dataset[i] for i in range(num_samples)]


def row_of(places: dict[int, float], length: int) -> torch.Tensor:
    row = torch.zeros(length)
    for key, share in places.items():
        row[key] = share
    return row


def relative_entries(batch: dict) -> list[set[tuple]]:
    """Head, distance from the answer's first id, key and share of the entries of each turn of a batch of one."""
    answers = torch.nonzero(batch["labels"][0] != IGNORED)[:, 0].tolist()
    starts = [position for position in answers if position - 1 not in answers]
    ends = [position for position in answers if position + 1 not in answers]
    rows = list(zip(batch["guide_entries"].tolist(), batch["guide_shares"].tolist(), strict=True))
    return [
        {
            (head, position - start, key, round(share, 5))
            for (_, head, position, key), share in rows
            if previous < position < end
        }
        for previous, start, end in zip([-1, *ends], starts, ends, strict=False)
    ]


class TestLoss:
    @pytest.mark.parametrize(
        ("num_layers", "layers"), [(6, [2, 3, 4]), (12, [*range(4, 11)]), (2, [0]), (1, [0])]
    )
    def test_layers(self, num_layers, layers):
        assert list(guided_layers(num_layers)) == layers

    def test_no_loss_where_attention_is_on_the_places(self):
        attention = torch.zeros(1, 2, 4, 4)
        attention[0, 0, 3] = row_of({0: 0.25, 2: 0.75}, 4)
        entries, shares = torch.tensor([[0, 0, 3, 0], [0, 0, 3, 2]]), torch.tensor([0.25, 0.75])
        loss, found = guide_loss([attention] * 3, entries, shares)
        assert loss.abs() < 1e-6 and found == 1

    def test_worked_example(self):
        """Places {1: 1/2, 2: 1/2} and attention 1/4 everywhere: log 2 nats; a second character, found, halves it."""
        attention = torch.full((1, 2, 4, 4), 0.25)
        attention[0, 0, 2] = row_of({1: 1.0}, 4)
        entries = torch.tensor([[0, 0, 3, 1], [0, 0, 3, 2], [0, 0, 2, 1]])
        loss, found = guide_loss([attention] * 6, entries, torch.tensor([0.5, 0.5, 1.0]))
        assert loss == pytest.approx(math.log(2) / 2) and found == pytest.approx(0.75)

    def test_second_head(self):
        """What it finds is in the loss, and not in the share that the first head found."""
        attention = torch.full((1, 2, 4, 4), 0.25)
        attention[0, 0, 3] = row_of({1: 1.0}, 4)
        entries = torch.tensor([[0, 0, 3, 1], [0, 1, 3, 0]])
        loss, found = guide_loss([attention] * 3, entries, torch.ones(2))
        assert loss == pytest.approx(math.log(4) / 2) and found == 1

    def test_only_the_first_head_of_the_guided_layers_counts(self):
        attentions = [torch.full((1, 2, 4, 4), 0.25, requires_grad=True) for _ in range(6)]
        guide_loss(attentions, torch.tensor([[0, 0, 3, 1]]), torch.tensor([1.0]))[0].backward()
        assert [a.grad is not None for a in attentions] == [i in (2, 3, 4) for i in range(6)]
        assert attentions[2].grad[0, 0, 3, 1] < 0 and attentions[2].grad[0, 1].eq(0).all()

    def test_batch_without_places(self):
        loss, _ = guide_loss(
            [torch.ones(1, 1, 1, 1)] * 2, torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0)
        )
        assert loss == 0


class TestPlaces:
    @pytest.mark.parametrize("connector", CONNECTORS)
    def test_character_lies_in_the_visual_token_it_is_shown(self, connector):
        """Each entry's token, laid back on the picture, covers its glyph; its query predicts that character."""
        collator = build_collator(connector)
        processor = collator.processor
        for sample in draw("read", 12, num_words=(1, 3)):
            batch = collator([sample])
            ids, entries = batch["input_ids"][0], batch["guide_entries"]
            visible = [c for c in sample.answer if not c.isspace()]
            assert [chr(ids[q + 1]) for _, _, q, _ in entries.tolist()] == visible
            assert batch["guide_shares"].eq(1).all()
            plan = processor.image_processor.plan(sample.scene.image.height, sample.scene.image.width)
            boxes = []  # of every visual token, in the order of the placeholders
            for view in plan.views:
                top, left, bottom, right = view.box
                rows, cols = {"resampler": (1, 3)}.get(
                    connector, (view.patch_grid[0] // 2, view.patch_grid[1] // 2)
                )
                height, width = (bottom - top) / rows, (right - left) / cols
                boxes += [
                    (view, top + r * height, left + c * width, height, width)
                    for r in range(rows)
                    for c in range(cols)
                ]
            placeholders = (ids == processor.image_token_id).nonzero()[:, 0].tolist()
            if connector == "cross_attention":
                assert len(placeholders) == 1
                placeholders = list(range(plan.num_visual_tokens))
            assert len(boxes) == len(placeholders)
            for (_, _, _, key), glyph in zip(entries.tolist(), sample.scene.glyphs, strict=True):
                view, top, left, height, width = boxes[placeholders.index(key)]
                y, x = (glyph.box[0] + glyph.box[2]) / 2, (glyph.box[1] + glyph.box[3]) / 2
                assert view is not plan.overview
                assert -1e-6 <= y - top <= height + 1e-6 and -1e-6 <= x - left <= width + 1e-6

    def test_what_is_not_read_out_has_no_places(self):
        blank = TaskSample("read", Scene(Image.new("RGB", (64, 48))), "Read this.", "Nothing")
        batch = build_collator()([blank, blank])
        assert batch["guide_entries"].shape == (0, 4)

    @pytest.mark.parametrize("connector", CONNECTORS)
    def test_counts_point_at_their_objects(self, connector):
        """Row and column of each object's patch, in reading order, are answered and guided; then the number."""
        collator = build_collator(connector)
        tokenizer = collator.processor.tokenizer
        for sample in draw("count", 8, max_count=6):
            batch = collator([sample])
            answer = batch["input_ids"][0][batch["labels"][0] != IGNORED].tolist()
            ids = [tokenizer.convert_tokens_to_ids(token) for token in LOCATION_TOKENS]
            numbers = [ids.index(token) for token in answer if token in ids]
            cells = list(zip(numbers[::2], numbers[1::2], strict=True))
            plan = collator.processor.image_processor.plan(*sample.scene.image.size[::-1])
            expected = [tuple(int(part) for part in plan.to_canvas(*point)) for point in sample.points]
            assert cells == sorted(expected) and len(cells) == int(sample.answer)
            assert tokenizer.decode(answer, skip_special_tokens=True) == sample.answer
            entries, shares = batch["guide_entries"], batch["guide_shares"]
            if connector == "cross_attention":  # at the number there is no next object
                nothing = entries[:, 3] == NOTHING
                [[_, head, query, _]] = entries[nothing].tolist()
                assert (head, query) == (0, entries[:, 2].max())
                entries, shares = entries[~nothing], shares[~nothing]
            queries = entries[entries[:, 1] == 0][:, 2].tolist()
            assert len(queries) == 2 * len(cells)
            assert [ids.index(batch["input_ids"][0, q + 1]) for q in queries] == numbers
            keys = entries[entries[:, 1] == 0][:, 3].tolist()
            assert keys[::2] == keys[1::2]
            for query in [*queries, queries[-1] + 1]:  # the number, too, is guided to all objects
                chosen = (entries[:, 1] == 1) & (entries[:, 2] == query)
                assert set(entries[chosen][:, 3].tolist()) == set(keys)
                assert shares[chosen].sum() == pytest.approx(1)

    @pytest.mark.parametrize("connector", CONNECTORS)
    def test_words_of_the_question_see_what_they_name(self, connector):
        collator = build_collator(connector)
        seen_forms = set()
        for sample in draw("count", 20, max_count=4):
            [batch_row] = (batch := collator([sample]))["input_ids"].tolist()
            plan = collator.processor.image_processor.plan(*sample.scene.image.size[::-1])
            placeholders = range(plan.num_visual_tokens)
            if connector != "cross_attention":
                placeholders = [i for i, token in enumerate(batch_row) if token == collator._image_id]
            entries, shares = batch["guide_entries"], batch["guide_shares"]
            first = next(
                i
                for i in range(len(batch_row))
                if batch_row[i : i + len(sample.question)] == list(sample.question.encode())
            )
            for index in range(len(sample.question)):
                mention = next((m for m in sample.mentions if m.start <= index < m.end), None)
                if mention is not None:
                    word = sample.question[mention.start : mention.end]
                    named = [
                        s.center for s in sample.scene.shapes if word in (s.color, plural(s.kind), "shapes")
                    ]
                    assert set(sample.points) <= set(named) == set(mention.points)
                    seen_forms.add(word in COLORS)
                elif index >= sample.mentions[-1].end:
                    named = sample.points
                else:
                    named = []
                chosen = entries[:, 2] == first + index
                assert entries[chosen][:, 1].eq(1).all()
                expected = {
                    placeholders[find_sight(plan, center, collator._token_grid).token] for center in named
                }
                assert set(entries[chosen][:, 3].tolist()) == expected
                assert shares[chosen].sum() == pytest.approx(1 if named else 0)
        assert seen_forms == {True, False}

    @pytest.mark.parametrize("connector", CONNECTORS)
    def test_follow_ups_are_guided_as_first_questions_are(self, connector):
        """The entries of each turn, counted from its answer, are those of the same question asked alone."""
        collator = build_collator(connector)
        answers_seen = set()
        for sample in draw("count", 10, max_count=4, max_questions=4):
            got = relative_entries(collator([sample]))
            assert len(got) == len(sample.turns)
            for turn, entries in zip(sample.turns, got, strict=True):
                answers_seen.add(turn.answer)
                alone = TaskSample(
                    "count", sample.scene, turn.question, turn.answer, turn.places, turn.points, turn.mentions
                )
                assert [entries] == relative_entries(collator([alone]))
        assert "0" in answers_seen and len(answers_seen) > 2

    def test_points_may_be_left_out(self):
        collator = build_collator()
        collator.points = False
        [sample] = draw("count", 1)
        batch = collator([sample])
        answer = batch["input_ids"][0][batch["labels"][0] != IGNORED].tolist()
        assert collator.processor.tokenizer.decode(answer) == f"{sample.answer}<|end|>"

    def test_moved_canvas_moves_points_and_views_alike(self):
        """Half of the pictures stay; the others move as a whole, wherever they are in a batch."""
        plain, moved = build_collator(), build_collator()
        moved.canvas_side = 40
        samples = draw("count", 24)
        distances = set()
        for sample in samples:
            before, after = plain([sample]), moved([sample])
            [shift] = (after["canvas_boxes"] - before["canvas_boxes"]).unique(dim=0).tolist()
            assert shift[:2] == shift[2:] and min(shift) >= 0 and after["canvas_boxes"].max() <= 40
            points = [
                moved.processor.find_points(batch["input_ids"][0].tolist()) for batch in (before, after)
            ]
            assert points[1] == [(row + shift[0], col + shift[1]) for row, col in points[0]]
            assert torch.equal(before["guide_entries"], after["guide_entries"])
            distances.add(tuple(shift[:2]))
        assert (0, 0) in distances and len(distances) > 6
        together = moved(samples[:4])["canvas_boxes"]
        assert torch.equal(together, torch.cat([moved([sample])["canvas_boxes"] for sample in samples[:4]]))

    def test_point_beyond_the_location_tokens_is_refused(self):
        collator = build_collator()
        collator.canvas_side = 10_000
        with pytest.raises(
            ValueError, match="^an object lies in row or column [0-9]+ of the canvas, expected less"
        ):
            collator(draw("count", 8))

    def test_lines_of_accented_letters(self):
        """Both bytes of an accented letter are shown its one place; a line break is shown none."""
        samples = draw("paragraph", 6, accents=1.0, num_lines=(2, 3), font_px=(14, 20))
        assert any(not sample.answer.isascii() for sample in samples)
        for sample in samples:
            batch = build_collator()([sample])
            shown = [batch["input_ids"][0, q + 1].item() for _, _, q, _ in batch["guide_entries"].tolist()]
            assert bytes(shown).decode() == "".join(sample.answer.split())

    def test_answer_that_is_not_bytes_is_refused(self):
        [sample] = draw("read", 1)
        collator = build_collator()
        collator._conversations = lambda rows, whole=collator._conversations: drop_one_label(whole(rows))
        with pytest.raises(ValueError, match="one per byte"):
            collator([sample])


def drop_one_label(batch):
    first = (batch["labels"][0] != IGNORED).nonzero()[0]
    batch["labels"][0, first] = IGNORED
    return batch


class TestModel:
    def test_loss_is_added(self):
        batch = build_collator()(draw("read", 4))
        model = tiny_model()
        model.set_attn_implementation({"text_config": "eager"})
        plain = model(**batch).loss
        model.config.guide_loss_weight = 0.5
        outputs = model(**batch)
        assert float(outputs.auxiliary_loss) == pytest.approx(0.5 * float(outputs.metrics["guide_loss"]))
        assert float(outputs.loss) == pytest.approx(float(plain + outputs.auxiliary_loss))

    def test_cross_attention_needs_no_eager_attention(self):
        batch = build_collator("cross_attention")(draw("read", 3))
        model = tiny_model("cross_attention")
        plain = model(**batch).loss
        model.config.guide_loss_weight = 0.5
        outputs = model(**batch)
        assert float(outputs.metrics["guide_loss"]) > 0
        assert float(outputs.loss) == pytest.approx(float(plain + outputs.auxiliary_loss), abs=1e-4)

    def test_attention_without_weights_is_refused(self):
        model = tiny_model()
        model.config.guide_loss_weight = 0.5
        model.set_attn_implementation({"text_config": "sdpa"})
        with pytest.raises(ValueError, match="eager"):
            model(**build_collator()(draw("read", 1)))

    def test_weight_is_kept(self):
        assert tiny_config(guide_loss_weight=0.2).to_dict()["guide_loss_weight"] == 0.2
