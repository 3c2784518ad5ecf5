import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed
from timm.models.naflexvit import checkpoint_filter_fn

from vlmslice.conv_stem import ConvStem
from vlmslice.sheets import lay_out_sheets
from vlmslice.slicing import SlicingConfig, plan_slices
from vlmslice.view_packing import split_into_patches
from vlmslice.vision_encoder import (
    VlmSliceVisionConfig,
    VlmSliceVisionEncoder,
    patch_coordinates,
)

TINY = {"depth": 2, "num_heads": 2, "global_pool": "", "pos_embed_grid_size": (4, 4)}
CUT = {"depth": 2, "embed_dim": 32, "num_heads": 2}  # for architectures with a name

# One of each kind: class token, DINOv2 without and with registers, SigLIP (pooling head, no class token), rotary
# positions, no final norm and SwiGLU, NaFlex by birth.
ARCHITECTURES = {
    "vit_tiny_patch16_224": (16, 1),
    "vit_small_patch14_dinov2": (14, 1),
    "vit_small_patch14_reg4_dinov2": (14, 5),
    "vit_base_patch16_siglip_224": (16, 0),
    "vit_small_patch16_dinov3": (16, 5),
    "eva02_tiny_patch14_224": (14, 1),
    "naflexvit_base_patch16_gap": (16, 4),
}
all_stems = pytest.mark.parametrize("stem", ["timm", "conv"])
all_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def tiny_encoder(seed: int = 0, **options) -> VlmSliceVisionEncoder:
    torch.manual_seed(seed)
    config = VlmSliceVisionConfig(**{"hidden_size": 32, "timm_kwargs": TINY} | options)
    return VlmSliceVisionEncoder(config).eval()


def named_encoder(architecture: str, **options) -> VlmSliceVisionEncoder:
    return tiny_encoder(
        architecture=architecture,
        patch_size=ARCHITECTURES[architecture][0],
        timm_kwargs=CUT,
        **options,
    )


def views(encoder: VlmSliceVisionEncoder, grids: list[tuple[int, int]], seed: int = 0, padding: float = 0.0):
    """Random patches of each grid, padded to the longest."""
    target_sizes = torch.tensor(grids)
    longest = int(target_sizes.prod(1).max())
    generator = torch.Generator().manual_seed(seed)
    pixel_values = torch.randn(len(grids), longest, encoder.config.patch_dim, generator=generator)
    for row, (height, width) in zip(pixel_values, grids, strict=True):
        row[height * width :] = padding
    return pixel_values, target_sizes


def largest_difference_alone(encoder: VlmSliceVisionEncoder, grids: list[tuple[int, int]]) -> float:
    """Largest difference between the features of a view in a padded batch and alone."""
    pixel_values, target_sizes = views(encoder, grids)
    with torch.no_grad():
        batched, valid = encoder(pixel_values, target_sizes)
        differences = []
        for view, (height, width) in enumerate(grids):
            n = height * width
            alone, valid_alone = encoder(pixel_values[view : view + 1, :n], target_sizes[view : view + 1])
            assert valid[view].tolist() == [True] * n + [False] * (batched.shape[1] - n)
            assert valid_alone.all()
            differences.append((batched[view, :n] - alone[0]).abs().max().item())
    return max(differences)


class TestPatchCoordinates:
    def test_table(self):
        coordinates, valid = patch_coordinates(torch.tensor([[2, 3], [1, 1], [4, 2]]), 8)
        assert coordinates[0].T.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 1, 2, 0, 1, 2, 0, 0]]
        assert coordinates[1].any() == False  # noqa: E712 - a tensor
        assert coordinates[2].T.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 0, 1, 0, 1, 0, 1]]
        assert valid.int().tolist() == [[1] * 6 + [0] * 2, [1] + [0] * 7, [1] * 8]
        assert coordinates.dtype == torch.int64 and valid.dtype == torch.bool

    @given(
        st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 20)
    )
    def test_every_place_once(self, grids, extra):
        sizes = torch.tensor(grids)
        coordinates, valid = patch_coordinates(sizes, int(sizes.prod(1).max()) + extra)
        for places, real, (height, width) in zip(coordinates, valid, grids, strict=True):
            expected = [[row, col] for row in range(height) for col in range(width)]
            assert places[real].tolist() == expected
            assert not places[~real].any()


class TestBatching:
    @all_stems
    def test_padded_batch_is_each_view_alone(self, stem):
        """Largest difference seen 1e-6, of features of standard deviation 1."""
        encoder = tiny_encoder(stem=stem)
        assert largest_difference_alone(encoder, [(2, 2), (4, 4), (2, 6), (7, 1), (4, 4)]) < 1e-5

    @all_architectures
    def test_padded_batch_is_each_view_alone_in_any_vit(self, architecture):
        assert largest_difference_alone(named_encoder(architecture), [(2, 4), (5, 3), (1, 6)]) < 1e-5

    @settings(max_examples=15)
    @given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=4))
    def test_padded_batch_of_any_grids(self, grids):
        assert largest_difference_alone(tiny_encoder(), grids) < 1e-5

    @all_architectures
    def test_padding_is_never_read(self, architecture):
        """Whatever padding holds: features of real patches are bitwise the same."""
        encoder = named_encoder(architecture)
        zeros, target_sizes = views(encoder, [(2, 4), (5, 3)])
        garbage, _ = views(encoder, [(2, 4), (5, 3)], padding=1e4)
        assert not torch.equal(zeros, garbage)
        with torch.no_grad():
            expected, valid = encoder(zeros, target_sizes)
            got, _ = encoder(garbage, target_sizes)
        assert torch.equal(got[valid], expected[valid])
        assert got.isfinite().all()

    @all_stems
    def test_padding_is_never_read_by_a_stem(self, stem):
        """Its windows end at the edges of the view, beyond which the padding lies."""
        encoder, grids = tiny_encoder(stem=stem), [(2, 4), (5, 3), (4, 4)]
        zeros, target_sizes = views(encoder, grids)
        garbage, _ = views(encoder, grids, padding=1e4)
        with torch.no_grad():
            expected, valid = encoder(zeros, target_sizes)
            assert torch.equal(encoder(garbage, target_sizes)[0][valid], expected[valid])

    @all_stems
    def test_views_do_not_see_each_other(self, stem):
        encoder = tiny_encoder(stem=stem)
        pixel_values, target_sizes = views(encoder, [(2, 4), (4, 4)])
        with torch.no_grad():
            before, _ = encoder(pixel_values, target_sizes)
            pixel_values[1] += 1.0
            after, _ = encoder(pixel_values, target_sizes)
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])

    def test_patches_of_a_view_see_each_other(self):
        encoder = tiny_encoder()
        pixel_values, target_sizes = views(encoder, [(4, 4)])
        with torch.no_grad():
            before, _ = encoder(pixel_values, target_sizes)
            pixel_values[0, 0] += 1.0
            after, _ = encoder(pixel_values, target_sizes)
        assert ((before - after).abs().amax(-1) > 1e-4).all()

    def test_shape_of_the_grid_matters(self):
        """The same patches as 2 x 8, 8 x 2 and 4 x 4 are three pictures."""
        encoder = tiny_encoder()
        pixel_values, _ = views(encoder, [(4, 4)])
        with torch.no_grad():
            outputs = [encoder(pixel_values, torch.tensor([grid]))[0] for grid in ((2, 8), (8, 2), (4, 4))]
        for i in range(3):
            assert (outputs[i] - outputs[i - 1]).abs().max() > 0.1

    def test_kernels_agree(self, monkeypatch):
        encoder = tiny_encoder()
        inputs = views(encoder, [(2, 4), (4, 4)])
        chosen = []

        def fused(self, device):
            for block in self.vit.blocks:
                chosen.append(block.attn.fused_attn)
                block.attn.fused_attn = True

        with torch.no_grad():
            plain, valid = encoder(*inputs)
            monkeypatch.setattr(VlmSliceVisionEncoder, "_choose_attention_kernel", fused)
            torch.testing.assert_close(encoder(*inputs)[0][valid], plain[valid], atol=1e-5, rtol=0)
        assert chosen == [False, False]  # the choice for the CPU


class TestPositions:
    @pytest.mark.parametrize("grid", [(3, 7), (8, 8), (2, 2), (1, 9), (4, 4)])
    def test_interpolation_is_that_of_timm(self, grid):
        """Against the function by which timm's classic ViT loads a checkpoint for another image size."""
        encoder = tiny_encoder()
        embeds = encoder.vit.embeds
        with torch.no_grad():
            embeds.pos_embed.normal_()
            embeds.proj.weight.zero_()
        height, width = grid
        coordinates, _ = patch_coordinates(torch.tensor([grid]), height * width)
        table = embeds.pos_embed.flatten(1, 2)
        expected = resample_abs_pos_embed(table, [height, width], [4, 4], num_prefix_tokens=0)
        got, _ = embeds(torch.zeros(1, height * width, encoder.config.patch_dim), patch_coord=coordinates)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)

    def test_each_view_has_its_own_interpolation(self):
        encoder = tiny_encoder()
        embeds = encoder.vit.embeds
        with torch.no_grad():
            embeds.pos_embed.normal_()
        grids = [(3, 7), (2, 2), (3, 7)]
        pixel_values, target_sizes = views(encoder, grids)
        coordinates, _ = patch_coordinates(target_sizes, 21)
        with torch.no_grad():
            batched, _ = embeds(pixel_values, patch_coord=coordinates)
            for view, (height, width) in enumerate(grids):
                n = height * width
                alone, _ = embeds(
                    pixel_values[view : view + 1, :n], patch_coord=coordinates[view : view + 1, :n]
                )
                torch.testing.assert_close(batched[view, :n], alone[0], atol=1e-6, rtol=0)

    def test_interpolation_in_bfloat16_is_done_in_float32(self):
        encoder = tiny_encoder().to(torch.bfloat16)
        embeds = encoder.vit.embeds
        with torch.no_grad():
            embeds.proj.weight.zero_()
        coordinates, _ = patch_coordinates(torch.tensor([[6, 6]]), 36)
        exact = resample_abs_pos_embed(
            embeds.pos_embed.float().flatten(1, 2), [6, 6], [4, 4], num_prefix_tokens=0
        )
        got, _ = embeds(torch.zeros(1, 36, 768, dtype=torch.bfloat16), patch_coord=coordinates)
        assert torch.equal(got, exact.to(torch.bfloat16))

    @pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
    def test_native_grid_is_the_classic_vit(self, architecture):
        """Weights of timm's classic form, loaded into ours, give its patch features."""
        patch, num_prefix = ARCHITECTURES[architecture]
        side = 4 * patch
        torch.manual_seed(0)
        classic = timm.create_model(architecture, img_size=side, num_classes=0, **CUT).eval()
        encoder = tiny_encoder(
            architecture=architecture, patch_size=patch, timm_kwargs=CUT | {"img_size": side}
        )
        # timm's conversion adds the class token's position to the token it was given, in place.
        state = {name: weight.clone() for name, weight in classic.state_dict().items()}
        encoder.vit.load_state_dict(checkpoint_filter_fn(state, encoder.vit))
        image = torch.randn(1, 3, side, side)
        patches = image.unfold(2, patch, patch).unfold(3, patch, patch)  # [1, 3, 4, 4, ph, pw]
        packed = patches.permute(0, 2, 3, 4, 5, 1).reshape(1, 16, -1)
        with torch.no_grad():
            expected = classic.forward_features(image)[:, num_prefix:]
            got, _ = encoder(packed, torch.tensor([[4, 4]]))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


class TestArchitectures:
    @all_architectures
    def test_builds_and_runs(self, architecture):
        encoder = named_encoder(architecture)
        assert encoder.vit.num_prefix_tokens == ARCHITECTURES[architecture][1]
        assert encoder.vit.attn_pool is None
        pixel_values, target_sizes = views(encoder, [(2, 4), (6, 4)])
        features, valid = encoder(pixel_values, target_sizes)
        assert features.shape == (2, 24, 32) and valid.shape == (2, 24)
        assert features[valid].std(dim=0).min() > 0.01

    @all_architectures
    def test_prefix_tokens_are_no_patches(self, architecture):
        """Feature t belongs to patch t: it changes most when that patch does, with any number of prefix tokens."""
        encoder = named_encoder(architecture)
        pixel_values, target_sizes = views(encoder, [(3, 4)])
        with torch.no_grad():
            before, _ = encoder(pixel_values, target_sizes)
            for patch in (0, 5, 11):
                changed = pixel_values.clone()
                changed[0, patch] = -changed[0, patch]
                after, _ = encoder(changed, target_sizes)
                assert int((after - before)[0].norm(dim=-1).argmax()) == patch

    def test_feature_layer(self):
        full, cut = tiny_encoder(), tiny_encoder(feature_layer=1)
        assert len(cut.vit.blocks) == 1
        cut.vit.load_state_dict(full.vit.state_dict(), strict=False)
        pixel_values, target_sizes = views(full, [(2, 4), (4, 4)])
        with torch.no_grad():
            got, valid = cut(pixel_values, target_sizes)
            full.vit.blocks[1] = BlockOut()
            expected, _ = full(pixel_values, target_sizes)
        assert torch.equal(got[valid], expected[valid])

    def test_conv_stem_is_torch_convolutions_on_the_image(self):
        """The patches put together again, through `nn.Conv2d` layers with the same weights."""
        torch.manual_seed(0)
        stem, grid = ConvStem(16, 32), (3, 2)
        image = torch.randn(1, 3, 48, 32)

        def conv(layer, x):
            k = layer.kernel_size
            other = torch.nn.Conv2d(x.shape[1], len(layer.weight), k, layer.stride, k // 2 if k == 3 else 0)
            other.weight.data = layer.weight.data.view(-1, k, k, x.shape[1]).permute(0, 3, 1, 2)
            other.bias.data = layer.bias.data
            return other(x)

        def residual(block, x):
            y = block.norm(x.movedim(1, -1)).movedim(-1, 1)
            return x + conv(block.outer, F.gelu(conv(block.inner, y)))

        first = torch.nn.Conv2d(3, 12, 4, 4)
        first.weight.data = stem.pixels.weight.data.view(12, 4, 4, 3).permute(0, 3, 1, 2)
        first.bias.data = stem.pixels.bias.data
        with torch.no_grad():
            x = residual(stem.fine[0], F.gelu(first(image)))
            x = residual(stem.middle[0], F.gelu(conv(stem.to_middle, x)))
            x = residual(stem.patches[0], F.gelu(conv(stem.to_patches, x)))
            patches = split_into_patches(image[0].movedim(0, -1), 16)[None]
            got = stem(patches, lay_out_sheets(torch.tensor([grid]), 6))
        torch.testing.assert_close(got[0], x[0].flatten(1).T, atol=1e-5, rtol=1e-5)

    def test_conv_stem_does_not_see_the_seams(self):
        """An image cut 2 x 2 embeds as the image in one piece; its overview, and another image, stay by themselves."""
        torch.manual_seed(0)
        stem, image = ConvStem(16, 32), torch.randn(64, 96, 3)
        pieces = [image[top : top + 32, left : left + 48] for top in (0, 32) for left in (0, 48)]
        overview, other = torch.randn(32, 32, 3), torch.randn(32, 48, 3)
        views = [split_into_patches(view, 16) for view in (overview, *pieces, other)]
        sizes = torch.tensor([[2, 2], *[[2, 3]] * 5])
        boxes = torch.tensor(
            [(0, 0, 4, 6), (0, 0, 2, 3), (0, 3, 2, 6), (2, 0, 4, 3), (2, 3, 4, 6), (0, 0, 2, 3)]
        )
        boxes[:5] += 7  # a canvas may be moved
        sheets = lay_out_sheets(sizes, 6, boxes, torch.tensor([5, 1]))
        assert [tuple(sheet.patches.shape) for sheet in sheets] == [(2, 2), (4, 6), (2, 3)]
        with torch.no_grad():
            got = stem(torch.nn.utils.rnn.pad_sequence(views, batch_first=True), sheets)
            whole = stem(split_into_patches(image, 16)[None], lay_out_sheets(torch.tensor([[4, 6]]), 24))
            alone = [
                stem(x[None], lay_out_sheets(g[None], len(x)))[0] for x, g in zip(views, sizes, strict=True)
            ]
        stitched = got[1:5].view(2, 2, 2, 3, -1).transpose(1, 2).reshape(1, 24, -1)
        torch.testing.assert_close(stitched, whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[0, :4], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[5], alone[5], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(got[1], alone[1], atol=1e-2)

    @settings(max_examples=50)
    @given(height=st.integers(1, 3000), width=st.integers(1, 3000))
    def test_sheets_hold_every_patch_once(self, height, width):
        plan = plan_slices(height, width, SlicingConfig())
        sizes, boxes = (
            torch.tensor([v.patch_grid for v in plan.views] * 2),
            torch.tensor(plan.canvas_boxes * 2),
        )
        longest = int(sizes.prod(dim=1).max()) + 3
        sheets = lay_out_sheets(sizes, longest, boxes, torch.tensor([len(plan.views)] * 2))
        expected = [
            view * longest + patch
            for view, grid in enumerate(sizes.prod(dim=1).tolist())
            for patch in range(grid)
        ]
        assert sorted(torch.cat([sheet.patches.flatten() for sheet in sheets]).tolist()) == expected
        assert len(sheets) == (2 if plan.grid == (1, 1) else 4)

    def test_small_runs_start_at_scale(self):
        """Positions that patch content does not drown, and blocks that do something from the first step."""
        encoder = tiny_encoder(hidden_size=64)
        pixel_values, target_sizes = views(encoder, [(4, 4)])
        coordinates, _ = patch_coordinates(target_sizes, 16)
        embeds = encoder.vit.embeds
        content = embeds.proj(pixel_values).std()
        assert 0.5 < content < 2
        assert 0.15 < embeds.pos_embed.pow(2).mean().sqrt() / content < 2
        out, _ = embeds(pixel_values, patch_coord=coordinates)
        assert encoder.vit.blocks(out).std() / out.std() > 1.1


class BlockOut(torch.nn.Module):
    """A block that passes its input on."""

    def forward(self, x, **kwargs):
        return x


class TestErrors:
    def build(self, **options):
        return VlmSliceVisionEncoder(
            VlmSliceVisionConfig(**{"hidden_size": 32, "timm_kwargs": TINY} | options)
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"architecture": "vit_tiny_patch16_22", "timm_kwargs": None},
                "^vision architecture 'vit_tiny_patch16_22' is no timm ViT that has a NaFlex form, expected a model of "
                "timm's vision_transformer, eva, naflexvit; did you mean 'vit_tiny_patch16_224'[?]$",
            ),
            (
                {"architecture": "resnet50", "timm_kwargs": None},
                "^vision architecture 'resnet50' is no timm ViT that has a NaFlex form",
            ),
            (
                {"architecture": "vit_tiny_patch16_224", "timm_kwargs": CUT, "hidden_size": 48},
                r"^vision architecture 'vit_tiny_patch16_224' has width and patch size \(32, 16\), the config says "
                r"\(48, 16\); correct hidden_size and patch_size$",
            ),
            (
                {"architecture": "vit_small_patch14_dinov2", "timm_kwargs": CUT},
                r"has width and patch size \(32, 14\), the config says \(32, 16\)",
            ),
            ({"feature_layer": 3}, "^feature_layer is 3, expected 1 to 2$"),
            ({"feature_layer": 0}, "^feature_layer is 0, expected 1 to 2$"),
            (
                {"timm_kwargs": TINY | {"num_head": 2}},
                "^timm_kwargs has 'num_head', expected fields of timm's NaFlexVitCfg; did you mean 'num_heads'[?]$",
            ),
            ({"stem": "cnov"}, "^vision stem is 'cnov', expected one of timm, conv; did you mean 'conv'"),
            (
                {"stem": "conv", "patch_size": 14},
                "^stem 'conv' with patch_size 14, expected 16; use stem 'timm'",
            ),
        ],
    )
    def test_config(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.build(**options)

    def test_grid_larger_than_the_patches(self):
        encoder = tiny_encoder()
        with pytest.raises(
            ValueError,
            match="^a view has 20 patches but pixel_values holds 16 per view; build both with one VlmSliceImageProc",
        ):
            encoder(torch.zeros(2, 16, 768), torch.tensor([[2, 2], [4, 5]]))

    def test_patches_of_another_size(self):
        encoder = tiny_encoder()
        with pytest.raises(
            ValueError,
            match="^pixel_values holds 588 values per patch, expected 768 for RGB patches of 16 px; give the image",
        ):
            encoder(torch.zeros(1, 16, 588), torch.tensor([[4, 4]]))
