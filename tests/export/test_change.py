"""LoRAs in what is read: the algebra against peft's, rows that are the same whoever asks, digests without reading."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from fluxkiln.errors import CheckpointError
from fluxkiln.export import change, checkpoint, fingerprint
from fluxkiln.export.checkpoint import copy_tensors, open_checkpoint, read_rows, read_tensor
from fluxkiln.export.fingerprint import digest_tensors
from fluxkiln.export.lora import changed_tensors, fuse_lora, measure_changes, with_loras
from fluxkiln.export.lora_file import read_lora
from tests.export.loras import CLIP, OUT, T5, K, Q, V, added, bits, pair, peft, weights, write

NAMES = {"text_encoder": CLIP.removeprefix("text_model."), "text_encoder_2": T5, "transformer": Q}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def opened(base, file, strength=1.0):
    return with_loras(open_checkpoint(base), [(file, strength)])


def read(base, file, name=f"{Q}.weight", strength=1.0, component="transformer"):
    return torch.from_numpy(read_tensor(opened(base, file, strength).tensors[component][name]).view(np.int16))


@pytest.fixture(scope="module")
def style(base, shapes, tmp_path_factory):
    """Random factors for matrices, a norm and a bias: nothing of it is exact."""
    tensors = {name: drawn(*one.shape, seed=i) for i, (name, one) in enumerate(peft(shapes, Q, OUT, rank=7).items())}
    tensors[f"transformer.{Q}.lora_B.bias"] = drawn(shapes[f"{Q}.bias"][0])
    tensors["transformer.transformer_blocks.0.attn.norm_q.weight"] = drawn(
        shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    )
    return write(tmp_path_factory.mktemp("lora") / "style.safetensors", tensors)


def test_read_is_what_is_fused(tmp_path, base, style):
    fuse_lora(base, [(style, 0.7)], tmp_path / "fused")
    fused, ours = open_checkpoint(tmp_path / "fused").tensors, opened(base, style, 0.7).tensors
    for component, refs in ours.items():
        for name, ref in refs.items():
            assert read_tensor(ref).tobytes() == read_tensor(fused[component][name]).tobytes(), name
    assert [ref.name for _, ref in changed_tensors(opened(base, style))] == sorted(
        [f"{Q}.weight", f"{Q}.bias", f"{OUT}.weight", "transformer_blocks.0.attn.norm_q.weight"],
        key=list(ours["transformer"]).index,
    )


def test_a_row_is_the_same_whoever_asks(base, style, monkeypatch):
    ref = opened(base, style).tensors["transformer"][f"{OUT}.weight"]
    whole = read_tensor(ref)
    monkeypatch.setattr(change, "_BLOCK_ITEMS", 1)
    for start, stop in ((0, 1), (1, 4), (5, len(whole)), (0, len(whole))):
        assert read_rows(ref, start, stop).tobytes() == whole[start:stop].tobytes()
    assert read_rows(ref.stored, 0, 4).tobytes() != whole[:4].tobytes()


def test_a_copy_has_what_is_read(tmp_path, base, style):
    refs = opened(base, style).tensors["transformer"]
    copied = copy_tensors(refs.values(), tmp_path / "copy.safetensors")
    assert all(read_tensor(copied[name]).tobytes() == read_tensor(ref).tobytes() for name, ref in refs.items())


def test_digests_follow_from_those_of_the_base(tmp_path, base, shapes, style, monkeypatch):
    plain = digest_tensors(open_checkpoint(base).tensors["transformer"].values())
    read_bytes = []
    stored = fingerprint._read_one
    monkeypatch.setattr(fingerprint, "_read_one", lambda ref: read_bytes.append(ref) or stored(ref))
    monkeypatch.setattr(checkpoint, "_read_stored", None)

    def digests(*loras):
        refs = with_loras(open_checkpoint(base), loras).tensors["transformer"].values()
        return digest_tensors(refs)

    monkeypatch.undo()
    ours = digests((style, 0.7))
    touched = {name for name in plain if plain[name] != ours[name]}
    assert touched == {ref.name for _, ref in changed_tensors(opened(base, style))}
    assert digests((style, 0.7)) == ours
    renamed = shutil.copy(style, tmp_path / "renamed.safetensors")
    assert digests((tmp_path / renamed, 0.7)) == ours
    others = [digests((style, 0.6)), digests((style, 0.7), (style, 0.7)),
              digests((write(tmp_path / "o.safetensors", peft(shapes, Q, OUT)), 0.7))]  # fmt: skip
    assert len({one[f"{Q}.weight"] for one in (plain, ours, *others)}) == 5
    assert {one[f"{K}.weight"] for one in others} == {plain[f"{K}.weight"]}


def test_text_encoders(tmp_path, base):
    refs = open_checkpoint(base).tensors
    tensors, expected = {}, {}
    names = {"text_encoder": (f"lora_te1_{CLIP.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"),
             "text_encoder_2": (f"lora_te3_{T5.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"),
             "transformer": (f"transformer.{Q}", ".lora_A.weight", ".lora_B.weight")}  # fmt: skip
    for component, (name, down, up) in names.items():
        own = {one: ref.shape for one, ref in refs[component].items()}
        expected[component] = pair(own, NAMES[component])
        tensors[name + down], tensors[name + up] = expected[component]
    tensors["lora_te1_text_model_encoder_layers_99_mlp_fc1.lora_down.weight"] = torch.ones(1, 2)
    tensors["lora_te1_text_model_encoder_layers_99_mlp_fc1.lora_up.weight"] = torch.ones(2, 1)
    file = write(tmp_path / "all.safetensors", tensors)
    both = opened(base, file, 0.5)
    for component, layer in NAMES.items():
        old = torch.from_numpy(read_tensor(refs[component][f"{layer}.weight"]).astype(np.float32))
        wanted = added(old, (*expected[component], 0.5))
        assert torch.equal(read(base, file, f"{layer}.weight", 0.5, component), bits(wanted)), component
    assert both.loras[0]["missing"] == ["lora_te1_text_model_encoder_layers_99_mlp_fc1"]
    assert both.loras[0]["tensors"] == 3
    # with one of the components only, the rest is told
    alone = with_loras(open_checkpoint(base, ("text_encoder",)), [(file, 0.5)])
    assert len(alone.loras[0]["missing"]) == 3
    with pytest.raises(
        CheckpointError, match=r"none of its 4 layers .* is in the vae.* of tiny-dev.*that are not built"
    ):
        with_loras(open_checkpoint(base, ("vae",)), [(file, 0.5)])


def peft_layer(kind, old, tensors, scale):
    """The weight that peft makes of one linear layer, its base in float32."""
    import peft as library

    out, width = old.shape
    module = torch.nn.Sequential(torch.nn.Linear(width, out, bias=False))
    module[0].weight.data[:] = old
    made = {
        "dora": lambda: library.LoraConfig(r=4, lora_alpha=4 * scale, target_modules=["0"], use_dora=True),
        "loha": lambda: library.LoHaConfig(r=4, alpha=4 * scale, target_modules=["0"]),
        "lokr": lambda: library.LoKrConfig(r=4, alpha=4 * scale, target_modules=["0"], decompose_factor=4),
    }[kind]()
    model = library.get_peft_model(module, made)
    state = {f"base_model.model.0.{name}": tensor for name, tensor in tensors.items()}
    loaded = library.set_peft_model_state_dict(model, state)
    assert not loaded.unexpected_keys
    return model.merge_and_unload()[0].weight.detach()


def factors(kind, out, width):
    """A layer's tensors as peft names them, none of them small."""
    if kind == "dora":
        return {"lora_A.weight": drawn(4, width) / 8, "lora_B.weight": drawn(out, 4, seed=1) / 8,
                "lora_magnitude_vector": drawn(out, seed=2).abs() + 0.5}  # fmt: skip
    if kind == "loha":
        return {"hada_w1_a": drawn(out, 4) / 4, "hada_w1_b": drawn(4, width, seed=1) / 4,
                "hada_w2_a": drawn(out, 4, seed=2) / 4, "hada_w2_b": drawn(4, width, seed=3) / 4}  # fmt: skip
    return {"lokr_w1": drawn(4, 4) / 4, "lokr_w2_a": drawn(out // 4, 4, seed=1) / 4,
            "lokr_w2_b": drawn(4, width // 4, seed=2) / 4}  # fmt: skip


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_as_peft_computes(tmp_path, base, shapes, kind, scale):
    tensors = factors(kind, *shapes[f"{Q}.weight"])
    old = weights(base)[f"{Q}.weight"].float()
    theirs = peft_layer(kind, old, tensors, scale)
    named = {f"transformer.{Q}.{name}": one for name, one in tensors.items()}
    named[f"transformer.{Q}.alpha"] = torch.tensor(4 * scale)
    ours = read(base, write(tmp_path / "style.safetensors", named)).view(torch.bfloat16).float()
    # both are float32 until one rounding to bfloat16, whose last bit is 2^-8 of a value
    assert torch.allclose(ours, theirs, rtol=2.0**-8, atol=1e-6)
    assert not torch.allclose(old, theirs, rtol=2.0**-8, atol=1e-6)
    # controls: what an alpha that is ignored, or a factor of another layer, would give
    if scale != 1:
        assert not torch.allclose(ours, peft_layer(kind, old, tensors, 1.0), rtol=2.0**-8, atol=1e-6)
    turned = dict(tensors) | {name: one.flip(0) for name, one in tensors.items() if name.endswith("_a") or "B" in name}
    assert not torch.allclose(ours, peft_layer(kind, old, turned, scale), rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_joined_layers_are_cut(tmp_path, base, shapes, kind):
    """kohya's name of queries, keys and values together: each gets its rows of the whole."""
    out, width = shapes[f"{Q}.weight"]
    tensors = factors(kind, 3 * out, width)
    names = {
        "lora_A.weight": "lora_down.weight",
        "lora_B.weight": "lora_up.weight",
        "lora_magnitude_vector": "dora_scale",
    }
    block = "lora_unet_double_blocks_0_img_attn_qkv"
    file = write(tmp_path / "kohya.safetensors", {f"{block}.{names.get(n, n)}": one for n, one in tensors.items()})
    old = weights(base)
    joined = peft_layer(kind, torch.cat([old[f"{layer}.weight"].float() for layer in (Q, K, V)]), tensors, 1.0)
    for layer, wanted in zip((Q, K, V), joined.split(out), strict=True):
        ours = read(base, file, f"{layer}.weight").view(torch.bfloat16).float()
        assert torch.allclose(ours, wanted, rtol=2.0**-8, atol=1e-6), layer


@pytest.mark.parametrize("wrong", ["alpha", "exchanged"])
def test_controls_of_a_pair(tmp_path, base, shapes, wrong):
    """An alpha that is left out, and up and down exchanged, of a square layer where both fit."""
    down, up = pair(shapes, Q)
    old = weights(base)[f"{Q}.weight"]
    assert old.shape[0] == old.shape[1]
    file = write(tmp_path / "style.safetensors", peft(shapes, Q, alpha=2.0))
    right = added(old, (down, up, 2 / 4))
    bad = added(old, (down, up, 1.0)) if wrong == "alpha" else added(old, (up.T, down.T, 2 / 4))
    assert torch.equal(read(base, file), bits(right))
    assert not torch.equal(read(base, file), bits(bad))


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_dtypes(tmp_path, base, shapes, dtype):
    shutil.copytree(base, copy := tmp_path / "base")
    ref = open_checkpoint(copy).tensors["transformer"][f"{Q}.weight"]
    kind = {"F16": torch.float16, "F32": torch.float32}[dtype]
    old = drawn(*ref.shape).to(kind)
    write(tmp_path / "one.safetensors", {ref.name: old})
    (stored,) = checkpoint.read_header(tmp_path / "one.safetensors").values()
    file = write(tmp_path / "style.safetensors", peft(shapes, Q))
    changed = replace(stored, change=opened(copy, file).tensors["transformer"][ref.name].change)
    down, up = pair(shapes, Q)
    wanted = (old.float() + up @ down).to(kind)
    assert read_tensor(changed).tobytes() == wanted.numpy().tobytes()
    strong = replace(stored, change=opened(copy, file, 1e39).tensors["transformer"][ref.name].change)
    with pytest.raises(CheckpointError, match=f"has a NaN or Inf in {dtype} with the LoRAs in it"):
        read_tensor(strong)


def test_lengths(tmp_path, base, shapes):
    file = write(tmp_path / "style.safetensors", peft(shapes, Q))
    before, after = weights(base)[f"{Q}.weight"].float(), read(base, file).view(torch.bfloat16).float()
    ((name, (length, change_length)),) = measure_changes(opened(base, file)).items()
    assert name == f"transformer/{Q}.weight"
    assert length == pytest.approx(before.norm().item(), rel=1e-5)
    assert change_length == pytest.approx((after - before).norm().item(), rel=1e-5)
    with pytest.raises(CheckpointError, match="use a smaller strength"):
        measure_changes(opened(base, file, 1e39))


def test_a_file_that_changes_or_goes(tmp_path, base, shapes):
    file = write(tmp_path / "style.safetensors", peft(shapes, Q))
    ref = opened(base, file).tensors["transformer"][f"{Q}.weight"]
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"style.safetensors was written to meanwhile"):
        read_tensor(ref)
    file.unlink()
    with pytest.raises(CheckpointError, match="put the LoRA back"):
        read_tensor(ref)


def test_metadata_of_a_text_encoder(tmp_path, base):
    refs = open_checkpoint(base).tensors["text_encoder"]
    shapes = {f"text_model.{name}": ref.shape for name, ref in refs.items()}
    tensors = peft(shapes, CLIP, prefix="text_encoder.")
    told = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 1, "text_encoder.lora_alpha": 8})}
    pieces = read_lora(write(tmp_path / "style.safetensors", tensors, told), open_checkpoint(base)).pieces
    assert [(piece.component, piece.scale) for piece in pieces] == [("text_encoder", 2.0)]
