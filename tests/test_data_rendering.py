import hashlib
import json
import random
import string
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from vlmslice.data import fonts as fonts_module
from vlmslice.data.dense import (
    HEADS,
    DenseCropConfig,
    DenseCropDataset,
    collate_crops,
    label_cells,
    resize_scene,
    shape_crop,
    text_crop,
)
from vlmslice.data.fonts import (
    CHARACTERS,
    HELD_OUT_FAMILIES,
    FontFile,
    FontLibrary,
    find_fonts,
    load_font,
    matplotlib_font_dir,
)
from vlmslice.data.scenes import (
    Glyph,
    Scene,
    Shape,
    add_camera_effects,
    approximate_length,
    draw_line,
    ink_and_paper,
    line_size,
    luminance,
    paper_image,
    sample_rng,
)
from vlmslice.data.shapes import COLORS, KINDS, draw_shape, scatter_shapes, visible_colors
from vlmslice.data.text import random_token, random_words, words

ROOT = Path(__file__).parents[1]
FONT_DIR = matplotlib_font_dir()  # the only fonts that a test can count on
SANS = str(FONT_DIR / "DejaVuSans.ttf")
FACES = ["DejaVuSans.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSansMono-Bold.ttf"]


@cache
def library(split: str = "eval") -> FontLibrary:
    return FontLibrary(split, [FONT_DIR])


def blank(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


def ink(image: Image.Image) -> np.ndarray:
    """Darkness 0-1 of each pixel on white."""
    return 1 - np.asarray(image.convert("L"), dtype=np.float64) / 255


def share_inside(darkness: np.ndarray, box: tuple[float, float, float, float]) -> float:
    """Share of the ink inside a box, which is widened to whole pixels."""
    top, left, bottom, right = box
    rows, cols = slice(max(0, int(top)), int(np.ceil(bottom))), slice(max(0, int(left)), int(np.ceil(right)))
    return darkness[rows, cols].sum() / darkness.sum()


def count_components(mask: np.ndarray) -> int:
    """Regions of True pixels that touch at a side or a corner."""
    left = {tuple(place) for place in np.argwhere(mask)}
    num = 0
    while left:
        num += 1
        stack = [left.pop()]
        while stack:
            y, x = stack.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack.extend(near)
    return num


class TestFonts:
    def test_held_out_families_are_apart(self):
        train, evaluation = library("train"), library("eval")
        assert not set(train.families) & HELD_OUT_FAMILIES
        assert set(evaluation.families) <= HELD_OUT_FAMILIES
        assert {"DejaVu Sans", "DejaVu Sans Mono", "DejaVu Serif"} <= set(evaluation.families)
        files = [
            {font.path for cuts in lib.families.values() for font in cuts} for lib in (train, evaluation)
        ]
        assert not files[0] & files[1]
        assert len(train) == len(files[0]) > 0 and len(evaluation) == len(files[1])

    def test_held_out_cuts_too(self):
        """Bold and oblique of a held-out family never reach training."""
        names = [Path(font.path).name for cuts in library("train").families.values() for font in cuts]
        assert not [name for name in names if name.startswith("DejaVu")]

    def test_draws_come_from_the_split(self):
        rng = random.Random(0)
        for split in ("train", "eval"):
            paths = {font.path for cuts in library(split).families.values() for font in cuts}
            assert {library(split).draw(rng, 12).path for _ in range(60)} <= paths

    def test_families_weigh_alike(self):
        one = FontLibrary("train", [FONT_DIR])
        one.families = {"many": [FontFile("many", str(i), SANS) for i in range(40)]}
        one.families["few"] = [FontFile("few", "Regular", str(FONT_DIR / "DejaVuSerif.ttf"))]
        one._names = list(one.families)
        rng = random.Random(0)
        drawn = [Path(one.draw(rng, 12).path).name for _ in range(200)]
        assert 70 < drawn.count("DejaVuSerif.ttf") < 130

    def test_every_font_has_every_character(self):
        for split in ("train", "eval"):
            for cuts in library(split).families.values():
                for font in cuts:
                    loaded = load_font(font.path, 20)
                    assert all(loaded.getmask(c).getbbox() for c in CHARACTERS), font

    def test_unsuitable_families_are_left_out(self, tmp_path, monkeypatch):
        """Also when the fonts were read before the family was found to be unsuitable."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        known = fonts_module._UNSUITABLE_FAMILIES
        before = find_fonts([FONT_DIR])
        assert not {font.family for font in before} & known
        assert "STIXGeneral" in {font.family for font in before}
        monkeypatch.setattr(fonts_module, "_UNSUITABLE_FAMILIES", known | {"STIXGeneral"})
        after = find_fonts([FONT_DIR])
        assert after == [font for font in before if font.family != "STIXGeneral"]

    def test_reading_is_cached(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        first = find_fonts([FONT_DIR])
        monkeypatch.setattr(fonts_module, "_read_font_file", lambda path: pytest.fail("read again"))
        assert find_fonts([FONT_DIR]) == first

    def test_files_that_are_no_fonts(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        (tmp_path / "text.ttf").write_text("no font")
        (tmp_path / "empty.otf").write_bytes(b"")
        (tmp_path / "DejaVuSans.ttf").write_bytes(Path(SANS).read_bytes())
        assert [font.family for font in find_fonts([tmp_path])] == ["DejaVu Sans"]

    def test_no_font_of_the_split(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        with pytest.raises(
            FileNotFoundError, match="^no font family for split 'train' under .*; install some"
        ):
            FontLibrary("train", [tmp_path])


class TestText:
    def test_splits_share_no_word(self):
        train, evaluation = words("train"), words("eval")
        assert not set(train) & set(evaluation)
        assert len(set(train)) == len(train) > 10_000
        assert 0.08 < len(evaluation) / (len(train) + len(evaluation)) < 0.12

    def test_words_are_plain(self):
        for word in words("train") + words("eval"):
            assert word.isascii() and word.isalpha() and word.islower() and 2 <= len(word) <= 12

    def test_training_text_holds_no_held_out_word(self):
        """Tokens that are a word, whatever their case and the punctuation round them."""
        rng, held_out, seen = random.Random(0), set(words("eval")), 0
        for _ in range(4000):
            token = random_token(rng, "train").strip(string.punctuation)
            if (
                token in (token.lower(), token.upper(), token.capitalize())
                and len(token) > 4
                and token.isalpha()
            ):
                seen += 1
                assert token.lower() not in held_out
        assert seen > 1000

    def test_evaluation_text_is_of_held_out_words(self):
        rng, train = random.Random(0), set(words("train"))
        tokens = [random_token(rng, "eval") for _ in range(2000)]
        assert not [token for token in tokens if token.islower() and len(token) > 4 and token in train]

    @pytest.mark.parametrize("num_words", [1, 2, 6])
    def test_number_of_words(self, num_words):
        rng = random.Random(0)
        for _ in range(200):
            text = random_words(rng, num_words)
            assert len(text.split(" ")) == num_words
            assert set(text) <= set(CHARACTERS + " ")

    @pytest.mark.parametrize(("split", "least", "most"), [("train", 0.12, 0.2), ("eval", 0, 0.05)])
    def test_lines_that_say_something_twice_are_for_training(self, split, least, most):
        rng = random.Random(0)
        lines = [random_words(rng, 4, split).split(" ") for _ in range(1000)]
        repeating = sum(len(set(line)) < 4 for line in lines)
        assert least <= repeating / 1000 <= most

    def test_all_characters_come_up(self):
        rng = random.Random(0)
        assert set("".join(random_token(rng) for _ in range(4000))) == set(CHARACTERS)


class TestGlyphs:
    @pytest.mark.parametrize("face", FACES)
    @pytest.mark.parametrize("size", [14, 40])
    def test_box_holds_the_ink(self, face, size):
        """All of it for upright characters without a tail, most of it for the others.

        Boxes end a little below the baseline, the same for all characters, so an underscore lies under its box.
        """
        font = load_font(str(FONT_DIR / face), size)
        for character in CHARACTERS.replace("_", ""):
            image = blank(3 * size, 3 * size)
            (glyph,) = draw_line(ImageDraw.Draw(image), character, font, size / 2, size, (0, 0, 0))
            assert glyph.character == character
            upright = character in string.ascii_uppercase + string.digits + "acemnorsuvwxz"
            sure = upright and "Italic" not in face and character not in "QJ"
            assert share_inside(ink(image), glyph.box) > (0.97 if sure else 0.75), character

    @pytest.mark.parametrize("face", FACES)
    def test_boxes_of_a_line_lie_on_their_glyphs(self, face):
        """Every character of a line drawn alone at its own place (all but kerning) lies in its own box."""
        font, text = load_font(str(FONT_DIR / face), 24), "AVATAR To, we. 0123 fly Jig"
        image = blank(60, 600)
        glyphs = draw_line(ImageDraw.Draw(image), text, font, 10, 12, (0, 0, 0))
        assert [glyph.character for glyph in glyphs] == [c for c in text if c != " "]
        visible = [i for i, c in enumerate(text) if c != " "]
        for i, glyph in zip(visible, glyphs, strict=True):
            start, end = 12 + font.getlength(text[:i]), 12 + font.getlength(text[: i + 1])
            assert abs((glyph.box[1] + glyph.box[3]) / 2 - (start + end) / 2) < 0.2 * 24
        columns = ink(image).sum(0)
        inside = np.zeros_like(columns)
        for glyph in glyphs:
            inside[int(glyph.box[1]) : int(np.ceil(glyph.box[3]))] = 1
        assert (columns * inside).sum() / columns.sum() > 0.98

    def test_boxes_run_left_to_right_at_one_height(self):
        font = load_font(SANS, 20)
        glyphs = draw_line(ImageDraw.Draw(blank(40, 300)), "xHg.", font, 3, 5, (0, 0, 0))
        assert len({(glyph.box[0], glyph.box[2]) for glyph in glyphs}) == 1
        for one, two in zip(glyphs, glyphs[1:], strict=False):
            assert one.box[3] == pytest.approx(two.box[1])
        assert glyphs[0].box[1] == 5
        assert glyphs[-1].box[3] == pytest.approx(5 + font.getlength("xHg."))

    def test_line_size_holds_the_line(self):
        font, text = load_font(SANS, 30), "Quay (fj) Ågj|"
        height, width = line_size(font, text)
        image = blank(height + 40, width + 40)
        draw_line(ImageDraw.Draw(image), text, font, 20, 20, (0, 0, 0))
        assert share_inside(ink(image), (20, 20, 20 + height, 20 + width)) > 0.999
        assert approximate_length(font, text) == pytest.approx(width, rel=0.05)


class TestLabels:
    def test_table(self):
        """A view of 1 x 2 patches, so 2 x 4 cells of 8 px, on a picture whose box starts at (16, 16).

        The glyph "b" covers the centres of the cells of columns 0 and 1 in row 0; a red square those of row 1 from
        column 2 on, with its centre in column 3. Cells are listed patch by patch, row-major in each.
        """
        scene = Scene(
            blank(48, 64),
            glyphs=[Glyph("b", (15.0, 16.0, 23.0, 31.0))],
            shapes=[Shape("square", "red", (24.0, 33.0, 34.0, 48.0))],
        )
        labels = label_cells(scene, (16, 16, 32, 48), (1, 2))
        b, square, red = CHARACTERS.index("b") + 1, KINDS.index("square") + 1, list(COLORS).index("red") + 1
        assert labels["character"].tolist() == [[b, b, 0, 0], [0, 0, 0, 0]]
        assert labels["kind"].tolist() == [[0, 0, 0, 0], [0, 0, square, square]]
        assert labels["color"].tolist() == [[0, 0, 0, 0], [0, 0, red, red]]
        assert labels["center"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]
        assert labels["glyph"].tolist() == [[b, 0, 0, 0], [0, 0, 0, 0]]
        assert {name: label.max() < HEADS[name] for name, label in labels.items()} == dict.fromkeys(
            HEADS, True
        )

    def test_cell_belongs_to_what_covers_its_centre(self):
        """Centres of cells lie at 4, 12, 20, 28 px: a box counts from its first to before its last edge."""
        for left, right, expected in [
            (0, 4, []),
            (0, 4.5, [0]),
            (4, 12, [0]),
            (4.5, 28, [1, 2]),
            (-50, 90, [0, 1, 2, 3]),
        ]:
            scene = Scene(blank(16, 32), glyphs=[Glyph("x", (0.0, left, 16.0, right))])
            plane = label_cells(scene, (0, 0, 16, 32), (1, 2))["character"]
            row = plane.reshape(2, 2, 2)[:, 0].flatten()
            assert np.flatnonzero(row).tolist() == expected

    def test_box_resized_to_fewer_patches(self):
        """A view of 64 x 64 px shown as 2 x 2 patches has cells of 16 px."""
        scene = Scene(blank(64, 64), glyphs=[Glyph("x", (16.0, 32.0, 32.0, 64.0))])
        plane = label_cells(scene, (0, 0, 64, 64), (2, 2))["character"]
        assert (plane.reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(4, 4) > 0).astype(int).tolist() == [
            [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0],
        ]  # fmt: skip

    def test_patches_spell_a_line_once(self):
        """Read from patch to patch, `glyph` is the line, whatever the slices; narrow letters, too."""
        text = "will fit ill-lit"
        image = blank(32, 96)
        scene = Scene(image, draw_line(ImageDraw.Draw(image), text, load_font(SANS, 14), 8, 3, (0, 0, 0)))
        for boxes in ([(0, 0, 32, 96)], [(0, 0, 32, 41), (0, 41, 32, 96)]):
            spelt = ""
            for box in boxes:
                labels = label_cells(scene, box, (2, round((box[3] - box[1]) / 16)))["glyph"]
                rows = labels.reshape(2, -1)
                assert sum(row.any() for row in rows) == 1
                spelt += "".join(CHARACTERS[label - 1] for label in rows.sum(0) if label)
            assert spelt == text.replace(" ", "")

    def test_fifth_character_of_a_patch_is_left_out(self):
        scene = Scene(
            blank(16, 16), [Glyph(c, (2.0, 3.0 * i, 14.0, 3.0 * i + 3)) for i, c in enumerate("abcde")]
        )
        [labels] = label_cells(scene, (0, 0, 16, 16), (1, 1))["glyph"]
        assert "".join(CHARACTERS[label - 1] for label in labels) == "abcd"

    def test_slices_share_out_the_picture(self):
        """Labels of the quarters of a picture, put together, are those of the whole."""
        scene = shape_crop(random.Random(3), 64, 96)
        whole = label_cells(scene, (0, 0, 64, 96), (4, 6))
        for name in HEADS:
            plane = np.zeros((4, 6, 4), dtype=int)
            for r in range(2):
                for c in range(2):
                    box = (32 * r, 48 * c, 32 * r + 32, 48 * c + 48)
                    part = label_cells(scene, box, (2, 3))[name]
                    plane[2 * r : 2 * r + 2, 3 * c : 3 * c + 3] = part.reshape(2, 3, 4)
            assert np.array_equal(plane.reshape(24, 4), whole[name])

    def test_one_centre_per_shape(self):
        """Seams cut no shape in two: over all quarters every centre inside the picture is counted once."""
        for seed in range(10):
            scene = shape_crop(random.Random(seed), 128, 128)
            parts = [
                label_cells(scene, (r, c, r + 64, c + 64), (4, 4))["center"].sum()
                for r in (0, 64)
                for c in (0, 64)
            ]
            inside = [s for s in scene.shapes if 0 <= s.center[0] < 128 and 0 <= s.center[1] < 128]
            cells = {(int(s.center[0] // 8), int(s.center[1] // 8)) for s in inside}
            assert sum(parts) == len(cells)

    def test_labels_of_drawn_text(self):
        """Cells of dark ink in big letters carry a character, cells of white paper far from text none."""
        image = blank(64, 256)
        glyphs = draw_line(ImageDraw.Draw(image), "HOME", load_font(SANS, 40), 8, 8, (0, 0, 0))
        plane = label_cells(Scene(image, glyphs), (0, 0, 64, 256), (4, 16))["character"]
        grid = plane.reshape(4, 16, 2, 2).swapaxes(1, 2).reshape(8, 32)
        dark = ink(image).reshape(8, 8, 32, 8).mean((1, 3)) > 0.4
        assert dark.any() and (grid[dark] > 0).all()
        assert not grid[:, 25:].any()
        order = [CHARACTERS[label - 1] for label in dict.fromkeys(grid[3][grid[3] > 0].tolist())]
        assert order == list("HOME")

    def test_resized_scene(self):
        scene = Scene(blank(40, 20), [Glyph("a", (10, 5, 20, 10))], [Shape("ring", "blue", (0, 0, 40, 20))])
        half = resize_scene(scene, 20, 40)
        assert half.image.size == (40, 20)
        assert half.glyphs[0].box == (5, 10, 10, 20)
        assert half.shapes[0].box == (0, 0, 20, 40) and half.shapes[0].kind == "ring"


class TestShapes:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("radius", [5.0, 20.5, 70.0])
    def test_shape_fills_its_box(self, kind, radius):
        image = blank(200, 220)
        shape = draw_shape(image, kind, "black", (98.0, 111.0), radius, (0, 0, 0))
        assert shape.center == pytest.approx((98, 111))
        top, left, bottom, right = shape.box
        darkness = ink(image)
        assert share_inside(darkness, (top - 1, left - 1, bottom + 1, right + 1)) > 0.9999
        rows, cols = np.flatnonzero(darkness.max(1) > 0.5), np.flatnonzero(darkness.max(0) > 0.5)
        assert np.ptp(rows) + 1 > 1.1 * radius and np.ptp(cols) + 1 > 1.1 * radius
        assert count_components(darkness > 0.5) == 1

    def test_kinds_look_different(self):
        pictures = []
        for kind in KINDS:
            image = blank(60, 60)
            draw_shape(image, kind, "black", (30, 30), 20, (0, 0, 0))
            pictures.append(ink(image))
        for i, one in enumerate(pictures):
            for two in pictures[i + 1 :]:
                assert np.abs(one - two).sum() / one.sum() > 0.1

    def test_heights_come_first(self):
        image = blank(60, 100)
        shape = draw_shape(image, "triangle", "red", (40, 20), 10, (200, 0, 0))
        rows, cols = np.nonzero(ink(image) > 0.3)
        assert 35 < rows.mean() < 46 and 17 < cols.mean() < 23
        widths = [np.count_nonzero(cols[rows == row]) + (cols[rows == row] == 0).sum() for row in (34, 44)]
        assert widths[0] < widths[1]  # it points up
        assert shape.box == (30, 10, 50, 30)

    @pytest.mark.parametrize("seed", range(12))
    def test_as_many_shapes_as_named(self, seed):
        """What is returned is what is to be seen: separate regions on a plain ground."""
        rng = random.Random(seed)
        image = blank(160, 200)
        wanted = [(rng.choice(KINDS), "black") for _ in range(rng.randint(1, 30))]
        shapes = scatter_shapes(rng, image, wanted, (4.0, 22.0))
        assert count_components(ink(image) > 0.5) == len(shapes)
        assert 0 < len(shapes) <= len(wanted)
        for shape in shapes:
            assert shape.box[0] >= 0 and shape.box[1] >= 0 and shape.box[2] <= 160 and shape.box[3] <= 200

    def test_shapes_that_find_no_room_are_left_out(self):
        image = blank(40, 40)
        shapes = scatter_shapes(random.Random(0), image, [("circle", "red")] * 20, (9.0, 9.0))
        assert 1 <= len(shapes) <= 4
        assert count_components(ink(image) > 0.3) == len(shapes)

    def test_visible_colors(self):
        assert "white" not in visible_colors((255, 255, 255))
        assert "black" not in visible_colors((10, 10, 10)) and "white" in visible_colors((10, 10, 10))
        for ground in [(255, 255, 255), (0, 0, 0), (128, 128, 128), (220, 40, 40)]:
            assert 5 < len(visible_colors(ground)) < len(COLORS)

    def test_ink_stands_out_from_paper(self):
        rng = random.Random(0)
        for _ in range(300):
            inked, paper = ink_and_paper(rng)
            assert abs(luminance(inked) - luminance(paper)) >= 70


class TestPages:
    @pytest.mark.parametrize("seed", range(6))
    def test_text_crop_is_of_its_size(self, seed):
        scene = text_crop(random.Random(seed), library(), 64, 160)
        assert scene.image.size == (160, 64) and scene.image.mode == "RGB"
        assert scene.glyphs and all(glyph.character in CHARACTERS for glyph in scene.glyphs)

    def test_easy_text_is_black_on_white_and_labelled(self):
        """All ink of easy crops lies within boxes but for tails; every box on the crop holds ink."""
        for seed in range(6):
            scene = text_crop(random.Random(seed), library(), 96, 160, easy=True)
            darkness = ink(scene.image)
            assert darkness.min() == 0 and darkness.max() > 0.9
            covered = np.zeros_like(darkness, dtype=bool)
            for glyph in scene.glyphs:
                top, left, bottom, right = (round(edge) for edge in glyph.box)
                covered[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = True
                if (
                    top >= 0
                    and bottom <= 96
                    and left >= 0
                    and right <= 160
                    and glyph.character not in ".,'`_-"
                ):
                    assert darkness[top:bottom, left:right].sum() > 2, glyph
            assert darkness[covered].sum() / darkness.sum() > 0.9

    def test_shapes_of_a_crop_do_not_overlap(self):
        for seed in range(20):
            inner = [
                s for s in shape_crop(random.Random(seed), 96, 128).shapes
                if s.box[0] > 0 and s.box[1] > 0 and s.box[2] < 96 and s.box[3] < 128
            ]  # fmt: skip
            for i, one in enumerate(inner):
                for two in inner[i + 1 :]:
                    gap = np.hypot(one.center[0] - two.center[0], one.center[1] - two.center[1])
                    assert gap >= (one.box[2] - one.box[0] + two.box[2] - two.box[0]) / 2

    def test_camera_effects_keep_size_and_place(self):
        image = blank(70, 150)
        draw_shape(image, "circle", "black", (30, 100), 20, (0, 0, 0))
        changed = 0
        for seed in range(40):
            after = add_camera_effects(random.Random(seed), image)
            assert after.size == image.size and after.mode == "RGB"
            weight = np.where(ink(after) > 0.5, 1.0, 0.0)
            rows, cols = np.nonzero(weight)
            assert abs(rows.mean() - 29.5) < 1 and abs(cols.mean() - 99.5) < 1
            changed += after.tobytes() != image.tobytes()
        assert 10 < changed < 35

    def test_paper(self):
        for seed in range(20):
            paper = np.asarray(paper_image(random.Random(seed), 30, 50, (200, 180, 160)), dtype=int)
            assert paper.shape == (30, 50, 3)
            assert np.abs(paper - [200, 180, 160]).max() <= 25


def digest(sample: dict) -> str:
    parts = [sample["pixels"].tobytes(), *(sample["labels"][name].tobytes() for name in HEADS)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def dataset(**options) -> DenseCropDataset:
    return DenseCropDataset(
        DenseCropConfig(**{"num_samples": 10**6, "easy_samples": 1000} | options), library()
    )


INDICES = [0, 1, 31, 32, 500, 999, 2000, 999_999]


class TestCrops:
    def test_sample_is_always_the_same(self):
        forwards, backwards = dataset(), dataset()
        first = {i: digest(forwards[i]) for i in INDICES}
        assert {i: digest(backwards[i]) for i in reversed(INDICES)} == first
        assert len(set(first.values())) == len(INDICES)

    def test_sample_is_the_same_in_a_fresh_process(self):
        """Another hash seed, nothing drawn before: a data order that a resumed run can rely on."""
        code = (
            "import json, sys; sys.path.insert(0, 'tests'); from test_data_rendering import *; "
            "print(json.dumps([digest(dataset()[i]) for i in reversed(INDICES)]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [digest(dataset()[i]) for i in reversed(INDICES)]

    def test_global_random_state_is_neither_used_nor_changed(self):
        random.seed(1)
        np.random.seed(1)
        first, state = digest(dataset()[7]), random.getstate()
        random.seed(2)
        np.random.seed(2)
        torch.manual_seed(2)
        assert digest(dataset()[7]) == first
        random.seed(1)
        dataset()[7]
        assert random.getstate() == state

    def test_seed_and_task_change_the_sample(self):
        assert digest(dataset(seed=1)[5]) != digest(dataset()[5])
        draws = {
            sample_rng(*key).random()
            for key in [(0, "crop", 1), (1, "crop", 1), (0, "page", 1), (0, "crop", 2)]
        }
        assert len(draws) == 4
        assert sample_rng(0, "crop", 1).random() == 0.3129739213253645

    def test_group_shares_a_grid(self):
        crops = dataset(group=4)
        sizes = [crops[i]["pixels"].shape for i in range(24)]
        assert all(len(set(sizes[i : i + 4])) == 1 for i in range(0, 24, 4))
        assert len(set(sizes)) > 2

    def test_labels_fit_the_patches(self):
        config = DenseCropConfig()
        for i in INDICES:
            sample = dataset()[i]
            height, width, _ = sample["pixels"].shape
            assert height % 32 == 0 and width % 32 == 0
            num_patches = height * width // 256
            assert config.max_patches // 2 <= num_patches <= config.max_patches
            for name, classes in HEADS.items():
                label = sample["labels"][name]
                assert label.shape == (num_patches, 4) and label.dtype == np.int64
                assert label.min() >= 0 and label.max() < classes

    def test_text_and_shapes(self):
        crops = dataset()
        samples = [crops[i]["labels"] for i in range(60)]
        text = sum(bool(labels["character"].any()) for labels in samples)
        shapes = sum(bool(labels["kind"].any()) for labels in samples)
        assert text > shapes > 5
        assert not any(labels["character"].any() and labels["kind"].any() for labels in samples)

    def test_collated_as_the_image_processor_packs(self):
        from vlmslice.view_packing import split_into_patches

        crops = dataset()
        samples = [crops[i] for i in range(3)]
        batch = collate_crops(samples)
        height, width, _ = samples[0]["pixels"].shape
        assert batch["target_sizes"].tolist() == [[height // 16, width // 16]] * 3
        for row, sample in zip(batch["pixel_values"], samples, strict=True):
            expected = split_into_patches(torch.from_numpy(sample["pixels"].copy()), 16) / 127.5 - 1
            torch.testing.assert_close(row, expected, atol=1e-6, rtol=0)
        assert {f"label_{name}" for name in HEADS} < batch.keys()
        for name in HEADS:
            assert batch[f"label_{name}"].shape == (3, height * width // 256, 4)
