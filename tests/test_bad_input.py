"""What a user can get wrong: one sentence with value, rule and remedy, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fluxkiln.cli.main import main
from fluxkiln.compile.toolchains.tpu_mlir.environment import TPU_MLIR_ROOT_VARIABLE
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.synth import synthesize
from fluxkiln.patches.flux1 import presets as synth_presets

SHARD = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
TENSOR = "transformer_blocks.1.attn.to_q.weight"


@pytest.fixture
def refuse(capsys, monkeypatch, tmp_path):
    """Run a command that must fail: its exit code and its one sentence. Nothing but store and models may be left."""
    monkeypatch.delenv("FLUXKILN_STORE", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert shown.out == ""
        *told, last = shown.err.splitlines()
        assert last.startswith("error: "), shown.err
        assert not any(line.startswith("error: ") for line in told)
        left = {path.name for path in (tmp_path / "build").glob("*")}
        assert left <= {"store", "models"}, left
        assert not list((tmp_path / "build" / "store" / "tmp").glob("*"))
        assert not list(tmp_path.rglob("*.partial"))
        return code, last.removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ("build cpu --model tiny-deb", 2, "'tiny-deb' is no model: neither an existing folder"),
        ("build cpu --model tiny-dev --statistics fluks", 2, "no statistics are called 'fluks'; tiny-dev has uniform"),
        ("build cpu --model . --statistics flux", 2, "--statistics flux: . is no synthetic preset and has its own"),
        ("plan cpu --model scenes-dev --statistics flux", 2, "--statistics flux: scenes-dev is trained and has its"),
        ("calibrate tiny-dev --statistics fluks", 2, "no statistics are called 'fluks'"),
        ("build tpu", 2, "no target is called 'tpu'; there are bm1684x, bm1684x2, bm1688, cpu"),
        ("build cpu --scheme W3", 2, "no scheme is called 'W3'; there are F32, F16, BF16"),
        ("build cpu --scheme W8BF16", 2, "target cpu cannot store W8BF16; it has BF16"),
        ("build bm1684x --scheme W4BF16-g48", 2, "group size 48: 32, 64, 128 are supported"),
        ("build bm1684x --scheme W8BF16-g32", 2, "only W4BF16 has groups"),
        ("build cpu --scheme W4BF16,doubel=F32", 2, "no kind of part is called 'doubel'; there are clip"),
        ("build cpu --scheme BF16,head=W9", 2, "no scheme is called 'W9'"),
        ("build cpu --size 1000x1024", 2, "width 1000 is not a positive multiple of 16; the nearest legal"),
        ("build cpu --size 1024x1000", 2, "height 1000 is not a positive multiple of 16"),
        ("build cpu --size 0", 2, "is not a positive multiple of 16"),
        ("build cpu --size big", 2, "size 'big' is not WIDTHxHEIGHT in pixels"),
        ("build cpu --tokens 513", 2, "513 text tokens: FLUX.1-dev was trained with at most 512; use TOKENS=512"),
        ("build cpu --model tiny-schnell --tokens 257", 2, "FLUX.1-schnell was trained with at most 256"),
        ("build cpu --tokens 0", 2, "tokens 0: at least 1 is needed"),
        ("build cpu --vae big", 2, "no VAE is called 'big'; there are kl"),
        ("build cpu --jobs 0", 2, "jobs 0: at least 1 is needed"),
        ("build cpu --steps 0", 2, "steps 0: at least 1 is needed"),
        ("build cpu --jobs many", 2, "'many' is not a valid integer"),
        ("build cpu --lora style.safetensors", 2, "--lora style.safetensors: there is no such file; give a LoRA's"),
        ("plan cpu --model tiny-deb", 2, "'tiny-deb' is no model"),
        ("export tiny-dev out --kind doubel", 2, "no kind of part is called 'doubel'"),
    ],
)  # fmt: skip
def test_options(refuse, arguments, code, sentence):
    found = refuse(*arguments.split())
    assert found[0] == code
    assert sentence in found[1]


def test_no_compiler(refuse, monkeypatch, tmp_path):
    monkeypatch.setenv(TPU_MLIR_ROOT_VARIABLE, str(tmp_path / "nowhere"))
    code, sentence = refuse("build", "bm1684x")
    assert code == 5
    assert f"TPU-MLIR, which makes it, is not installed in {tmp_path}/nowhere; run make env-tpu-mlir, name" in sentence


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file, which may be a hard link to the pristine one."""
    data = change(path.read_bytes())
    path.unlink()
    path.write_bytes(data)


def set_header(path: Path, tensor: str, **changes: object) -> None:
    def change(raw: bytes) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        header[tensor].update(changes)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + size :]

    rewrite(path, change)


def rename_in_index(model: Path) -> None:
    def change(raw: bytes) -> bytes:
        return raw.replace(TENSOR.encode(), b"transformer_blocks.1.attn.to_other.weight")

    rewrite(model / INDEX, change)


def transpose(model: Path) -> None:
    ref = open_checkpoint(model).tensors["transformer"]["transformer_blocks.1.ff.net.0.proj.weight"]
    set_header(ref.file, ref.name, shape=list(ref.shape[::-1]))


def put(bits: int) -> Callable[[Path], None]:
    """A bfloat16 with these bits as third weight of TENSOR."""

    def damage(model: Path) -> None:
        ref = open_checkpoint(model).tensors["transformer"][TENSOR]

        def change(raw: bytes) -> bytes:
            place = ref.offset + 4
            return raw[:place] + np.uint16(bits).tobytes() + raw[place + 2 :]

        rewrite(ref.file, change)

    return damage


def empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()
    (model / "readme.txt").write_text("nothing here")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no checkpoint": (empty, "is no diffusers checkpoint: model_index.json is missing; give a folder that"),
    "missing shard": (lambda model: (model / SHARD).unlink(), "-00002-of-00003.safetensors is missing in"),
    "truncated shard": (lambda model: rewrite(model / SHARD, lambda raw: raw[:-2]), "it is truncated"),
    "shortened shard": (lambda model: rewrite(model / SHARD, lambda raw: raw[:4]), "has at least 8"),
    "index of another shard": (rename_in_index, "index and shard are of different checkpoints; fetch both again"),
    "wrong shape": (transpose, "transformer_blocks.1.ff.net.0.proj.weight"),
    "NaN": (put(0x7FC0), f"{TENSOR} in "),
    "Inf": (put(0xFF80), f"{TENSOR} in "),
    "no tiny VAE": (lambda model: shutil.rmtree(model / "vae_tiny"), "has no folder vae_tiny, --vae tiny needs it"),
    "no VAE": (lambda model: shutil.rmtree(model / "vae"), "vae/config.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoints(refuse, tiny_checkpoint, tmp_path, damage):
    model = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint().root, model, copy_function=os.link)
    change, expected = DAMAGES[damage]
    change(model)
    for command in ("plan", "build"):
        code, sentence = refuse(command, "cpu", "--model", model, "--vae", "tiny")
        assert code == 1
        assert expected in sentence
        if damage in ("NaN", "Inf"):
            assert "is NaN or Inf at [0, 2], weights must be finite" in sentence


@pytest.mark.parametrize("target", ["cpu", pytest.param("bm1684x", marks=pytest.mark.tpu_mlir)])
def test_group_that_does_not_divide(refuse, monkeypatch, tmp_path, target):
    tiny = synth_presets.PRESETS["tiny-dev"]
    configs = dict(tiny.configs)
    configs["text_encoder_2"] = {**tiny.configs["text_encoder_2"], "d_model": 96}
    configs["transformer"] = {**tiny.configs["transformer"], "joint_attention_dim": 96}
    monkeypatch.setitem(synth_presets.PRESETS, "narrow", replace(tiny, name="narrow", configs=configs))
    model = synthesize("narrow", tmp_path / "model")
    sizes = ("--model", model, "--size", "32x32", "--tokens", "16")
    if target == "cpu":
        code, sentence = refuse("build", target, *sizes, "--scheme", "W4BF16")
        assert code == 2
        assert sentence == (
            "group size 64 does not divide the 96 input channels of encoder.block.0.layer.0.SelfAttention.q.weight; "
            "use W4BF16-g32"
        )
        assert main(["plan", target, *map(str, sizes), "--scheme", "W4BF16-g32"]) == 0
        return
    # no group size helps: the compiler would leave rows of such a weight out of the codes
    assert "SelfAttention.o.weight has 96 output channels" in refuse("build", target, *sizes, "--scheme", "W4BF16")[1]
    for command in ("plan", "build"):
        code, sentence = refuse(command, target, *sizes, "--scheme", "W4BF16-g32")
        assert code == 2
        assert "SelfAttention.o.weight has 96 output channels; bm1684x takes codes of a weight with a mult" in sentence
        scheme = sentence.partition("--scheme '")[2].partition("'")[0].replace("SCHEME", "W4BF16-g32")
    assert main(["plan", target, *map(str, sizes), "--scheme", scheme]) == 0
