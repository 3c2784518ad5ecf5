"""Who is asked: a vlmslice model, any model of transformers, any OpenAI-compatible endpoint, or a script.

All have one form, `Answerer`: pictures and an arm to texts. Scripts answer from what is drawn, as a model with one
known fault would; they are what the test is tested with.
"""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmslice.counting_test.arms import Arm, ArmError, check_arm, edit_inputs
from vlmslice.counting_test.pictures import Picture, num_slices_seeing
from vlmslice.errors import VlmSliceError, suggestion
from vlmslice.model_files import find_model, read_slicing_config
from vlmslice.slicing import SlicePlan, SlicingConfig, plan_slices

if TYPE_CHECKING:
    import httpx

    from vlmslice.inference import Assistant

SCRIPTS = ("perfect", "double-counter", "seam-misser", "size-failer", "constant")
ENDPOINT_KEY = "VLMSLICE_ENDPOINT_KEY"
"""Environment variable that holds the key of an endpoint."""

_BRIEFLY = " Answer with a number only."
_MAX_NEW_TOKENS = 128  # row and column of 30 objects, and the number
_MAX_SEEN_SIDE = 1024
_CONSTANT = "7"


class AnswererError(VlmSliceError):
    """A model cannot be asked."""


class Answerer(Protocol):
    """Someone who counts.

    Attributes:
        name: For reports.
        slicing: How pictures are sliced, of all but the policy; of a model that slices by itself, how the seams of the
            test are found.
        batch_size: Pictures that it takes at once.
    """

    name: str
    slicing: SlicingConfig
    batch_size: int

    def describe(self) -> dict[str, Any]:
        """All that decides its answers, for a manifest."""
        ...

    def check(self, arm: Arm) -> None:
        """Raises `ArmError` if it cannot be asked so."""
        ...

    def plan(self, height: int, width: int, arm: Arm) -> SlicePlan | None:
        """How it slices an image of this size; None if that is its own affair. Raises `SlicingError`."""
        ...

    def answer(self, pictures: Sequence[Picture], arm: Arm) -> list[str]:
        """One text for each picture."""
        ...


def plan_arm(slicing: SlicingConfig, height: int, width: int, arm: Arm) -> SlicePlan:
    """The plan of an image under the policy of an arm."""
    return plan_slices(height, width, replace(slicing, policy=arm.policy or slicing.policy))


class AssistantAnswerer:
    """A vlmslice model, asked as `Assistant.ask_batch` does."""

    batch_size = 8

    def __init__(self, model: str | Path | Assistant | None = None, max_visual_tokens: int | None = None):
        """`model`: a folder, by default the bundled one, loaded when first needed; or an assistant."""
        self._source = model
        if model is None or isinstance(model, (str, Path)):
            path = find_model(model)
            self._path: Path | None = path
            self.name = path.resolve().name
            slicing = read_slicing_config(path)
        else:
            self._path = None
            self.name = Path(model.model.name_or_path).name or "model"
            slicing = model.processor.image_processor.slicing_config
        self.slicing = replace(slicing, max_visual_tokens=max_visual_tokens or slicing.max_visual_tokens)

    @cached_property
    def assistant(self) -> Assistant:
        """Loaded at the first question."""
        if self._path is None:
            return self._source  # type: ignore[return-value]  # no path means an assistant
        from transformers.utils.logging import disable_progress_bar

        from vlmslice.inference import Assistant

        disable_progress_bar()
        return Assistant.from_pretrained(self._path)

    def describe(self) -> dict[str, Any]:
        from vlmslice.run_folder import describe_model

        model = {"name": self.name} if self._path is None else describe_model(self._path)
        return {
            "kind": "vlmslice",
            **model,
            "slicing": self.slicing.to_dict(),
            "max_new_tokens": _MAX_NEW_TOKENS,
        }

    def check(self, arm: Arm) -> None:
        if not arm.is_plain:
            check_arm(arm, self.assistant.model, self.assistant.processor)

    def plan(self, height: int, width: int, arm: Arm) -> SlicePlan | None:
        return plan_arm(self.slicing, height, width, arm)

    def answer(self, pictures: Sequence[Picture], arm: Arm) -> list[str]:
        answers = self.assistant.ask_batch(
            [([picture.draw()], picture.layout.question) for picture in pictures],
            policy=arm.policy,
            max_visual_tokens=self.slicing.max_visual_tokens,
            max_new_tokens=_MAX_NEW_TOKENS,
            edit_inputs=lambda inputs, plans: edit_inputs(inputs, plans, arm, self.assistant.processor),
        )
        return [answer.text for answer in answers]


class _OwnSlicing:
    """What answerers share that slice, or do not slice, by themselves: they have the arm "as it is" alone."""

    name: str
    batch_size = 1

    def __init__(self, slicing: SlicingConfig | None):
        self.slicing = slicing or SlicingConfig()

    def check(self, arm: Arm) -> None:
        if arm != Arm(None):
            raise ArmError(
                f"arm {arm.name!r} needs a vlmslice model, got {self.name!r}, which slices by itself; leave --arm out"
            )

    def plan(self, height: int, width: int, arm: Arm) -> SlicePlan | None:
        return None


class TransformersAnswerer(_OwnSlicing):
    """Any image-text-to-text model of transformers, from a folder: nothing is fetched, and no code of it is run."""

    def __init__(self, folder: str | Path, slicing: SlicingConfig | None = None):
        """`slicing`: whose seams pictures are made for."""
        super().__init__(slicing)
        self._path = Path(folder)
        self.name = self._path.resolve().name
        if not (self._path / "config.json").is_file():
            raise AnswererError(
                f"model {str(folder)!r} has no config.json; expected a folder of save_pretrained of an "
                "image-text-to-text model and its processor; check the path"
            )

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils.logging import disable_progress_bar

        import vlmslice.registration  # noqa: F401  # ours are among them

        disable_progress_bar()
        try:
            processor = AutoProcessor.from_pretrained(self._path, local_files_only=True)
            model = AutoModelForImageTextToText.from_pretrained(
                self._path, dtype="auto", use_safetensors=True, local_files_only=True
            )
        except (
            Exception
        ) as error:  # Files of unknown models make the libraries that read them raise anything.
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise AnswererError(
                f"model {str(self._path)!r} cannot be loaded as image-text-to-text: {reason[0]}; expected what "
                "save_pretrained of model and processor writes, of a model that needs no code of its own"
            ) from error
        if not getattr(processor, "chat_template", None):
            raise AnswererError(
                f"the processor of {str(self._path)!r} has no chat template; expected one to spell the question with; "
                "save it with the processor"
            )
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        on_device: Any = model.to(accelerator or "cpu")  # type: ignore[arg-type]  # `to` has lost its types
        return on_device.eval(), processor

    def describe(self) -> dict[str, Any]:
        from vlmslice.run_folder import describe_model

        return {
            "kind": "transformers",
            **describe_model(self._path),
            "suffix": _BRIEFLY,
            "max_new_tokens": _MAX_NEW_TOKENS,
        }

    def answer(self, pictures: Sequence[Picture], arm: Arm) -> list[str]:
        import torch

        model, processor = self._parts
        texts = []
        for picture in pictures:
            text = picture.layout.question + _BRIEFLY
            content = [{"type": "image", "image": picture.draw()}, {"type": "text", "text": text}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(model.device)
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
            new_ids = ids[:, inputs["input_ids"].shape[1] :]
            texts.append(processor.batch_decode(new_ids, skip_special_tokens=True)[0])
        return texts


class EndpointAnswerer(_OwnSlicing):
    """An OpenAI-compatible endpoint: `POST URL/chat/completions`, the image as a data URL of a PNG.

    The key is read from the environment variable `ENDPOINT_KEY`, if it is set, and goes nowhere else.
    """

    batch_size = 4
    _NUM_TRIES = 4

    def __init__(
        self,
        url: str,
        model: str,
        slicing: SlicingConfig | None = None,
        timeout: float = 120.0,
        pause: float = 2.0,
    ):
        """Prepares, but sends nothing yet.

        Args:
            url: Such as `http://localhost:8000/v1`.
            model: Name of the model there.
            slicing: Whose seams pictures are made for.
            timeout: Seconds to wait for an answer.
            pause: Seconds before a request that the endpoint was too busy for is sent again, doubled each time.
        """
        super().__init__(slicing)
        if not url.startswith(("http://", "https://")):
            raise AnswererError(f"--endpoint is {url!r}; expected a URL such as http://localhost:8000/v1")
        self._url = url.rstrip("/")
        self._timeout, self._pause = timeout, pause
        self.name = model

    @cached_property
    def _client(self) -> httpx.Client:
        try:
            import httpx
        except ImportError as error:
            raise AnswererError(
                "an endpoint needs httpx, which is not installed; pip install 'vlmslice[demo]'"
            ) from error
        key = os.environ.get(ENDPOINT_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(timeout=self._timeout, headers=headers)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "endpoint",
            "name": self.name,
            "url": self._url,
            "suffix": _BRIEFLY,
            "max_new_tokens": _MAX_NEW_TOKENS,
        }

    def answer(self, pictures: Sequence[Picture], arm: Arm) -> list[str]:
        client = self._client  # made once, before the threads
        with ThreadPoolExecutor(self.batch_size) as pool:
            return list(pool.map(lambda picture: self._ask(client, picture), pictures))

    def _ask(self, client: httpx.Client, picture: Picture) -> str:
        import httpx

        file = io.BytesIO()
        picture.draw().save(file, "PNG")
        data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        body = {
            "model": self.name,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": data}},
                        {"type": "text", "text": picture.layout.question + _BRIEFLY},
                    ],
                }
            ],
            "max_tokens": _MAX_NEW_TOKENS,
            "temperature": 0,
        }
        for number in range(self._NUM_TRIES):
            try:
                response = client.post(f"{self._url}/chat/completions", json=body)
            except httpx.TimeoutException as error:
                raise AnswererError(
                    f"endpoint {self._url} gave no answer within {self._timeout:g} s; give the same command again to "
                    "go on"
                ) from error
            except httpx.HTTPError as error:
                raise AnswererError(
                    f"endpoint {self._url} cannot be reached: {error}; check the URL and that it runs"
                ) from error
            is_busy = response.status_code == 429 or response.status_code >= 500
            if not is_busy or number == self._NUM_TRIES - 1:
                break
            time.sleep(self._pause * 2**number)
        if response.status_code != 200:
            hint = f"; set {ENDPOINT_KEY} to its key" if response.status_code in (401, 403) else ""
            raise AnswererError(
                f"endpoint {self._url} answered {response.status_code} {response.reason_phrase}: "
                f"{response.text[:200]}{hint}"
            )
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise AnswererError(
                f"endpoint {self._url} sent {response.text[:200]!r}; expected JSON with choices[0].message.content, as "
                "the chat completions of OpenAI have"
            ) from error
        return text or ""


class ScriptedAnswerer:
    """Answers from what is drawn, with one known fault.

    - `perfect`: none
    - `double-counter`: counts an object once for every slice that sees a fifth of it
    - `seam-misser`: passes over objects of which two slices or more see a fifth
    - `size-failer`: sees half of the objects where a side is longer than 1,024 px
    - `constant`: says 7
    """

    batch_size = 64

    def __init__(self, script: str, slicing: SlicingConfig | None = None):
        """`slicing`: by which the script slices; an arm has its own policy."""
        if script not in SCRIPTS:
            raise AnswererError(
                f"there is no script {script!r}{suggestion(script, SCRIPTS)}; expected one of {', '.join(SCRIPTS)}"
            )
        self.name = self._script = script
        self.slicing = slicing or SlicingConfig()

    def describe(self) -> dict[str, Any]:
        return {"kind": "scripted", "name": self.name, "slicing": self.slicing.to_dict()}

    def check(self, arm: Arm) -> None:
        if not arm.is_plain:
            raise ArmError(
                f"arm {arm.name!r} means nothing to a script, which sees no views; leave --arm out"
            )

    def plan(self, height: int, width: int, arm: Arm) -> SlicePlan | None:
        return plan_arm(self.slicing, height, width, arm)

    def answer(self, pictures: Sequence[Picture], arm: Arm) -> list[str]:
        return [self._count(picture, arm) for picture in pictures]

    def _count(self, picture: Picture, arm: Arm) -> str:
        boxes = picture.asked_boxes
        if self._script == "constant":
            return _CONSTANT
        if self._script == "perfect":
            return str(len(boxes))
        if self._script == "size-failer":
            return str(len(boxes) // 2 if max(picture.image_size) > _MAX_SEEN_SIDE else len(boxes))
        plan = plan_arm(self.slicing, *picture.image_size, arm)
        times_seen = [num_slices_seeing(plan, box) for box in boxes]
        if self._script == "double-counter":
            return str(sum(max(times, 1) for times in times_seen))
        return str(sum(times < 2 for times in times_seen))
