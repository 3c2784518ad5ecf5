"""Image loading: the same upright RGB pixels from every source, or one error of one family."""

import base64
import io
import json
import re
import struct
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from vlmslice.errors import VlmSliceError
from vlmslice.image_loading import (
    ALLOWED_FORMATS,
    ImageDecodeError,
    ImageError,
    ImageFormatError,
    ImageFrameError,
    ImageLimits,
    ImageSourceError,
    ImageTooLargeError,
    image_from_array,
    load_for,
    load_image,
    open_image,
    read_image_size,
)

ORIENTATION_TAG = 0x0112
# How a picture must be stored so that the EXIF orientation brings it upright (inverse of the EXIF table).
STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# Save options that keep flat blocks within 3 levels.
FAITHFUL: dict[str, dict] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "MPO": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True},
    "PNG": {},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
}


def blocks(height: int = 48, width: int = 80, seed: int = 0) -> Image.Image:
    """Flat blocks of 16 px, so that JPEG keeps them nearly exact."""
    colors = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3))
    return Image.fromarray(np.kron(colors, np.ones((16, 16, 1))).astype(np.uint8))


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def sources(encoded: bytes, folder: Path) -> dict[str, object]:
    """The same encoded image in every form that `load_image` takes."""
    path = folder / "image.bin"
    path.write_bytes(encoded)
    return {
        "str": str(path),
        "path": path,
        "bytes": encoded,
        "bytearray": bytearray(encoded),
        "memoryview": memoryview(encoded),
        "file": io.BytesIO(encoded),
        "data URL": "data:image/png;base64," + base64.b64encode(encoded).decode(),
        "PIL image": Image.open(io.BytesIO(encoded)),
        "PIL image from a path": Image.open(path),
    }


class TestSources:
    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_all_sources_agree(self, image_format: str, tmp_path: Path) -> None:
        encoded = encode(blocks(), image_format, **FAITHFUL[image_format])
        loaded = {name: load_image(source) for name, source in sources(encoded, tmp_path).items()}
        reference = pixels(loaded.pop("bytes"))
        assert reference.shape == (48, 80, 3)
        assert np.abs(reference - pixels(blocks())).max() <= 3
        for name, image in loaded.items():
            assert image.mode == "RGB"
            np.testing.assert_array_equal(pixels(image), reference, err_msg=name)

    def test_file_object_is_read_from_its_start(self) -> None:
        buffer = io.BytesIO()
        blocks().save(buffer, "PNG")
        np.testing.assert_array_equal(pixels(load_image(buffer)), pixels(blocks()))
        assert not buffer.closed

    def test_temporary_file(self) -> None:
        with tempfile.NamedTemporaryFile() as file:
            blocks().save(file, "PNG")
            assert load_image(file).size == (80, 48)

    def test_unseekable_stream_with_short_reads(self) -> None:
        class Drip:
            def __init__(self, encoded: bytes):
                self.rest = encoded

            def read(self, size: int = -1, /) -> bytes:
                chunk, self.rest = self.rest[:7], self.rest[7:]
                return chunk

        loaded = load_image(Drip(encode(blocks(), "PNG")))
        np.testing.assert_array_equal(pixels(loaded), pixels(blocks()))

    def test_rgb_image_passes_unchanged(self) -> None:
        image = blocks()
        assert load_image(image) is image

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("http://example.com/cat.png", r"is a URL \(http://\).*download it first"),
            ("HTTPS://example.com/cat.png", r"is a URL \(HTTPS://\)"),
            ("file:///etc/hostname", r"is a URL \(file://\).*plain path"),
            ("no/such/file.png", "No such file or directory.*check the path"),
            (Path("."), "Is a directory"),
            ("a\0b.png", "null byte"),
            ("data:image/png,abc", "expected 'data:image/...;base64,'"),
            ("data:image/png;base64,abc", "not base64"),
            (io.StringIO("text"), "yields str; expected bytes; open the file in binary mode"),
            (7, "got a int; expected a path"),
            ("x" * 100_000, r"File name too long"),
        ],
    )
    def test_nothing_to_read(self, source: object, message: str) -> None:
        with pytest.raises(ImageSourceError, match=message) as raised:
            load_image(source)  # type: ignore[arg-type]
        assert len(str(raised.value)) < 600

    def test_family(self) -> None:
        assert issubclass(ImageError, VlmSliceError) and issubclass(ImageError, ValueError)
        children = (
            ImageSourceError,
            ImageFormatError,
            ImageTooLargeError,
            ImageFrameError,
            ImageDecodeError,
        )
        assert all(issubclass(child, ImageError) for child in children)


class TestOrientation:
    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_upright_from_every_source(self, image_format: str, orientation: int, tmp_path: Path) -> None:
        upright = blocks()
        stored = upright.transpose(STORED_AS[orientation]) if orientation > 1 else upright
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = orientation
        encoded = encode(stored, image_format, exif=exif, **FAITHFUL[image_format])
        already_decoded = Image.open(io.BytesIO(encoded))
        already_decoded.load()
        for name, source in {**sources(encoded, tmp_path), "decoded PIL image": already_decoded}.items():
            loaded = load_image(source)  # type: ignore[arg-type]
            assert loaded.size == upright.size, name
            assert np.abs(pixels(loaded) - pixels(upright)).max() <= 3, name
            if not hasattr(source, "read"):  # a stream has been read to its end
                assert read_image_size(source) == (upright.height, upright.width), name  # type: ignore[arg-type]
            np.testing.assert_array_equal(pixels(load_image(loaded)), pixels(loaded), err_msg="turned twice")

    def test_agrees_with_pillow(self) -> None:
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = 6
        encoded = encode(blocks(), "PNG", exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
        np.testing.assert_array_equal(pixels(load_image(encoded)), pixels(expected))

    @staticmethod
    def _exif(*entries: tuple[int, int, int, int], next_ifd: int = 0) -> bytes:
        body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
        return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", next_ifd)

    def test_exif_loop(self) -> None:
        """The EXIF and GPS directories, and the next directory, all point back at the first one."""
        looped = self._exif(
            (ORIENTATION_TAG, 3, 1, 3), (0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 4, 1, 8), next_ifd=8
        )
        encoded = encode(blocks().transpose(Image.Transpose.ROTATE_180), "PNG", exif=looped)
        np.testing.assert_array_equal(pixels(load_image(encoded)), pixels(blocks()))

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize(
        "exif",
        [
            b"Exif\0\0garbage, not a directory",
            b"Exif\0\0II*\0\xff\xff\xff\xff",
            b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
            b"Exif\0\0",
            _exif((ORIENTATION_TAG, 3, 1, 99)),
            _exif((ORIENTATION_TAG, 3, 1, 0)),
            _exif((ORIENTATION_TAG, 2, 4, 0x41414141)),
            _exif((ORIENTATION_TAG, 3, 0xFFFFFFFF, 8)),
        ],
    )
    def test_unreadable_orientation_counts_as_upright(self, exif: bytes) -> None:
        for image_format in ("PNG", "WEBP"):
            encoded = encode(blocks(), image_format, exif=exif, **FAITHFUL[image_format])
            np.testing.assert_array_equal(pixels(load_image(encoded)), pixels(blocks()))


def ramp(dtype: str, low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 256 * 4).reshape(4, 256).astype(dtype)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


class TestModes:
    """Every mode of Pillow, each against values worked out here rather than by Pillow."""

    color = np.random.default_rng(1).integers(0, 256, (12, 20, 3)).astype(np.uint8)
    alpha = np.random.default_rng(2).integers(0, 256, (12, 20)).astype(np.uint8)

    @property
    def color_on_white(self) -> np.ndarray:
        share = self.alpha[..., None] / 255
        return self.color * share + 255 * (1 - share)

    @property
    def grey_on_white(self) -> np.ndarray:
        return grey(self.color[..., 0] * (self.alpha / 255) + 255 * (1 - self.alpha / 255))

    def check(self, image: Image.Image, expected: np.ndarray, tolerance: float = 0.51) -> None:
        before = image.copy()
        loaded = load_image(image)
        assert loaded.mode == "RGB"
        assert np.abs(pixels(loaded) - expected).max() <= tolerance
        assert image.mode == before.mode and image.tobytes() == before.tobytes(), "the source was changed"

    def rgba(self) -> Image.Image:
        return Image.fromarray(np.dstack([self.color, self.alpha]))

    def la(self) -> Image.Image:
        return Image.fromarray(np.dstack([self.color[..., 0], self.alpha]))

    def test_1(self) -> None:
        bits = self.alpha > 127
        self.check(Image.fromarray(bits), grey(bits * 255))

    def test_l(self) -> None:
        self.check(Image.fromarray(self.alpha), grey(self.alpha))

    def test_rgb_and_rgbx(self) -> None:
        self.check(Image.fromarray(self.color), self.color)
        self.check(Image.fromarray(self.color).convert("RGBX"), self.color)

    def test_rgba_on_white(self) -> None:
        self.check(self.rgba(), self.color_on_white)

    def test_transparent_black_is_white(self) -> None:
        self.check(Image.new("RGBA", (5, 4), (0, 0, 0, 0)), np.full((4, 5, 3), 255))

    def test_la_on_white(self) -> None:
        self.check(self.la(), self.grey_on_white)

    def test_premultiplied(self) -> None:
        # Premultiplied 8-bit colours lose up to half a level times 255 / alpha, weighted again by alpha / 255.
        self.check(self.rgba().convert("RGBa"), self.color_on_white, tolerance=2)
        self.check(self.la().convert("La"), self.grey_on_white, tolerance=2)

    def test_palette(self) -> None:
        palette = Image.fromarray(self.color).quantize(16)
        self.check(palette, np.asarray(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)])

    def test_palette_with_one_transparent_entry(self) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = 0
        self.check(image, np.array([[[255, 255, 255], [200, 100, 50]]]))

    def test_palette_with_alpha_per_entry(self) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = bytes([255, 51])
        self.check(image, np.array([[[10, 20, 30], [244, 224, 214]]]))

    def test_palette_with_alpha_band(self) -> None:
        image = Image.new("PA", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((0, 0), (1, 255))
        image.putpixel((1, 0), (1, 0))
        self.check(image, np.array([[[200, 100, 50], [255, 255, 255]]]))

    @pytest.mark.parametrize(
        ("mode", "value", "transparency"), [("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3)), ("1", 0, 0)]
    )
    def test_one_transparent_color(self, mode: str, value: object, transparency: object) -> None:
        image = Image.new(mode, (3, 1), value)  # type: ignore[arg-type]
        image.putpixel((1, 0), 255 if mode != "RGB" else (255, 0, 9))
        encoded = encode(image, "PNG", transparency=transparency)
        middle = [255, 0, 9] if mode == "RGB" else [255] * 3
        expected = np.array([[[255] * 3, middle, [255] * 3]])
        np.testing.assert_array_equal(pixels(load_image(encoded)), expected)

    def test_cmyk(self) -> None:
        ink = np.dstack([255 - self.color, np.zeros((12, 20), np.uint8)])
        self.check(Image.fromarray(ink, "CMYK"), self.color, tolerance=1)

    def test_cmyk_jpeg(self) -> None:
        encoded = encode(blocks().convert("CMYK"), "JPEG", quality=100, subsampling=0)
        assert np.abs(pixels(load_image(encoded)) - pixels(blocks())).max() <= 4

    @pytest.mark.parametrize(("mode", "tolerance"), [("YCbCr", 3), ("HSV", 12)])
    def test_other_color_spaces(self, mode: str, tolerance: int) -> None:
        self.check(Image.fromarray(self.color).convert(mode), self.color, tolerance)

    def test_lab(self) -> None:
        lab = Image.frombytes("LAB", (3, 1), bytes([0, 0, 0, 255, 0, 0, 138, 81, 70]))
        # Black, white and sRGB red, whose CIE L*a*b* (D50) is (54.3, 80.8, 69.9); L is stored times 2.55.
        self.check(lab, np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0]]]), tolerance=6)

    @pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
    def test_16_bit_is_scaled(self, mode: str) -> None:
        values = ramp("uint16", 0, 65535)
        order = ">u2" if mode == "I;16B" else "<u2" if sys.byteorder == "little" or mode != "I;16N" else ">u2"
        image = Image.frombytes(mode, (256, 4), values.astype(order).tobytes())
        self.check(image, grey(values / 257))

    def test_16_bit_png(self) -> None:
        values = ramp("uint16", 0, 65535)
        np.testing.assert_allclose(
            pixels(load_image(encode(Image.fromarray(values), "PNG"))), grey(values / 257), atol=0.51
        )

    def test_16_bit_png_with_transparency(self) -> None:
        encoded = encode(Image.fromarray(np.array([[0, 300, 65535]], np.uint16)), "PNG", transparency=300)
        assert pixels(load_image(encoded))[0, :, 0].tolist() == [0, 255, 255]

    @pytest.mark.parametrize(
        ("high", "scale"), [(200, 1), (255, 1), (256, 1 / 257), (65535, 1 / 257), (70_000, 255 / 70_000)]
    )
    def test_32_bit_integers(self, high: int, scale: float) -> None:
        values = ramp("int32", 0, high)
        self.check(Image.fromarray(values), grey(values * scale))

    def test_negative_integers_are_stretched(self) -> None:
        values = ramp("int32", -1000, 3000)
        self.check(Image.fromarray(values), grey((values + 1000) * 255 / 4000))

    @pytest.mark.parametrize(
        ("low", "high", "offset", "scale"),
        [(0, 1, 0, 255), (0.2, 0.4, 0, 255), (0, 200, 0, 1), (0, 65535, 0, 1 / 257), (-1, 1, 1, 127.5)],
    )
    def test_floats(self, low: float, high: float, offset: float, scale: float) -> None:
        values = ramp("float32", low, high)
        self.check(Image.fromarray(values), grey((values + offset) * scale), tolerance=0.52)

    def test_floats_without_a_value(self) -> None:
        values = np.array([[0, np.nan, np.inf, -np.inf, 1]], np.float32)
        self.check(Image.fromarray(values), grey(np.array([[0, 0, 255, 0, 255]])))
        self.check(Image.fromarray(np.full((2, 2), np.nan, np.float32)), np.zeros((2, 2, 3)))
        self.check(Image.fromarray(np.full((2, 2), -7, np.float32)), np.zeros((2, 2, 3)))


class TestArrays:
    color = TestModes.color

    @pytest.mark.parametrize(
        ("array", "expected"),
        [
            (color, color),
            (color / 255, color),
            (color.astype(np.float16) / 255, color),
            (color.astype(np.float64), color),
            (color.astype(np.uint16) * 257, color),
            (color.astype(np.int64), color),
            (color[..., 0], grey(color[..., 0])),
            (color[..., :1], grey(color[..., 0])),
            (color > 127, (color > 127) * 255),
            (np.dstack([color, np.full((12, 20), 255, np.uint8)]), color),
            (np.zeros((3, 4, 4), np.uint8), np.full((3, 4, 3), 255)),
            (np.zeros((3, 4, 2), np.uint8), np.full((3, 4, 3), 255)),
            (color[::2, ::-1], color[::2, ::-1]),
        ],
    )
    def test_values(self, array: np.ndarray, expected: np.ndarray) -> None:
        assert np.abs(pixels(image_from_array(array)) - expected).max() <= 1

    @pytest.mark.parametrize(
        "array",
        [np.zeros((2, 3, 5)), np.zeros(4), np.zeros((0, 4, 3)), np.array([["a"]]), np.zeros((2, 2), complex)],
    )
    def test_no_image(self, array: np.ndarray) -> None:
        with pytest.raises(ImageSourceError, match=re.escape(f"{array.shape}")):
            image_from_array(array)


def animation(image_format: str) -> bytes:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue")]
    return encode(frames[0], image_format, save_all=True, append_images=frames[1:], **FAITHFUL[image_format])


class TestFrames:
    @pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_first_frame_unless_asked(self, image_format: str) -> None:
        encoded = animation(image_format)
        colors = [load_image(encoded, frame=frame).getpixel((0, 0)) for frame in (None, 0, 1, 2, 1)]
        assert colors == [(255, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 0)]
        with pytest.raises(ImageFrameError, match="has no frame 3"):
            load_image(encoded, frame=3)

    def test_pil_image_keeps_its_frame(self) -> None:
        image = Image.open(io.BytesIO(animation("GIF")))
        image.seek(2)
        assert load_image(image).getpixel((0, 0)) == (0, 0, 255)
        assert load_image(image, frame=0).getpixel((0, 0)) == (255, 0, 0)

    def test_frame_cap(self) -> None:
        with pytest.raises(
            ImageFrameError, match="got frame=2; expected 0 to 1; raise ImageLimits.max_frames"
        ):
            load_image(animation("GIF"), frame=2, limits=ImageLimits(max_frames=2))
        with pytest.raises(ImageFrameError, match="got frame=-1"):
            load_image(animation("GIF"), frame=-1)

    def test_still_image_has_one_frame(self) -> None:
        assert load_image(blocks(), frame=0).size == (80, 48)
        for source in (blocks(), encode(blocks(), "BMP")):
            with pytest.raises(ImageFrameError, match="has no frame 1"):
                load_image(source, frame=1)

    def test_every_page_is_checked(self) -> None:
        pages = [Image.new("L", (8, 6)), Image.new("L", (80, 60))]
        encoded = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
        limits = ImageLimits(max_pixels=100)
        assert load_image(encoded, limits=limits).size == (8, 6)
        with pytest.raises(ImageTooLargeError, match="60x80 = 4800 pixels; expected at most 100"):
            load_image(encoded, limits=limits, frame=1)


class TestDamage:
    @pytest.fixture(autouse=True, params=[False, True], ids=["strict", "application allows truncation"])
    def truncation_flag(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", request.param)

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize(
        ("image_format", "options"),
        [
            ("JPEG", {}),
            ("JPEG", {"progressive": True}),
            ("PNG", {}),
            ("WEBP", {}),
            ("WEBP", {"lossless": True}),
            ("GIF", {}),
            ("BMP", {}),
            ("TIFF", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
        ],
    )
    def test_cut_at_every_tenth(self, image_format: str, options: dict, tmp_path: Path) -> None:
        flag = ImageFile.LOAD_TRUNCATED_IMAGES
        noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (60, 90, 3)).astype(np.uint8))
        encoded = encode(noise, image_format, **options)
        for percent in (*range(0, 100, 10), 99):
            cut = encoded[: len(encoded) * percent // 100]
            path = tmp_path / "cut.bin"
            path.write_bytes(cut)
            for source in (cut, path, io.BytesIO(cut)):
                with pytest.raises(ImageError) as raised:
                    load_image(source)
                self.check_text(raised.value)
        assert flag == ImageFile.LOAD_TRUNCATED_IMAGES

    def test_cut_pil_image(self) -> None:
        encoded = encode(blocks(320, 320), "JPEG")
        with pytest.raises(ImageDecodeError, match="PIL image of 320x320 .* is truncated") as raised:
            load_image(Image.open(io.BytesIO(encoded[: len(encoded) // 2])))
        self.check_text(raised.value)

    @pytest.mark.parametrize("garbage", [b"", b"\0", b"not an image", bytes(range(256)) * 40])
    def test_garbage(self, garbage: bytes) -> None:
        with pytest.raises(
            ImageFormatError, match=rf"\({len(garbage)} bytes\); expected an undamaged JPEG"
        ) as raised:
            load_image(garbage)
        self.check_text(raised.value)

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("image_format", ALLOWED_FORMATS)
    def test_flipped_bytes_raise_nothing_else(self, image_format: str) -> None:
        rng = np.random.default_rng(4)
        encoded = np.frombuffer(encode(blocks(), image_format), np.uint8)
        for _ in range(60):
            damaged = encoded.copy()
            where = rng.integers(0, min(len(encoded), 400), 4)
            damaged[where] = rng.integers(0, 256, 4)
            try:
                load_image(damaged.tobytes(), limits=ImageLimits(max_pixels=1_000_000))
            except ImageError as error:
                self.check_text(error)

    @staticmethod
    def check_text(error: BaseException) -> None:
        assert not re.search(r"0x[0-9a-fA-F]{4,}", str(error))
        chained = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        assert chained is None or not re.search(r"0x[0-9a-fA-F]{4,}", str(chained))

    def test_closed_file(self) -> None:
        image = Image.open(io.BytesIO(encode(blocks(), "PNG")))
        image.close()
        with pytest.raises(ImageDecodeError):
            load_image(image)

    def test_flag_survives_concurrent_loads(self) -> None:
        flag = ImageFile.LOAD_TRUNCATED_IMAGES
        good = encode(blocks(320, 320), "JPEG")
        bad = good[: len(good) // 2]

        def load(index: int) -> bool:
            try:
                load_image(bad if index % 3 == 0 else good)
            except ImageDecodeError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(load, range(60))) == [index % 3 != 0 for index in range(60)]
        assert flag == ImageFile.LOAD_TRUNCATED_IMAGES


class TestFormats:
    @pytest.mark.parametrize(
        "image_format", ["PPM", "EPS", "MSP", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "ICNS", "DDS"]
    )
    def test_refused(self, image_format: str) -> None:
        image = Image.new("1" if image_format in ("MSP",) else "RGB", (32, 32))
        encoded = encode(image, image_format)
        with pytest.raises(ImageFormatError, match="is not recognised.*convert it to one of these"):
            load_image(encoded)
        opened = Image.open(io.BytesIO(encoded))
        with pytest.raises(ImageFormatError, match=f"is of format {opened.format}"):
            load_image(opened)

    @pytest.mark.parametrize(
        "header",
        [
            b"SIMPLE  =                    T",
            b"8BPS\0\1",
            b"\xd7\xcd\xc6\x9a\0\0",
            b"%PDF-1.7",
            b"<svg></svg>",
            b"qoif",
        ],
    )
    def test_refused_by_header(self, header: bytes) -> None:
        with pytest.raises(ImageFormatError):
            load_image(header + bytes(3000))

    def test_other_plugins_never_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Image.init()
        for name, (_, accept) in list(Image.OPEN.items()):
            if name not in ALLOWED_FORMATS:
                monkeypatch.setitem(Image.OPEN, name, (lambda *_: pytest.fail("foreign plugin ran"), accept))
        with pytest.raises(ImageFormatError):
            load_image(encode(blocks(), "PPM"))

    def test_jpeg_with_more_pictures(self) -> None:
        encoded = encode(blocks(), "MPO", save_all=True, append_images=[blocks(seed=1)], **FAITHFUL["MPO"])
        assert Image.open(io.BytesIO(encoded)).format == "MPO"
        assert np.abs(pixels(load_image(encoded)) - pixels(blocks())).max() <= 3


class TestLimits:
    def test_pixels(self) -> None:
        encoded = encode(blocks(48, 80), "PNG")
        assert load_image(encoded, limits=ImageLimits(max_pixels=48 * 80)).size == (80, 48)
        for source in (encoded, Image.open(io.BytesIO(encoded))):
            with pytest.raises(
                ImageTooLargeError, match="48x80 = 3840 pixels; expected at most 3839; downscale it"
            ):
                load_image(source, limits=ImageLimits(max_pixels=48 * 80 - 1))

    def test_bytes(self, tmp_path: Path) -> None:
        encoded = encode(blocks(), "PNG")
        for name, source in sources(encoded, tmp_path).items():
            assert load_image(source, limits=ImageLimits(max_bytes=len(encoded))).size == (80, 48)  # type: ignore[arg-type]
            if not name.startswith("PIL image"):
                limits = ImageLimits(max_bytes=len(encoded) - 1)
                with pytest.raises(
                    ImageTooLargeError, match=f"larger than {len(encoded) - 1} bytes; compress it"
                ):
                    load_image(source, limits=limits)  # type: ignore[arg-type]

    def test_endless_file_is_cut_off(self) -> None:
        class Endless:
            num_bytes = 0

            def read(self, size: int = -1, /) -> bytes:
                self.num_bytes += size
                return bytes(size)

        source = Endless()
        with pytest.raises(ImageTooLargeError):
            load_image(source, limits=ImageLimits(max_bytes=3_000_000))
        assert source.num_bytes == 3_000_001

    def test_pillow_settings_are_left_alone(self) -> None:
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        load_image(encode(blocks(), "PNG"))
        assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)

    def test_warnings_as_errors(self) -> None:
        encoded = one_bit_png(13_000)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ImageTooLargeError):
                load_image(encoded)

    def test_bomb_costs_no_memory(self, tmp_path: Path) -> None:
        """1-bit PNGs of about 20 KB that would take 507 and 588 MB as RGB, in a process that has no other peak."""
        script = """
            import json, resource, sys, warnings
            from PIL import Image
            from vlmslice.image_loading import ImageTooLargeError, load_image

            def peak():
                return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

            warnings.simplefilter("ignore")
            load_image(sys.argv[1])
            before = peak()
            messages = []
            for pillow_cap in (Image.MAX_IMAGE_PIXELS, None):
                Image.MAX_IMAGE_PIXELS = pillow_cap
                for path in sys.argv[2:]:
                    opened = [] if pillow_cap else [Image.open(path)]
                    for source in (path, open(path, "rb").read(), *opened):
                        try:
                            load_image(source)
                        except ImageTooLargeError as error:
                            messages.append(str(error))
            print(json.dumps({"growth": peak() - before, "messages": messages}))
        """
        paths = [tmp_path / f"{side}.png" for side in (9, 13_000, 14_000)]
        for path in paths:
            path.write_bytes(one_bit_png(int(path.stem)))
            assert path.stat().st_size < 30_000
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, paths)],
            capture_output=True,
            text=True,
            check=True,
        )
        measured = json.loads(result.stdout)
        assert measured["growth"] < 50  # MiB; 3 measured
        sizes = [13_000**2] * 2 + [14_000**2] * 2 + [13_000**2] * 3 + [14_000**2] * 3
        for size, message in zip(sizes, measured["messages"], strict=True):
            assert str(size) in message


def one_bit_png(side: int) -> bytes:
    return encode(Image.new("1", (side, side)), "PNG")


def test_loading_is_pure(tmp_path: Path) -> None:
    """Two loads of one open PIL image give the same pixels, and it stays usable."""
    loaders: list[Callable[[], Image.Image]] = [
        lambda: Image.open(io.BytesIO(encode(blocks(), "PNG"))),
        lambda: Image.open(io.BytesIO(animation("GIF"))),
    ]
    for opened in (loader() for loader in loaders):
        first = pixels(load_image(opened))
        np.testing.assert_array_equal(pixels(load_image(opened)), first)
        assert opened.size == (first.shape[1], first.shape[0])


class TestLoadFor:
    """What the image processors load: opened first, then decoded for the views that are made of it."""

    JPEG = encode(blocks(320, 480), "JPEG", quality=95)

    @pytest.mark.parametrize(
        ("least_size", "reduction"),
        [((320, 480), 1), ((161, 240), 1), ((160, 241), 1), ((160, 240), 2), ((80, 120), 4), ((1, 1), 8)],
    )
    def test_smallest_that_is_large_enough(self, least_size: tuple[int, int], reduction: int) -> None:
        image = open_image(self.JPEG)
        loaded, reduced_by = load_for(image, least_size)
        assert reduced_by == reduction
        assert (loaded.height, loaded.width) == (320 // reduction, 480 // reduction)
        assert image.size == (480, 320), "the image passed in has changed"
        np.testing.assert_array_equal(pixels(load_image(image)), pixels(load_image(self.JPEG)))

    @pytest.mark.parametrize("orientation", [1, 3, 6])
    def test_reduced_pixels(self, orientation: int) -> None:
        """Of flat blocks the mean of each pixel's own; the sides that do not divide are rounded up."""
        upright = blocks(320, 480).crop((0, 0, 479, 317))
        stored = upright.transpose(STORED_AS[orientation]) if orientation > 1 else upright
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = orientation
        loaded, reduction = load_for(
            open_image(encode(stored, "JPEG", exif=exif, **FAITHFUL["JPEG"])), (100, 200)
        )
        assert (reduction, loaded.size) == (2, (240, 159))
        expected = upright.resize((240, 159), Image.Resampling.BOX, box=(0, 0, 479, 317))
        # Where blocks meet a reduced pixel may hold both; nowhere is it a block's neighbour.
        assert np.median(np.abs(pixels(loaded) - pixels(expected))) <= 2

    @pytest.mark.parametrize("image_format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO"])
    def test_only_jpeg_is_reduced(self, image_format: str) -> None:
        encoded = encode(blocks(320, 480), image_format, **FAITHFUL[image_format])
        loaded, reduction = load_for(open_image(encoded), (1, 1))
        # An MPO of one picture is a JPEG.
        assert reduction == (8 if Image.open(io.BytesIO(encoded)).format == "JPEG" else 1)
        if reduction == 1:
            np.testing.assert_array_equal(pixels(loaded), pixels(load_image(encoded)))

    def test_decoded_image_is_not_reduced(self) -> None:
        image = Image.open(io.BytesIO(self.JPEG))
        image.load()
        assert load_for(image, (1, 1)) == (image, 1)

    @pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16", "P", "RGBA"])
    def test_grey_stays_grey(self, mode: str) -> None:
        image = blocks().convert("L").convert("F" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray((np.asarray(image) * 257).astype(np.uint16))
        loaded, _ = load_for(open_image(encode(image, "PNG")), (48, 80))
        assert loaded.mode == ("L" if mode == "L" else "RGB")
        np.testing.assert_array_equal(pixels(loaded.convert("RGB")), pixels(load_image(encode(image, "PNG"))))

    def test_opened_image_does_not_keep_the_pixels(self) -> None:
        image = open_image(encode(blocks(), "PNG"))
        first, second = (load_for(image, (48, 80))[0] for _ in range(2))
        np.testing.assert_array_equal(pixels(first), pixels(second))
        assert image.tile, "the image passed in has been decoded"  # type: ignore[attr-defined]

    def test_damage_is_found_and_named(self, tmp_path: Path) -> None:
        path = tmp_path / "cut.jpg"
        path.write_bytes(self.JPEG[: len(self.JPEG) // 2])
        for least_size in ((320, 480), (1, 1)):
            with pytest.raises(ImageDecodeError, match=r"cut\.jpg' cannot be decoded"):
                load_for(open_image(path), least_size)

    def test_checks_come_before_the_pixels(self) -> None:
        with pytest.raises(ImageTooLargeError, match="320x480"):
            open_image(self.JPEG, limits=ImageLimits(max_pixels=1000))
