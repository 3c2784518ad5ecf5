"""Whether images that are evaluated on are among those that train: the same file, the same pixels, or a near copy.

Every image is shrunk to 32 x 32 gray levels and centred on their mean. The likeness of two is the correlation of these
thumbnails: 1 for a copy at another size or quality. Two receipts of one shop may look alike without being one: pairs
above a threshold are listed for a look.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlmslice.data.real_data import FILES, RealDataset
from vlmslice.image_loading import load_image
from vlmslice.suites import FileSuite, open_suite

_SIDE = 32


@dataclass(frozen=True)
class Overlap:
    """What was found.

    Attributes:
        num_trained, num_evaluated: images of either side.
        same_files: evaluated images that train too, by path or by content.
        pairs: (evaluated, trained, likeness) of each evaluated image with the nearest that trains, likest first.
    """

    num_trained: int
    num_evaluated: int
    same_files: list[str]
    pairs: list[tuple[str, str, float]]


def find_overlap(data_root: str | Path) -> Overlap:
    """Compares all images that the sets of `real_data` may train on with all of the suite `dev`.

    Raises:
        RealDataError: a set is missing.
        SuiteError: the suite cannot be opened.
    """
    root = Path(data_root)
    trained = sorted({row["image"] for _, row in RealDataset(root, list(FILES))._entries})
    suite = open_suite("dev", data_root=root)
    assert isinstance(suite, FileSuite)
    evaluated = suite.images
    same_paths = set(trained) & set(evaluated)
    digests = {_digest(root / image) for image in trained}
    same_files = sorted(same_paths | {image for image in evaluated if _digest(root / image) in digests})
    likeness = _thumbnails(root, evaluated) @ _thumbnails(root, trained).T
    nearest = likeness.argmax(axis=1)
    pairs = [
        (image, trained[n], float(likeness[i, n]))
        for i, (image, n) in enumerate(zip(evaluated, nearest.tolist(), strict=True))
    ]
    pairs.sort(key=lambda pair: -pair[2])
    return Overlap(len(trained), len(evaluated), same_files, pairs)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _thumbnails(root: Path, images: Iterable[str]) -> np.ndarray:
    """`float[N, pixels]` of mean 0 and length 1, so that products are correlations."""
    rows = []
    for image in images:
        gray = load_image(root / image).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
        levels = np.asarray(gray, dtype=np.float64).ravel()
        levels -= levels.mean()
        rows.append(levels / max(float(np.linalg.norm(levels)), 1e-9))
    return np.stack(rows)
