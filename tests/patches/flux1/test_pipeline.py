"""The whole pipeline on parts: bit-exact glue, patched parts within rounding, no model loaded, errors that show."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.errors import ParityError, ShapeError, UsageError
from fluxkiln.export.checkpoint import TensorReader
from fluxkiln.export.eager import PatchedRunner
from fluxkiln.patches.flux1.inputs import make_constants
from fluxkiln.patches.flux1.kinds import KINDS, MODULATION_ROWS, list_parts
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.flux1.pipeline import build_pipeline
from fluxkiln.patches.pipeline import PartChain, PipelineFiles, Sampling, quiet
from fluxkiln.types import Shapes
from fluxkiln.verify.ladder import Ladder
from fluxkiln.verify.metrics import compare, compare_images
from fluxkiln.verify.pipeline import run_with_parts

SHAPES = Shapes(64, 64, 32)
WIDE = Shapes(height=64, width=96, tokens=24)
CASES = [
    ("tiny-dev", "kl", SHAPES, "inline"),
    ("tiny-dev", "tiny", WIDE, "inline"),
    ("tiny-schnell", "kl", WIDE, "inline"),
    ("tiny-schnell", "tiny", SHAPES, "inline"),
    ("tiny-dev", "kl", SHAPES, "hoisted"),
    ("tiny-schnell", "tiny", SHAPES, "hoisted"),
]


class Replay:
    """A part runner that returns recorded outputs and insists on recorded inputs, to the bit.

    A part that takes all steps at once is given and gives all recorded rows, the last one repeated.
    """

    def __init__(self, recording):
        self.recording = recording
        self.order = []

    def __call__(self, name, inputs):
        step = self.order.count(name)
        self.order.append(name)
        expected, outputs = self.recording.inputs(name, step), self.recording.outputs(name, step)
        rows = KINDS[self.recording.kinds[name]].rows
        if rows:
            expected.update({row: self.all_rows("inputs", name, row) for row in rows if row in expected})
            outputs = {output: self.all_rows("outputs", name, output) for output in outputs}
        assert tuple(inputs) == tuple(expected), name
        for key, array in expected.items():
            assert inputs[key].dtype == array.dtype
            np.testing.assert_array_equal(inputs[key], array, err_msg=f"{name} {key}")
        for array in outputs.values():
            array.setflags(write=False)
        return outputs

    def all_rows(self, side, name, array):
        steps = [getattr(self.recording, side)(name, step)[array] for step in range(self.recording.steps)]
        return np.concatenate([*steps, *steps[-1:] * (MODULATION_ROWS - len(steps))])


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2].width}-{case[3]}")
def case(request, tiny_checkpoint, tiny_recording, hoisted_recording):
    preset, vae, shapes, modulation = request.param
    checkpoint = tiny_checkpoint(preset)
    record = tiny_recording if modulation == "inline" else hoisted_recording
    return checkpoint, list_parts(checkpoint.configs, vae, modulation), record(preset, vae, shapes)


@pytest.fixture
def hoisted(tiny_checkpoint, hoisted_recording):
    checkpoint = tiny_checkpoint()
    return checkpoint, list_parts(checkpoint.configs, modulation="hoisted"), hoisted_recording()


@pytest.fixture
def tiny(tiny_checkpoint, tiny_recording):
    checkpoint = tiny_checkpoint()
    return checkpoint, list_parts(checkpoint.configs), tiny_recording()


def files_of(checkpoint, shapes, root=None):
    constants = make_constants(checkpoint.configs, shapes, TensorReader(checkpoint), split=False)
    return PipelineFiles(root or checkpoint.root, checkpoint.configs, constants)


def run(checkpoint, parts, shapes, run_part, root=None, on_latents=None, **sampling):
    files = files_of(checkpoint, shapes, root)
    return run_with_parts(MODEL, files, shapes, parts, run_part, Sampling(**sampling), on_latents)


def test_what_lies_between_the_parts_is_bit_exact(case):
    """Every part gets what it got in the reference, in the order of the part list, and the same image comes out."""
    checkpoint, parts, recording = case
    replay = Replay(recording)
    result = run(checkpoint, parts, recording.shapes, replay)
    each_step = [part.name for part in parts if part.traits.each_step]
    before = [part.name for part in parts[:-1] if part.name not in each_step]
    assert replay.order == before + 2 * each_step + [parts[-1].name]
    np.testing.assert_array_equal(result.latents, recording.latents)
    np.testing.assert_array_equal(result.image, recording.image)
    np.testing.assert_array_equal(result.prompt_embeds, recording.rendering("prompt_embeds"))
    np.testing.assert_array_equal(result.pooled_prompt_embeds, recording.rendering("pooled_prompt_embeds"))


def test_patched_parts_make_the_reference_image(case):
    checkpoint, parts, recording = case
    result = run(checkpoint, parts, recording.shapes, PatchedRunner(checkpoint, parts))
    assert compare(result.latents, recording.latents).relative_l2 <= 1e-5
    image = compare_images(result.image, recording.image)
    assert image.relative_l2 <= 1e-5
    assert image.psnr is not None
    assert image.psnr >= 90
    assert compare(result.prompt_embeds, recording.rendering("prompt_embeds")).relative_l2 <= 1e-6
    assert compare(result.pooled_prompt_embeds, recording.rendering("pooled_prompt_embeds")).relative_l2 <= 1e-6


def test_result_says_what_ran(tiny):
    checkpoint, parts, recording = tiny
    seen = []
    result = run(checkpoint, parts, SHAPES, Replay(recording), on_latents=seen.append)
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[1], result.latents)
    assert not np.array_equal(seen[0], seen[1])
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
    assert list(result.calls_by_kind) == [kind for kind in KINDS if kind in {part.kind for part in parts}]
    assert result.seconds_by_kind.keys() == result.calls_by_kind.keys()
    assert 0 < sum(result.seconds_by_kind.values()) <= result.seconds
    assert (result.latents.shape, result.latents.dtype) == ((1, 16, 64), np.float32)
    assert (result.image.shape, result.image.dtype) == ((64, 64, 3), np.float32)


def test_modulation_runs_once_for_all_steps(hoisted):
    checkpoint, parts, _ = hoisted
    result = run(checkpoint, parts, SHAPES, PatchedRunner(checkpoint, parts, keep=len(parts)), steps=3)
    assert result.calls_by_kind == {
        "clip": 1,
        "t5_embed": 1,
        "t5_block": 2,
        "t5_final": 1,
        "time_embed": 1,
        "double_modulation": 2,
        "single_modulation": 3,
        "tail_modulation": 1,
        "token_embed": 3,
        "double_modulated": 6,
        "single_modulated": 9,
        "tail_modulated": 3,
        "vae_decoder": 1,
    }


def test_both_forms_make_the_same_image(hoisted):
    checkpoint, parts, _ = hoisted
    inline = list_parts(checkpoint.configs)
    results = [
        run(checkpoint, form, SHAPES, PatchedRunner(checkpoint, form, keep=len(form)), steps=3, guidance_scale=5.0)
        for form in (inline, parts)
    ]
    assert compare(results[1].latents, results[0].latents).relative_l2 <= 1e-6
    assert compare_images(results[1].image, results[0].image).relative_l2 <= 1e-6


def test_each_step_gets_its_own_row(hoisted):
    """Negative control: with the first step's row at every step the pipeline's gates fail."""
    checkpoint, parts, recording = hoisted
    patched = PatchedRunner(checkpoint, parts, keep=len(parts))

    def first_row(name, inputs):
        outputs = patched(name, inputs)
        if "_modulation" not in name:
            return outputs
        return {key: np.repeat(array[:1], len(array), axis=0) for key, array in outputs.items()}

    ladder = Ladder()
    for runner in (patched, first_row):
        result = run(checkpoint, parts, SHAPES, runner)
        ladder.compare("pipeline", None, "latents", -1, recording.latents, None, [("patched", result.latents)], "F32")
    assert [row.passed for row in ladder.rows] == [True, False]


def test_a_second_image_gets_modulation_of_its_own(hoisted):
    """The same pipeline object makes another image: other steps, another guidance."""
    checkpoint, parts, recording = hoisted
    chain = PartChain(parts, PatchedRunner(checkpoint, parts, keep=len(parts)))
    pipe = build_pipeline(files_of(checkpoint, SHAPES), chain, SHAPES)
    encoded, _ = pipe.encode(Sampling().prompt)
    for _ in pipe.denoise(encoded, steps=3, guidance=7.0, seed=0):
        pass
    *_, again = pipe.denoise(encoded, steps=2, guidance=Sampling().guidance_scale, seed=0)
    assert compare(again, recording.latents).relative_l2 <= 1e-5
    assert chain.calls["time_embed"] == 2


def test_more_steps_than_rows_are_refused_before_anything_runs(hoisted):
    checkpoint, parts, _ = hoisted
    with pytest.raises(UsageError, match=rf"{MODULATION_ROWS + 1} steps: .* at most {MODULATION_ROWS} at once"):
        run(checkpoint, parts, SHAPES, pytest.fail, steps=MODULATION_ROWS + 1)


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
    files = replace(files_of(checkpoint, SHAPES), configs=configs)
    result = run_with_parts(MODEL, files, SHAPES, parts, Replay(recording))
    np.testing.assert_array_equal(result.image, recording.image)


@pytest.mark.parametrize("shapes", [Shapes(64, 80, 32), Shapes(64, 64, 16)])
def test_constants_of_other_shapes_are_refused(tiny, shapes):
    checkpoint, parts, recording = tiny
    with pytest.raises(ShapeError, match=r"rotary_cos is float32 \[48, 128\], .* needs \["):
        run_with_parts(MODEL, files_of(checkpoint, SHAPES), shapes, parts, Replay(recording))
    files = files_of(checkpoint, shapes)
    for bias, words in (
        (np.zeros((1, 2, 31, 31), np.float32), r"position_bias is float32 \[1, 2, 31, 31\]"),
        (files.constants["position_bias"].astype(np.float16), "position_bias is float16"),
        (None, "position_bias is not there"),
    ):
        other = {
            name: array for name, array in (files.constants | {"position_bias": bias}).items() if array is not None
        }
        with pytest.raises(ShapeError, match=words):
            run_with_parts(MODEL, replace(files, constants=other), shapes, parts, Replay(recording))


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
    ladder.compare("pipeline", None, "latents", -1, recording.latents, None, [("patched", result.latents)], "F32")
    ladder.compare("pipeline", None, "image", -1, recording.image, None, [("patched", result.image)], "F32")
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
