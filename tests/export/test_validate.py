"""Checkpoints against the real classes on the meta device."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fluxkiln.errors import CheckpointError
from fluxkiln.export.checkpoint import open_checkpoint, validate_checkpoint
from fluxkiln.export.synth import synthesize

BLOCK = "single_transformer_blocks.1.proj_mlp.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(synthesize("tiny-dev", tmp_path_factory.mktemp("synth") / "tiny-dev"))


def with_refs(checkpoint, component, refs):
    return replace(checkpoint, tensors={**checkpoint.tensors, component: refs})


def test_a_good_checkpoint_passes(checkpoint):
    validate_checkpoint(checkpoint)


def test_missing_tensor(checkpoint):
    refs = {name: ref for name, ref in checkpoint.tensors["transformer"].items() if name != BLOCK}
    with pytest.raises(CheckpointError, match=rf"transformer of tiny-dev lacks {BLOCK}: its config\.json describes"):
        validate_checkpoint(with_refs(checkpoint, "transformer", refs))


def test_unexpected_tensors(checkpoint):
    extra = {f"lora.{i}": checkpoint.tensors["vae"]["decoder.conv_in.bias"] for i in range(3)}
    with pytest.raises(CheckpointError, match=r"vae of tiny-dev has lora\.0 and 2 more, which AutoencoderKL"):
        validate_checkpoint(with_refs(checkpoint, "vae", {**checkpoint.tensors["vae"], **extra}))


def test_wrong_shape(checkpoint):
    refs = dict(checkpoint.tensors["transformer"])
    refs[BLOCK] = replace(refs[BLOCK], shape=refs[BLOCK].shape[::-1])
    with pytest.raises(CheckpointError, match=rf"{BLOCK} .* has the shape \[256, 1024\], .* has \[1024, 256\]"):
        validate_checkpoint(with_refs(checkpoint, "transformer", refs))


def test_quantized_tensor(checkpoint):
    refs = dict(checkpoint.tensors["transformer"])
    refs[BLOCK] = replace(refs[BLOCK], dtype="U8")
    with pytest.raises(CheckpointError, match="is U8, weights must be BF16, F16, F32"):
        validate_checkpoint(with_refs(checkpoint, "transformer", refs))


@pytest.mark.parametrize(
    ("component", "key", "value", "message"),
    [
        ("transformer", "num_layers", 3, r"lacks transformer_blocks\.2\.norm1\.linear\.weight and \d+ more"),
        ("transformer", "guidance_embeds", False, r"has time_text_embed\.guidance_embedder\.linear_1\.\w+ and 3 more"),
        ("text_encoder_2", "d_ff", 512, r"DenseReluDense\.wi_0\.weight .* has the shape \[256, 128\]"),
        ("vae", "block_out_channels", [], r"vae/config\.json does not describe a AutoencoderKL"),
    ],
)
def test_config_of_another_model(checkpoint, component, key, value, message):
    configs = json.loads(json.dumps(checkpoint.configs))
    configs[component][key] = value
    with pytest.raises(CheckpointError, match=message):
        validate_checkpoint(replace(checkpoint, configs=configs))
