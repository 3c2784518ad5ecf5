import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import answer, chat, encode, noise_image, tiny_model, tiny_processor

from vlmslice import Assistant, load_image
from vlmslice.image_loading import ImageDecodeError
from vlmslice.inference import _AnswerStreamer
from vlmslice.model_files import ModelError, find_weights, read_slicing_config
from vlmslice.slicing import SlicingError
from vlmslice.tokenization import build_byte_tokenizer


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant(tiny_model(), tiny_processor())


class TestAsk:
    def test_answers_as_the_model_does(self, assistant: Assistant) -> None:
        image, question = noise_image(100, 200), "read the line"
        ids = answer(assistant.model, encode(assistant.processor, chat(question, image)), num_tokens=12)
        got = assistant.ask([image], question, max_new_tokens=12)
        assert got.text == assistant.processor.decode(ids[0], skip_special_tokens=True)
        assert got.num_new_tokens == 12

    def test_pieces_join_to_the_answer(self, assistant: Assistant) -> None:
        pieces: list[str] = []
        got = assistant.ask([noise_image(100, 200)], "what?", max_new_tokens=24, on_text=pieces.append)
        assert "".join(pieces) == got.text
        assert got.text

    def test_plans_are_those_of_the_images(self, assistant: Assistant) -> None:
        images = [noise_image(100, 200), noise_image(40, 300)]
        got = assistant.ask(images, "which?", max_new_tokens=1)
        processor = assistant.processor.image_processor
        assert got.plans == tuple(processor.plan(image.height, image.width) for image in images)
        assert got.num_visual_tokens == sum(plan.num_visual_tokens for plan in got.plans)

    def test_overrides_reach_plan_and_pixels(self, assistant: Assistant) -> None:
        image = noise_image(100, 200)
        few = assistant.ask([image], "read", max_visual_tokens=8, max_new_tokens=1)
        assert few.num_visual_tokens <= 8
        assert assistant.ask([image], "read", policy="uhd", max_new_tokens=1).plans[0].policy == "uhd"

    def test_no_image(self, assistant: Assistant) -> None:
        assert assistant.ask([], "hello", max_new_tokens=1).plans == ()

    def test_stages_are_timed(self, assistant: Assistant) -> None:
        seconds = assistant.ask([noise_image(100, 200)], "read", max_new_tokens=4).seconds
        assert list(seconds) == ["process", "first_token", "decode"]
        assert all(0 < value < 60 for value in seconds.values())

    def test_points_of_one_image_are_in_its_pixels(self, assistant: Assistant) -> None:
        """Of two objects in the rows and columns (0, 1) and (3, 0) of a canvas; the last row has no column."""
        tokenizer = assistant.processor.tokenizer
        ids = tokenizer("<|0|><|1|><|3|><|0|>2<|7|>").input_ids
        plan = assistant.processor.image_processor.plan(100, 200)
        height, width = (100 / plan.canvas_boxes[0][2], 200 / plan.canvas_boxes[0][3])
        points = assistant._points((plan,), torch.tensor(ids))
        expected = [(0.5 * height, 1.5 * width), (3.5 * height, 0.5 * width)]
        assert [pytest.approx(point) for point in expected] == list(points)
        assert assistant._points((plan, plan), torch.tensor(ids)) == ()

    def test_stops_when_told(self, assistant: Assistant) -> None:
        """After the third token, and what was said until then is the answer."""
        image, question = noise_image(100, 200), "read the line"
        calls: list[bool] = []

        def third_call() -> bool:
            calls.append(True)
            return len(calls) == 3

        whole, short = (assistant.ask([image], question, max_new_tokens=number) for number in (24, 3))
        got = assistant.ask([image], question, max_new_tokens=24, should_stop=third_call)
        assert (got.text, got.num_new_tokens, len(calls)) == (short.text, 3, 3)
        never = assistant.ask([image], question, max_new_tokens=24, should_stop=lambda: False)
        assert (never.text, never.num_new_tokens) == (whole.text, 24)
        reasons = [answered.finish_reason for answered in (whole, got, never)]
        assert reasons == ["length", "cancelled", "length"]

    def test_bad_image_and_policy(self, assistant: Assistant, tmp_path: Path) -> None:
        broken = tmp_path / "broken.png"
        noise_image(40, 40).save(broken)
        broken.write_bytes(broken.read_bytes()[:-200])
        with pytest.raises(ImageDecodeError, match="broken.png"):
            assistant.ask([str(broken)], "read")
        with pytest.raises(SlicingError, match="did you mean 'uhd'"):
            assistant.ask([noise_image(40, 40)], "read", policy="uhdd")


class TestAskBatch:
    def test_answers_are_those_of_ask(self, assistant: Assistant) -> None:
        samples = [
            ([noise_image(100, 200)], "read the line"),
            ([noise_image(40, 300, 1)], "q"),
            ([], "hello"),
            ([noise_image(300, 60, 2), noise_image(40, 40, 3)], "which of them is it?"),
        ]
        batch = assistant.ask_batch(samples, max_new_tokens=12)
        assert len({answer.text for answer in batch}) == len(samples)
        for (images, question), got in zip(samples, batch, strict=True):
            alone = assistant.ask(images, question, max_new_tokens=12)
            assert (got.text, got.plans) == (alone.text, alone.plans)
            assert got.num_visual_tokens == alone.num_visual_tokens
            assert got.num_new_tokens == alone.num_new_tokens
            assert list(got.seconds) == list(alone.seconds)
            assert all(0 < value < 60 for value in got.seconds.values())

    def test_lengths_end_with_the_end_token(self) -> None:
        assistant = Assistant(tiny_model(), tiny_processor())
        samples = [([noise_image(100, 200)], "read the line"), ([noise_image(40, 300, 1)], "q")]
        assert {a.num_new_tokens for a in assistant.ask_batch(samples, max_new_tokens=12)} == {12}
        ids = answer(
            assistant.model, encode(assistant.processor, chat("read the line", *samples[0][0])), num_tokens=12
        )[0]
        assistant.model.generation_config.eos_token_id = [ids[3]]
        batch = assistant.ask_batch(samples, max_new_tokens=12)
        alone = [assistant.ask(images, question, max_new_tokens=12) for images, question in samples]
        assert batch[0].num_new_tokens == ids.index(ids[3]) + 1
        assert [a.num_new_tokens for a in batch] == [a.num_new_tokens for a in alone]
        assert [a.finish_reason for a in batch] == [a.finish_reason for a in alone]
        assert batch[0].finish_reason == "stop"

    def test_what_goes_round_in_circles_ends(
        self, assistant: Assistant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The longer of two answers goes on when the other one is stopped, and is not cut itself."""
        samples = [([noise_image(100, 200)], "read the line"), ([noise_image(40, 300, 1)], "q")]
        whole = assistant.ask_batch(samples, max_new_tokens=12)
        first = assistant.ask([noise_image(100, 200)], "read the line", max_new_tokens=6)
        ids = answer(assistant.model, encode(assistant.processor, chat("q", *samples[1][0])), num_tokens=12)[
            0
        ]
        monkeypatch.setattr("vlmslice.looping.LEAST_LENGTH", 6)
        monkeypatch.setattr("vlmslice.looping.ends_in_loop", lambda row: row[:6] != ids[:6])
        batch = assistant.ask_batch(samples, max_new_tokens=12)
        alone = assistant.ask(*samples[0], max_new_tokens=12)
        assert [a.finish_reason for a in (*batch, alone)] == ["loop", "length", "loop"]
        assert [a.num_new_tokens for a in (*batch, alone)] == [6, 12, 6]
        assert [a.text for a in (*batch, alone)] == [first.text, whole[1].text, first.text]

    def test_padding_behind_an_answer_is_no_loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assistant = Assistant(tiny_model(), tiny_processor())
        samples = [([noise_image(100, 200)], "read the line"), ([noise_image(40, 300, 1)], "q")]
        [ids] = answer(
            assistant.model, encode(assistant.processor, chat("read the line", *samples[0][0])), num_tokens=3
        )
        assistant.model.generation_config.eos_token_id = [ids[2]]
        monkeypatch.setattr("vlmslice.looping.LEAST_LENGTH", 6)
        batch = assistant.ask_batch(samples, max_new_tokens=40)
        assert batch[0].finish_reason == "stop"
        assert batch[0].num_new_tokens == ids.index(ids[2]) + 1
        assert batch[1].num_new_tokens > 12

    def test_overrides_reach_the_plans(self, assistant: Assistant) -> None:
        samples = [([noise_image(100, 200)], "read"), ([noise_image(200, 100)], "read")]
        for got in assistant.ask_batch(samples, policy="uhd", max_visual_tokens=20, max_new_tokens=1):
            assert got.plans[0].policy == "uhd" and got.num_visual_tokens <= 20


class TestStreamer:
    @pytest.mark.parametrize(
        "text", ["", "one two", "naïve café 三千 🙂 ok", "line\nline two\n", "\n", " x "]
    )
    def test_text_split_anywhere_comes_out_whole(self, text: str) -> None:
        tokenizer = build_byte_tokenizer()
        pieces: list[str] = []
        streamer = _AnswerStreamer(tokenizer, pieces.append)
        streamer.put(torch.zeros(1, 5, dtype=torch.long))  # the prompt
        for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert "".join(pieces) == text
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
        assert streamer.first_token_at > 0


class TestModelFiles:
    def test_saved_and_loaded_answers_alike(self, assistant: Assistant, saved_model: Path) -> None:
        loaded = Assistant.from_pretrained(saved_model, device="cpu")
        image = noise_image(100, 200)
        for question in ("read", "how many?"):
            got = loaded.ask([image], question, max_new_tokens=8)
            assert got.text == assistant.ask([image], question, max_new_tokens=8).text
        assert not loaded.model.training

    def test_bf16_weights_become_fp32_on_the_cpu(self, saved_model: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(saved_model, tmp_path / "model")
        tiny_model().to(torch.bfloat16).save_pretrained(folder)
        assert Assistant.from_pretrained(folder, device="cpu").model.dtype == torch.float32

    def test_slicing_without_loading(self, assistant: Assistant, saved_model: Path) -> None:
        assert read_slicing_config(saved_model) == assistant.processor.image_processor.slicing_config
        assert read_slicing_config().scale_resolution == 224

    def test_no_folder(self) -> None:
        with pytest.raises(
            ModelError, match=r"'nowhere' has no readable config.json: No such file .*check the path"
        ):
            Assistant.from_pretrained("nowhere")

    @pytest.mark.parametrize("config", ["", "[]", "{"])
    def test_damaged_config(self, tmp_path: Path, config: str) -> None:
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ModelError, match=r"no readable config.json"):
            Assistant.from_pretrained(tmp_path)

    def test_another_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(ModelError, match="of type 'llama'.*vlmslice compose"):
            Assistant.from_pretrained(tmp_path)

    def test_pickled_weights_do_not_count(self, saved_model: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(saved_model, tmp_path / "model")
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match="has no weights"):
            Assistant.from_pretrained(folder)

    def test_cut_off_weights(self, saved_model: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(saved_model, tmp_path / "model")
        (weights,) = find_weights(folder)
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ModelError, match="cannot be loaded") as raised:
            Assistant.from_pretrained(folder)
        assert "\n" not in str(raised.value)

    def test_missing_processor(self, saved_model: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(saved_model, tmp_path / "model")
        (folder / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match="cannot be loaded"):
            Assistant.from_pretrained(folder)


def test_the_demo_image_is_sliced() -> None:
    image = load_image(Path(__file__).parents[1] / "demos" / "images" / "receipt_line.png")
    assert image.width > 4 * image.height
