import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_config, tiny_processor

from vlmslice.modeling import CanvasPosition, place_on_canvas
from vlmslice.position_embedding import sincos_2d


def similarity(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a, b, dim=-1).item()


class TestSincos:
    def test_worked_example(self):
        """Width 8: two wavelengths, 4 and 200; sine and cosine of y, then of x."""
        got = sincos_2d(torch.tensor([1.0, 100.0]), 8)
        short, long = 2 * math.pi / 4, 2 * math.pi / 200
        expected = [math.sin(short), math.sin(long), math.cos(short), math.cos(long)]
        expected += [math.sin(100 * short), math.sin(100 * long), math.cos(100 * short), math.cos(100 * long)]
        torch.testing.assert_close(got, torch.tensor(expected), atol=1e-4, rtol=0)

    @given(st.integers(1, 20), st.floats(0, 400), st.floats(0, 400))
    def test_root_mean_square_is_the_same_everywhere(self, quarter, y, x):
        embedding = sincos_2d(torch.tensor([y, x]), 4 * quarter)
        assert embedding.shape == (4 * quarter,) and embedding.dtype == torch.float32
        assert embedding.pow(2).mean().sqrt().item() == pytest.approx(math.sqrt(0.5), abs=1e-4)

    @given(st.floats(0, 200), st.floats(0, 200), st.floats(-3, 3), st.floats(-3, 3))
    def test_only_the_way_between_places_counts(self, y, x, down, right):
        here = torch.tensor([[y, x], [y + down, x + right]])
        there = here + torch.tensor([17.0, 5.0])
        a, b = sincos_2d(here, 64), sincos_2d(there, 64)
        assert similarity(a[0], a[1]) == pytest.approx(similarity(b[0], b[1]), abs=1e-3)

    def test_similarity_falls_with_distance(self):
        embeddings = sincos_2d(torch.tensor([[5.0, 5.0 + step / 4] for step in range(9)]), 64)
        products = (embeddings @ embeddings[0]).tolist()
        assert products == sorted(products, reverse=True)

    def test_axes_are_told_apart(self):
        embeddings = sincos_2d(torch.tensor([[2.0, 7.0], [7.0, 2.0]]), 32)
        assert torch.equal(embeddings[0, :16], embeddings[1, 16:])
        assert not torch.equal(embeddings[0], embeddings[1])

    def test_integer_places_of_any_shape(self):
        places = torch.arange(24).view(3, 4, 2)
        assert torch.equal(sincos_2d(places, 8), sincos_2d(places.double(), 8))
        assert sincos_2d(places, 8).shape == (3, 4, 8)

    def test_odd_width(self):
        with pytest.raises(ValueError, match="^dim is 6, expected a multiple of 4"):
            sincos_2d(torch.zeros(2), 6)


class TestCanvasPosition:
    """A (2, 3) grid of slices of 4 x 6 patches: blocks of 2 x 2 patches make a canvas of 4 x 9 blocks."""

    GRID, PATCHES, MERGE = (2, 3), (4, 6), 2

    def embeddings(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the slices' tokens laid out on the canvas, `[rows, cols, E]`, and of an overview of 2 x 3 tokens."""
        torch.manual_seed(0)
        module = CanvasPosition(tiny_config())
        (rows, cols), (height, width) = self.GRID, self.PATCHES
        boxes = [
            (r * height, c * width, (r + 1) * height, (c + 1) * width)
            for r in range(rows)
            for c in range(cols)
        ]
        canvas_boxes = torch.tensor([(0, 0, rows * height, cols * width), *boxes])
        high, wide = height // self.MERGE, width // self.MERGE
        cells = torch.cartesian_prod(torch.arange(high), torch.arange(wide)).expand(7, -1, -1)
        grids = torch.tensor([high, wide]).expand(7, 2)
        is_overview = torch.tensor([True] + [False] * 6)
        with torch.no_grad():
            out = module(place_on_canvas(cells, grids, canvas_boxes), is_overview)
            overview = out[0] - module.overview
        slices = (
            out[1:].view(rows, cols, high, wide, -1).transpose(1, 2).reshape(rows * high, cols * wide, -1)
        )
        return slices, overview.view(high, wide, -1)

    def test_canvas_is_one_plane(self):
        """Every token is where it would be if the image were one large slice."""
        canvas, _ = self.embeddings()
        places = torch.cartesian_prod(torch.arange(4), torch.arange(9)).view(4, 9, 2) + 0.5
        expected = 1.0 * sincos_2d(places, 32, longest=400.0)
        torch.testing.assert_close(canvas, expected, atol=1e-5, rtol=0)

    def test_neighbours_across_a_seam_are_as_near_as_within_a_slice(self):
        canvas, _ = self.embeddings()
        across = (canvas[:, 1:] - canvas[:, :-1]).norm(dim=-1)  # columns 2|3 and 5|6 lie in two slices
        down = (canvas[1:] - canvas[:-1]).norm(dim=-1)  # rows 1|2 do
        torch.testing.assert_close(across, across[:1, :1].expand_as(across), atol=1e-4, rtol=0)
        torch.testing.assert_close(down, down[:1, :1].expand_as(down), atol=1e-4, rtol=0)

    def test_overview_lies_over_its_image(self):
        """Token (0, 0) of the 2 x 3 overview covers 2 x 3 blocks of the canvas and is placed at their middle."""
        canvas, overview = self.embeddings()
        torch.testing.assert_close(
            overview[0, 0], sincos_2d(torch.tensor([1.0, 1.5]), 32, longest=400.0), atol=1e-5, rtol=0
        )
        for row in range(2):
            for col in range(3):
                nearest = (canvas @ overview[row, col]).flatten().argmax().item()
                assert (nearest // 9 // 2, nearest % 9 // 3) == (row, col)

    def test_overview_is_marked(self):
        module = CanvasPosition(tiny_config())
        cells, grids = torch.zeros(2, 1, 2), torch.ones(2, 2)
        boxes = torch.tensor([[0, 0, 4, 4]] * 2)
        with torch.no_grad():
            marked, plain = module(place_on_canvas(cells, grids, boxes), torch.tensor([True, False]))
        torch.testing.assert_close(marked - plain, module.overview.detach()[None])
        assert module.overview.norm() > 1

    def test_boxes_of_a_real_plan(self):
        """From the processor's boxes: the tokens of all slices tile the canvas, each block once."""
        plan = tiny_processor().image_processor.plan(100, 200)
        rows, cols = plan.grid
        assert rows > 1 and cols > 1
        seen = []
        for view, (top, left, _, _) in zip(plan.views, plan.canvas_boxes, strict=True):
            if view is not plan.overview:
                high, wide = view.patch_grid
                seen += [(top + r, left + c) for r in range(0, high, 2) for c in range(0, wide, 2)]
        high, wide = plan.slices[0].patch_grid
        assert sorted(seen) == [(r, c) for r in range(0, rows * high, 2) for c in range(0, cols * wide, 2)]
        assert plan.canvas_boxes[0] == (0, 0, rows * high, cols * wide)
