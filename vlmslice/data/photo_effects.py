"""What a camera and a cheap printer do to a document: tilt, shadow, faded contrast, thermal dots. Boxes follow."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageChops

from vlmslice.data.scenes import Color, Scene, add_camera_effects, random_color

_SHADOW_GRID = 4


def photograph(rng: random.Random, scene: Scene, share: float) -> Scene:
    """The scene as a camera saw it, in `share` of the cases; noise, blur and JPEG come to all, now and then."""
    if rng.random() < share:
        if rng.random() < 0.7:
            scene = tilt(rng, scene)
        if rng.random() < 0.5:
            scene.image = shade(rng, scene.image)
        if rng.random() < 0.3:
            scene.image = fade(rng, scene.image)
    scene.image = add_camera_effects(rng, scene.image)
    return scene


def tilt(rng: random.Random, scene: Scene, strength: float = 0.05) -> Scene:
    """The picture as a sheet seen from slightly aside.

    Args:
        rng: drawn from.
        scene: what lies on the sheet.
        strength: largest turn in radians, and share of a side by which a corner moves inwards at most.
    """
    width, height = scene.image.size
    half = np.array([width, height]) / 2
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half
    # A long strip is turned less: it must shrink to stay on the picture.
    turn = rng.uniform(-1, 1) * strength * min(1.0, 2 * min(width, height) / max(width, height))
    turned = corners @ np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))])
    turned /= (abs(turned) / half).max()
    inwards = np.array([(rng.uniform(0, 1), rng.uniform(0, 1)) for _ in range(4)])
    moved = turned * (1 - strength * inwards)
    onto = homography(corners + half, moved + half)
    back = homography(moved + half, corners + half)
    image = scene.image.transform(
        (width, height),
        Image.Transform.PERSPECTIVE,
        tuple(back.flatten()[:8]),
        Image.Resampling.BILINEAR,
        fillcolor=_ground(rng),
    )
    return scene.moved(image, lambda boxes: warp_boxes(boxes, onto))


def _ground(rng: random.Random) -> Color:
    draw = rng.random()
    gray = rng.randrange(20, 110)
    return (gray, gray, gray) if draw < 0.5 else random_color(rng)


def homography(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The `float64[3, 3]` that takes four points (x, y) to four others."""
    rows, right = [], []
    for (x, y), (u, v) in zip(start, end, strict=True):
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
        right += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(right)), 1.0).reshape(3, 3)


def warp_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Upright boxes round the images of boxes `float64[N, 4]` (top, left, bottom, right) under a homography."""
    top, left, bottom, right = boxes.T
    corners = np.stack([(left, top), (right, top), (right, bottom), (left, bottom)], axis=1)  # [2, 4, N]
    x, y, scale = np.einsum("ij,jkn->ikn", matrix, np.concatenate([corners, np.ones_like(corners[:1])]))
    x, y = x / scale, y / scale
    return np.stack([y.min(0), x.min(0), y.max(0), x.max(0)], axis=1)


def shade(rng: random.Random, image: Image.Image) -> Image.Image:
    """Uneven light: soft blotches, and now and then the edge of a shadow."""
    generator = np.random.default_rng(rng.getrandbits(32))
    light = generator.uniform(rng.uniform(0.7, 0.9), 1.0, (_SHADOW_GRID, _SHADOW_GRID))
    if rng.random() < 0.5:
        rows, cols = np.mgrid[:_SHADOW_GRID, :_SHADOW_GRID] / (_SHADOW_GRID - 1) - 0.5
        angle = generator.uniform(0, 2 * np.pi)
        light[np.sin(angle) * rows + np.cos(angle) * cols > generator.uniform(-0.1, 0.3)] *= rng.uniform(
            0.6, 0.8
        )
    small = Image.fromarray((255 * light).astype(np.uint8))
    mask = small.resize(image.size, Image.Resampling.BICUBIC)
    return ImageChops.multiply(image, Image.merge("RGB", (mask, mask, mask)))


def fade(rng: random.Random, image: Image.Image) -> Image.Image:
    """Contrast lowered by up to two fifths, towards some grey."""
    gray = rng.randrange(60, 220)
    return Image.blend(image, Image.new("RGB", image.size, (gray, gray, gray)), rng.uniform(0.15, 0.4))


def print_thermally(rng: random.Random, image: Image.Image, pitch: int) -> Image.Image:
    """Dark ink broken up into the dots of a thermal or needle printer, and paler in some bands.

    Args:
        pitch: distance of dots, px; 2 or more.
    """
    width, height = image.size
    gap = rng.randrange(70, 150)
    tile = np.zeros((pitch, pitch), dtype=np.uint8)
    tile[-1, :] = gap
    if rng.random() < 0.6:
        tile[:, -1] = gap
    dots = np.tile(tile, (-(-height // pitch), -(-width // pitch)))[:height, :width]
    if rng.random() < 0.5:
        generator = np.random.default_rng(rng.getrandbits(32))
        bands = generator.integers(0, rng.randrange(20, 90), (max(2, height // 40), 1), dtype=np.uint8)
        pale = np.asarray(Image.fromarray(bands).resize((1, height), Image.Resampling.BILINEAR))
        dots = np.maximum(dots, pale)
    mask = Image.fromarray(dots)
    return ImageChops.lighter(image, Image.merge("RGB", (mask, mask, mask)))
