"""Distillation: a model learns from the right answers and from the probabilities of a larger one.

The loss is `(1 - weight) * language loss + weight * T^2 * KL(teacher || student)`, both with logits divided by the
temperature T, averaged over the ids of the answers (Hinton et al., 2015, https://arxiv.org/abs/1503.02531). The factor
T^2 makes up for gradients that shrink with 1 / T^2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vlmslice.data.collator import IGNORED
from vlmslice.errors import VlmSliceError
from vlmslice.modeling import VlmSliceForConditionalGeneration, VlmSliceOutput

_INPUTS = (
    "input_ids",
    "pixel_values",
    "target_sizes",
    "canvas_boxes",
    "num_views",
    "token_boxes",
    "attention_mask",
    "position_ids",
)


class DistillationError(VlmSliceError, ValueError):
    """This teacher cannot teach this student, or not so."""


class Student(VlmSliceForConditionalGeneration):
    """A model whose loss knows a teacher; saved, it is the model alone.

    Being the model that it trains, and not a wrapper around it, it keeps the names of its weights, its tied weights and
    its checkpoints. The teacher is held beside the modules: it is not trained, not saved, and stays in eval mode.
    """

    _teacher: tuple[VlmSliceForConditionalGeneration, ...] = ()
    _weight = 0.0
    _temperature = 1.0

    def learn_from(
        self, teacher: VlmSliceForConditionalGeneration, weight: float = 0.5, temperature: float = 2.0
    ) -> Student:
        """Sets the teacher.

        Args:
            teacher: a model that takes the same inputs and spells the same ids; it is frozen.
            weight: of what the teacher says in the loss, from 0 to 1; the rest is the language loss.
            temperature: above 1, the less likely ids count for more.

        Raises:
            DistillationError: weight or temperature are out of range, or the teacher does not fit.
        """
        if not 0 <= weight <= 1 or not temperature > 0:
            raise DistillationError(
                f"got weight {weight} and temperature {temperature}, expected a weight from 0 to 1 and a temperature "
                "above 0"
            )
        own, other = _interface(self), _interface(teacher)
        differences = [f"{name} {other[name]} for {own[name]}" for name in own if own[name] != other[name]]
        if differences:
            raise DistillationError(
                f"the teacher has {'; '.join(differences)} of the student, expected both to take the same inputs and "
                "to spell the same ids; choose a teacher of the same family"
            )
        # In a tuple, lest it become a submodule.
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._weight, self._temperature = weight, temperature
        return self

    def forward(  # type: ignore[override]  # the same arguments, by name only
        self, labels: torch.LongTensor | None = None, **inputs: Any
    ) -> VlmSliceOutput:
        """As the model's, with the teacher's part in `loss`, where there are labels and a teacher.

        `metrics` gets `teacher_divergence`, in nats per answer id at the temperature, without the factor T^2.
        """
        outputs = super().forward(labels=labels, **inputs)
        if labels is None or not self._teacher:
            return outputs
        assert outputs.logits is not None and outputs.loss is not None and outputs.metrics is not None
        [teacher] = self._teacher
        if teacher.device != outputs.logits.device:
            teacher.to(outputs.logits.device)  # type: ignore[arg-type]  # transformers' `to` has lost its types
        with torch.no_grad():
            known = {name: inputs[name] for name in _INPUTS if name in inputs}
            teacher_logits = teacher(**known, use_cache=False).logits
        answers = labels[:, 1:] != IGNORED
        divergence = distillation_loss(
            outputs.logits[:, :-1][answers], teacher_logits[:, :-1][answers], self._temperature
        )
        auxiliary_loss = outputs.auxiliary_loss
        language_loss = outputs.loss if auxiliary_loss is None else outputs.loss - auxiliary_loss
        loss = (1 - self._weight) * language_loss + self._weight * divergence
        outputs.loss = loss if auxiliary_loss is None else loss + auxiliary_loss
        outputs.metrics |= {"teacher_divergence": divergence.detach() / self._temperature**2}
        return outputs

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # type: ignore[override]
        """Saves the model as what it is without its teacher."""
        super().save_pretrained(save_directory, **options)
        if options.get("is_main_process", True):
            self.config.architectures = [VlmSliceForConditionalGeneration.__name__]
            self.config.save_pretrained(save_directory)


def distillation_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """`T^2 * KL(teacher || student)` in nats, the mean over ids; 0 for none.

    Args:
        student_logits: `[ids, vocabulary]`.
        teacher_logits: the same, of the teacher.
        temperature: T, by which logits are divided.
    """
    log_student, log_teacher = (
        (logits.float() / temperature).log_softmax(dim=-1) for logits in (student_logits, teacher_logits)
    )
    divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return temperature**2 * divergence / max(len(student_logits), 1)


def _interface(model: VlmSliceForConditionalGeneration) -> dict[str, Any]:
    """What two models must share to answer the same inputs in the same ids."""
    config = model.config
    return {
        "vocab_size": config.text_config.vocab_size,
        "image_token_id": config.image_token_id,
        "location_token_id": config.location_token_id,
        "slicing": config.slicing,
        "visual tokens in the prompt": config.connector != "cross_attention",
    }
