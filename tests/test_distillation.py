"""Distillation: its loss against a sum by hand, what reaches the student, and what is saved."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import noise_image, tiny_config, tiny_model, tiny_processor

from vlmslice.data.collator import IGNORED, VlmSliceCollator
from vlmslice.shrinking.distillation import DistillationError, Student, distillation_loss
from vlmslice.training import Stage, run_stage

TIED = {"tie_word_embeddings": True}


def student_of(seed: int = 0, **options) -> Student:
    student = Student(tiny_config("cross_attention", text=TIED, **options))
    student.load_state_dict(tiny_model("cross_attention", seed, text=TIED, **options).state_dict())
    return student.eval()


def teacher_of(seed: int = 1, **options):
    return tiny_model("cross_attention", seed, text=TIED, **options)


def conversation(index: int) -> dict:
    """Answers of unequal length."""
    return {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read this."}]},
            {"role": "assistant", "content": [{"type": "text", "text": "abcdefgh"[: 1 + 3 * index % 8]}]},
        ],
        "images": [noise_image(40, 60, seed=index)],
    }


@pytest.fixture(scope="module")
def collator() -> VlmSliceCollator:
    return VlmSliceCollator(tiny_processor("cross_attention"))


@pytest.fixture(scope="module")
def batch(collator: VlmSliceCollator) -> dict[str, torch.Tensor]:
    return dict(collator([conversation(i) for i in range(4)]))


def test_divergence_by_hand() -> None:
    """Logits of log 1 and log 3, at temperature 1; at 2, probabilities are as their square roots."""
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(distillation_loss(student, teacher, 1.0)) == pytest.approx(by_hand, rel=1e-5)
    low = 1 / (1 + math.sqrt(3))
    by_hand = low * math.log(low / 0.5) + (1 - low) * math.log((1 - low) / 0.5)
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(4 * by_hand, rel=1e-5)
    assert float(distillation_loss(student[:0], teacher[:0], 2.0)) == 0


def test_loss_is_the_weighted_sum_over_answer_ids(batch: dict[str, torch.Tensor]) -> None:
    student, teacher = student_of(), teacher_of()
    with torch.no_grad():
        plain, logits = student(**batch), teacher(**batch).logits
        taught = student.learn_from(teacher, weight=0.3, temperature=2.0)(**batch)
    total, num_ids = 0.0, 0
    for row, labels in enumerate(batch["labels"]):
        for position in range(1, len(labels)):
            if labels[position] != IGNORED:
                p = (logits[row, position - 1].double() / 2).softmax(-1)
                q = (plain.logits[row, position - 1].double() / 2).softmax(-1)
                total += float((p * (p / q).log()).sum())
                num_ids += 1
    assert num_ids > 8
    expected = 0.7 * float(plain.loss) + 0.3 * 4 * total / num_ids
    assert float(taught.loss) == pytest.approx(expected, rel=1e-4)
    assert float(taught.metrics["teacher_divergence"]) == pytest.approx(total / num_ids, rel=1e-4)
    assert torch.equal(taught.logits, plain.logits)


def gradients(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_teacher_equal_to_its_student_teaches_nothing(batch: dict[str, torch.Tensor]) -> None:
    student = student_of()
    alone = gradients(student, batch)
    taught = gradients(student.learn_from(teacher_of(seed=0), weight=0.5), batch)
    assert float(student(**batch).metrics["teacher_divergence"]) == pytest.approx(0, abs=1e-6)
    assert alone.keys() == taught.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(taught[name], gradient / 2, rtol=1e-3, atol=1e-5)


def test_other_losses_stay_whole(batch: dict[str, torch.Tensor]) -> None:
    """The Trainer weights `loss - auxiliary_loss` by answer ids, so the teacher's part must be in it."""
    student = student_of(guide_loss_weight=0.5).learn_from(teacher_of(), weight=1.0)
    guide = {"guide_entries": torch.tensor([[0, 0, 5, 0]]), "guide_shares": torch.tensor([1.0])}
    with torch.no_grad():
        outputs = student(**batch, **guide)
        divergence = student(**batch).loss
    assert float(outputs.auxiliary_loss) > 0
    torch.testing.assert_close(outputs.loss - outputs.auxiliary_loss, divergence)


def test_teacher_is_held_beside_the_modules() -> None:
    student, teacher = student_of(), teacher_of().train()
    names = set(student.state_dict())
    student.learn_from(teacher).train()
    assert set(student.state_dict()) == names
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def stage_of(collator: VlmSliceCollator, build, **arguments) -> Stage:
    return Stage(
        name="distil",
        model=build,
        dataset=[conversation(i) for i in range(8)],
        collator=collator,
        arguments={
            "per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_steps": 15, "lr_scheduler_type": "constant",
            "optim": "adamw_torch", "logging_steps": 1, "save_steps": 5, "save_total_limit": 1, "report_to": [],
            "disable_tqdm": True, "seed": 0,
        } | arguments,
        save=lambda model, folder: model.save_pretrained(folder),
    )  # fmt: skip


def test_a_stage_brings_the_student_to_its_teacher(
    collator: VlmSliceCollator, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """From its teacher alone, through checkpoints, to a model without one."""
    teacher = teacher_of()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = student_of()
    final = run_stage(
        stage_of(collator, lambda previous: student.learn_from(teacher, weight=1.0)), tmp_path, None
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert "VlmSliceForConditionalGeneration" in (final / "config.json").read_text()
    saved = load_file(final / "model.safetensors")
    assert saved.keys() <= student.state_dict().keys()
    assert load_file(tmp_path / "distil" / "checkpoint-15" / "model.safetensors").keys() == saved.keys()
    trained, untrained = Student.from_pretrained(final).eval(), student_of()
    with torch.no_grad():
        first, last = (
            float(model.learn_from(teacher)(**batch).metrics["teacher_divergence"])
            for model in (untrained, trained)
        )
    assert last < first / 2


def test_accumulated_batches_weigh_every_answer_id_alike(collator: VlmSliceCollator, tmp_path: Path) -> None:
    weights = []
    for name, size, num in (("whole", 8, 1), ("parts", 2, 4)):
        stage = stage_of(
            collator,
            lambda previous: student_of().learn_from(teacher_of(), weight=0.7),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=num,
            max_steps=2,
            optim="sgd",
            learning_rate=1.0,
            save_strategy="no",
        )
        weights.append(load_file(run_stage(stage, tmp_path / name, None) / "model.safetensors"))
    start = student_of().state_dict()
    assert any(float((weights[0][name] - start[name]).abs().max()) > 1e-3 for name in weights[0])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(DistillationError, match="weight 1.5 .* from 0 to 1"):
        student_of().learn_from(teacher_of(), weight=1.5)
    with pytest.raises(DistillationError, match="temperature 0, .* above 0"):
        student_of().learn_from(teacher_of(), temperature=0)
    with pytest.raises(DistillationError, match="vocab_size 1000 for .* of the same family"):
        student_of().learn_from(tiny_model("cross_attention", text={"vocab_size": 1000}))
    with pytest.raises(DistillationError, match="visual tokens in the prompt True for False"):
        student_of().learn_from(tiny_model("pixel_unshuffle"))
