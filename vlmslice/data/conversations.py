"""Files of conversations, the common `messages` + `images` format or LLaVA's, as a map-style dataset.

One JSON object per line::

    {"messages": [{"role": "user", "content": "<image>\\nWhat is the total?"},
                  {"role": "assistant", "content": "12.50"}],
     "images": ["scans/receipt-7.png"]}

`content` comes in two forms:

- a string. In messages of the user and of the system each `<image>` mark stands for the next of `images`, and a line
  break right after a mark belongs to it (LLaVA's and ShareGPT's spelling). Answers hold no marks.
- a list of blocks, `{"type": "text", "text": ...}` and `{"type": "image"}`. Here `<image>` in a text is just text.

LLaVA's spelling is read as well: `conversations` of `{"from": "human", "value": ...}` (or "gpt", "system") instead of
`messages`, and `image`, one path or a list, instead of `images`. So is a file that is one JSON array of such objects.

The dataset hands out the second form only. Other keys of a line (`id`, ...) are left alone. Image paths are relative
to the file, or to `image_root`; an absolute path stands as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmslice.data.collator import Sample
from vlmslice.errors import VlmSliceError
from vlmslice.image_loading import ImageError, ImageLimits, load_image
from vlmslice.spatial_schema import ROLES

IMAGE_MARK = "<image>"

_LLAVA_ROLES = {"human": "user", "gpt": "assistant"}

_DEFAULT_LIMITS = ImageLimits()


class ConversationError(VlmSliceError, ValueError):
    """A line is not a conversation, or one of its images cannot be loaded; the text begins with file:line."""


class ConversationDataset(Sequence[Sample]):
    """The conversations of one file; images are loaded when a sample is asked for.

    Every line is checked when the dataset is built. Of each line only its place in the file is kept, so a file of a
    million lines takes 16 MB. A JSON array is kept in memory as a whole.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_root: str | Path | None = None,
        limits: ImageLimits = _DEFAULT_LIMITS,
    ):
        """Checks every line.

        Args:
            path: The JSONL file, whose blank lines are skipped, or a JSON array.
            image_root: Folder that image paths are relative to; the file's own folder by default.
            limits: Caps on the size of an image.
        """
        self.path = Path(path)
        self.image_root = self.path.parent if image_root is None else Path(image_root)
        self.limits = limits
        self._records = self._read_array()
        for number, record in enumerate(self._records or [], start=1):
            parse_conversation(record, f"{self.path}: record {number}")
        self._places = self._find_lines() if self._records is None else np.empty((0, 2), dtype=np.int64)

    def _read_array(self) -> list[bytes] | None:
        """The objects of a JSON array, each as a line; None for JSONL."""
        with self.path.open("rb") as file:
            if file.read(512).lstrip()[:1] != b"[":
                return None
            file.seek(0)
            try:
                return [json.dumps(record).encode() for record in json.load(file)]
            except ValueError as error:
                raise ConversationError(f"{self.path}: not valid JSON: {error}") from error

    def _find_lines(self) -> np.ndarray:
        """Offset and number of each line that is not blank, all of them checked."""
        places = []
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    parse_conversation(line, f"{self.path}:{number}")
                    places.append((offset, number))
                offset += len(line)
        return np.array(places, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._places) if self._records is None else len(self._records)

    def without_pixels(self) -> Sequence[Sample]:
        """The same samples with the paths of their images in place of the images; for `lengths.measure_dataset`."""
        return _Outlines(self)

    def outline(self, index: int) -> Sample:
        """A sample with the paths of its images in place of the images."""
        line, source = self._read(index)
        messages, paths = parse_conversation(line, source)
        return Sample(messages=messages, images=[self.image_root / path for path in paths], source=source)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        sample = self.outline(index)
        try:
            sample["images"] = [load_image(path, limits=self.limits) for path in sample["images"]]
        except ImageError as error:
            raise ConversationError(f"{sample['source']}: {error}") from error
        return sample

    def _read(self, index: int) -> tuple[bytes, str]:
        """A record and where it comes from."""
        if self._records is not None:
            return self._records[index], f"{self.path}: record {range(len(self))[index] + 1}"
        offset, number = self._places[index]
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.readline(), f"{self.path}:{number}"


class _Outlines(Sequence[Sample]):
    def __init__(self, dataset: ConversationDataset):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        return self._dataset.outline(index)


def parse_conversation(line: str | bytes, source: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Reads one line.

    Args:
        line: A JSON object, as described at the top of this file.
        source: Named in errors, as file:line.

    Returns:
        The messages, every content a list of blocks, and the paths of the images, one per image block, in order.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConversationError(f"{source}: not valid JSON: {error}") from error
    if (
        isinstance(record, dict)
        and "messages" not in record
        and isinstance(record.get("conversations"), list)
    ):
        record = _from_llava(record)
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
        raise ConversationError(
            f'{source}: got no messages; expected an object {{"messages": [...], "images": [...]}} with at least one'
        )
    paths = record.get("images", [])
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ConversationError(f"{source}: images is {paths!r:.80}; expected a list of paths")
    messages = [
        _parse_message(message, f"{source}: message {number}")
        for number, message in enumerate(record["messages"])
    ]
    num_places = sum(block["type"] == "image" for message in messages for block in message["content"])
    if num_places != len(paths):
        raise ConversationError(
            f"{source}: the messages have places for {num_places} images but images lists {len(paths)}; write one "
            f'{IMAGE_MARK} mark (in a string) or {{"type": "image"}} block (in a list) per image'
        )
    return messages, paths


def _from_llava(record: dict[str, Any]) -> dict[str, Any]:
    """LLaVA's keys turned into `messages` and `images`; what is wrong with the values is told later."""
    messages = [
        {"role": _LLAVA_ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
        if isinstance(turn, dict)
        else turn
        for turn in record["conversations"]
    ]
    images = record.get("image", record.get("images", []))
    return {"messages": messages, "images": [images] if isinstance(images, str) else images}


def _parse_message(message: Any, source: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ConversationError(
            f"{source} is {message!r:.80}; expected an object with a role of {', '.join(ROLES)}"
        )
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        text = [{"type": "text", "text": content}] if content else []
        return {"role": role, "content": text if role == "assistant" else split_image_marks(content)}
    if not isinstance(content, list):
        raise ConversationError(
            f"{source} has the content {content!r:.80}; expected a string or a list of blocks"
        )
    for block in content:
        is_image = block == {"type": "image"}
        is_text = (
            isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str)
        )
        if not is_image and not is_text:
            raise ConversationError(
                f'{source} holds the block {block!r:.80}; expected {{"type": "text", "text": ...}} or '
                '{"type": "image"} with its path in the list of images'
            )
        if is_image and role == "assistant":
            raise ConversationError(
                f"{source} is an answer with an image; move the image to a message of the user"
            )
    return {"role": role, "content": content}


def split_image_marks(content: str) -> list[dict[str, str]]:
    """Turns a string with `<image>` marks into blocks.

    "<image>\\nWhat is this?" becomes `[{"type": "image"}, {"type": "text", "text": "What is this?"}]`.
    """
    first, *others = content.split(IMAGE_MARK)
    blocks = [{"type": "text", "text": first}] if first else []
    for text in others:
        blocks.append({"type": "image"})
        text = text.removeprefix("\n")
        if text:
            blocks.append({"type": "text", "text": text})
    return blocks
