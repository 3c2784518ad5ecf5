"""Ask a saved model about images: one class from folder to answer, with the time that each stage takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import vlmslice.registration  # noqa: F401  # the processor finds its image processor by the Auto classes
from vlmslice.image_loading import ImageSource, load_image
from vlmslice.json_decoding import JSONSchemaLogitsProcessor
from vlmslice.looping import StopLoops
from vlmslice.model_files import ModelError, find_model, find_weights
from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.processing import VlmSliceProcessor
from vlmslice.slicing import SlicePlan

FinishReason = Literal["stop", "length", "loop", "cancelled"]
MAX_NEW_TOKENS = 1024
"""Of an answer, if nothing else is asked for: a page of text is cut there, and says so."""


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it took.

    Attributes:
        text: The answer.
        plans: The slice plan of each image.
        num_visual_tokens: Over all images.
        num_new_tokens: Tokens of the answer, its end included.
        seconds: By stage: `process` (load the images, plan, slice, spell the prompt), `first_token` (encode the views,
            read the prompt), `decode` (the rest of the answer).
        points: Where the answer points at its image, (y, x) in px; see `spatial_schema`. A question about several
            images has none, as a point does not say which it is on.
        finish_reason: Why it ended: `stop` (the model said so), `length` (at the most tokens asked for), `loop` (it
            went round in circles, see `looping`) or `cancelled` (the caller said so).
    """

    text: str
    plans: tuple[SlicePlan, ...]
    num_visual_tokens: int
    num_new_tokens: int
    seconds: dict[str, float]
    points: tuple[tuple[float, float], ...] = ()
    finish_reason: FinishReason = "stop"

    def to_dict(self) -> dict[str, Any]:
        """All but the seconds, to which callers add their own, in dicts, lists, numbers and strings: ready for JSON."""
        return {
            "answer": self.text,
            "points": [[round(part, 1) for part in point] for point in self.points],
            "plans": [plan.to_dict() for plan in self.plans],
            "num_visual_tokens": self.num_visual_tokens,
            "num_new_tokens": self.num_new_tokens,
            "finish_reason": self.finish_reason,
        }


class Assistant:
    """A model and its processor, ready to answer.

    ```python
    assistant = Assistant.from_pretrained()  # the bundled model
    answer = assistant.ask(["receipt.png"], "What is written in the image?")
    ```
    """

    def __init__(self, model: VlmSliceForConditionalGeneration, processor: VlmSliceProcessor):
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None, device: str | None = None) -> Assistant:
        """Loads a model from a folder, by default the bundled one.

        Args:
            folder: A folder of `save_pretrained` of model and processor. Only safetensors are read, no code is run and
                nothing is fetched.
            device: Such as `"cuda:1"`; by default the accelerator of the machine, if any, else the CPU. On a CPU the
                weights become fp32, whatever they are saved in: without special units bf16 is slower there.

        Raises:
            ModelError: The folder holds no complete vlmslice model.
        """
        path = find_model(folder)
        find_weights(path)
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        target = torch.device(device or accelerator or "cpu")
        on_cpu = target.type == "cpu"
        try:
            processor = VlmSliceProcessor.from_pretrained(path, local_files_only=True)
            model = VlmSliceForConditionalGeneration.from_pretrained(
                path, dtype=torch.float32 if on_cpu else "auto", use_safetensors=True, local_files_only=True
            )
        except Exception as error:  # A damaged file makes the libraries that read it raise anything.
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(
                f"model {str(path)!r} cannot be loaded: {reason[0]}; expected what save_pretrained of model and "
                "processor writes; save or download it again"
            ) from error
        return cls(model.to(target), processor)  # type: ignore[arg-type]  # transformers' `to` has lost its types

    def ask(
        self,
        images: Sequence[ImageSource],
        question: str,
        *,
        policy: str | None = None,
        max_visual_tokens: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        json_schema: dict[str, Any] | None = None,
        on_text: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answers a question about images, always by the likeliest token.

        Args:
            images: What `load_image` takes; they stand before the question, in this order.
            question: Plain text; tokens of the spatial schema spelled in it have no effect.
            policy: Slicing policy, instead of the model's own.
            max_visual_tokens: Most visual tokens of each image, instead of the model's own.
            max_new_tokens: Most tokens of the answer.
            json_schema: The answer is held to JSON of this schema; the question should ask for it. An answer that is
                cut (see `Answer.finish_reason`) is not whole.
            on_text: Called with each piece of the answer as soon as it is certain; joined, they are the answer.
            should_stop: Called after each token; once it is true, the answer ends there.

        Raises:
            ImageError: An image cannot be loaded.
            SlicingError: An image cannot be planned as asked.
            SchemaError: `json_schema` cannot be followed.
        """
        start = time.perf_counter()
        [plans], inputs = self._encode([(images, question)], policy, max_visual_tokens)
        processed = time.perf_counter()

        streamer = _AnswerStreamer(self.processor.tokenizer, on_text)
        loops = StopLoops(inputs["input_ids"].shape[1])
        told = _StopWhenTold(should_stop)
        output = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=streamer,
            logits_processor=self._constraints(json_schema),
            stopping_criteria=StoppingCriteriaList([loops, told]),
        )
        done = time.perf_counter()
        new_ids = output[0, inputs["input_ids"].shape[1] :]
        return Answer(
            text="".join(streamer.pieces),
            plans=plans,
            num_visual_tokens=sum(plan.num_visual_tokens for plan in plans),
            num_new_tokens=len(new_ids),
            seconds={
                "process": processed - start,
                "first_token": streamer.first_token_at - processed,
                "decode": done - streamer.first_token_at,
            },
            points=self._points(plans, new_ids),
            finish_reason="cancelled" if told.stopped else self._finish_reason(new_ids, loops),
        )

    def ask_batch(
        self,
        samples: Sequence[tuple[Sequence[ImageSource], str]],
        *,
        policy: str | None = None,
        max_visual_tokens: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        json_schema: dict[str, Any] | None = None,
        edit_inputs: Callable[[Any, list[tuple[SlicePlan, ...]]], Any] | None = None,
    ) -> list[Answer]:
        """Answers several questions at once, each about its own images, as `ask` would one by one.

        The answers are those of `ask` as far as arithmetic goes: sums of a batch are rounded in another order, so two
        tokens that are likely to within 1e-4 of each other may change places.

        Args:
            samples: Images and question of each, as `ask` takes them; prompts of similar length waste least.
            policy: As in `ask`.
            max_visual_tokens: As in `ask`.
            max_new_tokens: As in `ask`.
            json_schema: As in `ask`, of all answers.
            edit_inputs: Given the model inputs of the batch and the plans of each sample's images, returns the inputs
                that the model gets instead, as experiments do; see `counting_test.arms`.

        Returns:
            One answer for each sample, in order. Their `seconds` are equal shares of the batch's.

        Raises:
            ImageError: An image cannot be loaded.
            SlicingError: An image cannot be planned as asked.
            SchemaError: `json_schema` cannot be followed.
        """
        start = time.perf_counter()
        plans, inputs = self._encode(samples, policy, max_visual_tokens)
        if edit_inputs is not None:
            inputs = edit_inputs(inputs, plans)
        processed = time.perf_counter()
        clock, loops = _FirstTokenClock(), StopLoops(inputs["input_ids"].shape[1])
        output = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=clock,
            logits_processor=self._constraints(json_schema),
            stopping_criteria=StoppingCriteriaList([loops]),
        )
        done = time.perf_counter()
        seconds = {
            "process": (processed - start) / len(samples),
            "first_token": (clock.first_token_at - processed) / len(samples),
            "decode": (done - clock.first_token_at) / len(samples),
        }
        new_ids = output[:, inputs["input_ids"].shape[1] :]
        # What transformers fills up the rows with that are done is no part of their answers.
        answers = [
            ids[: min(length, loops.stopped.get(row, length))]
            for row, (ids, length) in enumerate(zip(new_ids, self._answer_lengths(new_ids), strict=True))
        ]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        return [
            Answer(
                text,
                of_sample,
                sum(plan.num_visual_tokens for plan in of_sample),
                len(ids),
                dict(seconds),
                self._points(of_sample, ids),
                self._finish_reason(ids, loops, row),
            )
            for row, (text, of_sample, ids) in enumerate(zip(texts, plans, answers, strict=True))
        ]

    def _encode(
        self,
        samples: Sequence[tuple[Sequence[ImageSource], str]],
        policy: str | None,
        max_visual_tokens: int | None,
    ) -> tuple[list[tuple[SlicePlan, ...]], Any]:
        """Slice plans of each sample's images, and the model inputs of all samples."""
        overrides = {"policy": policy, "max_visual_tokens": max_visual_tokens}
        slicing = {name: value for name, value in overrides.items() if value is not None}
        plans, chats = [], []
        for images, question in samples:
            pictures = [load_image(image) for image in images]
            plans.append(
                tuple(
                    self.processor.image_processor.plan(picture.height, picture.width, **slicing)
                    for picture in pictures
                )
            )
            content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
            chats.append([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])
        inputs = self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=slicing
        )
        return plans, inputs.to(self.model.device)

    def _constraints(self, json_schema: dict[str, Any] | None) -> LogitsProcessorList:
        if json_schema is None:
            return LogitsProcessorList()
        ends = self.model.generation_config.eos_token_id
        return LogitsProcessorList([JSONSchemaLogitsProcessor(json_schema, self.processor.tokenizer, ends)])

    def _points(self, plans: tuple[SlicePlan, ...], ids: torch.Tensor) -> tuple[tuple[float, float], ...]:
        if len(plans) != 1:
            return ()
        cells = self.processor.find_points(ids.tolist())
        # A location names a patch; the middle of it is shown.
        return tuple(plans[0].to_image(row + 0.5, col + 0.5) for row, col in cells)

    def _answer_lengths(self, new_ids: torch.Tensor) -> list[int]:
        """Tokens of each row up to its end token, which counts."""
        ends = self._are_ends(new_ids)
        return (ends.cumsum(dim=1) - ends.long() == 0).sum(dim=1).tolist()

    def _are_ends(self, ids: torch.Tensor) -> torch.Tensor:
        end_ids = self.model.generation_config.eos_token_id
        if end_ids is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        return torch.isin(ids, torch.tensor(end_ids, device=ids.device))

    def _finish_reason(self, ids: torch.Tensor, loops: StopLoops, row: int = 0) -> FinishReason:
        if len(ids) and bool(self._are_ends(ids)[-1]):
            return "stop"
        return "loop" if row in loops.stopped else "length"


class _StopWhenTold(StoppingCriteria):
    """Ends every answer of a batch once a callback, if there is one, says so."""

    def __init__(self, should_stop: Callable[[], bool] | None):
        self._should_stop = should_stop
        self.stopped = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.stopped = self._should_stop is not None and self._should_stop()
        return torch.full((len(input_ids),), self.stopped, dtype=torch.bool, device=input_ids.device)


class _FirstTokenClock(BaseStreamer):
    """Takes the time at which a batch has its first tokens."""

    def __init__(self) -> None:
        self.first_token_at = 0.0
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._seen_prompt and not self.first_token_at:
            self.first_token_at = time.perf_counter()
        self._seen_prompt = True

    def end(self) -> None:
        pass


class _AnswerStreamer(TextStreamer):
    """Collects the pieces of the answer, hands them on, and takes the time of the first token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces: list[str] = []
        self.first_token_at = 0.0
        self._on_text = on_text

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt and not self.first_token_at:
            self.first_token_at = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.pieces.append(text)
            if self._on_text is not None:
                self._on_text(text)
