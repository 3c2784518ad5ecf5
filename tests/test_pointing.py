"""Points in answers: which one was made last, and what the model sees after it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import chat, encode, noise_image, tiny_model, tiny_processor

from vlmslice.pointing import NOWHERE, last_points
from vlmslice.tokenization import build_byte_tokenizer

FIRST = build_byte_tokenizer().convert_tokens_to_ids("<|0|>")
QUESTION = chat("How many?", noise_image(150, 170))
POINTS = [FIRST + number for number in (1, 3, 2, 0, 4, 5)]


def naive_last_points(ids: list[int]) -> list[tuple[int, int, int]]:
    found, run = [], []
    for number in ids:
        run = [*run, number - 100] if 100 <= number < 356 else []
        pairs = list(zip(run[::2], run[1::2], strict=False))
        told = run[-1] if len(run) % 2 else NOWHERE
        found.append((*(pairs[-1] if pairs else (NOWHERE, NOWHERE)), told))
    return found


@given(st.lists(st.lists(st.integers(97, 105), min_size=12, max_size=12), min_size=1, max_size=4))
def test_last_points_are_those_of_a_plain_loop(ids):
    got = last_points(torch.tensor(ids), 100)
    expected = [naive_last_points(row) for row in ids]
    if got is None:
        assert {point for row in expected for point in row} == {(NOWHERE, NOWHERE, NOWHERE)}
    else:
        assert [[tuple(point) for point in row] for row in got.tolist()] == expected


def test_example_of_the_docstring():
    points = last_points(torch.tensor([[7, 102, 105, 102, 109, 8]]), 100)
    assert points[0, :, 0].tolist() == [-1, -1, 2, 2, 2, -1]
    assert points[0, :, 1].tolist() == [-1, -1, 5, 5, 9, -1]
    assert points[0, :, 2].tolist() == [-1, 2, -1, 2, -1, -1]


class TestSight:
    def inputs(self, ids: list[int]) -> dict[str, torch.Tensor]:
        """A question, answered so far by `ids`."""
        batch = encode(tiny_processor("cross_attention"), QUESTION)
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([ids], dtype=torch.int64)], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch

    def test_even_heads_see_what_lies_ahead(self):
        model, batch = tiny_model("cross_attention", location_token_id=FIRST), self.inputs(POINTS)
        model.config.guide_loss_weight = 1.0
        guide = {"guide_entries": torch.zeros((1, 4), dtype=torch.int64), "guide_shares": torch.ones(1)}
        with torch.no_grad():
            features = model.get_image_features(
                **{
                    name: batch[name]
                    for name in ("pixel_values", "target_sizes", "canvas_boxes", "num_views")
                }
            )
            model(**batch, labels=batch["input_ids"], **guide)
        merge_size = model.config.slicing["merge_size"]
        blocks = [
            (int(row // merge_size), int(col // merge_size)) for row, col in features.places[0].tolist()
        ]
        assert len(blocks) > len(set(blocks)) > 20  # slices, and an overview over them
        for weights in model.cross_attention.weights:
            seen = weights[0].gt(0)
            assert seen[..., -1].all()  # where nothing is
            assert seen[1::2].all()
            for back, last in (
                (1, (4, 5)),
                (2, (2, 0)),
                (3, (2, 0)),
                (4, (1, 3)),
                (5, (1, 3)),
                (6, (-1, -1)),
            ):
                last_block = tuple(number // merge_size for number in last)
                expected = torch.tensor([block > last_block for block in blocks])
                assert torch.equal(seen[::2, -back, :-1], expected.expand(2, -1)), (back, last)

    def test_model_without_location_tokens_sees_all(self):
        model, batch = tiny_model("cross_attention"), self.inputs(POINTS)
        pointing = tiny_model("cross_attention", location_token_id=FIRST)
        with torch.no_grad():
            all_seen, some_seen = model(**batch).logits[0], pointing(**batch).logits[0]
        assert torch.equal(all_seen[:-5], some_seen[:-5])
        assert not torch.allclose(all_seen[-5:], some_seen[-5:], atol=1e-3)

    @pytest.mark.parametrize("first_fit_layers", [[], [0, 1]])
    def test_cached_steps_are_the_whole_sequence(self, first_fit_layers):
        """Answers that are made to point, by beams too, get the scores of one run over all their ids."""
        model = tiny_model("cross_attention", location_token_id=FIRST, first_fit_layers=first_fit_layers)
        for head in model.cross_attention.first_fit.values():
            torch.nn.init.normal_(head.output.weight)
            torch.nn.init.zeros_(head.threshold)
        answer = [*POINTS, ord("3")]
        batch, length = self.inputs([]), self.inputs([])["input_ids"].shape[1]

        def follow(_, ids):
            return [answer[len(ids) - length]]

        options = {"max_new_tokens": len(answer), "do_sample": False, "prefix_allowed_tokens_fn": follow}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        with torch.no_grad():
            expected = model(**self.inputs(answer)).logits[0, length - 1 : -1]
            for use_cache in (True, False):
                out = model.generate(**batch, **options, use_cache=use_cache)
                assert out.sequences[0, length:].tolist() == answer
                torch.testing.assert_close(torch.cat(out.logits), expected, atol=1e-4, rtol=1e-4)
            out = model.generate(**batch, **options, num_beams=2)
            torch.testing.assert_close(torch.stack(out.logits)[:, 0], expected, atol=1e-4, rtol=1e-4)
