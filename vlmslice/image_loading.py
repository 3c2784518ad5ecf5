"""From anything that holds an image to upright 8-bit RGB, with the header checked before a pixel is decoded.

Every way in (path, bytes, file object, `data:` URL, PIL image) passes the same checks, in this order:

1. the byte cap, before the bytes are read in full;
2. the format allow-list, so that no other Pillow plugin even looks at the bytes;
3. the pixel cap, on the size that the header states, before anything is decoded;
4. a decode that either yields every pixel or raises.

Errors form one family:

    ImageError
    ├── ImageSourceError     nothing to read: missing file, remote URL, wrong type
    ├── ImageFormatError     not an image of an allowed format
    ├── ImageTooLargeError   over a cap of `ImageLimits`
    ├── ImageFrameError      no such frame
    └── ImageDecodeError     damaged pixels
"""

import base64
import binascii
import io
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError

from vlmslice.errors import VlmSliceError

ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# What Pillow calls the allowed formats once open: a JPEG that carries further pictures becomes an MPO.
_ALLOWED_FORMAT_NAMES = frozenset((*ALLOWED_FORMATS, "MPO"))

_NAME = "vlmslice source"
"""Key of `Image.info` under which an image that is not decoded yet keeps how an error names it."""

# EXIF 2.32, tag 0x0112: the stored image needs this operation to stand upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_UINT16_TO_UINT8 = np.round(np.arange(65536) / 257).astype(np.uint8)


class ImageError(VlmSliceError, ValueError):
    """An image cannot be loaded; the children say why."""


class ImageSourceError(ImageError):
    """There is nothing to read: a missing file, a remote URL, an object that is no image."""


class ImageFormatError(ImageError):
    """The bytes are not an image of one of `ALLOWED_FORMATS`."""


class ImageTooLargeError(ImageError):
    """The image exceeds a cap of `ImageLimits`."""


class ImageFrameError(ImageError):
    """The animation or multi-page file has no such frame, or not within the cap."""


class ImageDecodeError(ImageError):
    """The header is fine, the pixels are not; no part of the image is returned."""


@dataclass(frozen=True)
class ImageLimits:
    """Caps that an image must respect before it is decoded.

    Attributes:
        max_pixels: height * width, as the header states it. The default is the size at which Pillow starts
            to warn (1 GiB / 4 / 3): 9,459 x 9,459. Pillow itself refuses more than twice
            `PIL.Image.MAX_IMAGE_PIXELS`, whatever is said here.
        max_bytes: length of the encoded file.
        max_frames: frames of an animation that may be reached, since frame n of a GIF costs n + 1 decodes.
    """

    max_pixels: int = 89_478_485
    max_bytes: int = 128 * 2**20
    max_frames: int = 256


@runtime_checkable
class Readable(Protocol):
    """A binary file object, as far as loading needs it."""

    def read(self, size: int = ..., /) -> bytes: ...


@runtime_checkable
class Seekable(Protocol):
    """A file object that may be able to go back to its start."""

    def seekable(self) -> bool: ...

    def seek(self, offset: int, /) -> int: ...


ImageSource = str | Path | bytes | bytearray | memoryview | Readable | Image.Image


def load_image(
    source: ImageSource, *, limits: ImageLimits = ImageLimits(), frame: int | None = None
) -> Image.Image:
    """Loads an image as upright RGB.

    The same picture gives the same pixels from a path, bytes, a file object (read from its start), a base64
    `data:` URL or a PIL image. The rules of conversion:

    - EXIF orientation is applied; orientation data that cannot be read counts as upright.
    - Transparency is composited on white.
    - 16-bit grey is scaled from 0..65535. 32-bit integers and floats carry no range, so the smallest of
      0..1 (floats), 0..255 and 0..65535 that holds all values is taken, else minimum..maximum; NaN counts as
      black.
    - CMYK and LAB are converted without the file's colour profile.
    - Of an animation or a multi-page file the first frame is taken; of a PIL image, the frame it stands at.

    Args:
        source: What to load. A `str` is a path or a `data:` URL; remote URLs are refused.
        limits: Caps checked before decoding. None applies to a PIL image that was not opened from a file: its
            maker already holds the pixels.
        frame: Index of the frame to take instead.

    Returns:
        An RGB image without EXIF orientation; the PIL image passed in, if it already was that.

    Raises:
        ImageError: One of its children, see the top of this module.
    """
    return _load(source, limits, frame)[0]


def open_image(source: ImageSource, *, limits: ImageLimits = ImageLimits()) -> Image.Image:
    """Opens an image and checks its header as `load_image` does, but decodes no pixel: that is left to `load_for`.

    Args:
        source: As in `load_image`.
        limits: As in `load_image`.

    Returns:
        A PIL image as it is stored: of any mode, and not turned upright. The PIL image passed in, if it was one.

    Raises:
        ImageError: One of its children, see the top of this module.
    """
    name = _describe(source)
    image = _open_source(source, name, limits)
    image.info.setdefault(_NAME, name)  # for errors when it is decoded
    return image


def load_for(image: Image.Image, least_size: tuple[int, int]) -> tuple[Image.Image, int]:
    """Loads an opened image as `load_image` does, but no larger and no wider in bytes than its user needs.

    A JPEG that has not been decoded yet is decoded straight at 1/2, 1/4 or 1/8 of its size, where that is still at
    least `least_size`: its decoder then computes fewer pixels. Grey stays one channel.

    Args:
        image: As `open_image` returns it. It keeps its size.
        least_size: (height, width) of the upright image that suffices.

    Returns:
        The upright image in mode RGB or L, and the 1, 2, 4 or 8 by which it is reduced. Of 4912 x 7360 px, of which
        1900 x 2900 suffice, 2456 x 3680 and 2. A side that does not divide is rounded up.

    Raises:
        ImageError: One of its children, see the top of this module.
    """
    return _load(image, ImageLimits(), None, least_size)


def _load(
    source: ImageSource, limits: ImageLimits, frame: int | None, least_size: tuple[int, int] | None = None
) -> tuple[Image.Image, int]:
    """What `load_image` and, if `least_size` is given, `load_for` return."""
    name = _describe(source)
    reduction = 1
    with _strict_decoding():
        image = _open_source(source, name, limits)
        if frame is not None:
            _seek(image, frame, name, limits)
        try:
            if least_size is not None:
                image, reduction = _reduce(image, least_size)
            image.load()
            return _to_upright_rgb(image, keep_grey=least_size is not None), reduction
        except Exception as error:  # Pillow's decoders raise whatever a malformed file makes them raise.
            raise ImageDecodeError(
                f"{name} cannot be decoded: {_reason(error)}; expected a complete, undamaged image; "
                "export or download it again"
            ) from None


def _reduce(image: Image.Image, least_size: tuple[int, int]) -> tuple[Image.Image, int]:
    """What `load_for` decodes in place of an image, and by which factor that is smaller.

    A second reading of the file, if it has not been decoded: the image passed in keeps its size, and what was opened
    here does not come to hold its pixels as well.
    """
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.fp is None:
        return image, 1
    reduction = 1
    if image.format == "JPEG":
        height, width = least_size if _orientation(image) < 5 else least_size[::-1]
        enough = (n for n in (8, 4, 2) if -(-image.height // n) >= height and -(-image.width // n) >= width)
        reduction = next(enough, 1)
    if reduction == 1 and _NAME not in image.info:
        return image, 1  # The caller's own: once decoded, it need not be again.
    image.fp.seek(0)
    fresh = Image.open(io.BytesIO(image.fp.read()), formats=ALLOWED_FORMATS)
    if reduction > 1:
        fresh.draft(fresh.mode, (image.width // reduction, image.height // reduction))
    return fresh, reduction


def read_image_size(source: ImageSource, *, limits: ImageLimits = ImageLimits()) -> tuple[int, int]:
    """(height, width) of the upright image that `load_image` would return, without decoding a pixel.

    An orientation that a PNG states after its pixels is not seen.

    Args:
        source: As in `load_image`.
        limits: As in `load_image`.

    Raises:
        ImageError: One of its children, see the top of this module.
    """
    image = _open_source(source, _describe(source), limits)
    width, height = image.size
    # Pillow gives the upright size of a TIFF itself.
    turned = _orientation(image) >= 5 and image.format != "TIFF"
    return (width, height) if turned else (height, width)


def image_from_array(array: np.ndarray) -> Image.Image:
    """Turns an array into an RGB image by the rules of `load_image`.

    Args:
        array: `[height, width]` or `[height, width, channels]` with 1 (grey), 2 (grey, alpha), 3 (RGB) or 4
            (RGBA) channels. uint8 is taken as it is, bool and uint16 are scaled, other types by the range
            rule.

    Raises:
        ImageSourceError: The shape or type is none of these.
    """
    channels = 1 if array.ndim == 2 else array.shape[-1]
    is_image = array.ndim in (2, 3) and channels in (1, 2, 3, 4) and array.size > 0
    if not is_image or array.dtype.kind not in "buif":
        raise ImageSourceError(
            f"got an array of shape {array.shape} and type {array.dtype}; expected numbers as [height, width] "
            "or [height, width, 1 to 4 channels]; reorder the axes or pass input_data_format"
        )
    pixels = np.ascontiguousarray(_to_uint8(array.reshape(*array.shape[:2], channels)))
    if channels == 1:
        return Image.fromarray(pixels[..., 0]).convert("RGB")
    return _to_upright_rgb(Image.fromarray(pixels))  # Pillow takes 2, 3, 4 channels for LA, RGB, RGBA.


def _describe(source: ImageSource) -> str:
    """Names a source for an error message, never with its content or its memory address."""
    if isinstance(source, Image.Image):
        if _NAME in source.info:
            return str(source.info[_NAME])
        width, height = source.size
        return f"PIL image of {height}x{width} (mode {source.mode})"
    if isinstance(source, str) and source[:5].lower() == "data:":
        return "data: URL"
    if isinstance(source, (str, Path)):
        text = str(source)
        return f"image {text!r}" if len(text) <= 200 else f"image {text[:200]!r}... ({len(text)} characters)"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"image of {len(source)} bytes"
    return f"image from a {type(source).__name__}"


def _reason(error: Exception) -> str:
    """The text of a foreign error, without memory addresses."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(error)) or type(error).__name__


def _read(source: ImageSource, name: str, limits: ImageLimits) -> bytes:
    """Reads the encoded image, at most one chunk beyond the byte cap."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _within_byte_cap(bytes(source), name, limits)
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return _decode_data_url(source, name, limits)
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source)
        if scheme:
            raise ImageSourceError(
                f"{name} is a URL ({scheme[0]}); expected a local path, a base64 data: URL, bytes or a PIL "
                "image; download it first, or pass the plain path of a local file"
            )
    if isinstance(source, (str, Path)):
        try:
            with open(source, "rb") as file:
                return _read_file(file, name, limits)
        except ImageError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path.
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ImageSourceError(
                f"{name} cannot be read: {reason}; expected a readable file; check the path"
            ) from error
    if isinstance(source, Readable):
        try:
            return _read_file(source, name, limits)
        except OSError as error:
            raise ImageSourceError(
                f"{name} cannot be read: {_reason(error)}; expected a binary file object open for reading"
            ) from error
    raise ImageSourceError(
        f"got a {type(source).__name__}; expected a path, bytes, a binary file object, a base64 data: URL or "
        "a PIL image"
    )


def _read_file(file: Readable, name: str, limits: ImageLimits) -> bytes:
    if isinstance(file, Seekable) and file.seekable():
        file.seek(0)
    chunks = []
    num_bytes = 0
    while num_bytes <= limits.max_bytes:
        chunk = file.read(min(2**20, limits.max_bytes + 1 - num_bytes))
        if not isinstance(chunk, bytes):
            raise ImageSourceError(
                f"{name} yields {type(chunk).__name__}; expected bytes; open the file in binary mode ('rb')"
            )
        if not chunk:
            break
        chunks.append(chunk)
        num_bytes += len(chunk)
    return _within_byte_cap(b"".join(chunks), name, limits)


def _decode_data_url(url: str, name: str, limits: ImageLimits) -> bytes:
    header, _, payload = url.partition(",")
    if not header.lower().endswith(";base64"):
        raise ImageSourceError(
            f"{name} starts {header[:40]!r}; expected 'data:image/...;base64,' and base64 text"
        )
    if len(payload) * 3 // 4 > limits.max_bytes + 2:
        raise _too_many_bytes(name, limits)
    try:
        encoded = base64.b64decode(urllib.parse.unquote_to_bytes(payload))
    except binascii.Error as error:
        raise ImageSourceError(f"{name} is not base64: {error}; encode the file again") from error
    return _within_byte_cap(encoded, name, limits)


def _within_byte_cap(encoded: bytes, name: str, limits: ImageLimits) -> bytes:
    if len(encoded) > limits.max_bytes:
        raise _too_many_bytes(name, limits)
    return encoded


def _too_many_bytes(name: str, limits: ImageLimits) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"{name} is larger than {limits.max_bytes} bytes; compress it, or raise ImageLimits.max_bytes"
    )


def _open_source(source: ImageSource, name: str, limits: ImageLimits) -> Image.Image:
    image = source if isinstance(source, Image.Image) else _open(_read(source, name, limits), name)
    if isinstance(image, ImageFile.ImageFile):
        _check_header(image, name, limits)
    return image


def _open(encoded: bytes, name: str) -> Image.Image:
    """Parses the header; no plugin outside the allow-list sees the bytes."""
    try:
        return Image.open(io.BytesIO(encoded), formats=ALLOWED_FORMATS)
    except UnidentifiedImageError:
        raise ImageFormatError(
            f"{name} is not recognised ({len(encoded)} bytes); expected an undamaged "
            f"{', '.join(ALLOWED_FORMATS)} file; convert it to one of these"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(
            f"{name} is too large for Pillow: {error} Downscale it, or raise PIL.Image.MAX_IMAGE_PIXELS and "
            "ImageLimits.max_pixels"
        ) from None
    except Exception as error:  # As in `load_image`: malformed headers raise anything.
        raise ImageDecodeError(
            f"{name} has a damaged header: {_reason(error)}; export or download it again"
        ) from None


def _check_header(image: Image.Image, name: str, limits: ImageLimits) -> None:
    if image.format not in _ALLOWED_FORMAT_NAMES:
        raise ImageFormatError(
            f"{name} is of format {image.format}; expected {', '.join(ALLOWED_FORMATS)}; convert it to one "
            "of these"
        )
    width, height = image.size
    if height * width > limits.max_pixels:
        raise ImageTooLargeError(
            f"{name} has {height}x{width} = {height * width} pixels; expected at most {limits.max_pixels}; "
            "downscale it, or raise ImageLimits.max_pixels"
        )


def _seek(image: Image.Image, frame: int, name: str, limits: ImageLimits) -> None:
    if not 0 <= frame < limits.max_frames:
        raise ImageFrameError(
            f"{name}: got frame={frame}; expected 0 to {limits.max_frames - 1}; raise ImageLimits.max_frames "
            "to go further"
        )
    try:
        image.seek(frame)
    except EOFError:
        raise ImageFrameError(
            f"{name} has no frame {frame}; expected the index of an existing frame; 0 is the first"
        ) from None
    except Exception as error:  # As in `load_image`: earlier frames are decoded on the way.
        raise ImageDecodeError(f"{name} cannot be decoded up to frame {frame}: {_reason(error)}") from None
    if isinstance(image, ImageFile.ImageFile):
        _check_header(image, name, limits)  # Each page of a TIFF has its own size.


class _StrictDecoding:
    """How many loads rely on `LOAD_TRUNCATED_IMAGES` being off, and what it was before the first of them."""

    lock = threading.Lock()
    num_users = 0
    previous = False


@contextmanager
def _strict_decoding() -> Iterator[None]:
    """Makes Pillow raise on missing data even if the application has set `ImageFile.LOAD_TRUNCATED_IMAGES`.

    Pillow has no per-image switch. The flag is restored when the last concurrent load ends.
    """
    with _StrictDecoding.lock:
        if _StrictDecoding.num_users == 0:
            _StrictDecoding.previous = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _StrictDecoding.num_users += 1
    try:
        yield
    finally:
        with _StrictDecoding.lock:
            _StrictDecoding.num_users -= 1
            if _StrictDecoding.num_users == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _StrictDecoding.previous


def _to_upright_rgb(image: Image.Image, keep_grey: bool = False) -> Image.Image:
    upright = image if keep_grey and image.mode == "L" and not image.has_transparency_data else _to_rgb(image)
    operation = _UPRIGHT.get(_orientation(image))
    if operation is not None:
        upright = upright.transpose(operation)
    if upright is not image:
        upright.info = {}  # The copied EXIF would turn the image again at the next load.
    return upright


def _orientation(image: Image.Image) -> int:
    """EXIF orientation as far as the image is read; 1 (upright) if absent or unreadable.

    `ImageOps.exif_transpose` would also rewrite the whole EXIF block, which fails on malformed ones; only
    this one tag is read here. `getexif` of a PNG would decode it first.
    """
    try:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # Camera metadata is often broken; the picture is still good.
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _wide_grey_to_rgb(image)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converter = ImageCms.buildTransform(*profiles, inMode="LAB", outMode="RGB")
        return converter.apply(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "La":  # Pillow has no direct way from premultiplied grey.
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(rgba, mask=rgba)
    return on_white


def _wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    pixels = _to_uint8(values)
    transparent_value = image.info.get("transparency")
    if isinstance(transparent_value, int):  # PNG tRNS of a 16-bit grey image names one value.
        pixels = np.where(values == transparent_value, np.uint8(255), pixels)
    return Image.fromarray(pixels).convert("RGB")


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Scales values of any type to `uint8` of the same shape, by the range rule of `load_image`."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return _UINT16_TO_UINT8[values]
    wide: np.ndarray = values.astype(np.float64 if values.dtype.itemsize == 8 else np.float32)
    is_float = values.dtype.kind == "f"
    finite = wide[np.isfinite(wide)] if is_float else wide
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if low < 0 or high > 65535:
        span = (low, high)
    elif high > 255:
        span = (0.0, 65535.0)
    elif high > 1 or not is_float:
        span = (0.0, 255.0)
    else:
        span = (0.0, 1.0)
    scaled = (wide - span[0]) * (255 / ((span[1] - span[0]) or 1.0))
    scaled = np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
    return np.rint(np.clip(scaled, 0, 255, out=scaled)).astype(np.uint8)
