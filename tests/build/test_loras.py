"""A build with a LoRA: its own folder, no checkpoint written, parity, and where the LoRA is named."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from fluxkiln.artifacts.intact import read_manifest
from fluxkiln.build.make import build, lora_label, plan, prepare
from fluxkiln.build.verification import record, verify
from fluxkiln.compile.tensors import part_refs
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.digests import digest_json
from fluxkiln.errors import CheckpointError
from fluxkiln.export.checkpoint import read_tensor
from fluxkiln.export.lora_file import digest_lora
from fluxkiln.progress import Laps, Silent
from fluxkiln.settings import Settings

LAYER = "transformer_blocks.1.attn.to_q"


class Told(Silent):
    """Keeps what is told."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    return Settings(
        "cpu", "tiny-dev", size=((32, 32),), tokens=(16,), components=("transformer",), build_dir=folder / "build"
    )


@pytest.fixture(scope="module")
def with_lora(settings, tiny_checkpoint, tmp_path_factory):
    out, width = tiny_checkpoint("tiny-dev").tensors["transformer"][f"{LAYER}.weight"].shape
    drawn = torch.Generator().manual_seed(3)
    tensors = {f"transformer.{LAYER}.lora_A.weight": torch.randn(4, width, generator=drawn) / width**0.5,
               f"transformer.{LAYER}.lora_B.weight": torch.randn(out, 4, generator=drawn)}  # fmt: skip
    save_file(tensors, file := tmp_path_factory.mktemp("loras") / "style.safetensors")
    return replace(settings, loras=((file, 0.5),))


@pytest.fixture(scope="module")
def plain(settings):
    return build(settings)


@pytest.fixture(scope="module")
def changed(plain, with_lora):
    return build(with_lora)


def test_parity_holds_with_other_weights(plain, changed):
    assert plain.parity["passed"]
    assert changed.parity["passed"]
    assert plain.bundle != changed.bundle
    prints = {read_manifest(result.bundle).checkpoint.fingerprint for result in (plain, changed)}
    assert len(prints) == 2


def test_no_checkpoint_is_written(changed, settings):
    """What is below the build folder: the synthetic checkpoint, and per part the tensors that its graph has."""
    assert [path.name for path in (settings.build_dir / "models").iterdir()] == ["synth"]
    files = {file.path: file for file in read_manifest(changed.bundle).files if file.role == "weights"}
    assert files["onnx/weights/double.01.safetensors"]
    tensors = load_file(changed.bundle / "onnx" / "weights" / "double.01.safetensors")
    recorded = prepare(settings).checkpoint.tensors["transformer"]
    assert {name for name, tensor in tensors.items() if tensor.tobytes() != read_tensor(recorded[name]).tobytes()} == {
        f"{LAYER}.weight"
    }


def test_gates_tell_the_lora(plain, changed, settings, with_lora, tmp_path):
    """A build without it misses the reference run of the changed checkpoint, where the LoRA is and nowhere else."""
    without, having = prepare(settings), prepare(with_lora)
    recording = record(having)
    context = without.checkpoint, without.plan, without.cache
    made = toolchain_of(without.plan.target).make(*context, settings, Silent(), Laps())
    parity = verify(without, made, recording, tmp_path, Silent())
    assert {row.part for row in parity.ladder.rows if not row.passed} == {"double.01"}
    assert {row.part for row in parity.ladder.rows if row.passed} >= {"double.00", "single.02", "tail"}


def test_one_tensor_differs(plain, changed, settings, with_lora):
    before, after = (prepare(one).checkpoint.digests["transformer"] for one in (settings, with_lora))
    assert [name for name in before if before[name] != after[name]] == [f"{LAYER}.weight"]


def test_lora_is_named(plain, changed, with_lora):
    file, strength = with_lora.loras[0]
    told = [{"file": "style.safetensors", "sha256": digest_lora(file), "strength": strength}]
    assert json.loads((changed.bundle / "build.json").read_text())["lora"] == told
    assert read_manifest(changed.bundle).settings["lora"] == told
    report = json.loads((changed.bundle.parent / "report.json").read_text())
    assert report["provenance"]["LoRA style.safetensors"] == f"sha256:{told[0]['sha256']} x 0.5"
    assert "lora" not in json.loads((plain.bundle / "build.json").read_text())
    assert "lora" not in read_manifest(plain.bundle).settings


def test_what_matched_is_told(changed, with_lora):
    told = Told()
    prepared = prepare(with_lora, told)
    assert list(prepared.changes) == ["double.01"]
    assert 0.01 < prepared.changes["double.01"] < 10
    lines = prepared.lora_lines()
    assert lines["LoRA style.safetensors x 0.5"] == "changes 1 tensors, all of its layers were found"
    assert told.notes == [f"{what}: {how}" for what, how in lines.items()]
    report = json.loads((changed.bundle.parent / "report.json").read_text())
    assert report["loras"] == lines
    assert "double.01 changes by" in (changed.bundle.parent / "report.html").read_text()


def test_lengths_are_measured_once(changed, with_lora, monkeypatch):
    monkeypatch.setattr("fluxkiln.build.make.measure_changes", None)
    assert prepare(with_lora).changes


def test_nothing_to_do(changed, with_lora):
    again = build(with_lora)
    assert again.nothing_to_do
    assert again.bundle == changed.bundle


def test_plan_knows_what_is_there(changed, with_lora):
    stronger = replace(with_lora, loras=((with_lora.loras[0][0], 0.75),))
    planned, known = plan(stronger), plan(with_lora)
    assert planned["name"] != changed.name
    assert known["name"] == changed.name
    assert 0 < known["totals"]["to_do"] <= planned["totals"]["to_do"]


def test_another_strength_is_another_digest_of_the_touched_part(settings, with_lora):
    """Everything that is kept of a part is found by the digests of its tensors."""
    stronger = replace(with_lora, loras=((with_lora.loras[0][0], 0.75),))
    found = []
    for one in (settings, with_lora, stronger):
        made = prepare(one)
        found.append({part.name: digest_json({ref.name: made.checkpoint.digests[part.folder][ref.name] for ref in
                      part_refs(made.checkpoint, made.plan, part)}) for part in made.plan.parts})  # fmt: skip
    assert all(len({one["double.01"] for one in found}) == 3 for _ in found)
    assert all(len({one[name] for one in found}) == 1 for name in found[0] if name != "double.01")


def test_label(settings, with_lora, tmp_path):
    file = with_lora.loras[0][0]
    labels = {lora_label(replace(settings, loras=loras)) for loras in ((), ((file, 0.5),), ((file, 0.25),))}
    assert "" in labels
    assert len(labels) == 3
    (moved := tmp_path / "moved.safetensors").write_bytes(file.read_bytes())
    assert lora_label(replace(settings, loras=((moved, 0.5),))) == lora_label(with_lora)


def test_lora_without_the_transformer(with_lora):
    with pytest.raises(CheckpointError, match=r"none of its 1 layers .* is in the vae"):
        plan(replace(with_lora, components=("vae",)))
