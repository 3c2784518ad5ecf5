"""A saved model in a process that has only imported vlmslice: transformers' Auto classes and pipeline, offline."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import CONNECTORS, answer, chat, encode, noise_image, tiny_model, tiny_processor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, pipeline

from vlmslice.config import VlmSliceConfig
from vlmslice.image_processing import VlmSliceImageProcessor
from vlmslice.image_processing_pil import VlmSliceImageProcessorPil
from vlmslice.model_files import BUNDLED_MODEL
from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.processing import VlmSliceProcessor

ROOT = Path(__file__).parents[1]

# Whatever reaches for the network fails with the address it wanted.
IN_A_FRESH_PROCESS = """
import json, socket, sys

def refuse(self, address, *args):
    raise OSError(f"the network was asked for {address}")

socket.socket.connect = refuse
folder, picture = sys.argv[1:]

import vlmslice
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline
)

extras = [name for name in ("fontTools", "matplotlib", "peft", "deepspeed") if name in sys.modules]
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
messages = [{"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": "read"}]}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)[:, inputs["input_ids"].shape[1]:]
ask = pipeline("image-text-to-text", model=folder)
print(json.dumps({
    "config": type(AutoConfig.from_pretrained(folder)).__name__,
    "model": type(model).__name__,
    "processor": type(processor).__name__,
    "tokenizer": AutoTokenizer.from_pretrained(folder)("é<|end|>")["input_ids"],
    "backends": [
        type(AutoImageProcessor.from_pretrained(folder, backend=name)).__name__ for name in ("torchvision", "pil")
    ],
    "ids": ids.tolist(),
    "answer": processor.decode(ids[0], skip_special_tokens=True),
    "piped": ask(text=messages, max_new_tokens=10, generate_kwargs={"do_sample": False}, return_full_text=False),
    "piped_batch": ask(
        text=[messages, messages], max_new_tokens=10, generate_kwargs={"do_sample": False},
        return_full_text=False, batch_size=2,
    ),
    "extras": extras,
}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def report(saved, tmp_path_factory) -> dict:
    picture = tmp_path_factory.mktemp("picture") / "noise.png"
    noise_image(100, 200).save(picture)
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, str(saved), str(picture)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class TestFreshProcess:
    def test_classes(self, report):
        assert report["config"] == "VlmSliceConfig"
        assert report["model"] == "VlmSliceForConditionalGeneration"
        assert report["processor"] == "VlmSliceProcessor"
        assert report["backends"] == ["VlmSliceImageProcessor", "VlmSliceImageProcessorPil"]
        assert report["tokenizer"] == [0xC3, 0xA9, 257]

    def test_answer_is_that_of_the_model_that_was_saved(self, report):
        inputs = encode(tiny_processor(), chat("read", noise_image(100, 200)))
        assert report["ids"] == answer(tiny_model(), inputs)

    def test_pipeline(self, report):
        assert [turn["generated_text"] for turn in report["piped"]] == [report["answer"]]
        batch = [turn["generated_text"] for chat_turns in report["piped_batch"] for turn in chat_turns]
        assert batch == [report["answer"]] * 2

    def test_a_model_needs_no_training_extras(self, report):
        assert report["extras"] == []


class TestSavedFolder:
    def test_files(self, saved):
        names = {path.name for path in saved.iterdir()}
        assert {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "processor_config.json",
            "chat_template.jinja",
            "tokenizer.json",
        } <= names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]

    @pytest.mark.parametrize("connector", CONNECTORS)
    def test_processor_slices_as_the_model_expects(self, connector, tmp_path):
        """Token counts follow from `slicing` alone, so these two files of one folder must say the same."""
        tiny_model(connector).save_pretrained(tmp_path)
        tiny_processor(connector).save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        processor = AutoProcessor.from_pretrained(tmp_path)
        assert processor.image_processor.slicing_config == config.slicing_config
        assert processor.image_token_id == config.image_token_id

    def test_image_processor_from_the_slicing_of_a_config(self, saved):
        config = AutoConfig.from_pretrained(saved)
        built = VlmSliceImageProcessorPil(**config.slicing)
        assert built.slicing_config == config.slicing_config

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"merge_size": 1}, "placeholders in its prompt but its images give"),
            ({"patch_size": 8}, "pixel_values holds 192 values per patch, expected 768"),
            ({"tokens_per_view": 2}, "placeholders in its prompt but its images give"),
        ],
    )
    def test_processor_of_another_model_is_refused(self, saved, option, message):
        """What must agree does so or fails at the first image, with the two numbers; policies and limits are free."""
        processor = AutoProcessor.from_pretrained(saved, **option)
        model = AutoModelForImageTextToText.from_pretrained(saved)
        with pytest.raises(ValueError, match=message):
            model(**encode(processor, chat("read", noise_image(100, 200))))

    @pytest.mark.parametrize("option", [{"policy": "uhd"}, {"max_slice_nums": 2}, {"max_visual_tokens": 9}])
    def test_policy_and_limits_are_free(self, saved, option):
        processor = AutoProcessor.from_pretrained(saved, **option)
        model = AutoModelForImageTextToText.from_pretrained(saved)
        inputs = encode(processor, chat("read", noise_image(100, 200)))
        plan = processor.image_processor.plan(100, 200)
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
        assert (inputs["input_ids"] == processor.image_token_id).sum() == plan.num_visual_tokens


class TestThisProcess:
    def test_auto_classes(self, saved):
        assert type(AutoConfig.from_pretrained(saved)) is VlmSliceConfig
        assert type(AutoProcessor.from_pretrained(saved)) is VlmSliceProcessor
        assert type(AutoModelForImageTextToText.from_pretrained(saved)) is VlmSliceForConditionalGeneration
        assert type(AutoImageProcessor.from_pretrained(saved)) is VlmSliceImageProcessor
        assert type(AutoImageProcessor.from_pretrained(saved, backend="pil")) is VlmSliceImageProcessorPil

    def test_model_from_a_config_alone(self):
        model = AutoModelForImageTextToText.from_config(tiny_model().config)
        assert type(model) is VlmSliceForConditionalGeneration

    def test_backends_agree_on_the_answer(self, saved):
        """Their pixels differ by two levels at most."""
        model = AutoModelForImageTextToText.from_pretrained(saved)
        processors = [AutoProcessor.from_pretrained(saved) for _ in range(2)]
        processors[1].image_processor = AutoImageProcessor.from_pretrained(saved, backend="pil")
        batches = [encode(processor, chat("read", noise_image(100, 200))) for processor in processors]
        assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
        difference = (batches[0]["pixel_values"] - batches[1]["pixel_values"]).abs().max()
        assert difference < 2.5 / 127.5
        assert answer(model, batches[0], 1) == answer(model, batches[1], 1)


@pytest.mark.skipif(
    not (BUNDLED_MODEL / "model.safetensors").exists(), reason="the bundled model is not in this checkout"
)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}], ids=["as saved", "float32"])
def test_pipeline_with_the_bundled_model(options):
    """transformers loads weights as they were saved, in bf16, unless told otherwise."""
    ask = pipeline("image-text-to-text", model=str(BUNDLED_MODEL), **options)
    picture = str(ROOT / "demos" / "images" / "receipt_line.png")
    content = [{"type": "image", "path": picture}, {"type": "text", "text": "What is written in the image?"}]
    [answered] = ask(text=[{"role": "user", "content": content}], max_new_tokens=40, return_full_text=False)
    assert answered["generated_text"] == "KIKU JAPANESE RESTAURANT"
