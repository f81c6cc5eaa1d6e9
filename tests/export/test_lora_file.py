"""The forms that LoRA files have, read to the pairs of diffusers' own names and fused."""

import json

import pytest
import torch

from fluxkiln.errors import CheckpointError
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.lora import fuse_lora
from fluxkiln.export.lora_file import METADATA_KEY, read_lora
from fluxkiln.export.synth import unwritten_checkpoint
from tests.export.loras import K, Q, V, added, bits, exact, peft, weights, write


def test_kohya_qkv_is_split(tmp_path, base, shapes):
    out, width = shapes[f"{Q}.weight"]
    down, up = exact(4, width, 1), exact(3 * out, 4, 2)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    file = write(tmp_path / "kohya.safetensors", {
        f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0),
    })  # fmt: skip
    fuse_lora(base, [(file, 2.0)], tmp_path / "fused")
    old, new = weights(base), weights(tmp_path / "fused")
    for i, layer in enumerate((Q, K, V)):
        wanted = added(old[f"{layer}.weight"], (down, up[i * out : (i + 1) * out], 2.0 / 4))
        assert torch.equal(bits(new[f"{layer}.weight"]), bits(wanted)), layer


def product(pieces, tensor):
    """scale * up @ down of a tensor."""
    piece = next(piece for piece in pieces if piece.tensor == tensor)
    return piece.scale * torch.from_numpy(piece.delta.rows(piece.rows))


def test_kohya_linear1_and_final_layer(tmp_path):
    single, final = "lora_unet_single_blocks_7_linear1", "lora_unet_final_layer_adaLN_modulation_1"
    down, up = exact(2, 3072, 1), exact(3 * 3072 + 12288, 2, 2)
    ends = exact(2, 3072, 3), exact(2 * 3072, 2, 4)
    file = write(tmp_path / "kohya.safetensors", {
        f"{single}.lora_down.weight": down, f"{single}.lora_up.weight": up, f"{single}.alpha": torch.tensor(0.5),
        f"{final}.lora_down.weight": ends[0], f"{final}.lora_up.weight": ends[1], f"{final}.alpha": torch.tensor(1.0),
    })  # fmt: skip
    pieces = read_lora(file, unwritten_checkpoint("full-dev", ("transformer",))).pieces
    block = "single_transformer_blocks.7"
    names = [f"{block}.attn.to_k", f"{block}.attn.to_q", f"{block}.attn.to_v", f"{block}.proj_mlp", "norm_out.linear"]
    assert [piece.tensor for piece in pieces] == sorted(f"{name}.weight" for name in names)
    wanted = 0.25 * (up @ down)
    for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
        assert torch.equal(product(pieces, f"{block}.{name}.weight"), wanted[3072 * i : 3072 * (i + 1)])
    assert torch.equal(product(pieces, f"{block}.proj_mlp.weight"), wanted[3 * 3072 :])
    # Black Forest Labs have the shift first, diffusers the scale; the alpha, which the converter drops, counts.
    shift, scale = (0.5 * (ends[1] @ ends[0])).chunk(2)
    assert torch.equal(product(pieces, "norm_out.linear.weight"), torch.cat([scale, shift]))


def test_xlabs(tmp_path, base, shapes):
    out, width = shapes[f"{Q}.weight"]
    down, up, proj = exact(4, width, 1), exact(3 * out, 4, 2), (exact(4, out, 3), exact(width, 4, 4))
    block = "double_blocks.0.processor"
    file = write(tmp_path / "xlabs.safetensors", {
        f"{block}.qkv_lora1.down.weight": down, f"{block}.qkv_lora1.up.weight": up,
        f"{block}.proj_lora2.down.weight": proj[0], f"{block}.proj_lora2.up.weight": proj[1],
    })  # fmt: skip
    fuse_lora(base, [(file, 1.0)], tmp_path / "fused")
    old, new = weights(base), weights(tmp_path / "fused")
    for i, layer in enumerate((Q, K, V)):
        assert torch.equal(new[f"{layer}.weight"], added(old[f"{layer}.weight"], (down, up[i * out :][:out], 1.0)))
    name = "transformer_blocks.0.attn.to_add_out.weight"
    assert torch.equal(new[name], added(old[name], (*proj, 1.0)))


def test_control_lora_is_read_and_does_not_fit(tmp_path, base):
    tensors = {}

    def layer(name, out, width):
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = torch.ones(2, width), torch.ones(out, 2)

    for name in ("time_in", "vector_in", "guidance_in"):
        layer(f"{name}.in_layer", 3072, 768 if name == "vector_in" else 256)
        layer(f"{name}.out_layer", 3072, 3072)
    layer("txt_in", 3072, 4096)
    layer("img_in", 3072, 128)
    layer("final_layer.linear", 64, 3072)
    layer("final_layer.adaLN_modulation.1", 6144, 3072)
    for i in range(19):
        for side in ("img", "txt"):
            layer(f"double_blocks.{i}.{side}_mod.lin", 18432, 3072)
            layer(f"double_blocks.{i}.{side}_attn.qkv", 9216, 3072)
            layer(f"double_blocks.{i}.{side}_attn.proj", 3072, 3072)
            layer(f"double_blocks.{i}.{side}_mlp.0", 12288, 3072)
            layer(f"double_blocks.{i}.{side}_mlp.2", 3072, 12288)
            for norm in ("query", "key"):
                tensors[f"double_blocks.{i}.{side}_attn.norm.{norm}_norm.scale"] = torch.full((128,), 2.0)
    for i in range(38):
        layer(f"single_blocks.{i}.modulation.lin", 9216, 3072)
        layer(f"single_blocks.{i}.linear1", 21504, 3072)
        layer(f"single_blocks.{i}.linear2", 3072, 15360)
        for norm in ("query", "key"):
            tensors[f"single_blocks.{i}.norm.{norm}_norm.scale"] = torch.full((128,), 2.0)
    tensors["double_blocks.3.img_attn.proj.lora_B.bias"] = torch.arange(3072.0)
    down, up = exact(2, 3072, 1), exact(6144, 2, 2)
    tensors |= {f"final_layer.adaLN_modulation.1.lora_{half}.weight": t for half, t in (("A", down), ("B", up))}
    file = write(tmp_path / "control.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"x_embedder.weight as \[3072, 128\].* or a control LoRA"):
        read_lora(file, full := unwritten_checkpoint("full-dev", ("transformer",)))
    for name in ("img_in.lora_A.weight", "img_in.lora_B.weight"):
        tensors[name] = tensors[name][:, :64]
    file = write(tmp_path / "control.safetensors", tensors)
    pieces = {piece.tensor: piece for piece in read_lora(file, full).pieces}
    assert pieces["transformer_blocks.3.attn.norm_added_q.weight"].replaces
    bias = pieces["transformer_blocks.3.attn.to_out.0.bias"]
    assert bias.delta.values().tolist() == list(range(3072))
    assert pieces["single_transformer_blocks.37.proj_mlp.weight"].shape == (12288, 3072)
    shift, scale = (up @ down).chunk(2)
    assert torch.equal(product(pieces.values(), "norm_out.linear.weight"), torch.cat([scale, shift]))
    with pytest.raises(CheckpointError, match=r"cannot place|is for another model"):
        fuse_lora(base, [(file, 1.0)], tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("prefix", ["transformer.", "", "base_model.model."])
def test_prefixes(tmp_path, base, shapes, prefix):
    file = write(tmp_path / "style.safetensors", peft(shapes, Q, prefix=prefix))
    assert [piece.tensor for piece in read_lora(file, open_checkpoint(base)).pieces] == [f"{Q}.weight"]


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn.to_k": 1, r"^transformer_blocks.0.attn.to_q": 2}}, 0.5),
    ],
)
def test_alpha_of_the_metadata(tmp_path, base, shapes, config, scale):
    told = {METADATA_KEY: json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    file = write(tmp_path / "style.safetensors", peft(shapes, Q), told)
    assert [piece.scale for piece in read_lora(file, open_checkpoint(base)).pieces] == [scale]


def test_replaced_norms_and_biases(tmp_path, base, shapes):
    """What a control LoRA has besides pairs, in diffusers' names."""
    bias, norm = f"{Q}.bias", "transformer_blocks.0.attn.norm_q.weight"
    tensors = peft(shapes, Q, alpha=2.0)
    tensors[f"transformer.{Q}.lora_B.bias"] = exact(1, shapes[bias][0], 3)[0]
    tensors[f"transformer.{norm}"] = exact(1, shapes[norm][0], 4)[0]
    fuse_lora(base, [(write(tmp_path / "style.safetensors", tensors), 0.5)], tmp_path / "fused")
    old, new = weights(base), weights(tmp_path / "fused")
    wanted = (old[bias].float() + 0.25 * tensors[f"transformer.{Q}.lora_B.bias"]).to(torch.bfloat16)
    assert torch.equal(new[bias], wanted)
    assert torch.equal(new[norm].float(), tensors[f"transformer.{norm}"])
