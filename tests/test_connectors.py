import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONNECTORS, tiny_config, tiny_slicing

from vlmslice.connectors import Resampler, SpatialResampler, block_places, build_connector, query_grid
from vlmslice.slicing import plan_slices
from vlmslice.vision_encoder import patch_coordinates

all_connectors = pytest.mark.parametrize("connector", CONNECTORS)
ANCHORED = ("spatial_resampler", "pixel_unshuffle")
sizes = st.integers(1, 700)


def make(connector: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_connector(tiny_config(connector, **options)).eval()


def features_of(grids: list[tuple[int, int]], seed: int = 0, padding: float = 0.0):
    """Random features of views with these patch grids: features, validity, grids."""
    target_sizes = torch.tensor(grids)
    num_patches = int(target_sizes.prod(1).max())
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(grids), num_patches, 32, generator=generator)
    _, valid = patch_coordinates(target_sizes, num_patches)
    features[~valid] *= padding
    return features, valid, target_sizes


def attention_of(module: torch.nn.Module, grid: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Weights `[Q, T]` that the queries of one view lay on its patches, mean over heads.

    The value projection is made to copy a one-hot code of the patch, so that what comes out are the weights.
    """
    height, width = grid
    num_patches = height * width
    features, valid, target_sizes = features_of([grid], seed)
    caught = {}

    def catch(attention, inputs):
        content, places, features, patch_places, valid = inputs
        caught.update(content=content, places=places, patch_places=patch_places)

    hook = module.attention.register_forward_pre_hook(catch)
    module(features, valid, target_sizes)
    hook.remove()
    attention = module.attention
    weights = []
    values = attention.value.forward
    for patch in range(num_patches):
        one_hot = torch.zeros(1, num_patches, attention.num_heads * attention.head_dim)
        one_hot[0, patch] = 1.0
        attention.value.forward = lambda _, one_hot=one_hot: one_hot
        mixed = {}
        out = attention.output.register_forward_pre_hook(lambda _, inputs, m=mixed: m.update(mixed=inputs[0]))
        attention(caught["content"], caught["places"], features, caught["patch_places"], valid)
        out.remove()
        weights.append(mixed["mixed"][0].unflatten(-1, (attention.num_heads, -1))[..., 0].mean(-1))
    attention.value.forward = values
    return torch.stack(weights, dim=-1).detach()


class TestCounts:
    @all_connectors
    @settings(max_examples=25)
    @given(images=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3))
    def test_tokens_made_are_tokens_planned(self, connector, images):
        plans = [plan_slices(height, width, tiny_slicing(connector)) for height, width in images]
        planned = [view.num_visual_tokens for plan in plans for view in plan.views]
        grids = [view.patch_grid for plan in plans for view in plan.views]
        with torch.no_grad():
            tokens, valid = make(connector)(*features_of(grids))
        assert valid.sum(dim=1).tolist() == planned
        assert tokens.shape == (len(grids), max(planned), 32)
        assert tokens[valid].isfinite().all()

    @pytest.mark.parametrize("num_queries", [1, 3, 7, 12, 16])
    def test_resampler_gives_tokens_per_view(self, num_queries):
        module = make("resampler", slicing=tiny_slicing("resampler", tokens_per_view=num_queries).to_dict())
        tokens, valid = module(*features_of([(2, 2), (4, 6), (8, 2)]))
        assert tokens.shape == (3, num_queries, 32) and valid.all()

    @pytest.mark.parametrize(
        ("num_queries", "grid"),
        [(64, (8, 8)), (12, (3, 4)), (7, (1, 7)), (1, (1, 1)), (2, (1, 2)), (96, (8, 12))],
    )
    def test_query_grid(self, num_queries, grid):
        assert query_grid(num_queries) == grid

    def test_block_places_table(self):
        places, valid = block_places(torch.tensor([[4, 6], [2, 2]]), 2)
        assert places[0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
        assert valid.int().tolist() == [[1] * 6, [1] + [0] * 5]

    @all_connectors
    def test_scale_of_tokens(self, connector):
        """Each token enters the language model at the root mean square that the config asks for."""
        tokens, valid = make(connector, connector_scale=0.2)(*features_of([(4, 4), (2, 6)]))
        rms = tokens[valid].pow(2).mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, 0.2), atol=1e-3, rtol=0)


class TestIndependence:
    @all_connectors
    def test_padding_is_never_read(self, connector):
        module, grids = make(connector), [(2, 4), (4, 4), (6, 2)]
        with torch.no_grad():
            expected, valid = module(*features_of(grids))
            got, _ = module(*features_of(grids, padding=1e4))
        assert torch.equal(got[valid], expected[valid])

    @all_connectors
    def test_batch_is_each_view_alone(self, connector):
        module, grids = make(connector), [(2, 4), (4, 4), (6, 2)]
        features, _, target_sizes = features_of(grids)
        with torch.no_grad():
            batched, valid = module(*features_of(grids))
            for view, (height, width) in enumerate(grids):
                n = height * width
                alone, _ = module(
                    features[view : view + 1, :n],
                    torch.ones(1, n, dtype=torch.bool),
                    target_sizes[view : view + 1],
                )
                torch.testing.assert_close(batched[view][valid[view]], alone[0], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("merge_size", [1, 2, 3])
    def test_pixel_unshuffle_sees_its_block_only(self, merge_size):
        module = make(
            "pixel_unshuffle",
            slicing={"scale_resolution": 192, "merge_size": merge_size, "overview_resolution": 96},
        )
        grid = (6, 12)
        features, valid, target_sizes = features_of([grid])
        with torch.no_grad():
            before, _ = module(features, valid, target_sizes)
            for row, col in [(0, 0), (1, 2), (5, 11), (3, 7)]:
                changed = features.clone()
                changed[0, row * grid[1] + col] += torch.randn(32)
                after, _ = module(changed, valid, target_sizes)
                moved = (after - before)[0].abs().amax(-1).nonzero().flatten().tolist()
                assert moved == [row // merge_size * (grid[1] // merge_size) + col // merge_size]

    def test_order_inside_a_block_matters(self):
        module = make("pixel_unshuffle")
        features, valid, target_sizes = features_of([(2, 2)])
        swapped = features[:, [1, 0, 2, 3]]
        assert (
            module(features, valid, target_sizes)[0] - module(swapped, valid, target_sizes)[0]
        ).abs().max() > 0.1


class TestAnchors:
    """At initialisation a query looks where it stands, before anything is learned."""

    @pytest.mark.parametrize("grid", [(4, 4), (8, 6), (14, 14), (2, 30)])
    def test_spatial_resampler_attends_to_its_block(self, grid):
        """Of 196 patches, the 4 of its block get 91 % of the attention (2 % would be even), one more ring 99.9 %."""
        module = make("spatial_resampler", connector_heads=8, connector_head_dim=64)
        assert isinstance(module, SpatialResampler)
        weights = attention_of(module, grid)
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)), atol=1e-5, rtol=0)
        patches, _ = patch_coordinates(torch.tensor([grid]), grid[0] * grid[1])
        blocks, _ = block_places(torch.tensor([grid]), 2)
        own = (patches[0][None] // 2 == blocks[0][:, None]).all(-1)
        near = (patches[0][None] + 0.5 - (blocks[0][:, None] * 2 + 1)).abs().amax(-1) <= 1.5
        assert own.sum(-1).tolist() == [4] * len(weights)
        assert (weights * own).sum(-1).min() > 0.9
        assert (weights * near).sum(-1).min() > 0.99

    def test_each_head_looks_at_its_own_patch(self):
        module = make("spatial_resampler", connector_heads=4, connector_head_dim=64)
        assert module.attention.offsets.tolist() == [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]

    def test_window_moves_with_the_query(self):
        """The weights of a query far from the edges are those of its right and lower neighbour, one block on."""
        module = make("spatial_resampler", connector_heads=8, connector_head_dim=64)
        grid = (14, 14)
        weights = attention_of(module, grid).view(7, 7, 14, 14)
        here, right, below = weights[3, 3], weights[3, 4], weights[4, 3]
        inner = slice(4, 10)
        for moved, shift in ((right, (0, 2)), (below, (2, 0))):
            shifted = moved.roll((-shift[0], -shift[1]), dims=(0, 1))
            assert (shifted[inner, inner] - here[inner, inner]).abs().max() < 1e-4
            assert here[inner, inner].max() > 0.1

    def test_tokens_move_with_the_picture(self):
        """A pattern moved by one block gives the same token one block on; nothing but places says where it is."""
        module = make("spatial_resampler", connector_heads=8, connector_head_dim=64)
        pattern = torch.randn(4, 4, 32, generator=torch.Generator().manual_seed(0))
        tokens = []
        for left in (4, 6):
            canvas = torch.zeros(12, 14, 32)
            canvas[4:8, left : left + 4] = pattern
            valid = torch.ones(1, 168, dtype=torch.bool)
            with torch.no_grad():
                out, _ = module(canvas.view(1, 168, 32), valid, torch.tensor([[12, 14]]))
            tokens.append(out.view(6, 7, 32))
        here, there = tokens[0][2:4, 2:4], tokens[1][2:4, 3:5]
        assert torch.cosine_similarity(here, there, dim=-1).min() > 0.99
        assert torch.cosine_similarity(here, tokens[1][2:4, 2:4], dim=-1).min() < 0.9

    def test_resampler_queries_are_spread_over_the_view(self):
        """Nine queries over 12 x 12 patches: each lays most on its own ninth, and the ninths are all different."""
        module = make(
            "resampler",
            connector_heads=8,
            connector_head_dim=64,
            slicing=tiny_slicing("resampler", tokens_per_view=9).to_dict(),
        )
        assert isinstance(module, Resampler)
        weights = attention_of(module, (12, 12)).view(9, 3, 4, 3, 4).sum((2, 4)).flatten(1)
        assert weights.argmax(-1).tolist() == list(range(9))
        assert weights.diagonal().min() > 0.9

    @all_connectors
    def test_content_reaches_the_token(self, connector):
        """Two views of other content, one place: tokens differ; the reverse would be a connector that sees nothing."""
        module = make(connector)
        with torch.no_grad():
            one, _ = module(*features_of([(4, 4)], seed=0))
            two, _ = module(*features_of([(4, 4)], seed=1))
        assert torch.cosine_similarity(one, two, dim=-1).max() < 0.9
