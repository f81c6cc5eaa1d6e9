"""A build with a LoRA: its own folder, the fused checkpoint made once, parity, and where the LoRA is named."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from fluxkiln.artifacts.intact import read_manifest
from fluxkiln.build.make import build, lora_label, plan, prepare
from fluxkiln.build.verification import record, verify
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.errors import UsageError
from fluxkiln.export.lora import digest_lora
from fluxkiln.progress import Laps, Silent
from fluxkiln.settings import Settings

LAYER = "transformer_blocks.1.attn.to_q"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    return Settings(
        "cpu", "tiny-dev", size=(32, 32), tokens=16, components=("transformer",), build_dir=folder / "build"
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
def fused(plain, with_lora):
    return build(with_lora)


def weight_files(bundle):
    return {file.path: file.sha256 for file in read_manifest(bundle).files if file.role == "weights"}


def test_parity_holds_with_other_weights(plain, fused, tiny_checkpoint):
    shard = tiny_checkpoint("tiny-dev").tensors["transformer"][f"{LAYER}.weight"].file.name
    assert plain.parity["passed"]
    assert fused.parity["passed"]
    assert plain.bundle != fused.bundle
    before, after = weight_files(plain.bundle), weight_files(fused.bundle)
    assert before.keys() == after.keys()
    # The one shard that the layer is in.
    assert [name.rpartition("/")[2] for name in before if before[name] != after[name]] == [shard]
    prints = {read_manifest(result.bundle).checkpoint.fingerprint for result in (plain, fused)}
    assert len(prints) == 2


def test_gates_tell_the_lora(plain, fused, settings, with_lora, tmp_path):
    """A build without it misses the reference run of the fused checkpoint, where the LoRA is and nowhere else."""
    without, having = prepare(settings), prepare(with_lora)
    recording = record(having)
    context = without.checkpoint, without.plan, without.cache
    made = toolchain_of(without.plan.target).make(*context, settings, Silent(), Laps())
    parity = verify(without, made, recording, tmp_path, Silent())
    assert {row.part for row in parity.ladder.rows if not row.passed} == {"double.01"}
    assert {row.part for row in parity.ladder.rows if row.passed} >= {"double.00", "single.02", "tail"}


def test_one_tensor_differs(plain, fused, settings, with_lora):
    before, after = (prepare(one).checkpoint.digests["transformer"] for one in (settings, with_lora))
    assert [name for name in before if before[name] != after[name]] == [f"{LAYER}.weight"]


def test_lora_is_named(plain, fused, with_lora):
    file, strength = with_lora.loras[0]
    told = [{"file": "style.safetensors", "sha256": digest_lora(file), "strength": strength}]
    assert json.loads((fused.bundle / "build.json").read_text())["lora"] == told
    assert read_manifest(fused.bundle).settings["lora"] == told
    report = json.loads((fused.bundle.parent / "report.json").read_text())
    assert report["provenance"]["LoRA style.safetensors"] == f"sha256:{told[0]['sha256']} x 0.5"
    assert "lora" not in json.loads((plain.bundle / "build.json").read_text())
    assert "lora" not in read_manifest(plain.bundle).settings


def test_made_once(fused, with_lora):
    again = build(with_lora)
    assert again.nothing_to_do
    assert again.bundle == fused.bundle
    assert len(list((with_lora.build_dir / "models" / "lora").iterdir())) == 1


def test_plan_writes_no_checkpoint(fused, with_lora):
    stronger = replace(with_lora, loras=((with_lora.loras[0][0], 0.75),))
    planned = plan(stronger)
    assert planned["name"] != fused.name
    assert planned["totals"]["to_do"] > 0
    assert len(list((with_lora.build_dir / "models" / "lora").iterdir())) == 1
    known = plan(with_lora)
    assert known["name"] == fused.name
    assert known["totals"]["to_do"] < planned["totals"]["to_do"]
    assert planned["totals"]["disk_bytes"] > known["totals"]["disk_bytes"]


def test_label(settings, with_lora, tmp_path):
    file = with_lora.loras[0][0]
    labels = {lora_label(replace(settings, loras=loras)) for loras in ((), ((file, 0.5),), ((file, 0.25),))}
    assert "" in labels
    assert len(labels) == 3
    (moved := tmp_path / "moved.safetensors").write_bytes(file.read_bytes())
    assert lora_label(replace(settings, loras=((moved, 0.5),))) == lora_label(with_lora)


def test_lora_without_the_transformer(with_lora):
    with pytest.raises(UsageError, match="LoRAs go into the transformer, and only vae is built"):
        plan(replace(with_lora, components=("vae",)))
