"""Vision encoder: any timm ViT over variable patch grids, all views of a batch in one forward pass.

Legend: V views, T patches per view (padded), C values per patch, D width.

The ViT is built by timm in its NaFlex form (Dehghani et al., 2023, "Patch n' Pack: NaViT"): patches come in already
cut and flattened, each view brings its own patch grid, and the learned position embeddings are interpolated in 2D
(in fp32) to that grid. One padded batch replaces the slice-by-slice loop.
"""

import dataclasses
from typing import Any

import timm
import torch
from huggingface_hub.dataclasses import strict
from timm.models import is_model_in_modules
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import nn
from transformers import PreTrainedConfig

from vlmslice.canvas_mixer import CanvasMixer
from vlmslice.conv_stem import ConvStem
from vlmslice.errors import suggestion
from vlmslice.position_embedding import sincos_2d
from vlmslice.sheets import lay_out_sheets

_GENERIC = "naflexvit"

# The timm modules whose models have a NaFlex form: the first two take `use_naflex`, the last is NaFlex itself.
_CONVERTIBLE_MODULES = ("vision_transformer", "eva")
_NAFLEX_MODULE = "naflexvit"


@strict
class VlmSliceVisionConfig(PreTrainedConfig):
    """A ViT named by timm, or a plain one described by its sizes.

    `architecture` is a timm name such as `"vit_small_patch14_dinov2"` or `"naflexvit_base_patch16_gap"`, or
    `"naflexvit"` for a plain NaFlex ViT whose `NaFlexVitCfg` fields are given in `timm_kwargs`.

    `feature_layer` is the number of transformer blocks kept; blocks after it are not built. A DINOv2 whose last block
    was altered by fine-tuning is used with `feature_layer=11`. None keeps all.

    `stem` is `"timm"` for the architecture's own linear patch embedding, or `"conv"` for `ConvStem`.

    `canvas_dilations` puts a `CanvasMixer` after the blocks, one layer for each dilation. None has no such mixer.

    `join_slices=False` lets stem and mixer see each slice by itself, too, as all published encoders do.
    """

    model_type = "vlmslice_vision"
    base_config_key = "vision_config"

    architecture: str = _GENERIC
    timm_kwargs: dict[str, Any] | None = None
    hidden_size: int = 192
    patch_size: int = 16
    feature_layer: int | None = None
    stem: str = "timm"
    canvas_dilations: list[int] | None = None
    join_slices: bool = True

    @property
    def patch_dim(self) -> int:
        """Values in one flattened RGB patch."""
        return 3 * self.patch_size * self.patch_size


def build_timm_vit(config: VlmSliceVisionConfig) -> NaFlexVit:
    """Builds the timm module (random weights) that `config` describes.

    Raises:
        ValueError: timm has no such ViT in NaFlex form, its width or patch size differ from the config, or a field
            of the config has no meaning.
    """
    vit = (
        _build_plain_vit(config)
        if config.architecture == _GENERIC
        else build_named_vit(config.architecture, config.timm_kwargs)
    )
    got = (vit.embed_dim, vit.embeds.patch_size[0])
    if got != (config.hidden_size, config.patch_size):
        raise ValueError(
            f"vision architecture {config.architecture!r} has width and patch size {got}, the config says "
            f"{(config.hidden_size, config.patch_size)}; correct hidden_size and patch_size"
        )
    if config.feature_layer is not None:
        if not 1 <= config.feature_layer <= len(vit.blocks):
            raise ValueError(f"feature_layer is {config.feature_layer}, expected 1 to {len(vit.blocks)}")
        vit.blocks = vit.blocks[: config.feature_layer]
    vit.attn_pool = None
    if config.stem != "timm":
        vit.embeds.proj = nn.Identity()  # the stem comes before it
    return vit


def _build_plain_vit(config: VlmSliceVisionConfig) -> NaFlexVit:
    kwargs = config.timm_kwargs or {}
    names = [field.name for field in dataclasses.fields(NaFlexVitCfg)]
    for name in kwargs:
        if name not in names:
            raise ValueError(
                f"timm_kwargs has {name!r}, expected fields of timm's NaFlexVitCfg{suggestion(name, names)}"
            )
    cfg = NaFlexVitCfg(patch_size=config.patch_size, embed_dim=config.hidden_size, **kwargs)
    return NaFlexVit(cfg, num_classes=0)


def build_named_vit(name: str, timm_kwargs: dict[str, Any] | None = None) -> NaFlexVit:
    """Builds a ViT of timm in its NaFlex form, with random weights and without a head.

    Raises:
        ValueError: timm has no such model, or it has no NaFlex form.
    """
    kwargs = dict(timm_kwargs or {})
    if is_model_in_modules(name, _CONVERTIBLE_MODULES):
        kwargs["use_naflex"] = True
    elif not is_model_in_modules(name, [_NAFLEX_MODULE]):
        modules = (*_CONVERTIBLE_MODULES, _NAFLEX_MODULE)
        names = [known for module in modules for known in timm.list_models(module=module)]
        raise ValueError(
            f"vision architecture {name!r} is no timm ViT that has a NaFlex form, expected a model of timm's "
            f"{', '.join(modules)}{suggestion(name, [_GENERIC, *names])}"
        )
    return timm.create_model(name, pretrained=False, num_classes=0, **kwargs)


def _build_stem(config: VlmSliceVisionConfig) -> ConvStem | None:
    if config.stem == "timm":
        return None
    if config.stem != "conv":
        raise ValueError(
            f"vision stem is {config.stem!r}, expected one of timm, conv{suggestion(config.stem, ['timm', 'conv'])}"
        )
    return ConvStem(config.patch_size, config.hidden_size)


@torch.no_grad()
def _initialise_for_small_runs(vit: NaFlexVit, stem: ConvStem | None) -> None:
    """Weights whose outputs keep the scale of their inputs, and sine-cosine positions about as large as the content.

    timm's defaults (0.02 everywhere, shrunk further by depth) suit long runs of wide models. At width 256 they make
    every block nearly the identity and leave positions at a tenth of the patch content.
    """
    for module in [*vit.modules(), *(stem.modules() if stem else [])]:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in vit.blocks:
        for linear in (block.attn.proj, block.mlp.fc2):
            linear.weight.mul_((2 * len(vit.blocks)) ** -0.5)
    if stem is not None:
        for linear in stem.residual_outputs():
            linear.weight.mul_((2 * len(stem.residual_outputs())) ** -0.5)
    table = vit.embeds.pos_embed
    if table is not None:
        rows, cols = table.shape[1:3]
        places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), dim=-1)
        # 0.2 is the root mean square that patch content has within a picture; larger positions hide it.
        table.copy_(0.3 * sincos_2d(places, table.shape[-1], longest=60.0)[None])


def patch_coordinates(target_sizes: torch.Tensor, num_patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each patch, and which patches are real.

    Args:
        target_sizes: `int64[V, 2]` patch grid (height, width) of each view.
        num_patches: T, the padded length.

    Returns:
        `int64[V, T, 2]` (row, column), zero at padding, and `bool[V, T]`, True for real patches.

    Example: a 2x3 grid padded to 8 gives rows `0 0 0 1 1 1 . .` and columns `0 1 2 0 1 2 . .`
    """
    index_1T = torch.arange(num_patches, device=target_sizes.device)[None]
    width_V1 = target_sizes[:, 1:2]
    valid_VT = index_1T < target_sizes.prod(dim=1, keepdim=True)
    coordinates_VT2 = torch.stack([index_1T // width_V1, index_1T % width_V1], dim=-1)
    return coordinates_VT2 * valid_VT[..., None], valid_VT


class VlmSliceVisionEncoder(nn.Module):
    """Runs the ViT on packed views.

    `gradient_checkpointing` is the flag that `gradient_checkpointing_enable` of a transformers model sets.
    """

    gradient_checkpointing = False

    def __init__(self, config: VlmSliceVisionConfig):
        super().__init__()
        self.config = config
        self.vit = build_timm_vit(config)
        self.stem = _build_stem(config)
        self.mixer = (
            CanvasMixer(config.hidden_size, config.canvas_dilations) if config.canvas_dilations else None
        )
        if config.architecture == _GENERIC:
            _initialise_for_small_runs(self.vit, self.stem)

    def forward(
        self,
        pixel_values: torch.Tensor,
        target_sizes: torch.Tensor,
        canvas_boxes: torch.Tensor | None = None,
        num_views: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes all views of a batch.

        Args:
            pixel_values: `[V, T, 3 * patch_size**2]`, channels last inside a patch, zero padded.
            target_sizes: `int64[V, 2]` patch grid of each view.
            canvas_boxes, num_views: see `view_packing.PackedViews`. With them, stem `conv` and the mixer see the slices
                of an image side by side; transformer blocks see a view alone in any case.

        Returns:
            Patch features `[V, T, D]` and `bool[V, T]`, True for real patches.

        Raises:
            ValueError: a patch grid does not fit in T, or the patches are of another size.
        """
        num_patches, patch_dim = pixel_values.shape[1:]
        if patch_dim != self.config.patch_dim:
            raise ValueError(
                f"pixel_values holds {patch_dim} values per patch, expected {self.config.patch_dim} for RGB patches of "
                f"{self.config.patch_size} px; give the image processor the model's patch_size"
            )
        longest = int(target_sizes.prod(dim=1).max())
        if longest > num_patches:
            raise ValueError(
                f"a view has {longest} patches but pixel_values holds {num_patches} per view; "
                "build both with one VlmSliceImageProcessor"
            )
        coordinates_VT2, valid_VT = patch_coordinates(target_sizes, num_patches)
        full = bool(valid_VT.all())
        self._choose_attention_kernel(pixel_values.device)
        self.vit.set_grad_checkpointing(self.gradient_checkpointing and self.training)
        pixel_values = pixel_values.to(next(self.vit.blocks.parameters()).dtype)
        sheets = []
        if not self.config.join_slices:
            canvas_boxes = num_views = None
        if self.stem is not None or self.mixer is not None:
            sheets = lay_out_sheets(target_sizes, num_patches, canvas_boxes, num_views)
        if self.stem is not None:
            pixel_values = self.stem(pixel_values, sheets)
        # A batch without padding needs no mask, which saves the mask addition in every layer.
        output = self.vit.forward_features(
            pixel_values,
            patch_coord=coordinates_VT2,
            patch_valid=None if full else valid_VT,
        )
        features_VTD = output["patches"][:, self.vit.num_prefix_tokens :]
        if self.mixer is not None:
            features_VTD = self.mixer(features_VTD, sheets)
        return features_VTD, valid_VT

    def _choose_attention_kernel(self, device: torch.device) -> None:
        """Plain matrix products on the CPU, the fused kernel elsewhere.

        On two CPU cores a training step of a 3.7M ViT in bf16 runs 8,350 patches/s with plain products and 6,090 with
        the fused kernel, whose backward pass is slow there.
        """
        fused = device.type != "cpu"
        for module in self.vit.blocks.modules():
            if hasattr(module, "fused_attn"):  # timm's attention classes, parallel blocks and others
                module.fused_attn = fused
