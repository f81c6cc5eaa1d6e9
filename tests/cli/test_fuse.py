"""`fluxkiln fuse`, and how `--lora` is read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fluxkiln.cli.main import main
from fluxkiln.errors import UsageError
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.settings import parse_loras

LAYER = "transformer_blocks.1.attn.to_q"


@pytest.fixture
def style(tmp_path, tiny_checkpoint):
    out, width = tiny_checkpoint("tiny-dev").tensors["transformer"][f"{LAYER}.weight"].shape
    tensors = {f"transformer.{LAYER}.lora_A.weight": torch.ones(1, width),
               f"transformer.{LAYER}.lora_B.weight": torch.ones(out, 1)}  # fmt: skip
    save_file(tensors, file := tmp_path / "style.safetensors")
    return file


def test_fuse(capsys, tmp_path, tiny_checkpoint, style):
    base = tiny_checkpoint("tiny-dev")
    assert main(["fuse", str(base.root), str(tmp_path / "out"), "--lora", f"{style}:0.5", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    shard = base.tensors["transformer"][f"{LAYER}.weight"].file
    assert document["model"] == str(tmp_path / "out")
    (lora,) = document["lora"]
    assert (lora["file"], lora["strength"], lora["tensors"], lora["missing"]) == (style.name, 0.5, 1, [])
    assert (document["tensors"], document["bytes"]) == (1, shard.stat().st_size)
    assert open_checkpoint(tmp_path / "out").tensors["transformer"].keys() == base.tensors["transformer"].keys()


def test_fuse_without_a_lora(capsys, tmp_path):
    assert main(["fuse", "tiny-dev", str(tmp_path / "out")]) == 2
    assert "no LoRA was named; give at least one, as FILE or FILE:STRENGTH" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter(capsys, tmp_path, tiny_checkpoint, style):
    given = ["fuse", str(tiny_checkpoint("tiny-dev").root), str(tmp_path / "one.safetensors"), "--lora", f"{style}:0.5"]
    assert main([*given, "--adapter", "mflux", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["for"], document["layers"]) == ("mflux", 1)
    assert (tmp_path / "one.safetensors").is_file()
    assert main([*given, "--adapter", "comfy"]) == 2
    assert "adapters are written for mflux and mlx_example" in capsys.readouterr().err


def test_parse_loras(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b c.safetensors", "d:0.5", "e,f"):
        Path(name).touch()
    a, b = Path("a.safetensors"), Path("b c.safetensors")
    assert parse_loras([]) == ()
    assert parse_loras([""]) == ()
    assert parse_loras(["a.safetensors"]) == ((a, 1.0),)
    assert parse_loras(["a.safetensors:0.8,b c.safetensors", "a.safetensors:-1e-1"]) == ((a, 0.8), (b, 1.0), (a, -0.1))
    assert parse_loras(["d:0.5", "e,f", "d:0.5:2"]) == ((Path("d:0.5"), 1.0), (Path("e,f"), 1.0), (Path("d:0.5"), 2.0))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("b.safetensors", "--lora b.safetensors: there is no such file; give a LoRA's .safetensors file"),
        ("b.safetensors:1", "--lora b.safetensors:1: there is no such file"),
        (".", "--lora .: is a folder; give"),
        ("a.safetensors:strong", "strength 'strong' is no number; 1 is as trained"),
        ("a.safetensors:", "strength '' is no number"),
        ("a.safetensors:nan", "strength 'nan' is no number"),
        ("a.safetensors:inf", "strength 'inf' is no number"),
    ],
)
def test_parse_loras_refuses(tmp_path, monkeypatch, text, sentence):
    monkeypatch.chdir(tmp_path)
    Path("a.safetensors").touch()
    with pytest.raises(UsageError) as caught:
        parse_loras([text])
    assert sentence in str(caught.value)
