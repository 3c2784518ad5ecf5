"""The model: views -> vision encoder -> connector -> placeholders of the prompt -> language model -> answer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from vlmslice.attention_guide import NOTHING, guide_loss
from vlmslice.canvas_mixer import CanvasMixer
from vlmslice.config import VlmSliceConfig
from vlmslice.connectors import (
    BlockProjection,
    CrossAttention,
    PixelUnshuffle,
    Resampler,
    TokenHead,
    block_places,
    build_connector,
    query_grid,
)
from vlmslice.cross_attention import CrossAttentionLayers, GatedCrossAttention, VisualMemory
from vlmslice.dense_reader import DenseHead, dense_loss
from vlmslice.first_fit import FirstFit, first_fit_loss
from vlmslice.loss_weighting import weighted_loss
from vlmslice.packed_rows import find_samples
from vlmslice.pointing import last_points
from vlmslice.position_embedding import sincos_2d
from vlmslice.sheets import find_overviews
from vlmslice.spatial_schema import LOCATION_TOKENS
from vlmslice.vision_encoder import VlmSliceVisionEncoder, patch_coordinates
from vlmslice.visual_expert import VisualExpertLayers


@dataclass
class VlmSliceOutput(CausalLMOutputWithPast):
    """As `CausalLMOutputWithPast`.

    `auxiliary_loss` is the part of `loss` that does not come from the answers; `metrics` holds figures for the
    training log. `visual_memory` is what the connector `cross_attention` made of the images, for the next tokens, and
    `cross_attentions` the weights `[B, H, L, M + 1]` of each layer that looks at it, if `output_attentions` is set.
    """

    auxiliary_loss: torch.Tensor | None = None
    metrics: dict | None = None
    visual_memory: VisualMemory | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """Visual tokens `[tokens, E]` of each image in `pooler_output`, and where they lie.

    `places`: for each image `[tokens, 2]`, row and column of the middle of a token on the canvas, in patches.
    `can_point`: for each image `bool[tokens]`, False for tokens of an overview, whose places are coarse.
    """

    places: Sequence[torch.Tensor] | None = None
    can_point: Sequence[torch.Tensor] | None = None


class CanvasPosition(nn.Module):
    """Adds to every visual token where on the image it lies, and whether it comes from the overview.

    The place of a token is measured in blocks of the full-detail canvas (all slices side by side), so the last token
    of a slice's row and the first of its right neighbour's are one unit apart, as two neighbours in a slice are.
    """

    def __init__(self, config: VlmSliceConfig):
        super().__init__()
        self.dim = config.text_config.hidden_size // 4 * 4
        self.projection = nn.Linear(self.dim, config.text_config.hidden_size, bias=False)
        self.overview = nn.Parameter(torch.empty(config.text_config.hidden_size))
        self._scale = config.connector_scale
        self._merge_size = config.slicing["merge_size"]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.copy_(self.projection.weight, self._scale * torch.eye(*self.projection.weight.shape))
        nn.init.normal_(self.overview, std=self._scale)

    def forward(self, places_VQ2: torch.Tensor, is_overview_V: torch.Tensor) -> torch.Tensor:
        """`[V, Q, E]` for tokens whose centres lie at rows and columns of the canvas, in patches."""
        embedding = sincos_2d(places_VQ2 / self._merge_size, self.dim, longest=400.0)
        embedding = embedding.to(self.projection.weight.dtype)
        return self.projection(embedding) + is_overview_V[:, None, None] * self.overview


_OWN_MODULES = (
    BlockProjection,
    CanvasMixer,
    CanvasPosition,
    CrossAttention,
    DenseHead,
    FirstFit,
    GatedCrossAttention,
    PixelUnshuffle,
    Resampler,
    TokenHead,
    VisualExpertLayers,
)


class VlmSlicePreTrainedModel(PreTrainedModel):
    config_class = VlmSliceConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # timm initialises its ViT, transformers the language model; only our own modules are left.
        if isinstance(module, _OWN_MODULES):
            module.reset_parameters()
        elif hasattr(module, "init_non_persistent_buffers"):
            # Rotary tables of timm are not in a checkpoint, so `from_pretrained` has nothing to fill them with.
            module.init_non_persistent_buffers()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside of it, transformers passes over a module whose own parameters are loaded, be those of its
        # children missing or not, lest `_init_weights` overwrite them. Ours goes through init functions that do not.
        super()._initialize_weights(module, is_custom_code=False)


class VlmSliceForConditionalGeneration(VlmSlicePreTrainedModel, GenerationMixin):
    """A high-resolution vision-language model with adaptive slicing.

    The forward pass:

    1. All views of the batch go through the vision encoder at once, each with its own patch grid.
    2. The connector turns the patches of a view into its visual tokens.
    3. A canvas position is added to each token, so that the language model knows where on the image it lies.
    4. Token i replaces the i-th placeholder of the prompt, and the language model runs as on text. With the connector
       `cross_attention`, layers of the language model look at the tokens instead. With a visual expert, layers have
       weights of their own for the tokens.
    """

    def __init__(self, config: VlmSliceConfig):
        super().__init__(config)
        self.vision_encoder = VlmSliceVisionEncoder(config.vision_config)
        self.connector = build_connector(config)
        self.canvas_position = CanvasPosition(config) if config.canvas_position else None
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.cross_attention = None
        if config.connector == "cross_attention":
            self.cross_attention = CrossAttentionLayers(config, self.language_model)
        self.visual_expert = None
        if config.visual_expert_interval:
            self.visual_expert = VisualExpertLayers(config, self.language_model)
        self.dense_head = None
        if config.dense_loss_weight:
            self.dense_head = DenseHead(config.vision_config.hidden_size)
        self.post_init()
        # A placeholder is no answer. Without a cache it would even be taken for one of the prompt at the next step.
        self.generation_config.suppress_tokens = [config.image_token_id]

    def stop_as(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Makes `generate` begin, end and pad with the tokens of `tokenizer`."""
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self.generation_config, name, getattr(tokenizer, name))

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        target_sizes: torch.Tensor,
        canvas_boxes: torch.Tensor,
        num_views: torch.Tensor,
        token_boxes: torch.Tensor | None = None,
    ) -> ImageFeatures:
        """Visual tokens of all views.

        Args:
            pixel_values: `[V, T, patch_dim]` packed patches.
            target_sizes: `int64[V, 2]` patch grids.
            canvas_boxes: `int64[V, 4]` place of each view on the full-detail canvas, in patches.
            num_views: `int64[N]` views of each image.
            token_boxes: `int64[V, 4]` the visual tokens of each view that are kept; None for all. See
                `view_packing.PackedViews`.

        Returns:
            `pooler_output`: one `[tokens, E]` tensor per image, in order. `last_hidden_state`: patch features
            `[V, T, D]`. `places`, `can_point`: as `pooler_output`, see `ImageFeatures`.

        Raises:
            ValueError: the views do not add up to the images'.
        """
        if int(num_views.sum()) != pixel_values.shape[0]:
            raise ValueError(
                f"num_views adds up to {int(num_views.sum())} views but pixel_values holds {pixel_values.shape[0]}; "
                "pass the output of one VlmSliceProcessor call unchanged"
            )
        features_VTD, valid_VT = self.vision_encoder(pixel_values, target_sizes, canvas_boxes, num_views)
        tokens_VQE, valid_VQ = self.connector(features_VTD, valid_VT, target_sizes)
        cells_VQ2, grids_V2 = self._token_cells(target_sizes)
        places_VQ2 = place_on_canvas(cells_VQ2, grids_V2, canvas_boxes)
        if token_boxes is not None:
            valid_VQ = valid_VQ & _lie_in(cells_VQ2, token_boxes)
        is_overview_V = find_overviews(canvas_boxes, num_views)
        if self.canvas_position is not None:
            tokens_VQE = tokens_VQE + self.canvas_position(places_VQ2, is_overview_V)
        tokens_per_image = [int(tokens.sum()) for tokens in valid_VQ.sum(dim=1).split(num_views.tolist())]
        return ImageFeatures(
            last_hidden_state=features_VTD,
            pooler_output=tokens_VQE[valid_VQ].split(tokens_per_image),
            places=places_VQ2[valid_VQ].split(tokens_per_image),
            can_point=(~is_overview_V[:, None].expand_as(valid_VQ))[valid_VQ].split(tokens_per_image),
        )

    def _token_cells(self, target_sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of each visual token in its view's grid of tokens, and the shape of that grid."""
        num_queries = self.config.slicing["tokens_per_view"]
        if num_queries is None:
            merge_size = self.config.slicing["merge_size"]
            return block_places(target_sizes, merge_size)[0], target_sizes // merge_size
        grids_V2 = target_sizes.new_tensor(query_grid(num_queries)).expand_as(target_sizes)
        return patch_coordinates(grids_V2, num_queries)[0], grids_V2

    def get_placeholder_mask(
        self, input_ids: torch.Tensor, tokens_per_image: list[int], samples: torch.Tensor | None = None
    ) -> torch.Tensor:
        """True at the placeholders, after checking every sample's count against its images.

        `samples` of packed rows, see `packed_rows`: each is checked by itself.

        Raises:
            ValueError: the placeholders of some sample are not those of a whole number of images in order; a sum over
                the batch would miss two samples whose counts are swapped.
        """
        mask = input_ids == self.config.image_token_id
        _images_per_sample(_count_per_sample(mask, samples), tokens_per_image)
        return mask

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        target_sizes: torch.LongTensor | None = None,
        canvas_boxes: torch.LongTensor | None = None,
        num_views: torch.LongTensor | None = None,
        token_boxes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        visual_memory: VisualMemory | None = None,
        last_points: torch.LongTensor | None = None,
        loss_weights: torch.Tensor | None = None,
        **kwargs,
    ) -> VlmSliceOutput:
        """Runs the model on token ids and the views of their images; see `get_image_features` for the shapes.

        `visual_memory` and `last_points` (see `pointing`) belong to ids that go on from a cache; those of whole
        sequences are found from the images and ids.

        Where `position_ids` start again within a row, it holds several samples; see `packed_rows`.

        With `labels` the language loss is returned, weighted by `loss_weights` (see `loss_weighting`) if given; with
        `label_NAME` arguments (cells, see `data.dense`) and a dense head the dense loss is added to it, and with
        `guide_entries` and `guide_shares` (see `attention_guide`) the guide loss.
        """
        dense_labels = {
            k.removeprefix("label_"): kwargs.pop(k) for k in list(kwargs) if k.startswith("label_")
        }
        guide = [kwargs.pop(name, None) for name in ("guide_entries", "guide_shares")]
        is_guided = bool(self.config.guide_loss_weight) and guide[0] is not None
        if is_guided and self.cross_attention is None:
            kwargs["output_attentions"] = True
        samples = find_samples(position_ids, attention_mask, past_key_values, use_cache, self.language_model)
        if samples is not None:
            use_cache = False
        image_outputs, placeholder_mask, shows_weights = None, None, False
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError(
                    "got pixel_values without input_ids, expected the ids whose placeholders the visual tokens "
                    "replace; pass input_ids, or inputs_embeds alone"
                )
            image_outputs = self.get_image_features(
                pixel_values, target_sizes, canvas_boxes, num_views, token_boxes
            )
            if self.cross_attention is None:
                tokens_of_images = image_outputs.pooler_output
                placeholder_mask = self.get_placeholder_mask(
                    input_ids, [len(t) for t in tokens_of_images], samples
                )
                tokens = torch.cat(tokens_of_images).to(inputs_embeds.dtype)
                inputs_embeds = inputs_embeds.masked_scatter(placeholder_mask.unsqueeze(-1), tokens)
            else:
                inputs_embeds, visual_memory = self._remember(
                    input_ids, inputs_embeds, image_outputs, samples
                )
        elif labels is not None and self.training:
            inputs_embeds, visual_memory = self._see_nothing(inputs_embeds)
        if self.cross_attention is not None:
            if last_points is None and input_ids is not None:
                last_points = self._last_points(input_ids, samples)
            shows_weights = bool(kwargs.pop("output_attentions", False))
            self.cross_attention.look_at(visual_memory, last_points, is_guided or shows_weights, samples)
        if self.visual_expert is not None:
            if placeholder_mask is None and self.training:
                # Of no visual tokens the experts get gradients of zero: all processes have gradients for the same
                # weights, and the loss of a batch of texts has some even if all else is frozen.
                placeholder_mask = torch.zeros(
                    inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device
                )
            self.visual_expert.divide(placeholder_mask)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        loss, auxiliary_loss, metrics = None, None, None
        if labels is not None:
            if loss_weights is not None:
                loss = weighted_loss(outputs.logits, labels, loss_weights)
            else:
                loss = self.loss_function(
                    logits=outputs.logits,
                    labels=labels,
                    vocab_size=self.config.text_config.vocab_size,
                    **kwargs,
                )
            # All labels ignored (-100): the mean over nothing is nothing to learn from, not NaN.
            loss = loss.where((labels[:, 1:] != -100).any(), 0.0)
            metrics = {"language_loss": loss.detach()}
            auxiliary = []
            if self.dense_head is not None and dense_labels and image_outputs is not None:
                features = image_outputs.last_hidden_state
                _, valid = patch_coordinates(target_sizes, features.shape[1])
                dense, right = dense_loss(self.dense_head(features), dense_labels, valid)
                auxiliary.append(self.config.dense_loss_weight * dense)
                metrics |= {f"{name}_right": value for name, value in right.items()}
            if is_guided:
                attentions = (
                    outputs.attentions if self.cross_attention is None else self.cross_attention.weights
                )
                if not attentions or attentions[0] is None:
                    raise ValueError(
                        "the guide loss needs the attention weights of the language model, and its attention "
                        "implementation gives none; call model.set_attn_implementation({'text_config': 'eager'})"
                    )
                divergence, found = guide_loss(attentions, *guide)
                auxiliary.append(self.config.guide_loss_weight * divergence)
                metrics |= {"guide_loss": divergence.detach(), "place_found": found}
                if self.cross_attention is not None and self.cross_attention.found:
                    surprise, found = self._first_fit_loss(guide[0], input_ids, visual_memory)
                    auxiliary.append(self.config.guide_loss_weight * surprise)
                    metrics |= {"first_fit_loss": surprise.detach(), "next_found": found}
            if auxiliary:
                auxiliary_loss = torch.stack(auxiliary).sum()
                loss = loss + auxiliary_loss
        return VlmSliceOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            auxiliary_loss=auxiliary_loss,
            metrics=metrics,
            visual_memory=visual_memory if labels is None else None,
            cross_attentions=tuple(self.cross_attention.weights) if shows_weights else None,
        )

    def _see_nothing(self, inputs_embeds: torch.Tensor) -> tuple[torch.Tensor, VisualMemory | None]:
        """Runs all that sees on a blank view, for a training batch without any image, and uses none of it.

        Processes that train together wait for one another at every weight: DDP for its gradient, ZeRO-3 for its
        parts in the forward pass, too. One whose batch holds no image must take the same way as the others. The
        gradients that come of it are zero, so those of the step are what they would be in one process.
        """
        side = self.config.slicing["merge_size"]
        grid = torch.tensor([[side, side]], device=inputs_embeds.device)
        features = self.get_image_features(
            inputs_embeds.new_zeros(1, side * side, self.config.vision_config.patch_dim),
            grid,
            torch.cat([torch.zeros_like(grid), grid], dim=1),
            torch.ones_like(grid[:, 0]),
        )
        assert features.pooler_output is not None and features.places is not None
        assert features.can_point is not None
        # No token of it, so nothing is added, whatever the weights; but the tie to the graph stays.
        nothing = [part[0][:0] for part in (features.pooler_output, features.places, features.can_point)]
        inputs_embeds = inputs_embeds + nothing[0].sum().to(inputs_embeds.dtype)
        if self.cross_attention is None:
            return inputs_embeds, None
        tokens, places, can_point = ([part] * len(inputs_embeds) for part in nothing)
        return inputs_embeds, self.cross_attention.remember(tokens, places, can_point)

    def _first_fit_loss(
        self, entries: torch.Tensor, input_ids: torch.Tensor, memory: VisualMemory
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `first_fit.first_fit_loss`, of the entries of the guide that lead to a point or to none."""
        assert self.cross_attention is not None and memory.order is not None
        samples, heads, positions, keys = entries.unbind(1)
        numbers = input_ids[samples, positions + 1] - (self.config.location_token_id or 0)
        to_point = (numbers >= 0) & (numbers < len(LOCATION_TOKENS)) | (keys == NOTHING)
        chosen = (heads == 0) & to_point
        return first_fit_loss(self.cross_attention.found, memory.order, entries[chosen][:, [0, 2, 3]])

    def _last_points(
        self, input_ids: torch.Tensor, samples: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        if self.cross_attention is None or self.config.location_token_id is None:
            return None
        return last_points(input_ids, self.config.location_token_id, samples)

    def _remember(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor,
        features: ImageFeatures,
        samples: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, VisualMemory]:
        """What the samples' layers look at; images and their placeholders are numbered within each sample."""
        assert self.cross_attention is not None
        tokens_of_images, places_of_images = features.pooler_output, features.places
        assert (
            tokens_of_images is not None and places_of_images is not None and features.can_point is not None
        )
        num_placeholders = int((input_ids == self.config.image_token_id).sum())
        if num_placeholders > len(tokens_of_images):
            raise ValueError(
                f"the prompts hold {num_placeholders} placeholders for {len(tokens_of_images)} images, expected one "
                "for each, as this model looks at visual tokens beside the prompt; build them with a VlmSliceProcessor "
                "of one_placeholder=True"
            )
        mask = self.get_placeholder_mask(input_ids, [1] * len(tokens_of_images), samples)
        counts = mask.sum(dim=1).tolist()
        counts_of_samples = _count_per_sample(mask, samples)
        numbers = self.cross_attention.number_images(max(counts_of_samples), inputs_embeds)
        numbers_of_images = torch.cat([numbers[:count] for count in counts_of_samples])
        inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), numbers_of_images)
        numbered = iter(
            tokens + number for tokens, number in zip(tokens_of_images, numbers_of_images, strict=True)
        )
        tokens, places, can_point = (
            [torch.cat([none, *(next(images) for _ in range(count))]) for count in counts]
            for images, none in (
                (numbered, tokens_of_images[0][:0]),
                (iter(places_of_images), places_of_images[0][:0]),
                (iter(features.can_point), features.can_point[0][:0]),
            )
        )
        samples_of_rows = None
        if samples is not None:
            samples_of_tokens = iter(
                sample.expand(len(tokens))
                for sample, tokens in zip(samples[mask], tokens_of_images, strict=True)
            )
            samples_of_rows = [
                torch.cat([samples[0, :0], *(next(samples_of_tokens) for _ in range(count))])
                for count in counts
            ]
        return inputs_embeds, self.cross_attention.remember(tokens, places, can_point, samples_of_rows)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        target_sizes: torch.LongTensor | None = None,
        canvas_boxes: torch.LongTensor | None = None,
        num_views: torch.LongTensor | None = None,
        token_boxes: torch.LongTensor | None = None,
        **model_kwargs,
    ):
        """Repeats every sample, for beams and for several answers to one prompt.

        transformers repeats row by row, which would tear views from their images: `v0 v0 v1 v1` for `v0 v1 v0 v1`.
        """
        if pixel_values is not None and expand_size > 1:
            num_placeholders = (input_ids == self.config.image_token_id).sum(dim=1).tolist()
            num_images = _images_per_sample(
                num_placeholders, self._placeholders_per_image(target_sizes, num_views, token_boxes)
            )
            num_views_of_sample = [int(views.sum()) for views in num_views.split(num_images)]

            def repeat(x: torch.Tensor, rows_of_sample: list[int]) -> torch.Tensor:
                return torch.cat([copy for rows in x.split(rows_of_sample) for copy in [rows] * expand_size])

            pixel_values, target_sizes, canvas_boxes = (
                repeat(x, num_views_of_sample) for x in (pixel_values, target_sizes, canvas_boxes)
            )
            if token_boxes is not None:
                token_boxes = repeat(token_boxes, num_views_of_sample)
            num_views = repeat(num_views, num_images)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs |= {
                "pixel_values": pixel_values,
                "target_sizes": target_sizes,
                "canvas_boxes": canvas_boxes,
                "num_views": num_views,
                "token_boxes": token_boxes,
            }
        return input_ids, model_kwargs

    def _placeholders_per_image(
        self, target_sizes: torch.Tensor, num_views: torch.Tensor, token_boxes: torch.Tensor | None
    ) -> list[int]:
        if self.cross_attention is not None:
            return [1] * len(num_views)
        tokens_V = self.tokens_per_view(target_sizes)
        if token_boxes is not None:
            tokens_V = (token_boxes[:, 2:] - token_boxes[:, :2]).prod(dim=1)
        return [int(tokens.sum()) for tokens in tokens_V.split(num_views.tolist())]

    def tokens_per_view(self, target_sizes: torch.Tensor) -> torch.Tensor:
        """`int64[V]`, the visual tokens that the connector makes of each view."""
        num_queries = self.config.slicing["tokens_per_view"]
        if num_queries is not None:
            return target_sizes.new_full((len(target_sizes),), num_queries)
        return (target_sizes // self.config.slicing["merge_size"]).prod(dim=1)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        pixel_values=None,
        target_sizes=None,
        canvas_boxes=None,
        num_views=None,
        token_boxes=None,
        inputs_embeds=None,
        is_first_iteration=False,
        visual_memory=None,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # After the first step the cache holds the visual tokens, or what was found in the visual memory; without a
        # cache all is needed at every step.
        if is_first_iteration or not kwargs.get("use_cache", True):
            if self.config.coverage_penalty and not kwargs.get("use_cache", True):
                warnings.warn(
                    "coverage_penalty has no effect without a cache; expected use_cache=True", stacklevel=2
                )
            model_inputs |= {
                "pixel_values": pixel_values,
                "target_sizes": target_sizes,
                "canvas_boxes": canvas_boxes,
                "num_views": num_views,
                "token_boxes": token_boxes,
            }
        else:
            model_inputs["visual_memory"] = visual_memory
        if model_inputs.get("input_ids") is not None:
            points = self._last_points(input_ids)
            if points is not None:
                model_inputs["last_points"] = points[:, -model_inputs["input_ids"].shape[1] :]
        return model_inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        memory = outputs.get("visual_memory")
        if memory is not None:
            if self.config.coverage_penalty and memory.coverage is None:
                assert self.cross_attention is not None
                memory = self.cross_attention.hold_back(memory, self.config.coverage_penalty)
            model_kwargs["visual_memory"] = memory
        return model_kwargs

    def _reorder_cache(self, past_key_values, beam_idx):
        """Called by beam search; what the beams have read goes with their cache."""
        past_key_values.reorder_cache(beam_idx)
        if self.cross_attention is not None:
            self.cross_attention.reorder(beam_idx)
        return past_key_values


def place_on_canvas(
    cells_VQ2: torch.Tensor, cell_grids_V2: torch.Tensor, canvas_boxes: torch.Tensor
) -> torch.Tensor:
    """Middles of cells, at fractions `(cell + 0.5) / cell_grid` of their view's box; rows and columns in patches."""
    fractions_VQ2 = (cells_VQ2 + 0.5) / cell_grids_V2[:, None]
    origin_V12, end_V12 = canvas_boxes[:, None, :2], canvas_boxes[:, None, 2:]
    return origin_V12 + fractions_VQ2 * (end_V12 - origin_V12)


def _count_per_sample(mask: torch.Tensor, samples: torch.Tensor | None) -> list[int]:
    """How often `mask`, `bool[B, L]`, is True in each sample: in each row, or in each of its packed samples."""
    if samples is None:
        return mask.sum(dim=1).tolist()
    counts = mask.new_zeros(len(mask), int(samples.max()) + 1, dtype=torch.int64)
    counts.scatter_add_(1, samples, mask.long())
    return counts.flatten().tolist()


def _images_per_sample(num_placeholders: list[int], tokens_per_image: list[int]) -> list[int]:
    """How many images, in order, fill the placeholders of each sample.

    Raises:
        ValueError: see `get_placeholder_mask`.
    """
    remaining = list(tokens_per_image)
    num_images = []
    for sample, count in enumerate(num_placeholders):
        taken: list[int] = []
        while remaining and sum(taken) < count:
            taken.append(remaining.pop(0))
        if sum(taken) != count:
            raise ValueError(
                f"sample {sample} has {count} placeholders in its prompt but its images give {sum(taken)} visual "
                "tokens; build both with one VlmSliceProcessor call and keep images in the order of the prompts"
            )
        num_images.append(len(taken))
    if remaining:
        raise ValueError(
            f"{len(remaining)} images ({sum(remaining)} visual tokens) are left over after the last sample's "
            "placeholders; build prompts and images with one VlmSliceProcessor call"
        )
    return num_images


def _lie_in(cells_VQ2: torch.Tensor, boxes_V4: torch.Tensor) -> torch.Tensor:
    """`bool[V, Q]`: whether row and column are at least the first two and below the last two of a box."""
    first_V12, end_V12 = boxes_V4[:, None, :2], boxes_V4[:, None, 2:]
    return ((cells_VQ2 >= first_V12) & (cells_VQ2 < end_V12)).all(dim=-1)
