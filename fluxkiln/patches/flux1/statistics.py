"""Weights of a synthetic transformer with the outliers that are published for FLUX.1's.

What is known, and where it stands:

- Two of the 3072 channels of the image stream, 154 and 1446, are massive in every token:
  ganchaofan0000/DiTF, eval_spair.py, of arXiv 2505.18584.
- Their size hangs on the time step and not on the prompt: arXiv 2510.11538. What all blocks add to the image stream
  grows by 1.9 until the middle of 28 steps and falls to 1.4 at the end: FLUX_MAG_RATIOS in diffusers,
  hooks/mag_cache.py.
- Mean magnitude and range of the streams of FLUX.1-dev, first step: black-forest-labs/flux, issue 472. Image behind its
  embedder 0.24 and -5.3 to 6.2, behind block 0 0.42 and -35 to 40; text behind its embedder 0.76 and -27 to 38.
- Both streams leave the range of F16: `clip(-65504, 65504)` in diffusers, models/transformers/transformer_flux.py.
- Weights of FLUX are bell-shaped with long tails, and a few channels of a linear layer's inputs are much larger than
  the others: arXiv 2508.03485. In DiTs magnitudes differ between input channels above all (arXiv 2406.17343), and large
  inputs seldom meet large weights (arXiv 2405.16005).
- In one layer of FLUX.1-dev the largest inputs of a channel lie between 0.06 and 1.64, the largest weights between 0.10
  and 0.41: a log in deepcompressor's issue 27.

The rest is assumed: the kurtosis of the weights, which other channels are large and by how much, and how the streams
grow behind block 0. T5, CLIP and the VAE are drawn as by default: of theirs nothing is used.
"""

from __future__ import annotations

from collections.abc import Mapping

from fluxkiln.patches.flux1.presets import RULES
from fluxkiln.patches.model import Pin, WeightRule

_WIDTH = 3072
_UP, _DOWN = 154 / _WIDTH, 1446 / _WIDTH
# Channels, spread evenly, that AdaLN makes large at the inputs of a block's linear layers.
_SALIENT = tuple((2 * i + 1) / 24 for i in range(12))
# Of one matrix: some input channels are twice or half as large, one output channel of 32 is eight times as large.
_INPUTS = (-1, 0, 0, 0, 0, 0, 0, 1)
_OUTPUTS = (0,) * 27 + (1,) * 4 + (3,)


# One channel of the time embedding follows cos(2.05 t - 1), t from 1 to 0: from the 86th frequency's cos and sin.
_TIME = 0.25
_TIME_FEATURES = (Pin(0, _TIME, 21.6, 86 / 256), Pin(0, _TIME, 33.6, 214 / 256))


def _massive(value: float) -> tuple[Pin, ...]:
    """Both massive channels, of either sign."""
    return Pin(0, _UP, value), Pin(0, _DOWN, -0.875 * value)


def _scales(run: int) -> tuple[Pin, ...]:
    """AdaLN's scale, to which 1 is added: massive channels are small to what reads them, salient ones large."""
    return *(Pin(run, place, -0.9) for place in (_UP, _DOWN)), *(Pin(run, place, 6.0) for place in _SALIENT)


def _gates(run: int) -> tuple[Pin, ...]:
    """Weights of AdaLN's gate: that of the massive channels follows time."""
    return tuple(Pin(run, place, 0.2, _TIME) for place in (_UP, _DOWN))


def _matrix(
    pattern: str, gain: float, rows: tuple[int, ...] = (), runs: tuple[float, ...] = (), pins: tuple[Pin, ...] = ()
) -> WeightRule:
    return WeightRule(pattern, gain, tails=True, rows=rows, columns=_INPUTS, runs=runs, pins=pins)


# shift, scale and gate; a double block has them twice
_ADALN = (0.2, 0.6, 1.4)
_ADALN_TWICE = 2 * (0.2, 0.6, 0.9)
_TO_STREAM = r"blocks\.\d+\.(attn\.to_out\.0|ff\.net\.2|proj_out)\.bias"
_TO_TEXT = r"(to_add_out|ff_context\.net\.2)\.bias"

FLUX: Mapping[str, tuple[WeightRule, ...]] = {
    **RULES,
    "transformer": (
        WeightRule(r"norm_(added_)?[qk]\.weight", 0.2, mean=1.3, fan_in=False),
        # Its runs are scale and shift.
        WeightRule(r"norm_out\.linear\.bias", 0.3, fan_in=False, runs=(1.0, 1.0), pins=_scales(0)),
        _matrix(r"norm_out\.linear\.weight", 0.4),
        WeightRule(r"norm\.linear\.bias", 0.5, fan_in=False, runs=_ADALN, tails=True, pins=_scales(1)),
        _matrix(r"norm\.linear\.weight", 0.5, runs=_ADALN, pins=_gates(2)),
        WeightRule(
            r"norm1\w*\.linear\.bias", 0.5, fan_in=False, runs=_ADALN_TWICE, tails=True, pins=_scales(1) + _scales(4)
        ),
        _matrix(r"norm1\w*\.linear\.weight", 0.5, runs=_ADALN_TWICE, pins=_gates(2) + _gates(5)),
        _matrix(r"timestep_embedder\.linear_1\.weight", 1.4, pins=_TIME_FEATURES),
        _matrix(r"timestep_embedder\.linear_2\.weight", 1.0, pins=(Pin(0, _TIME, 0.5, _TIME),)),
        _matrix(r"embedder\.linear_1\.weight", 1.4),
        # The first block makes what is massive, those behind it add to it. At the first step the gates are about 2.
        WeightRule(r"^transformer_" + _TO_STREAM.replace(r"\d+", "0"), 0.15, fan_in=False, pins=_massive(8.7)),
        WeightRule(_TO_STREAM, 0.15, fan_in=False, pins=_massive(1.0)),
        WeightRule(_TO_TEXT, 0.15, fan_in=False, pins=_massive(5.0)),
        WeightRule(r"^x_embedder\.bias", 0.05, fan_in=False, pins=_massive(5.5)),
        WeightRule(r"^context_embedder\.bias", 0.15, fan_in=False, pins=_massive(32.0)),
        WeightRule(r"\.bias", 0.15, fan_in=False),
        _matrix(r"^x_embedder\.weight", 0.3),
        _matrix(r"(net\.2|blocks\.\d+\.proj_out)\.weight", 1.3),
        _matrix(r"(to_v|add_v_proj|net\.0\.proj|proj_mlp)\.weight", 1.0, rows=_OUTPUTS),
        _matrix(r"", 1.0),
    ),
}
