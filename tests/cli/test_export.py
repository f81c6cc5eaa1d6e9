"""`fluxkiln export --whole` and `--part`: what is written, what is told, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxkiln.export import fingerprint
from fluxkiln.files import FileState
from fluxkiln.patches.flux1.kinds import MODULATION_ROWS

SIZE = ("--size", "32x32", "--tokens", "16")


@pytest.fixture
def model(fluxkiln):
    assert fluxkiln("synth", "tiny-dev", "model").code == 0
    return "model"


def test_whole_and_part(fluxkiln, model):
    run = fluxkiln("export", model, "out", "--whole", "text_encoder_2", "--part", "t5_bl*1", *SIZE, "--json")
    assert run.code == 0, run.err
    found = run.document
    assert [graph["file"] for graph in found["graphs"]] == ["text_encoder_2.onnx", "t5_block.01.onnx"]
    whole, part = found["graphs"]
    assert whole["parts"] == ["t5_embed", "t5_block.00", "t5_block.01", "t5_final"]
    assert whole["tensors"] == 20
    assert whole["outputs"] == [{"name": "last_hidden_state", "dtype": "float", "shape": [1, 16, 128]}]
    assert part["parts"] == ["t5_block.01"]
    assert 0 < part["bytes_referenced"] < whole["bytes_referenced"]
    assert found["weight_bytes_written"] == 0
    assert found["bytes_written"] == sum(Path("out", graph["file"]).stat().st_size for graph in found["graphs"])
    assert found["cpu_seconds"] > 0
    assert found["shapes"] == {"height": 32, "width": 32, "tokens": 16}
    assert all(Path("out", file).is_file() for file in found["weights"])
    assert "graph: 2 done" in run.err


def test_hoisted_form(fluxkiln, model):
    run = fluxkiln("export", model, "out", "--modulation", "hoisted", "--part", "tail*", *SIZE, "--json")
    assert run.code == 0, run.err
    once, step = run.document["graphs"]
    assert [once["file"], step["file"]] == ["tail_modulation.onnx", "tail.onnx"]
    [all_steps], step_row = once["outputs"], step["inputs"][1]
    assert (all_steps["name"], step_row["name"]) == ("modulation", "modulation")
    assert (all_steps["shape"][0], step_row["shape"][0]) == (MODULATION_ROWS, 1)
    assert all_steps["shape"][1:] == step_row["shape"][1:]


def test_for_people(fluxkiln, model):
    run = fluxkiln("export", model, model, "--part", "t5_final", *SIZE)
    assert run.code == 0, run.err
    lines = run.out.splitlines()
    assert lines[1].split() == ["t5_final.onnx", "1", "1", "256", "B", "0", "B", *lines[1].split()[-2:]]
    assert "model: 1 graph; weights: 1 file (in place), 0 B written; " in lines[-1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--whole", "unet"),
            "no component is called 'unet'; there are text_encoder, text_encoder_2, transformer, vae",
        ),
        (("--whole", "vae", "--kind", "tail"), "--kind chooses templates"),
        (("--part", "tail", "--format", "pt2"), "write one format, onnx23 or onnx17, not pt2"),
        (("--part", "tail", "--format", "onnx17", "--format", "onnx23"), "not onnx17 and onnx23"),
        (("--kind", "double_modulated"), "kind double_modulated is not there with --modulation inline"),
        (("--kind", "head", "--modulation", "hoisted"), "use --modulation inline"),
        (("--part", "tail", "--modulation", "lifted"), "no form of the transformer is called 'lifted'"),
        (("--copy",), "--copy is for the weights of --whole and --part"),
    ],
)
def test_options_that_do_not_go_together(options, sentence, fluxkiln):
    """Refused before the model is made."""
    run = fluxkiln("export", "tiny-dev", "out", *options)
    assert run.code == 2
    assert sentence in run.err
    assert not list(Path.cwd().iterdir())


def test_part_that_does_not_exist(fluxkiln, model):
    run = fluxkiln("export", model, "out", "--part", "double.7*", "--json")
    assert run.code == 2
    assert "no part is called 'double.7*'; this model has clip," in run.document["error"]["message"]
    assert not Path("out").exists()


def test_checkpoint_that_is_gone_before_the_end(fluxkiln, model, monkeypatch):
    sizes = iter(range(100))
    monkeypatch.setattr(fingerprint, "_stat_shard", lambda file: FileState(next(sizes), 0, 0, 0, 0))
    run = fluxkiln("export", model, "out", "--part", "t5_final", *SIZE, "--json")
    assert run.code == 1
    assert json.loads(run.out)["error"]["kind"] == "CheckpointError"
    assert [path.name for path in Path.cwd().iterdir()] == ["model"]
