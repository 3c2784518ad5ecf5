"""The recipes for models and data of one's own, run as a user would, on tiny models."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import noise_image, tiny_model, tiny_processor
from transformers import pipeline
from typer.testing import CliRunner

from vlmslice.data.collator import VlmSliceCollator
from vlmslice.data.conversations import ConversationDataset
from vlmslice.inference import Assistant
from vlmslice.model_files import BUNDLED_MODEL
from vlmslice.training import run

SCRIPT = Path(__file__).parents[1] / "train" / "train.py"
FAST = ["--set", "disable_tqdm=true", "--set", "logging_steps=1", "--set", "report_to=none"]

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs the script's command line; returns the exit code and all output."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setenv("COLUMNS", "200")
    spec = importlib.util.spec_from_file_location("train_script", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def invoke(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(module.app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return invoke


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 conversations: images of several sizes, two images, none, two turns, and LLaVA's spelling."""
    folder = tmp_path_factory.mktemp("data")
    rows: list[dict] = []
    for number in range(6):
        noise_image(40 + 30 * number, 220 - 30 * number, number).save(folder / f"{number}.png")
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": "<image>\nWhat?"},
                    {"role": "assistant", "content": "abab"},
                ],
                "images": [f"{number}.png"],
            }
        )
    rows[5]["messages"] += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "ba"}]
    rows.append(
        {
            "messages": [
                {"role": "user", "content": "<image><image>\nBoth?"},
                {"role": "assistant", "content": "ab"},
            ],
            "images": ["0.png", "4.png"],
        }
    )
    rows.append({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "abba"}]})
    rows.append(
        {
            "image": "1.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "abab"},
            ],
        }
    )
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=["cross_attention", "spatial_resampler"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in bf16, whose processor slices otherwise than any default."""
    folder = tmp_path_factory.mktemp("model")
    processor = tiny_processor(request.param)
    tiny = tiny_model(request.param).to(torch.bfloat16)
    tiny.stop_as(processor.tokenizer)
    tiny.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def logged(stage: Path, name: str) -> list[float]:
    history = json.loads((stage / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    """Parts of the model, by their first name, of which some weight is not what it was."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name.split(".")[0] for name in old if not torch.equal(old[name].to(new[name].dtype), new[name])}


def assert_answers(folder: Path, image: Path) -> None:
    asked = Assistant.from_pretrained(folder).ask([image], "What?", max_new_tokens=4).text
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "What?"}]
    ask = pipeline("image-text-to-text", str(folder))
    chat = [{"role": "user", "content": content}]
    answers = ask(chat, max_new_tokens=4, return_full_text=False, generate_kwargs={"do_sample": False})
    assert [answer["generated_text"] for answer in answers] == [asked]


def test_sft(train: Train, model: Path, data: Path, tmp_path: Path) -> None:
    code, output = train(
        "--recipe", "sft", "--model", model, "--data", data, "--eval-data", data, "--output-dir", tmp_path, *FAST,
        "--max-steps", 6, "--set", "learning_rate=3e-3", "--set", "per_device_train_batch_size=4",
        "--set", "bf16=false", "--set", "per_device_eval_batch_size=2", "--set", "eval_steps=3",
    )  # fmt: skip
    assert code == 0, output
    stage = tmp_path / "sft"
    eval_losses = logged(stage, "eval_loss")
    assert len(eval_losses) == 3 and eval_losses[-1] < eval_losses[0] - 1
    assert len(logged(stage, "loss")) == 6
    assert {weight.dtype for weight in weights(stage / "final").values()} == {torch.float32}
    assert changed(model, stage / "final") >= {"vision_encoder", "connector", "language_model"}
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (stage / "final" / name).read_text() == (model / name).read_text()
    assert_answers(stage / "final", data.parent / "0.png")

    # The loss of one batch of all, as the model itself has it.
    assistant = Assistant.from_pretrained(stage / "final")
    batch = VlmSliceCollator(assistant.processor)(list(ConversationDataset(data)))
    with torch.no_grad():
        expected = assistant.model(**batch).loss.item()
    assert eval_losses[-1] == pytest.approx(expected, abs=2e-5)


def test_sft_freezes_parts_and_saves_bf16(train: Train, model: Path, data: Path, tmp_path: Path) -> None:
    code, output = train(
        "--recipe", "sft", "--model", model, "--data", data, "--output-dir", tmp_path, *FAST, "--max-steps", 2,
        "--set", "learning_rate=0.1", "--option", "vision_encoder=0", "--option", "language_model=0",
        "--option", "dtype=bfloat16",
    )  # fmt: skip
    assert code == 0, output
    final = tmp_path / "sft" / "final"
    assert changed(model, final) <= {"connector", "canvas_position", "cross_attention"}
    assert "connector" in changed(model, final)
    assert {weight.dtype for weight in weights(final).values()} == {torch.bfloat16}


def test_another_policy_is_trained_with_and_saved(
    train: Train, model: Path, data: Path, tmp_path: Path
) -> None:
    code, output = train(
        "--recipe", "sft", "--model", model, "--data", data, "--output-dir", tmp_path, *FAST, "--max-steps", 1,
        "--option", "policy=overlap_dedup",
    )  # fmt: skip
    assert code == 0, output
    final = tmp_path / "sft" / "final"
    assistant = Assistant.from_pretrained(final)
    assert assistant.model.config.slicing["policy"] == "overlap_dedup"
    answer = assistant.ask([noise_image(90, 90)], "what?", max_new_tokens=1)
    assert answer.plans[0].policy == "overlap_dedup" and len(answer.plans[0].slices) == 4
    code, output = train(
        "--recipe",
        "sft",
        "--model",
        model,
        "--data",
        data,
        "--output-dir",
        tmp_path,
        "--option",
        "policy=overlaps",
    )
    assert code == 2 and "did you mean 'overlap'" in output


def test_lora(train: Train, model: Path, data: Path, tmp_path: Path) -> None:
    command = [
        "--recipe", "lora", "--model", model, "--data", data, "--output-dir", tmp_path, *FAST, "--option", "rank=4",
        "--option", "alpha=8", "--max-steps", 4, "--set", "learning_rate=1e-2", "--set", "save_steps=2",
    ]  # fmt: skip
    assert train(*command)[0] == 0
    stage = tmp_path / "lora"
    losses = logged(stage, "loss")
    assert losses[-1] < losses[0] - 1
    assert changed(model, stage / "final") == {"language_model"}
    assert (stage / "final" / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads((stage / "final" / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert_answers(stage / "final", data.parent / "0.png")

    # Resumed from the adapter of a checkpoint, it ends where it did.
    before = weights(stage / "final")
    for path in (stage / "final", stage / "checkpoint-4"):
        path.rename(tmp_path / path.name)
    assert train(*command)[0] == 0
    again = weights(stage / "final")
    assert all(torch.equal(before[name], again[name]) for name in before)


@pytest.mark.parametrize("rendered", [None, 0.0, 0.5])
def test_pretrain(train: Train, model: Path, data: Path, tmp_path: Path, rendered: float | None) -> None:
    if "cross_attention" in (model / "config.json").read_text() and rendered is not None:
        pytest.skip("one connector is enough to test the mixtures with")
    chats = [] if rendered is None else ["--data", data, "--option", f"rendered={rendered}"]
    code, output = train(
        "--recipe", "pretrain", "--model", model, *chats, "--output-dir", tmp_path, *FAST, "--max-steps", 2,
        "--set", "warmup_steps=1", "--set", "per_device_train_batch_size=2", "--set", "whole.max_steps=3",
    )  # fmt: skip
    assert code == 0, output
    align, whole = tmp_path / "align", tmp_path / "whole"
    assert len(logged(align, "loss")) == 2 and len(logged(whole, "loss")) == 3
    assert "vision_encoder" not in changed(model, align / "final")
    assert {"connector", "language_model"} <= changed(model, align / "final")
    assert "vision_encoder" in changed(align / "final", whole / "final")
    assert json.loads((whole / "final" / "config.json").read_text())["use_cache"] is True


def test_pretrain_mixes_by_share(train: Train, model: Path, data: Path) -> None:
    from recipes import build_stages

    from vlmslice.data.sources import Source

    stages = build_stages("pretrain", model, data=[Source(data)], options={"rendered": 0.25})
    assert [stage.name for stage in stages] == ["align", "whole"]
    for stage in stages:
        sources = [stage.dataset[8 * i].get("source") for i in range(400)]
        share = sum(source.startswith("rendered sample") for source in sources) / len(sources)
        assert share == pytest.approx(0.25, abs=0.07)


def test_decay_of_a_recipe_on_other_data(train: Train, model: Path, data: Path, tmp_path: Path) -> None:
    common = [
        "--recipe",
        "sft",
        "--model",
        model,
        "--output-dir",
        tmp_path,
        *FAST,
        "--set",
        "learning_rate=1e-3",
    ]
    constant = ["--set", "lr_scheduler_type=constant", "--set", "save_steps=1"]
    assert train(*common, *constant, "--data", data, "--max-steps", 2)[0] == 0
    code, output = train(
        *common, "--data", f"{data}:2", "--decay-from", tmp_path / "sft" / "checkpoint-1", "--max-steps", 2,
        "--decay-shape", "1-sqrt",
    )  # fmt: skip
    assert code == 0, output
    rates = logged(tmp_path / "decay", "learning_rate")
    assert rates == pytest.approx([1e-3, 1e-3 * (1 - 0.5**0.5)])
    record = json.loads((tmp_path / "decay" / "final" / "recipe.json").read_text())
    assert record["starts_at"].endswith("sft/checkpoint-1")
    assert record["dataset"]["sources"][0]["weight"] == 2


@pytest.mark.skipif(
    not (BUNDLED_MODEL / "model.safetensors").exists(), reason="the bundled model is not in this checkout"
)
def test_the_bundled_model_goes_on(train: Train, tmp_path: Path) -> None:
    """The stage `head` changes nothing of the model; the next one has all of its weights to start from."""
    code, output = train(
        "--recipe", "widen", "--stage", "head", "--max-steps", 2, "--output-dir", tmp_path, *FAST
    )  # fmt: skip
    assert code == 0, output
    before, after = weights(BUNDLED_MODEL), weights(tmp_path / "head" / "final")
    assert all(torch.equal(after[name].to(weight.dtype), weight) for name, weight in before.items())
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"dense_head"}
    assert logged(tmp_path / "head", "glyph_right")


def test_it_goes_on_with_other_samples_each_time(train: Train) -> None:
    from recipes import build_stages

    (head, large), (_, again), (_, other) = (
        build_stages("onward", **options)
        for options in ({}, {"options": {"seed": 2}}, {"options": {"seed": 3}})
    )
    assert (head.name, large.name, large.arguments["max_steps"]) == ("head", "large", 460)
    questions = [[stage.dataset[i].question for i in range(8)] for stage in (large, again, other)]
    assert questions[0] == questions[1] != questions[2]


def test_steps_are_filled_up() -> None:
    from vlmslice.training import Stage

    stage = Stage("x", None, range(10), None, {"per_device_train_batch_size": 4}, None)  # type: ignore[arg-type]
    assert list(run.whole_steps(stage)) == list(range(8))
    stage.fills_steps = True
    assert list(run.whole_steps(stage)) == [*range(10), 0, 1]


def test_the_bundled_model_is_the_default(train: Train, data: Path) -> None:
    from recipes import build_stages

    from vlmslice.data.sources import Source

    [stage] = build_stages("sft", data=[Source(data)])
    assert stage.model.args[0] == BUNDLED_MODEL
    batch = stage.collator([stage.dataset[i] for i in range(len(stage.dataset))])
    tokenizer = stage.collator.processor.tokenizer
    learnt = [tokenizer.decode(labels[labels >= 0]) for labels in batch["labels"]]
    assert learnt == ["abab<|end|>"] * 5 + ["abab<|end|>ba<|end|>", "ab<|end|>", "abba<|end|>", "abab<|end|>"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "sft"], "trains on conversations of yours; add --data FILE.jsonl"),
        (["--recipe", "tiny", "--data", "DATA"], "takes no --data; got ["),
        (["--recipe", "tiny", "--data", "DATA"], "recipes that do: lora, pretrain, sft"),
        (["--recipe", "tiny", "--eval-data", "DATA"], "takes no --eval-data"),
        (["--recipe", "pretrain"], "starts from a saved model; add --model FOLDER"),
        (["--recipe", "sft", "--data", "DATAl"], "there is no file"),
        (["--recipe", "sft", "--data", "DATA:0"], "has the weight 0; expected a number above 0"),
        (["--recipe", "sft", "--data", "DATA", "--model", "/nowhere"], "it has no config.json"),
        (["--recipe", "sft", "--data", "DATA", "--option", "rank=8"], "option of recipe 'sft' 'rank'; expected one of"),
        (["--recipe", "lora", "--data", "DATA", "--option", "rnak=8"], "did you mean 'rank'?"),
        (["--recipe", "lora", "--data", "DATA", "--option", "rank"], "--option 'rank' has no value"),
        (["--recipe", "lora", "--data", "DATA", "--option", "rank=x"], "is 'x'; expected a value like 16"),
        (["--recipe", "lora", "--data", "DATA", "--option", "parts=visoin"], "no part 'visoin'"),
        (["--recipe", "tiny", "--option", "rank=8"], "recipe 'tiny' has no options; got 'rank'"),
        (["--recipe", "tiny", "--set", "eey.seed=1"], "unknown stage of recipe 'tiny' 'eey'; did you mean 'eye'?"),
        (["--recipe", "tiny", "--set", "eye.sed=1"], "unknown training argument 'sed'; did you mean 'seed'?"),
        (["--recipe", "tiny", "--decay-from", "runs/answr/checkpoint-2"], "'answr'; did you mean 'answer'?"),
        (["--recipe", "tiny", "--decay-from", "runs/eye/checkpoint-2", "--stage", "eye"], "leave --stage eye out"),
        (["--recipe", "tiny", "--decay-from", "runs/eye/checkpoint-2"], "no whole checkpoint; expected RUN/STAGE"),
    ],
)  # fmt: skip
def test_errors_name_the_remedy(
    train: Train, data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    arguments = [argument.replace("DATA", str(data)) for argument in arguments]
    code, output = train(*arguments, "--output-dir", tmp_path)
    assert code == 2 and message in output


def test_list_says_what_a_recipe_needs(train: Train) -> None:
    _, output = train("--list")
    assert "sft: Trains all weights" in output
    assert "  its stages depend on --model, --data" not in output
    assert output.count("  its stages depend on --data") == 2
    assert output.count("  its stages depend on --model") == 3
