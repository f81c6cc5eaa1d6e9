"""Whole images of several prompts and seeds, by diffusers and by parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.build import samples as sampling
from fluxkiln.build.make import prepare
from fluxkiln.build.samples import reference_runs, sample_runs
from fluxkiln.export.eager import PatchedRunner
from fluxkiln.progress import Silent
from fluxkiln.settings import Settings
from fluxkiln.verify.ladder import Ladder

PROMPTS, SEEDS = ("a kiln", "a bridge"), (0, 3)


class Told(Silent):
    def __init__(self):
        self.lines = []

    def done(self, stage, what, how):
        self.lines.append((what, how))


@pytest.fixture(scope="module", params=["tiny-dev", "tiny-schnell"])
def prepared(request, tiny_checkpoint, tmp_path_factory):
    """A build of the model for the CPU, of four steps with two prompts and two seeds."""
    settings = Settings(
        "cpu", str(tiny_checkpoint(request.param).root), scheme="F32", build_dir=tmp_path_factory.mktemp("build"),
        steps=4, prompts=PROMPTS, seeds=SEEDS,
    )  # fmt: skip
    return prepare(settings)


@pytest.fixture(scope="module")
def runner(prepared):
    return PatchedRunner(prepared.checkpoint, prepared.plan.parts, keep=100)


@pytest.fixture(scope="module")
def sampled(prepared, runner):
    ladder, told = Ladder(), Told()
    return sample_runs(prepared, prepared.plan, ladder, runner, "patched", told), ladder, told


def test_every_run_is_compared_at_every_step(sampled):
    runs, ladder, _ = sampled
    assert [(entry["prompt"], entry["seed"]) for entry in runs["entries"]] == [
        (prompt, seed) for prompt in PROMPTS for seed in SEEDS
    ]
    assert (runs["steps"], runs["shapes"]) == (4, "32x32, 16 tokens")
    for entry in runs["entries"]:
        assert len(entry["drift"]) == 4
        assert all(0.0 < drift < 5e-5 for drift in entry["drift"])
        assert entry["psnr"] > 60
    assert [row.part for row in ladder.rows] == [f"pipeline.{n:02d}" for n in range(4) for _ in ("latents", "image")]
    assert all(row.passed for row in ladder.rows)


def test_prompts_and_seeds_make_other_images(prepared, sampled):
    found = reference_runs(
        prepared, prepared.plan, [(prompt, seed) for prompt in PROMPTS for seed in SEEDS], 4, Silent()
    )
    images = [run.image for run in found.values()]
    for i, one in enumerate(images):
        assert len(found[list(found)[i]].latents) == 4
        assert all(not np.allclose(one, other, atol=1e-3) for other in images[i + 1 :])


def test_references_are_kept(prepared, sampled, monkeypatch):
    monkeypatch.setattr(sampling, "_open_reference", lambda *_: pytest.fail("the pipeline was opened"))
    told = Told()
    reference_runs(prepared, prepared.plan, [(PROMPTS[0], SEEDS[0])], 4, told)
    assert told.lines == [(f"reference, seed 0: {PROMPTS[0]}", "from the store")]


def test_a_wrong_part_is_seen_in_every_run(prepared, runner):
    def spoilt(name, inputs):
        outputs = runner(name, inputs)
        if name == "double.01":
            outputs["hidden_states_out"] = outputs["hidden_states_out"] * np.float32(1.05)
        return outputs

    asked = replace(prepared, settings=replace(prepared.settings, prompts=(), seeds=(5, 6)))
    ladder = Ladder()
    runs = sample_runs(asked, prepared.plan, ladder, spoilt, "patched", Silent())
    assert {row.part for row in ladder.rows if not row.passed} == {"pipeline.00", "pipeline.01"}
    drift = runs["entries"][0]["drift"]
    assert drift[-1] > 100 * 5e-5
    assert drift[0] < drift[-1], "errors add up"


def test_nothing_is_sampled_unasked(prepared):
    unasked = replace(prepared, settings=replace(prepared.settings, prompts=(), seeds=()))
    ladder = Ladder()
    assert sample_runs(unasked, prepared.plan, ladder, None, "patched", Silent()) is None
    assert ladder.rows == []
