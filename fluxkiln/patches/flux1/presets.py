"""Synthetic FLUX.1: its configs at its own size or smaller, and how weights are drawn so that every block matters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fluxkiln.patches.model import Preset, WeightRule


def _read_presets() -> dict[str, Preset]:
    """FLUX.1-dev's own configs, and of each preset what differs.

    CLIP's eos_token_id 2 is FLUX.1's own: transformers then pools at the highest token id, which is the end token.
    """
    read = json.loads(Path(__file__).with_name("presets.json").read_bytes())
    presets = {}
    for preset in read["presets"]:
        differing = preset.pop("configs")
        trained = Path(__file__).with_name("trained") / preset["name"] if preset.pop("trained", False) else None
        configs = {name: {**config, **differing.get(name, {})} for name, config in read["full"].items()}
        presets[preset["name"]] = Preset(**{**preset, "size": tuple(preset["size"])}, configs=configs, trained=trained)
    return presets


# Raise when synth writes other bytes for the same preset and seed: caches of synthetic checkpoints are keyed by it.
GENERATOR = 2
PRESETS: Mapping[str, Preset] = _read_presets()

# AdaLN's shift, scale and gate: small shifts keep tokens different from one another, large gates make blocks matter.
_ADALN = (0.2, 0.6, 1.4)
# a double block updates each stream twice
_ADALN_TWICE = 2 * (0.2, 0.6, 0.9)

# The first match counts. The gains keep the residual streams within a few units at 57 blocks while each block adds
# 10 % to 100 % of its stream; the tests hold both.
RULES: Mapping[str, tuple[WeightRule, ...]] = {
    "text_encoder": (
        WeightRule(r"norm\d?\.weight", 0.2, mean=1.0, fan_in=False),
        WeightRule(r"token_embedding", 0.7, fan_in=False),
        WeightRule(r"position_embedding", 0.4, fan_in=False),
        WeightRule(r"\.bias", 0.15, fan_in=False),
        WeightRule(r"(out_proj|fc2)\.weight", 0.6),
        WeightRule(r"", 1.0),
    ),
    "text_encoder_2": (
        WeightRule(r"layer_norm\.weight", 0.2, mean=1.0, fan_in=False),
        WeightRule(r"shared", 1.0, fan_in=False),
        WeightRule(r"relative_attention_bias", 0.7, fan_in=False),
        # T5 does not divide attention scores by the square root of the head width, here 64.
        WeightRule(r"SelfAttention\.q", 0.125),
        WeightRule(r"SelfAttention\.o|\.wo", 0.7),
        WeightRule(r"", 1.0),
    ),
    "transformer": (
        WeightRule(r"norm_(added_)?[qk]\.weight", 0.2, mean=1.3, fan_in=False),
        WeightRule(r"norm_out\.linear\.bias", 0.3, fan_in=False),
        WeightRule(r"norm_out\.linear\.weight", 0.4),
        WeightRule(r"norm\.linear\.bias", 0.5, fan_in=False, runs=_ADALN),
        WeightRule(r"norm\.linear\.weight", 0.5, runs=_ADALN),
        WeightRule(r"norm1\w*\.linear\.bias", 0.5, fan_in=False, runs=_ADALN_TWICE),
        WeightRule(r"norm1\w*\.linear\.weight", 0.5, runs=_ADALN_TWICE),
        WeightRule(r"embedder\.linear_1\.weight", 1.4),
        WeightRule(r"(to_out\.0|to_add_out|net\.2|blocks\.\d+\.proj_out)\.bias", 0.15, fan_in=False),
        WeightRule(r"\.bias", 0.15, fan_in=False),
        WeightRule(r"(net\.2|blocks\.\d+\.proj_out)\.weight", 1.3),
        WeightRule(r"", 1.0),
    ),
    "vae": (
        WeightRule(r"norm\w*\.weight", 0.2, mean=1.0, fan_in=False),
        WeightRule(r"\.bias", 0.1, fan_in=False),
        WeightRule(r"conv_out\.weight", 0.6),
        WeightRule(r"", 1.0),
    ),
    "vae_tiny": (
        # The decoder's last layer: its result is in [0, 1] before it is stretched to [-1, 1].
        WeightRule(r"decoder\.layers\.(12|18)\.bias", 0.05, mean=0.5, fan_in=False),
        WeightRule(r"decoder\.layers\.(12|18)\.weight", 0.5),
        WeightRule(r"\.bias", 0.1, fan_in=False),
        WeightRule(r"conv\.4\.weight", 0.5),
        WeightRule(r"", 1.0),
    ),
}
