"""Weights with FLUX.1's published statistics: a few fixed channels are massive, and by default none is."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fluxkiln.export.synth import synthesize
from fluxkiln.patches.flux1.presets import PRESETS, RULES
from fluxkiln.patches.flux1.statistics import FLUX
from fluxkiln.patches.flux1.tensors import component_layout

# 154 and 1446 of 3072, at the width of 256
MASSIVE = [13, 120]
STEPS = 28


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Statistics -> of tiny-dev in diffusers: the image stream behind every block, the largest input of every channel
    of every linear layer of the blocks, and what all blocks add at every step."""
    import torch
    from diffusers import FluxPipeline

    def run(statistics):
        folder = synthesize("tiny-dev", tmp_path_factory.mktemp("model") / "m", statistics=statistics)
        pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
        streams, peaks, sums, begin = [], {}, [], []

        def look(module, given):
            peaks.setdefault(module, given[0].flatten(0, -2).abs().amax(0).numpy())

        for block in blocks:
            block.register_forward_hook(lambda _, given, made: streams.append(made[1][0].numpy()))
            for name, module in block.named_modules():
                if isinstance(module, torch.nn.Linear) and "norm" not in name:
                    module.register_forward_pre_hook(look)
        blocks[0].register_forward_pre_hook(lambda _, a, k: begin.append(k["hidden_states"]), with_kwargs=True)
        blocks[-1].register_forward_hook(
            lambda _, given, made: sums.append(float((made[1] - begin[-1]).norm(dim=-1).mean()))
        )
        random = torch.Generator().manual_seed(0)
        pipe("a kiln", height=64, width=64, max_sequence_length=16, num_inference_steps=STEPS, generator=random)
        return streams, list(peaks.values()), sums

    return {statistics: run(statistics) for statistics in ("uniform", "flux")}


def largest(stream):
    sizes = np.abs(stream).mean(0)
    return sorted(np.argsort(sizes)[-2:].tolist()), np.sort(sizes)[-2] / np.median(sizes)


def test_two_channels_of_the_image_stream_are_massive_behind_every_block(seen):
    for stream in seen["flux"][0]:
        channels, ratio = largest(stream)
        assert channels == MASSIVE
        assert ratio > 20
        assert np.isfinite(stream).all()
        # every token has them, with one sign each
        assert (stream[:, MASSIVE[0]] > 10).all()
        assert (stream[:, MASSIVE[1]] < -10).all()
    for stream in seen["uniform"][0]:
        channels, ratio = largest(stream)
        assert channels != MASSIVE
        assert ratio < 5


def test_inputs_of_linear_layers_have_channels_that_stand_out(seen):
    ratios = {name: [peaks.max() / np.median(peaks) for peaks in found] for name, (_, found, _) in seen.items()}
    assert min(ratios["flux"]) > 5
    assert max(ratios["uniform"]) < 5


def test_what_blocks_add_follows_the_time_step_as_published(seen):
    """Beside FLUX_MAG_RATIOS, the published growth from step to step: within 15 % of it from step 14 on."""
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    published = np.cumprod(FLUX_MAG_RATIOS.numpy())[:STEPS]
    for statistics, (_, _, sums) in seen.items():
        grown = np.array(sums[:STEPS]) / sums[0]
        near = np.abs(grown / published - 1)[STEPS // 2 :] < 0.15
        assert near.all() == (statistics == "flux"), (statistics, grown)


def test_every_rule_of_flux_is_for_some_tensor_and_no_pin_falls_outside():
    for preset in ("tiny-dev", "full-dev"):
        layout = component_layout("transformer", PRESETS[preset].configs["transformer"])
        chosen = [next(rule for rule in FLUX["transformer"] if re.search(rule.pattern, name)) for name in layout]
        assert {id(rule) for rule in chosen} == {id(rule) for rule in FLUX["transformer"]}
        for (name, shape), rule in zip(layout.items(), chosen, strict=True):
            assert shape[0] % max(1, len(rule.runs)) == 0, name
            assert (rule.rows or rule.columns) == () or len(shape) == 2, name
            assert all(
                pin.run < max(1, len(rule.runs)) and 0 <= pin.row < 1 and 0 <= pin.column < 1 for pin in rule.pins
            )
            assert len(shape) == 2 or not any(pin.column for pin in rule.pins), name


def test_text_encoders_and_vae_are_drawn_as_by_default():
    assert {name: FLUX[name] for name in RULES if name != "transformer"} == {
        name: rules for name, rules in RULES.items() if name != "transformer"
    }
