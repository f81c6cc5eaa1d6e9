"""FLUX.1 as other programs have it, against diffusers' converter; transformers' reader has T5 in the tests of files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from fluxkiln.errors import UsageError
from fluxkiln.patches.flux1.layouts import CONVERTED_WIDTH
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.flux1.presets import PRESETS


def joined(one, numbers):
    pieces = [numbers[name] for name in one.sources]
    return np.concatenate([np.roll(piece, len(piece) // 2) if one.swapped else piece for piece in pieces])


@pytest.mark.parametrize("preset", ["wide-dev", "full-dev", "schnell"])
def test_diffusers_own_converter_finds_every_row(preset):
    configs = PRESETS["full-dev" if preset == "schnell" else preset].configs
    if preset == "schnell":
        configs = {"transformer": {**configs["transformer"], "guidance_embeds": False}}
    shapes = MODEL.layout("transformer", configs["transformer"])
    random = np.random.default_rng(0)
    numbers = {name: random.integers(0, 1 << 40, shape[0]) for name, shape in shapes.items()}
    layout = MODEL.as_others("bfl", "transformer", configs)
    state = {one.name: torch.from_numpy(joined(one, numbers)) for one in layout.tensors}
    converted = convert_flux_transformer_checkpoint_to_diffusers(state)
    assert not state, "names that diffusers does not know"
    assert converted.keys() == numbers.keys()
    for name, rows in converted.items():
        np.testing.assert_array_equal(rows.numpy(), numbers[name])


def test_narrow_models_are_stretched_to_the_width_of_the_converter():
    tiny, wide = (MODEL.as_others("bfl", "transformer", PRESETS[name].configs) for name in ("tiny-dev", "wide-dev"))
    assert (tiny.stretch, wide.stretch) == (CONVERTED_WIDTH // 256, 1)
    odd = {"transformer": {**PRESETS["tiny-dev"].configs["transformer"], "num_attention_heads": 5}}
    assert MODEL.as_others("bfl", "transformer", odd).stretch == 0


def test_every_tensor_is_somewhere_once():
    configs = PRESETS["tiny-dev"].configs
    for layout, component in (("bfl", "transformer"), ("llama.cpp", "text_encoder_2")):
        found = [name for one in MODEL.as_others(layout, component, configs).tensors for name in one.sources]
        assert sorted(found) == sorted(MODEL.layout(component, configs[component]))


def test_a_layout_that_there_is_not_is_refused():
    with pytest.raises(UsageError, match=r"no layout 'bfl' is known for text_encoder; there are bfl for transformer"):
        MODEL.as_others("bfl", "text_encoder", PRESETS["tiny-dev"].configs)
