"""Wrapper modules: they hold the checkpoint's tensors under its names, and refuse what they do not cover."""

from __future__ import annotations

import pytest
import torch

from fluxkiln.errors import CheckpointError, UsageError
from fluxkiln.export.bindings import part_state
from fluxkiln.patches.flux1.kinds import KINDS, list_parts
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.flux1.parts import build_part
from fluxkiln.patches.parts import load_part, part_slots, slot_name

BIAS_TABLE = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def weights_of(part, checkpoint):
    state = part_state(part, part_slots(MODEL, part.kind, checkpoint.configs), checkpoint)
    return {slot: torch.from_numpy(weight) for slot, weight in state.items()}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint()


@pytest.mark.parametrize("preset", ["tiny-dev", "tiny-schnell"])
@pytest.mark.parametrize(("vae", "modulation"), [("kl", "inline"), ("tiny", "inline"), ("kl", "hoisted")])
def test_parts_hold_every_tensor_of_the_checkpoint_once(tiny_checkpoint, preset, vae, modulation):
    checkpoint = tiny_checkpoint(preset)
    held = {}
    for part in list_parts(checkpoint.configs, vae, modulation):
        module = build_part(part.kind, checkpoint.configs)
        for name, parameter in module.named_parameters():
            key = part.folder, part.prefix + slot_name(name)
            assert key not in held, f"{part.name} holds {key[1]}, so does {held[key]}"
            held[key] = part.name
            assert tuple(parameter.shape) == checkpoint.tensors[key[0]][key[1]].shape
    other = "vae_tiny" if vae == "kl" else "vae"
    left = {
        (component, name)
        for component, tensors in checkpoint.tensors.items()
        for name in tensors
        if component != other and (component, name) not in held
    }
    encoder = {(component, name) for component, name in left if component[:3] == "vae" and name.startswith("encoder.")}
    assert left - encoder == {("text_encoder_2", BIAS_TABLE)}


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_unchanged_by_loading_and_running(checkpoint, part_of_kind, kind):
    """Names and values: a patch that scaled a weight in place would show here."""
    part, recording = part_of_kind(kind)
    weights = weights_of(part, checkpoint)
    module = load_part(MODEL, kind, checkpoint.configs, {slot: weight.clone() for slot, weight in weights.items()})
    names = list(module.state_dict())
    assert list(build_part(kind, checkpoint.configs).state_dict()) == names
    inputs = recording.inputs(part.name)
    with torch.no_grad():
        module(*(torch.from_numpy(inputs[name]) for name in KINDS[kind].inputs))
    assert list(module.state_dict()) == names
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, weights[slot_name(name)]), name


def test_hoisted_kinds_share_out_the_inline_ones_weights(checkpoint):
    """A modulation has the AdaLN linears and nothing else, a modulated part all the rest."""
    for kind, linears in {"double": ("norm1", "norm1_context"), "single": ("norm",), "tail": ("norm_out",)}.items():
        modulation = {f"{name}.linear.{leaf}" for name in linears for leaf in ("weight", "bias")}
        assert set(part_slots(MODEL, f"{kind}_modulation", checkpoint.configs)) == modulation
        rest = set(part_slots(MODEL, kind, checkpoint.configs)) - modulation
        assert set(part_slots(MODEL, f"{kind}_modulated", checkpoint.configs)) == rest
    embedders = set(part_slots(MODEL, "time_embed", checkpoint.configs)) | set(
        part_slots(MODEL, "token_embed", checkpoint.configs)
    )
    assert embedders == set(part_slots(MODEL, "head", checkpoint.configs))


@pytest.mark.parametrize("kind", KINDS)
def test_build_allocates_nothing_and_is_in_eval_mode(checkpoint, kind):
    module = build_part(kind, checkpoint.configs)
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"meta"}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(child.training for child in module.modules())


def test_slots_are_the_parameters_in_order(checkpoint):
    assert part_slots(MODEL, "tail", checkpoint.configs) == (
        "norm_out.linear.weight",
        "norm_out.linear.bias",
        "proj_out.weight",
        "proj_out.bias",
    )
    assert not [slot for slot in part_slots(MODEL, "t5_block", checkpoint.configs) if "relative_attention_bias" in slot]


def test_guidance_embedder_is_devs_alone(tiny_checkpoint):
    embedders = [
        {
            slot.split(".")[1]
            for slot in part_slots(MODEL, "head", tiny_checkpoint(preset).configs)
            if "embedder." in slot
        }
        for preset in ("tiny-dev", "tiny-schnell")
    ]
    assert embedders[0] - embedders[1] == {"guidance_embedder"}
    assert embedders[1] < embedders[0]


def test_missing_or_extra_weight_is_named(checkpoint):
    part = next(part for part in list_parts(checkpoint.configs) if part.kind == "tail")
    weights = weights_of(part, checkpoint)
    with pytest.raises(CheckpointError, match=r"part of kind tail: weight stray\.weight"):
        load_part(MODEL, "tail", checkpoint.configs, {**weights, "stray.weight": torch.zeros(1)})
    del weights["proj_out.bias"]
    with pytest.raises(CheckpointError, match=r"part of kind tail: weight proj_out\.bias"):
        load_part(MODEL, "tail", checkpoint.configs, weights)


def test_unknown_kind_is_named(checkpoint):
    with pytest.raises(UsageError, match=r"'tripel'; there are clip, t5_embed"):
        build_part("tripel", checkpoint.configs)


@pytest.mark.parametrize(
    ("kind", "component", "change", "message"),
    [
        ("vae_decoder", "vae", {"use_post_quant_conv": True}, "post_quant_conv"),
        ("t5_block", "text_encoder_2", {"feed_forward_proj": "relu"}, "feed_forward_proj 'relu'"),
    ],
)
def test_structure_the_parts_do_not_cover_is_refused(checkpoint, kind, component, change, message):
    configs = {**checkpoint.configs, component: {**checkpoint.configs[component], **change}}
    with pytest.raises(CheckpointError, match=message):
        build_part(kind, configs)


def test_missing_tiny_vae_is_refused(checkpoint):
    configs = {name: config for name, config in checkpoint.configs.items() if name != "vae_tiny"}
    with pytest.raises(CheckpointError, match="no folder vae_tiny"):
        build_part("tiny_vae_decoder", configs)
