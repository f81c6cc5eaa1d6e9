"""LoRAs as one adapter: it adds what fusing adds; for mflux by its own table of names, and for MLX's example."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fluxkiln.compile.toolchains.mlx.environment import mlx_environment, run_mlx
from fluxkiln.errors import CheckpointError, UsageError
from fluxkiln.export.adapter import write_adapter
from fluxkiln.export.checkpoint import read_tensor
from fluxkiln.export.lora import with_loras

DOUBLE, SINGLE = "transformer_blocks.1.attn.to_q", "single_transformer_blocks.0.proj_mlp"
MATCHED = """
import json, re, sys
from mflux.models.flux.weights.flux_lora_mapping import FluxLoRAMapping
names = json.load(open(sys.argv[1]))
known = [p for t in FluxLoRAMapping.get_mapping() for p in (*t.possible_up_patterns, *t.possible_down_patterns)]
patterns = [re.compile(re.escape(p).replace(re.escape("{block}"), r"\\d+")) for p in known]
json.dump([name for name in names if not any(p.fullmatch(name) for p in patterns)], open(sys.argv[2], "w"))
"""


def write_lora(path, checkpoint, layers, rank, **more):
    """Random pairs of rank `rank` with an alpha of 1."""
    random, tensors = torch.Generator().manual_seed(rank), {}
    for layer in layers:
        out, width = checkpoint.tensors["transformer"][f"{layer}.weight"].shape
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(rank, width, generator=random)
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(out, rank, generator=random)
        tensors[f"transformer.{layer}.alpha"] = torch.tensor(1.0)
    save_file(tensors | more, path)
    return path


@pytest.fixture
def changed(tiny_checkpoint, tmp_path):
    """tiny-dev with two LoRAs, of which both change one layer."""
    checkpoint = tiny_checkpoint()
    files = (write_lora(tmp_path / "a.safetensors", checkpoint, (DOUBLE, SINGLE), 2),
             write_lora(tmp_path / "b.safetensors", checkpoint, (DOUBLE,), 3))  # fmt: skip
    return with_loras(checkpoint, [(files[0], 0.5), (files[1], -1.0)])


def added(checkpoint, layer):
    """What the LoRAs add to a layer, by what reads it changed; of float32 numbers, not of what is stored."""
    ref = checkpoint.tensors["transformer"][f"{layer}.weight"]
    total = torch.zeros(ref.shape)
    for piece, (_, strength) in zip(ref.change.pieces, ref.change.loras, strict=True):
        total += strength * piece.scale * torch.from_numpy(piece.delta.rows(piece.rows))
    stored = torch.from_numpy(read_tensor(ref).astype("f4")) - torch.from_numpy(read_tensor(ref.stored).astype("f4"))
    torch.testing.assert_close(stored, total, rtol=0, atol=0.02)  # a bfloat16 of the sum
    return total


def test_mflux_gets_the_sum_by_names_that_it_knows(changed, tmp_path):
    assert write_adapter(tmp_path / "out.safetensors", changed, "mflux") == 2
    found = load_file(tmp_path / "out.safetensors")
    for layer, rank in ((DOUBLE, 5), (SINGLE, 2)):
        down, up = (found[f"transformer.{layer}.lora_{place}.weight"] for place in "AB")
        assert down.shape[0] == up.shape[1] == rank
        torch.testing.assert_close(up @ down, added(changed, layer))


@pytest.mark.skipif(mlx_environment().find() is None, reason="MLX is not installed: make env-mlx")
def test_mflux_knows_every_layer_of_a_block(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint()
    layers = [name.removesuffix(".weight") for name, ref in checkpoint.tensors["transformer"].items()
              if len(ref.shape) == 2 and "transformer_blocks" in name]  # fmt: skip
    lora = write_lora(tmp_path / "every.safetensors", checkpoint, layers, 1)
    write_adapter(tmp_path / "out.safetensors", with_loras(checkpoint, [(lora, 1.0)]), "mflux")
    names = [*load_file(tmp_path / "out.safetensors"), "transformer.transformer_blocks.0.attn.to_x.lora_A.weight"]
    (tmp_path / "names.json").write_text(json.dumps(names))
    (tmp_path / "matched.py").write_text(MATCHED)
    run_mlx([str(tmp_path / name) for name in ("names.json", "lost.json")], tmp_path / "log", tmp_path / "matched.py")
    assert json.loads((tmp_path / "lost.json").read_text()) == names[-1:]


def test_the_example_gets_zeros_for_layers_that_it_joins(changed, tmp_path):
    assert write_adapter(tmp_path / "out.safetensors", changed, "mlx_example") == 2
    found = load_file(tmp_path / "out.safetensors")
    joined = {
        "double_blocks.1.img_attn.qkv": [DOUBLE, None, None],
        "single_blocks.0.linear1": [None, None, None, SINGLE],
    }
    assert {name.rpartition(".")[0] for name in found} == joined.keys()
    for name, layers in joined.items():
        made = (found[f"{name}.lora_a"] @ found[f"{name}.lora_b"]).T
        prefix = DOUBLE.removesuffix("to_q") if "double" in name else SINGLE.replace("proj_mlp", "attn.")
        rows = [added(changed, layer) if layer else torch.zeros_like(
                torch.from_numpy(read_tensor(changed.tensors["transformer"][f"{prefix}to_{one}.weight"]).astype("f4")))
                for layer, one in zip(layers, "qkv_", strict=False)]  # fmt: skip
        torch.testing.assert_close(made, torch.cat(rows))
    with safe_open(tmp_path / "out.safetensors", "np") as opened:
        assert opened.metadata() == {"lora_rank": "5", "lora_blocks": "-1"}


def test_what_is_no_adapter_is_refused(tiny_checkpoint, changed, tmp_path):
    checkpoint, out = tiny_checkpoint(), tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match="--adapter comfy: adapters are written for mflux and mlx_example"):
        write_adapter(out, changed, "comfy")
    outside = write_lora(tmp_path / "outside.safetensors", checkpoint, ("x_embedder",), 1)
    with pytest.raises(
        CheckpointError, match=r"x_embedder.weight of the transformer is no layer of a block.*; fuse it"
    ):
        write_adapter(out, with_loras(checkpoint, [(outside, 1.0)]), "mflux")
    height = checkpoint.tensors["transformer"][f"{DOUBLE}.weight"].shape[0]
    lengths = {f"transformer.{DOUBLE}.lora_magnitude_vector": torch.ones(height)}
    dora = write_lora(tmp_path / "dora.safetensors", checkpoint, (DOUBLE,), 1, **lengths)
    with pytest.raises(
        CheckpointError, match="is not changed by a pair of matrices but by a LoHa, LoKr or DoRA; fuse it"
    ):
        write_adapter(out, with_loras(checkpoint, [(dora, 1.0)]), "mlx_example")
    assert not out.exists()
    out.touch()
    with pytest.raises(UsageError, match=r"out\.safetensors is there already; name a new file"):
        write_adapter(out, changed, "mflux")
