"""What cannot work or is not used is said before any work: numbers, contradictions, odd names, options without use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fluxkiln.artifacts.intact import read_manifest
from fluxkiln.build import make
from fluxkiln.build.make import build, outline
from fluxkiln.cli.main import main
from fluxkiln.compile.opener import open_bundle
from fluxkiln.compile.toolchain import open_executor
from fluxkiln.errors import UsageError
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.settings import Settings
from tests.cli.test_fuse import LAYER
from tests.eager import make_bundle
from tests.hostile.forged import forge

ODD_NAMES = ("my model", "it's", '"', "größe", "-x", "..x", "a;b", "%s", "$HOME", "x" * 200)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refuse(capsys):
    """Run a command that must end at once: its one sentence."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        told = [line for line in shown.err.splitlines() if not line.startswith("[transformers]")]  # of the fixtures
        assert len(told) == 1, told
        return told[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("generate x --bundle b --seed -1", "--seed: -1 is not in the range"),
        ("generate x --bundle b --seed 100000000000000000000", "--seed: 100000000000000000000 is not in the range"),
        ("generate x --bundle b --threads 100000", "--threads: 100000 is not in the range 0<=x<=1024"),
        ("generate x --bundle b --threads -1", "--threads: -1 is not in the range"),
        ("generate x --bundle b --device 2000", "--device: 2000 is not in the range 0<=x<=1024"),
        ("generate x --bundle b --device -1", "--device: -1 is not in the range"),
        ("serve --bundle b --threads 100000", "--threads: 100000 is not in the range"),
        ("serve --bundle b --port 70000", "port 70000: it must be from 0 to 65535"),
        ("generate x --bundle b --steps 1000000000", "--steps: 1000000000 is not in the range"),
        ("compile --resume --jobs 0", "--jobs: 0 is not in the range"),
        ("calibrate tiny-dev --block -1", "--block: -1 is not in the range"),
        ("calibrate tiny-dev --seed -1", "seed -1: a seed is a whole number"),
        ("train recipe scenes-dev out --threads -1", "--threads: -1 is not in the range"),
        ("ls 127.0.0.1:1/x --transfers 100000", "--transfers: 100000 is not in the range"),
        ("ls 127.0.0.1:1/x --deadline 0", "--deadline 0.0: it must be from 1"),
        ("ls 127.0.0.1:1/x --deadline nan", "--deadline nan: it must be from 1"),
        ("judge b --seed -1", "--seed: -1 is not in the range"),
        ("judge b --steps 0", "--steps: 0 is not in the range"),
        ("judge b --guidance nan", "--guidance nan: it must be from 0 to 100"),
        ("synth tiny-dev out --seed -1", "--seed: -1 is not in the range"),
        ("build cpu --seed -1", "seed -1: a seed is a whole number from 0 to"),
        ("build cpu --jobs -1", "jobs -1: at least 1 is needed"),
        ("build trn1 --tp 0", "tp 0: at least 1 is needed"),
        ("build trn1 --tp 10001", "tp 10001: 10000 are the most"),
        ("build cpu --force", "--force lets --no-verify replace"),
        ("report build --scheme BF16", "--scheme: options of a build find the one of a target"),
    ],
)
def test_numbers_and_options(refuse, arguments, words):
    assert words in refuse(*arguments.split())


@pytest.mark.parametrize(
    ("target", "changes", "words"),
    [
        ("cpu", {"tp_degree": 4}, "--tp 4: target cpu does not cut the model over cores"),
        ("cpu", {"granularity": "whole"}, "--granularity whole: target cpu does not cut"),
        ("cpu", {"prove": True}, "--prove: target cpu casts nothing"),
        ("trn1", {"prove": True}, "--prove: target trn1 casts nothing"),
        ("trn1", {"modulation": "inline"}, "modulation 'inline': for trn1"),
        ("trn1", {"tp_degree": 7}, "tp"),
        ("trn1", {"tp_degree": 10_000}, "tp"),
        ("trn1", {"granularity": "group:0"}, "group:0"),
        ("trn1", {"granularity": "group:4"}, "there are 2 double and 3 single blocks; give at most group:3"),
        ("trn1", {"granularity": "group:" + "9" * 50}, "group:9999"),
        ("trn1", {"granularity": "group:x"}, "group:x"),
        ("bm1684x", {"scheme": "W4BF16-g48"}, "group size 48"),
        ("bm1684x", {"scheme": "W4BF16-g256"}, "group size 256"),
        ("bm1684x", {"scheme": "W4BF16-g0"}, "group size 0"),
        ("bm1684x", {"scheme": "W4BF16,head=F32,head=BF16"}, "head is given twice"),
    ],
)
def test_what_a_target_does_not_take(target, changes, words):
    """By the shapes alone: nothing is written, nor read."""
    with pytest.raises(UsageError) as caught:
        outline(Settings(target, **changes))
    assert words in str(caught.value)
    assert os.listdir() in ([], ["build"])


def test_options_of_a_build_are_for_a_target(refuse, tiny_checkpoint, tmp_path):
    folder = make_bundle(tiny_checkpoint(), tmp_path / "made")
    words = refuse("publish", folder, "oci-layout:out:v1", "--scheme", "F32")
    assert f"--scheme: {folder} is a folder, and options of a build find the one of a target; leave it out" in words
    assert not Path("out").exists()


def test_options_of_another_executor(tiny_checkpoint, tmp_path):
    bundle = open_bundle(make_bundle(tiny_checkpoint(), tmp_path / "made"))
    with pytest.raises(UsageError, match="--device 0: the executor ort does not use it; leave it out"):
        open_executor(bundle, device=0, threads=1)
    with pytest.raises(UsageError, match="--device GPU: the executor ort does not use it; leave it out"):
        open_executor(bundle, device="GPU")
    open_executor(bundle, device=None, threads=1).close()


def test_a_verified_bundle_stays(tiny_checkpoint, tmp_path, monkeypatch):
    settings = Settings("cpu", str(tiny_checkpoint().root), build_dir=tmp_path / "build", verify=False)
    prepared = make.prepare(settings)
    prepared.plan.folder.mkdir(parents=True)
    shutil.copytree(make_bundle(tiny_checkpoint(), tmp_path / "made"), prepared.plan.bundle)
    monkeypatch.setattr(make, "check_resources", lambda prepared: 1 / 0)  # where the work begins
    for parity, more, ends in (
        ({"verified": True, "passed": True}, {}, UsageError),
        ({"verified": True, "passed": False}, {}, UsageError),
        ({"verified": True, "passed": True}, {"force": True}, ZeroDivisionError),
        ({"verified": False}, {}, ZeroDivisionError),
    ):
        forge(prepared.plan.bundle, lambda document, parity=parity: document.update(parity=parity))
        with pytest.raises(ends) as caught:
            build(Settings("cpu", settings.model, build_dir=settings.build_dir, verify=False, **more))
        assert ends is ZeroDivisionError or "--no-verify would replace it" in str(caught.value)
        assert read_manifest(prepared.plan.bundle).parity == parity


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_of_folders(tiny_checkpoint, tmp_path, capsys, name):
    """As model, as LoRA and as what is written; the true name is kept."""
    import torch
    from safetensors.torch import save_file

    model = tmp_path / "from" / name
    shutil.copytree(tiny_checkpoint().root, model, copy_function=os.link)
    out, width = open_checkpoint(model).tensors["transformer"][f"{LAYER}.weight"].shape
    names = (f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight")
    Path(name).mkdir()
    style = Path(name) / f"{name[:50]}.safetensors"
    save_file(dict(zip(names, (torch.ones(1, width), torch.ones(out, 1)), strict=True)), style)
    code = main(["fuse", "--lora", str(style), "--", str(model), f"{name}.out"])
    assert code == 0, capsys.readouterr().err
    assert open_checkpoint(Path(f"{name}.out")).name == f"{name}.out"
    prepared = make.prepare(Settings("cpu", str(model), build_dir=tmp_path / "build", verify=False))
    assert prepared.checkpoint.name == name
