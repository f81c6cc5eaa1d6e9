"""Host constants against what the recorded reference pipeline really used."""

from __future__ import annotations

import numpy as np
import pytest

from fluxkiln.export.checkpoint import TensorReader
from fluxkiln.patches.flux1.inputs import make_constants, pooled_row, position_bias, rotary_embedding
from fluxkiln.types import Shapes

SMALLEST = Shapes(height=32, width=32, tokens=16)


@pytest.mark.parametrize("part", ["double.00", "single.02"])
def test_rotary_embedding_is_the_references(tiny_checkpoint, tiny_recording, part):
    checkpoint, recording = tiny_checkpoint(), tiny_recording("tiny-dev", "kl", SMALLEST)
    made = make_constants(checkpoint.configs, SMALLEST, TensorReader(checkpoint), split=False)
    for name in ("rotary_cos", "rotary_sin"):
        recorded = recording.inputs(part)[name]
        assert made[name].dtype == np.float32
        assert np.array_equal(made[name], recorded), name


def test_rotary_embedding_by_the_formula(tiny_checkpoint):
    """Text stands at 0; an image token at (0, row, column); pairs of channels turn together."""
    shapes = Shapes(height=48, width=64, tokens=5)
    made = rotary_embedding(tiny_checkpoint().configs["transformer"], shapes)
    assert made["rotary_cos"].shape == (5 + 3 * 4, 128)
    assert np.array_equal(made["rotary_cos"][:5], np.ones((5, 128), np.float32))
    row, column = 2, 3
    angles = np.concatenate([
        np.repeat(place * 10000.0 ** -(np.arange(0, width, 2) / width), 2)
        for place, width in ((0, 16), (row, 56), (column, 56))
    ])  # fmt: skip
    token = 5 + row * 4 + column
    assert np.abs(made["rotary_cos"][token] - np.cos(angles)).max() < 1e-6
    assert np.abs(made["rotary_sin"][token] - np.sin(angles)).max() < 1e-6
    assert np.abs(made["rotary_sin"][token - 1] - np.sin(angles)).max() > 0.1


@pytest.mark.parametrize("part", ["t5_block.00", "t5_block.01"])
def test_position_bias_is_the_references(tiny_checkpoint, tiny_recording, part):
    recorded = tiny_recording("tiny-dev", "kl", SMALLEST).inputs(part)["position_bias"]
    checkpoint = tiny_checkpoint()
    made = position_bias(checkpoint.configs["text_encoder_2"], SMALLEST, TensorReader(checkpoint))
    assert made.dtype == np.float32
    assert np.array_equal(made, recorded)
    assert not np.array_equal(made, made.swapaxes(-1, -2))  # what comes before is not what comes after


def test_pooled_row_is_the_end_tokens(tiny_recording):
    ids = tiny_recording("tiny-dev", "kl", SMALLEST).inputs("clip")["input_ids"]
    row = pooled_row(ids, {"eos_token_id": 2})
    recording = tiny_recording("tiny-dev", "kl", SMALLEST)
    hidden = recording.outputs("clip")["last_hidden_state"]
    assert np.array_equal(hidden[0, row], recording.rendering("pooled_prompt_embeds")[0])
    assert pooled_row(np.array([[7, 9, 5, 9]]), {"eos_token_id": 2}) == 1
    assert pooled_row(np.array([[7, 9, 5, 5]]), {"eos_token_id": 5}) == 2
