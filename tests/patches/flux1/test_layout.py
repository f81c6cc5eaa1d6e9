"""The layout kept by hand against the real classes, and presets against what makes them useful."""

from __future__ import annotations

import math

import pytest

from fluxkiln.export.checkpoint import expected_tensors
from fluxkiln.export.synth import synthesized_bytes
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.flux1.presets import PRESETS
from fluxkiln.patches.flux1.tensors import component_layout
from fluxkiln.types import Shapes


@pytest.mark.parametrize("component", MODEL.classes)
@pytest.mark.parametrize("preset", PRESETS)
def test_same_names_and_shapes_as_the_real_class(preset, component):
    config = PRESETS[preset].configs[component]
    layout = component_layout(component, config)
    ours = {name.removeprefix("text_model."): shape for name, shape in layout.items()}
    assert len(ours) == len(layout)
    assert ours == expected_tensors(MODEL, component, config)


def test_full_dev_has_the_size_of_flux():
    preset = PRESETS["full-dev"]
    parameters = sum(
        math.prod(shape) for shape in component_layout("transformer", preset.configs["transformer"]).values()
    )
    assert parameters == 11_901_408_320
    # Bytes of T5-XXL's encoder in bfloat16, as FLUX.1's own index states them.
    assert synthesized_bytes(preset.name, ["text_encoder_2"]) == 9_524_621_312


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_default_size_is_legal(preset):
    shapes = Shapes(*preset.size, preset.tokens)
    assert shapes.tokens <= MODEL.most_tokens[preset.variant]
    # more than one token of each kind, or attention shows nothing
    assert shapes.image_tokens > 1
    assert shapes.tokens > 1


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_four_bit_groups_fit(preset):
    """Input widths of all matrices in blocks are multiples of 128, the largest group."""
    for component, prefix in (
        ("transformer", ("transformer_blocks", "single_")),
        ("text_encoder_2", ("encoder.block",)),
    ):
        for name, shape in component_layout(component, preset.configs[component]).items():
            if name.startswith(prefix) and len(shape) == 2 and "relative_attention_bias" not in name:
                assert shape[1] % 128 == 0, name


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_widths_of_components_fit_each_other(preset):
    transformer = preset.configs["transformer"]
    assert transformer["joint_attention_dim"] == preset.configs["text_encoder_2"]["d_model"]
    assert transformer["pooled_projection_dim"] == preset.configs["text_encoder"]["hidden_size"]
    assert transformer["in_channels"] == 4 * preset.configs["vae"]["latent_channels"]
    assert sum(transformer["axes_dims_rope"]) == transformer["attention_head_dim"]
    assert transformer["guidance_embeds"] == preset.configs["scheduler"]["use_dynamic_shifting"]
