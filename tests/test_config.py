import json

import pytest
from tiny_models import CONNECTORS, tiny_config, tiny_slicing
from transformers import AutoConfig, GPT2Config, LlamaConfig

from vlmslice.config import VlmSliceConfig
from vlmslice.slicing import SlicingConfig, SlicingError
from vlmslice.vision_encoder import VlmSliceVisionConfig


class TestRoundTrip:
    @pytest.mark.parametrize("connector", CONNECTORS)
    def test_json(self, connector, tmp_path):
        config = tiny_config(connector, canvas_position=False, dense_loss_weight=0.25)
        config.save_pretrained(tmp_path)
        for loaded in (VlmSliceConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
            assert type(loaded) is VlmSliceConfig
            assert type(loaded.vision_config) is VlmSliceVisionConfig
            assert type(loaded.text_config) is LlamaConfig
            assert json.loads(loaded.to_json_string()) == json.loads(config.to_json_string())
            assert loaded.slicing_config == config.slicing_config == tiny_slicing(connector)
            assert loaded.vision_config.timm_kwargs["pos_embed_grid_size"] == [4, 4]  # JSON has no tuples

    def test_encoder_from_json_is_the_same(self, tmp_path):
        """The list that JSON makes of a tuple must build the same encoder."""
        from vlmslice.vision_encoder import build_timm_vit

        config = tiny_config()
        config.save_pretrained(tmp_path)
        built = [build_timm_vit(c.vision_config) for c in (config, VlmSliceConfig.from_pretrained(tmp_path))]
        shapes = [{name: p.shape for name, p in vit.named_parameters()} for vit in built]
        assert shapes[0] == shapes[1]
        assert shapes[0]["embeds.pos_embed"] == (1, 4, 4, 32)

    def test_parts_given_as_dicts(self):
        config = tiny_config()
        again = VlmSliceConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
        assert again.to_dict() == config.to_dict()
        assert again.text_config.vocab_size == config.text_config.vocab_size

    def test_any_language_model(self, tmp_path):
        config = tiny_config(text_config=GPT2Config(n_embd=32, n_layer=1, n_head=2))
        config.save_pretrained(tmp_path)
        loaded = VlmSliceConfig.from_pretrained(tmp_path)
        assert type(loaded.text_config) is GPT2Config
        assert loaded.get_text_config() is loaded.text_config
        assert loaded.text_config.hidden_size == 32

    def test_defaults(self):
        config = VlmSliceConfig()
        assert config.slicing_config == SlicingConfig()
        assert config.vision_config.patch_dim == 768
        assert config.connector == "spatial_resampler"

    def test_slicing_is_filled_in(self):
        """Every field is written down, so that a later default does not change a saved model."""
        config = VlmSliceConfig(slicing={"max_slice_nums": 4})
        assert config.slicing == SlicingConfig(max_slice_nums=4).to_dict()


class TestErrors:
    @pytest.mark.parametrize(
        ("connector", "suggestion"),
        [("spatial_resample", "spatial_resampler"), ("pixel-unshuffle", "pixel_unshuffle")],
    )
    def test_connector_nearly_named(self, connector, suggestion):
        with pytest.raises(
            ValueError,
            match=f"^connector is '{connector}', expected one of {', '.join(CONNECTORS)}; "
            f"did you mean '{suggestion}'[?]$",
        ):
            VlmSliceConfig(connector=connector)

    def test_connector_unknown(self):
        with pytest.raises(ValueError, match="^connector is 'mlp', expected one of [a-z_, ]+$"):
            VlmSliceConfig(connector="mlp")

    def test_slicing_field_nearly_named(self):
        with pytest.raises(SlicingError, match="max_slice_num.*max_slice_nums"):
            VlmSliceConfig(slicing={"max_slice_num": 4})

    def test_patch_sizes_differ(self):
        with pytest.raises(
            ValueError,
            match="^slicing.patch_size is 16, the vision encoder's is 14; both must be the encoder's$",
        ):
            VlmSliceConfig(vision_config={"patch_size": 14})
        assert VlmSliceConfig(vision_config={"patch_size": 14}, slicing={"patch_size": 14})

    @pytest.mark.parametrize(
        ("connector", "tokens"), [("resampler", None), ("spatial_resampler", 64), ("pixel_unshuffle", 9)]
    )
    def test_connector_and_tokens_per_view(self, connector, tokens):
        with pytest.raises(
            ValueError,
            match=f"^connector '{connector}' with slicing.tokens_per_view={tokens}: the resampler needs a number of "
            "tokens per view, the other connectors give one token per block and take None$",
        ):
            VlmSliceConfig(connector=connector, slicing={"tokens_per_view": tokens})

    @pytest.mark.parametrize(
        "options", [{"connector_heads": "8"}, {"canvas_position": "yes"}, {"connector_scale": "large"}]
    )
    def test_fields_have_types(self, options):
        with pytest.raises(Exception, match=next(iter(options))):
            VlmSliceConfig(**options)
