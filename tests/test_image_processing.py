"""Both image processors: the right pixels in the right view, packed as the plan says."""

import io
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from vlmslice.image_loading import ImageDecodeError, ImageSourceError, load_image
from vlmslice.image_processing import VlmSliceImageProcessor
from vlmslice.image_processing_pil import VlmSliceImageProcessorPil
from vlmslice.slicing import SlicingConfig, SlicingError
from vlmslice.slicing_policies import POLICIES
from vlmslice.view_packing import intermediate_size, join_patches, split_into_patches

PROCESSOR_CLASSES = (VlmSliceImageProcessor, VlmSliceImageProcessorPil)
Processor = VlmSliceImageProcessor | VlmSliceImageProcessorPil
TINY: dict[str, Any] = {
    "scale_resolution": 64,
    "overview_resolution": 32,
    "patch_size": 8,
    "max_slice_nums": 12,
}
LEVEL = 2 / 255  # One step of an 8-bit pixel in normalised units.


@pytest.fixture(params=PROCESSOR_CLASSES, ids=["torchvision", "pil"])
def processor(request: pytest.FixtureRequest) -> Processor:
    return request.param(**TINY)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def page(height: int, width: int) -> Image.Image:
    """Black and coloured print on white: the hard edges of the images this is made for."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for index, top in enumerate(range(4, height, 17)):
        color = ("black", "red", "navy")[index % 3]
        draw.text((5, top), "Sphinx of black quartz, judge my vow 0123456789 " * 3, color)
    return image


def gradient(height: int, width: int) -> Image.Image:
    rows, cols = np.mgrid[0:height, 0:width]
    ramps = np.dstack([rows * 255 // height, cols * 255 // width, (rows + cols) % 256])
    return Image.fromarray(ramps.astype(np.uint8))


def unpack(outputs: Any, view_index: int, patch_size: int) -> np.ndarray:
    """The 8-bit pixels of one view, back from its packed patches."""
    patch_grid = tuple(outputs["target_sizes"][view_index].tolist())
    pixels = join_patches(torch.as_tensor(outputs["pixel_values"][view_index]), patch_grid, patch_size)
    levels = (pixels.numpy() + 1) * 127.5
    assert np.abs(levels - levels.round()).max() < 1e-3
    return levels.round().astype(np.uint8)


class TestPixels:
    @pytest.mark.parametrize("size", [(200, 120), (60, 500), (333, 251), (40, 40), (1, 300)])
    def test_each_slice_holds_its_own_cell(self, processor: Processor, size: tuple[int, int]) -> None:
        """Every slice is painted in a colour of its own; a single foreign pixel would show."""
        plan = processor.plan(*size)
        cells = np.zeros((*size, 3), np.uint8)
        colors = np.random.default_rng(0).integers(0, 256, (len(plan.slices), 3))
        for view, color in zip(plan.slices, colors, strict=True):
            top, left, bottom, right = view.box
            cells[top:bottom, left:right] = color
        outputs = processor(Image.fromarray(cells))
        num_overviews = len(plan.views) - len(plan.slices)
        for index, (view, color) in enumerate(zip(plan.slices, colors, strict=True), start=num_overviews):
            pixels = unpack(outputs, index, processor.patch_size)
            assert pixels.shape == (*view.size, 3)
            np.testing.assert_array_equal(pixels, np.broadcast_to(color, pixels.shape))

    def test_pixels_outside_the_box_do_not_matter(self, processor: Processor) -> None:
        image = np.asarray(noise(200, 120))
        plan = processor.plan(200, 120)
        reference = processor(Image.fromarray(image))
        for index, view in enumerate(plan.views):
            top, left, bottom, right = view.box
            changed = 255 - image
            changed[top:bottom, left:right] = image[top:bottom, left:right]
            outputs = processor(Image.fromarray(changed))
            assert torch.equal(outputs["pixel_values"][index], reference["pixel_values"][index])

    def test_slices_at_full_detail_reassemble_to_the_image(self, processor: Processor) -> None:
        image = noise(192, 128)
        outputs = processor(image)
        plan = outputs["plans"][0]
        assert plan.grid == (3, 2) and all(view.size == (64, 64) for view in plan.slices)
        rebuilt = np.zeros((192, 128, 3), np.uint8)
        for index, (top, left, bottom, right) in enumerate(plan.canvas_boxes):
            if index > 0:
                box = [side * processor.patch_size for side in (top, left, bottom, right)]
                rebuilt[box[0] : box[2], box[1] : box[3]] = unpack(outputs, index, processor.patch_size)
        np.testing.assert_array_equal(rebuilt, np.asarray(image))

    def test_views_are_plain_resizes_of_their_boxes(self) -> None:
        """Against Pillow in one call; gradients have no overshoot, so the order of the passes is immaterial."""
        image = gradient(150, 210)
        processor = VlmSliceImageProcessorPil(**TINY)
        outputs = processor(image)
        for index, view in enumerate(outputs["plans"][0].views):
            top, left, bottom, right = view.box
            expected = image.crop((left, top, right, bottom)).resize(
                view.size[::-1], Image.Resampling.BICUBIC
            )
            pixels = unpack(outputs, index, processor.patch_size).astype(int)
            assert np.abs(pixels - np.asarray(expected)).mean() < 0.5

    def test_patches_are_row_major_and_channels_last(self) -> None:
        pixels = torch.arange(16 * 24 * 3).reshape(16, 24, 3)
        patches = split_into_patches(pixels, 8)
        assert patches.shape == (6, 8 * 8 * 3)
        assert torch.equal(patches[4].reshape(8, 8, 3), pixels[8:16, 8:16])
        assert torch.equal(join_patches(patches, (2, 3), 8), pixels)

    @pytest.mark.parametrize("image", [noise, page, gradient])
    @pytest.mark.parametrize(
        "size", [(480, 640), (100, 1200), (333, 251), (30, 40), (700, 700), (143, 27), (251, 6), (1, 90)]
    )
    def test_backends_agree(self, image: Callable[[int, int], Image.Image], size: tuple[int, int]) -> None:
        """Both round to 8 bits after each pass; measured: mean 0.00005, at most 2 levels."""
        source = image(*size)
        values = [cls(overview_resolution=160)(source)["pixel_values"] for cls in PROCESSOR_CLASSES]
        difference = (values[0] - values[1]).abs()
        assert difference.max() <= 2 * LEVEL + 1e-6
        assert difference.mean() <= 2e-4

    @given(*[st.integers(1, 100_000)] * 4)
    def test_intermediate_is_small(self, height: int, width: int, new_height: int, new_width: int) -> None:
        """At most the geometric mean of source and result, whatever the aspect ratios."""
        middle = intermediate_size((height, width), (new_height, new_width))
        assert middle in ((height, new_width), (new_height, width))
        assert (middle[0] * middle[1]) ** 2 <= height * width * new_height * new_width

    @pytest.mark.parametrize("size", [(2, 30_000), (30_000, 2), (1, 1), (1, 9_000)])
    def test_extreme_shapes(self, processor: Processor, size: tuple[int, int]) -> None:
        outputs = processor(Image.new("RGB", size[::-1], "white"))
        for row, (height, width) in zip(
            outputs["pixel_values"], outputs["target_sizes"].tolist(), strict=True
        ):
            assert row[: height * width].min() == row.max() == 1


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


class TestLargeFiles:
    """Decoded at reduced size, resized in bands, grey until resized: the views must not tell."""

    @pytest.mark.parametrize("policy", POLICIES)
    def test_reduced_decode_stays_near(self, processor: Processor, policy: str) -> None:
        """Measured: mean 0.1 to 1.3 levels, and 2.4 where a sawtooth becomes a single view of 64 x 64 px (uniform)."""
        for image in (page(1500, 2100), gradient(1500, 2100)):
            file = jpeg(image)
            reduced, full = (
                processor(file, policy=policy, max_visual_tokens=9999, do_reduced_decode=reduce)
                for reduce in (True, False)
            )
            assert reduced["plans"] == full["plans"], "the plan is that of the image, not of what was decoded"
            difference = (reduced["pixel_values"] - full["pixel_values"]).abs()
            assert 0 < difference.mean() <= 3 * LEVEL
            assert difference.max() <= 60 * LEVEL
            decoded = processor(load_image(file), policy=policy, max_visual_tokens=9999)
            assert torch.equal(decoded["pixel_values"], full["pixel_values"])

    @pytest.mark.parametrize("size", [(2000, 1200), (601, 5003), (3333, 2511)])
    def test_reduced_slices_hold_their_own_cells(self, processor: Processor, size: tuple[int, int]) -> None:
        """Each slice is painted in a colour of its own; of the neighbour's, its edge may show half a pixel."""
        plan = processor.plan(*size)
        cells = np.zeros((*size, 3), np.uint8)
        for index, view in enumerate(plan.slices):
            top, left, bottom, right = (int(edge) for edge in view.box)
            cells[top:bottom, left:right] = 250 if index % 2 else 5
        outputs = processor(jpeg(Image.fromarray(cells)))
        assert outputs["plans"] == [plan]
        for index, _ in enumerate(plan.slices):
            pixels = unpack(outputs, index + 1, processor.patch_size).astype(int)
            expected = 250 if index % 2 else 5
            assert np.abs(pixels[1:-1, 1:-1] - expected).max() <= 30
            assert np.abs(pixels - expected).max() < 123, "an edge is nearer to the neighbour"

    @pytest.mark.parametrize("size", [(640, 480), (127, 1000), (120, 260)])
    def test_small_enough_files_are_decoded_in_full(self, size: tuple[int, int]) -> None:
        """Each of these would be left with less than two pixels for a pixel of a view."""
        for processor in (cls() for cls in PROCESSOR_CLASSES):
            file = jpeg(noise(*size))
            assert torch.equal(processor(file)["pixel_values"], processor(load_image(file))["pixel_values"])

    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("size", [(400, 300), (90, 700), (700, 90)])
    def test_bands_do_not_show(
        self, policy: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        processor = VlmSliceImageProcessor(**TINY, policy=policy, max_visual_tokens=9999)
        whole = processor(noise(*size))["pixel_values"]
        monkeypatch.setattr("vlmslice.image_processing._BAND_PIXELS", 1500)
        monkeypatch.setattr("vlmslice.image_processing._CONVERTED_PIXELS", 400)
        assert torch.equal(processor(noise(*size))["pixel_values"], whole)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_grey_file_equals_its_rgb(self, processor: Processor, policy: str) -> None:
        grey = noise(200, 330).convert("L")
        buffer = io.BytesIO()
        grey.save(buffer, "PNG")
        outputs = [
            processor(image, policy=policy, max_visual_tokens=9999)["pixel_values"]
            for image in (buffer.getvalue(), grey, grey.convert("RGB"))
        ]
        assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[2])

    def test_images_are_not_decoded_before_their_turn(self, processor: Processor) -> None:
        files = processor.fetch_images([jpeg(noise(40, 60)), jpeg(noise(40, 60, 1))])
        processor(files)
        assert all(file.tile for file in files), "a batch holds the pixels of all its images"

    def test_damaged_file_is_named(self, processor: Processor, tmp_path: Path) -> None:
        path = tmp_path / "cut.jpg"
        path.write_bytes(jpeg(noise(400, 400))[:9000])
        with pytest.raises(ImageDecodeError, match=r"images\[1\]: image '.*cut.jpg' cannot be decoded"):
            processor([noise(9, 9), path])


class TestPacking:
    @settings(max_examples=25)
    @given(
        sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=3),
        processor_class=st.sampled_from(PROCESSOR_CLASSES),
    )
    def test_follows_the_plan(self, sizes: list[tuple[int, int]], processor_class: type[Processor]) -> None:
        processor = processor_class(**TINY)
        outputs = processor([gradient(*size) for size in sizes], return_tensors="pt")
        plans = [processor.plan(*size) for size in sizes]
        views = [view for plan in plans for view in plan.views]
        assert outputs["plans"] == plans
        assert outputs["num_views"].tolist() == [len(plan.views) for plan in plans]
        assert [tuple(grid) for grid in outputs["target_sizes"].tolist()] == [
            view.patch_grid for view in views
        ]
        boxes = [box for plan in plans for box in plan.canvas_boxes]
        assert [tuple(box) for box in outputs["canvas_boxes"].tolist()] == boxes
        values = outputs["pixel_values"]
        longest = max(view.patch_grid[0] * view.patch_grid[1] for view in views)
        assert (
            values.dtype == torch.float32 and values.shape[0] == len(views) and values.shape[2] == 8 * 8 * 3
        )
        assert values.shape[1] % 16 == 0 and longest <= values.shape[1] < longest + 16
        assert values.abs().max() <= 1
        for row, (height, width) in zip(values, outputs["target_sizes"].tolist(), strict=True):
            assert (row[height * width :] == 0).all()
        for key in ("target_sizes", "canvas_boxes", "num_views"):
            assert outputs[key].dtype == torch.int64

    def test_height_comes_first(self, processor: Processor) -> None:
        height, width = processor(gradient(20, 60))["target_sizes"][0].tolist()
        assert height < width

    def test_batch_equals_singles(self, processor: Processor) -> None:
        images = [noise(100, 200), noise(20, 30), noise(300, 50)]
        batch = processor(images)
        row = 0
        for image in images:
            single = processor(image)
            for values in single["pixel_values"]:
                assert torch.equal(batch["pixel_values"][row, : len(values)], values)
                row += 1
        assert row == len(batch["pixel_values"])

    def test_normalisation(self, processor: Processor) -> None:
        image = Image.new("RGB", (16, 16), (255, 51, 0))
        for kwargs, expected in (
            ({}, [1, -0.6, -1]),
            ({"do_normalize": False}, [1, 0.2, 0]),
            ({"do_rescale": False, "do_normalize": False}, [255, 51, 0]),
            ({"image_mean": [1.0, 0.0, 0.5], "image_std": [1.0, 2.0, 0.25]}, [0, 0.1, -2]),
            ({"do_rescale": False, "image_mean": 51.0, "image_std": 2.0}, [102, 0, -25.5]),
        ):
            pixel = processor(image, **kwargs)["pixel_values"][0, 0, :3]
            torch.testing.assert_close(pixel, torch.tensor(expected, dtype=torch.float32))

    def test_return_tensors(self, processor: Processor) -> None:
        arrays = processor(gradient(100, 90), return_tensors="np")
        assert all(isinstance(arrays[key], np.ndarray) for key in processor.model_input_names)
        np.testing.assert_array_equal(arrays["pixel_values"], processor(gradient(100, 90))["pixel_values"])


class TestInputs:
    def test_all_forms_of_one_image(self, processor: Processor, tmp_path: Path) -> None:
        image = noise(70, 90)
        array = np.asarray(image)
        image.save(tmp_path / "image.png")
        encoded = (tmp_path / "image.png").read_bytes()
        reference = processor(image)["pixel_values"]
        for form in (
            str(tmp_path / "image.png"),
            tmp_path / "image.png",
            encoded,
            io.BytesIO(encoded),
            Image.open(tmp_path / "image.png"),
            array,
            array.transpose(2, 0, 1),
            array[None],
            array / 255,
            torch.from_numpy(array.copy()),
            torch.from_numpy(array.copy()).permute(2, 0, 1),
            torch.from_numpy(array / 255),
            [image],
            [[image]],
            (image,),
        ):
            assert torch.equal(processor(form)["pixel_values"], reference), type(form)

    def test_nested_lists_are_flattened_in_order(self, processor: Processor) -> None:
        images = [noise(20, 30, seed) for seed in range(4)]
        flat = processor(images)
        nested = processor([[images[0]], [], [images[1], images[2]], [[images[3]]]])
        assert torch.equal(nested["pixel_values"], flat["pixel_values"])
        stacked = np.stack([np.asarray(image) for image in images])
        assert torch.equal(processor(stacked)["pixel_values"], flat["pixel_values"])
        assert torch.equal(processor([stacked[:2], stacked[2:]])["pixel_values"], flat["pixel_values"])

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
    def test_modes_follow_the_loading_rules(self, processor: Processor, mode: str) -> None:
        if mode == "I;16":
            image = Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16))
        else:
            image = noise(30, 40).convert("L" if mode == "F" else "RGB").convert(mode)
        expected = processor(load_image(image))["pixel_values"]
        assert torch.equal(processor(image)["pixel_values"], expected)

    def test_orientation(self, processor: Processor) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        buffer = io.BytesIO()
        noise(30, 80).save(buffer, "PNG", exif=exif)
        assert processor(Image.open(buffer))["plans"][0].image_size == (80, 30)
        assert processor(processor.fetch_images(Image.open(buffer)))["plans"][0].image_size == (80, 30)

    def test_transparent_array_is_white(self, processor: Processor) -> None:
        assert (processor(np.zeros((16, 16, 4), np.uint8))["pixel_values"][0, :4] == 1).all()

    def test_input_data_format(self, processor: Processor) -> None:
        array = np.asarray(noise(3, 40))
        last = processor(array, input_data_format="channels_last")
        assert last["plans"][0].image_size == (3, 40)
        assert processor(array)["plans"][0].image_size == (40, 3)

    def test_bfloat16_tensor(self, processor: Processor) -> None:
        white = torch.ones(3, 16, 16, dtype=torch.bfloat16)
        assert (processor(white)["pixel_values"][0, :4] == 1).all()

    def test_no_network(self, processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
        with pytest.raises(ImageSourceError, match=r"images\[1\]: .*is a URL \(http://\)"):
            processor([noise(9, 9), "http://127.0.0.1/cat.png"])

    @pytest.mark.parametrize("images", [[], [[], []]])
    def test_no_image(self, processor: Processor, images: list) -> None:
        with pytest.raises(ImageSourceError, match="got no image"):
            processor(images)

    def test_error_names_the_place(self, processor: Processor, tmp_path: Path) -> None:
        with pytest.raises(ImageSourceError, match=r"images\[1\]\[0\]: image '.*missing.png' cannot be read"):
            processor([[noise(9, 9)], [tmp_path / "missing.png"]])

    def test_odd_arrays(self, processor: Processor) -> None:
        with pytest.raises(ImageSourceError, match=r"shape \(7, 8, 9\)"):
            processor(np.zeros((7, 8, 9)))


class TestSettings:
    def test_defaults_are_those_of_the_slicing_config(self) -> None:
        for processor_class in PROCESSOR_CLASSES:
            assert processor_class().slicing_config == SlicingConfig()

    def test_plan_overrides(self, processor: Processor) -> None:
        assert processor.plan(300, 300).policy == "adaptive"
        assert processor.plan(300, 300, policy="uhd", max_slice_nums=4).policy == "uhd"
        assert processor.slicing_config == SlicingConfig(**TINY)

    def test_call_overrides(self, processor: Processor) -> None:
        image = gradient(300, 300)
        plan = processor(image)["plans"][0]
        fewer = processor(image, max_visual_tokens=40)["plans"][0]
        assert fewer.num_visual_tokens <= 40 < plan.num_visual_tokens
        assert fewer == processor.plan(300, 300, max_visual_tokens=40)
        assert processor(image, policy="minicpm")["plans"][0].policy == "minicpm"
        assert processor(image)["plans"][0] == plan, "an override of one call reached the next"

    @pytest.mark.parametrize("loader", PROCESSOR_CLASSES)
    def test_save_and_load(self, processor: Processor, loader: type[Processor], tmp_path: Path) -> None:
        processor.save_pretrained(tmp_path)
        assert (
            '"image_processor_type": "VlmSliceImageProcessor"'
            in (tmp_path / "preprocessor_config.json").read_text()
        )
        loaded = loader.from_pretrained(tmp_path)
        assert loaded.slicing_config == processor.slicing_config
        assert loaded.to_dict() == processor.to_dict()
        image = gradient(100, 130)
        torch.testing.assert_close(
            loaded(image)["pixel_values"], processor(image)["pixel_values"], atol=2 * LEVEL + 1e-6, rtol=0
        )
        assert loader.from_pretrained(tmp_path, max_slice_nums=4).plan(500, 500).grid == (2, 2)

    def test_resample(self, processor: Processor) -> None:
        """The nearest pixel of a black and white image is black or white."""
        stripes = Image.fromarray(np.indices((50, 70)).sum(0).astype(np.uint8) % 2 * 255)
        values = processor(stripes, resample=Image.Resampling.NEAREST)["pixel_values"]
        assert set(values.unique().tolist()) <= {-1.0, 0.0, 1.0}
        assert len(processor(stripes)["pixel_values"].unique()) > 3

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"policy": "adaptve"}, SlicingError, "adaptve"),
            ({"max_visual_tokens": 0}, SlicingError, "max_visual_tokens"),
            ({"size": 224}, ValueError, "got size=.*the slice plan sets all sizes"),
            ({"do_resize": False}, ValueError, "got do_resize=False"),
            ({"do_center_crop": True}, ValueError, "got do_center_crop=True"),
            ({"max_slices": 3}, TypeError, "max_slices"),
        ],
    )
    def test_wrong_options(
        self, processor: Processor, kwargs: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            processor(gradient(20, 20), **kwargs)
