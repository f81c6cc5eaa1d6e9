"""The whole pipeline on parts: bit-exact glue, patched parts within rounding, no model loaded, errors that show."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from fluxkiln.components import KINDS, Shapes, list_parts
from fluxkiln.errors import ParityError, ShapeError
from fluxkiln.export.eager import PatchedRunner
from fluxkiln.export.host import host_constants, pooled_row
from fluxkiln.verify.ladder import Ladder
from fluxkiln.verify.metrics import compare, compare_images
from fluxkiln.verify.pipeline import quiet, run_with_parts

SHAPES = Shapes(64, 64, 32)
WIDE = Shapes(height=64, width=96, tokens=24)
CASES = [
    ("tiny-dev", "kl", SHAPES),
    ("tiny-dev", "tiny", WIDE),
    ("tiny-schnell", "kl", WIDE),
    ("tiny-schnell", "tiny", SHAPES),
]


class Replay:
    """A part runner that returns recorded outputs and insists on recorded inputs, to the bit."""

    def __init__(self, recording):
        self.recording = recording
        self.order = []

    def __call__(self, name, inputs):
        step = self.order.count(name)
        self.order.append(name)
        expected = self.recording.inputs(name, step)
        assert tuple(inputs) == tuple(expected), name
        for key, array in expected.items():
            assert inputs[key].dtype == array.dtype
            np.testing.assert_array_equal(inputs[key], array, err_msg=f"{name} {key}")
        outputs = self.recording.outputs(name, step)
        for array in outputs.values():
            array.setflags(write=False)
        return outputs


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2].width}")
def case(request, tiny_checkpoint, tiny_recording):
    preset, vae, shapes = request.param
    checkpoint = tiny_checkpoint(preset)
    return checkpoint, list_parts(checkpoint.configs, vae), tiny_recording(preset, vae, shapes)


@pytest.fixture
def tiny(tiny_checkpoint, tiny_recording):
    checkpoint = tiny_checkpoint()
    return checkpoint, list_parts(checkpoint.configs), tiny_recording()


def run(checkpoint, parts, shapes, run_part, root=None, **options):
    constants = host_constants(checkpoint, shapes)
    return run_with_parts(
        root or checkpoint.root, checkpoint.configs, shapes, parts, constants, pooled_row, run_part, **options
    )


def test_what_lies_between_the_parts_is_bit_exact(case):
    """Every part gets what it got in the reference, in the order of the part list, and the same image comes out."""
    checkpoint, parts, recording = case
    replay = Replay(recording)
    result = run(checkpoint, parts, recording.shapes, replay)
    by_component = {
        component: [part.name for part in parts if part.component == component]
        for component in ("text_encoder", "text_encoder_2", "transformer", "vae")
    }
    encoders = by_component["text_encoder"] + by_component["text_encoder_2"]
    assert replay.order == encoders + 2 * by_component["transformer"] + by_component["vae"]
    np.testing.assert_array_equal(result.latents, recording.latents)
    np.testing.assert_array_equal(result.image, recording.image)
    np.testing.assert_array_equal(result.prompt_embeds, recording.prompt_embeds)
    np.testing.assert_array_equal(result.pooled_prompt_embeds, recording.pooled_prompt_embeds)


def test_patched_parts_make_the_reference_image(case):
    checkpoint, parts, recording = case
    result = run(checkpoint, parts, recording.shapes, PatchedRunner(checkpoint, parts))
    assert compare(result.latents, recording.latents).relative_l2 <= 1e-5
    image = compare_images(result.image, recording.image)
    assert image.relative_l2 <= 1e-5
    assert image.psnr is not None
    assert image.psnr >= 90
    assert compare(result.prompt_embeds, recording.prompt_embeds).relative_l2 <= 1e-6
    assert compare(result.pooled_prompt_embeds, recording.pooled_prompt_embeds).relative_l2 <= 1e-6


def test_result_says_what_ran(tiny):
    checkpoint, parts, recording = tiny
    seen = []
    result = run(checkpoint, parts, SHAPES, Replay(recording), on_step=lambda *step: seen.append(step))
    assert seen == [(1, 2), (2, 2)]
    assert result.calls_by_kind == {
        "clip": 1,
        "t5_embed": 1,
        "t5_block": 2,
        "t5_final": 1,
        "head": 2,
        "double": 4,
        "single": 6,
        "tail": 2,
        "vae_decoder": 1,
    }
    assert list(result.calls_by_kind) == [kind for kind in KINDS if kind != "tiny_vae_decoder"]
    assert result.seconds_by_kind.keys() == result.calls_by_kind.keys()
    assert 0 < sum(result.seconds_by_kind.values()) <= result.seconds
    assert (result.latents.shape, result.latents.dtype) == ((1, 16, 64), np.float32)
    assert (result.image.shape, result.image.dtype) == ((64, 64, 3), np.float32)


def test_no_model_is_needed(tiny, tmp_path):
    """A folder with tokenizers and scheduler is enough, as a bundle has them."""
    checkpoint, parts, recording = tiny
    root = tmp_path / "bundle"
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(checkpoint.root / name, root / name)
    result = run(checkpoint, parts, SHAPES, Replay(recording), root=root)
    np.testing.assert_array_equal(result.image, recording.image)


def test_seed_steps_and_prompt_count(tiny):
    checkpoint, parts, recording = tiny
    patched = PatchedRunner(checkpoint, parts, keep=len(parts))
    first = run(checkpoint, parts, SHAPES, patched)
    for options in ({"seed": 1}, {"steps": 3}, {"prompt": "two kilns"}, {"guidance_scale": 7.0}):
        other = run(checkpoint, parts, SHAPES, patched, **options)
        assert compare(other.latents, first.latents).relative_l2 > 1e-3, options
    assert compare(first.latents, recording.latents).relative_l2 <= 1e-5


def test_tiny_vae_config_may_leave_out_its_defaults(tiny_checkpoint, tiny_recording):
    """taef1's own config.json has no shift_factor and no block_out_channels."""
    checkpoint, recording = tiny_checkpoint(), tiny_recording("tiny-dev", "tiny")
    parts = list_parts(checkpoint.configs, "tiny")
    kept = {k: v for k, v in checkpoint.configs["vae_tiny"].items() if k not in ("scaling_factor", "shift_factor")}
    configs = {**checkpoint.configs, "vae_tiny": kept}
    constants = host_constants(checkpoint, SHAPES)
    result = run_with_parts(checkpoint.root, configs, SHAPES, parts, constants, pooled_row, Replay(recording))
    np.testing.assert_array_equal(result.image, recording.image)


@pytest.mark.parametrize("shapes", [Shapes(64, 80, 32), Shapes(64, 64, 16)])
def test_constants_of_other_shapes_are_refused(tiny, shapes):
    checkpoint, parts, recording = tiny
    constants = host_constants(checkpoint, SHAPES)
    with pytest.raises(ShapeError, match=r"rotary_cos is for 48 tokens, .* needs"):
        run_with_parts(checkpoint.root, checkpoint.configs, shapes, parts, constants, pooled_row, Replay(recording))
    constants = {**host_constants(checkpoint, shapes), "position_bias": np.zeros((1, 2, 31, 31), np.float32)}
    with pytest.raises(ShapeError, match="position_bias is for 31 tokens"):
        run_with_parts(checkpoint.root, checkpoint.configs, shapes, parts, constants, pooled_row, Replay(recording))


def test_a_runners_error_comes_through(tiny):
    checkpoint, parts, recording = tiny

    class Failing(Replay):
        def __call__(self, name, inputs):
            if name == "single.01":
                raise ParityError("the device is gone")
            return super().__call__(name, inputs)

    with pytest.raises(ParityError, match="the device is gone"):
        run(checkpoint, parts, SHAPES, Failing(recording))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("double.00", "double.01"),
        ("single.00", "single.02"),
        ("single.01", "single.02"),
        ("t5_block.00", "t5_block.01"),
    ],
)
def test_swapped_blocks_fail_the_pipelines_gates(tiny, one, other):
    checkpoint, parts, recording = tiny
    patched = PatchedRunner(checkpoint, parts)
    names = {one: other, other: one}
    result = run(checkpoint, parts, SHAPES, lambda name, inputs: patched(names.get(name, name), inputs))
    ladder = Ladder()
    ladder.climb_latents(-1, recording.latents, [("patched", result.latents)], "F32")
    ladder.climb_image(-1, recording.image, [("patched", result.image)], "F32")
    assert [row.passed for row in ladder.rows] == [False, False]
    # and it is more than 4-bit weights cost, which is 0.11 for this model
    assert ladder.rows[0].vs_reference.relative_l2 > 0.15


def test_nothing_is_printed(tiny, capfd):
    checkpoint, parts, recording = tiny
    run(checkpoint, parts, SHAPES, Replay(recording))
    assert capfd.readouterr() == ("", "")


def test_quiet_puts_back_what_it_changed():
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)

    def state():
        return [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]

    before = state()
    inside = []

    def fail():
        inside.extend(state())
        raise RuntimeError

    with pytest.raises(RuntimeError), quiet():
        fail()
    assert inside == [(40, False), (40, False)]
    assert state() == before
