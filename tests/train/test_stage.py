"""Stages: killed anywhere they end the same; a loss that is no number stops them."""

import pytest
import torch

from fluxkiln.errors import FluxkilnError
from fluxkiln.train import stage as stages
from fluxkiln.train.stage import Stage, run_stage


class Killed(BaseException):
    pass


def make(steps=30, broken=-1):
    torch.manual_seed(0)
    module, count = torch.nn.Linear(4, 3), [0]

    def loss(chance):
        count[0] += 1
        x = torch.randn(8, 4, generator=chance)
        return (module(x) - x[:, :3]).square().mean() * (float("nan") if count[0] == broken else 1.0)

    return Stage("probe", {"probe": module}, loss, steps, 1e-2, warmup=3, average=0.9), module


def test_it_learns(tmp_path):
    stage, _ = make(200)
    before = stage.loss(torch.Generator().manual_seed(1)).item()
    run_stage(stage, tmp_path)
    assert stage.loss(torch.Generator().manual_seed(1)).item() < before / 3


def test_a_killed_stage_ends_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_SAVE_EVERY_S", 0.0)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    stage, undisturbed = make()
    run_stage(stage, tmp_path / "a")

    def kill(done, *_):
        if done == 20:
            raise Killed

    stage, _ = make()
    with pytest.raises(Killed):
        run_stage(stage, tmp_path / "b", kill)
    stage, resumed = make()
    steps = []
    run_stage(stage, tmp_path / "b", lambda done, *_: steps.append(done))
    assert steps == [30]
    assert torch.equal(resumed.weight, undisturbed.weight)
    assert torch.equal(resumed.bias, undisturbed.bias)


def test_a_finished_stage_gives_its_result_again(tmp_path):
    stage, first = make()
    run_stage(stage, tmp_path)
    stage, again = make()
    run_stage(stage, tmp_path)
    assert torch.equal(first.weight, again.weight)


def test_a_loss_that_is_no_number_stops_it_and_keeps_the_state(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_SAVE_EVERY_S", 0.0)
    stage, _ = make(broken=11)
    with pytest.raises(FluxkilnError, match=r"probe: the loss of step 10 is nan.*learning rate"):
        run_stage(stage, tmp_path)
    stage, _ = make()
    steps = []
    run_stage(stage, tmp_path, lambda done, *_: steps.append(done))
    assert steps == [20, 30]
