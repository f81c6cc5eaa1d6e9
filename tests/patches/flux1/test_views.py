"""Rows filled up and cut back, and one recorded run seen in both forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.errors import UsageError
from fluxkiln.patches.flux1.kinds import MODULATION_ROWS, list_parts
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.pipeline import run_rows
from fluxkiln.verify.reference import read_recording, view_recording


@pytest.fixture
def parts(tiny_checkpoint):
    return {part.name: part for part in list_parts(tiny_checkpoint().configs, modulation="hoisted")}


class Doubling:
    """A part that doubles what it is given; keeps it."""

    def __call__(self, name, inputs):
        self.given = inputs
        return {"temb": 2 * inputs["timestep"][:, None]}


@pytest.mark.parametrize("rows", [1, 3, MODULATION_ROWS])
def test_rows_are_filled_with_the_last_one_and_cut_back(parts, rows):
    run, time = Doubling(), np.linspace(1, 0.1, rows, dtype=np.float32)
    pooled = np.ones((1, 4), np.float32)
    made = run_rows(run, parts["time_embed"], {"pooled_projections": pooled, "timestep": time})
    np.testing.assert_array_equal(made["temb"][:, 0], 2 * time)
    assert run.given["timestep"].shape == (MODULATION_ROWS,)
    assert (run.given["timestep"][rows:] == time[-1]).all()
    assert run.given["pooled_projections"] is pooled


def test_parts_without_rows_run_as_they_are(parts):
    inputs = {"hidden_states": np.ones((1, 4, 8), np.float32)}
    assert run_rows(lambda name, given: {name: given}, parts["tail"], inputs) == {"tail": inputs}


@pytest.mark.parametrize(("timesteps", "guidances"), [(0, 0), (MODULATION_ROWS + 1, MODULATION_ROWS + 1), (2, 3)])
def test_rows_that_do_not_fit_are_refused(parts, timesteps, guidances):
    inputs = {"timestep": np.ones(timesteps), "guidance": np.ones(guidances)}
    with pytest.raises(UsageError, match=rf"timestep {timesteps}, guidance {guidances}; it takes 1 to 64 of each"):
        run_rows(Doubling(), parts["time_embed"], inputs)


@pytest.mark.parametrize(("preset", "vae"), [("tiny-dev", "kl"), ("tiny-schnell", "tiny")])
def test_one_run_serves_both_forms(tiny_checkpoint, tiny_recording, record_parts, preset, vae):
    """A view is what recording that form alone gives, to the bit: files are called by their contents."""
    configs = tiny_checkpoint(preset).configs
    both = record_parts(preset, MODEL.recorded_parts(configs, vae))
    hoisted = list_parts(configs, vae, "hoisted")
    alone = record_parts(preset, hoisted)
    for parts, expected in ((hoisted, alone), (list_parts(configs, vae), tiny_recording(preset, vae))):
        view = view_recording(both, MODEL, parts)
        assert view.calls == expected.calls
        assert tuple(view.calls) == tuple(view.kinds) == tuple(part.name for part in parts)
        assert view == replace(expected, root=both.root, seconds=both.seconds)
    assert read_recording(both.root) == both


def test_the_modulation_a_block_is_given_is_its_own_modulations(hoisted_recording):
    recording = hoisted_recording()
    for step in range(2):
        temb = recording.outputs("time_embed", step)["temb"]
        for block, modulation, rows in (
            ("double.01", "double_modulation.01", 12),
            ("single.02", "single_modulation.02", 3),
            ("tail", "tail_modulation", 2),
        ):
            np.testing.assert_array_equal(recording.inputs(modulation, step)["temb"], temb)
            made = recording.outputs(modulation, step)["modulation"]
            assert made.shape == (1, rows, temb.shape[1])
            np.testing.assert_array_equal(recording.inputs(block, step)["modulation"], made)
    first, second = (recording.outputs("double_modulation.00", step)["modulation"] for step in range(2))
    assert np.abs(first - second).max() > 1e-2, "steps differ, or any row would do"


def test_a_form_that_was_not_recorded_is_refused(tiny_checkpoint, tiny_recording, hoisted_recording):
    configs = tiny_checkpoint().configs
    hoisted = list_parts(configs, modulation="hoisted")
    with pytest.raises(UsageError, match=r"part time_embed of kind time_embed was not recorded \(recorded as nothing"):
        view_recording(tiny_recording(), MODEL, hoisted)
    with pytest.raises(UsageError, match=r"double.00 of kind double_modulated was not recorded \(recorded as double"):
        view_recording(tiny_recording(), MODEL, tuple(part for part in hoisted if part.kind == "double_modulated"))
    with pytest.raises(UsageError, match=r"double.00 of kind double was not recorded \(recorded as double_modulated"):
        view_recording(hoisted_recording(), MODEL, tuple(part for part in list_parts(configs) if part.kind == "double"))
