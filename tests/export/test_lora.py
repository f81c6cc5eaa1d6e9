"""LoRAs fused into a tiny checkpoint, against sums computed here and against diffusers' own fusing."""

import os
import shutil
import signal
import struct
import subprocess
import sys

import pytest
import torch

from fluxkiln.errors import CheckpointError, FluxkilnError, ResourceError, UsageError
from fluxkiln.export.checkpoint import open_checkpoint, read_tensor
from fluxkiln.export.folders import shutil as folders_shutil
from fluxkiln.export.lora import RECORD, fuse_lora, read_record
from tests.export.loras import CLIP, OUT, K, Q, added, bits, exact, pair, peft, weights, write


def test_weights_bit_for_bit(tmp_path, base, shapes):
    file = write(tmp_path / "style.safetensors", peft(shapes, Q, OUT, alpha=2.0))
    done = []
    fused = fuse_lora(base, [(file, 0.5)], tmp_path / "fused", lambda *counts: done.append(counts))
    old, new = weights(base), weights(tmp_path / "fused")
    assert fused.tensors == tuple(sorted([f"{Q}.weight", f"{OUT}.weight"]))
    for i, layer in enumerate((Q, OUT)):
        wanted = added(old[f"{layer}.weight"], (*pair(shapes, layer, seed=2 * i), 0.5 * 2 / 4))
        assert torch.equal(bits(new[f"{layer}.weight"]), bits(wanted))
        assert not torch.equal(new[f"{layer}.weight"], old[f"{layer}.weight"])
    assert old.keys() == new.keys()
    for name in old.keys() - set(fused.tensors):
        assert torch.equal(bits(old[name]), bits(new[name])), name
    assert done[-1] == (fused.nbytes, fused.nbytes)


def test_rows_come_in_blocks(tmp_path, base, shapes, monkeypatch):
    tensors = {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(5)) for name, t in
               peft(shapes, Q, OUT).items()}  # fmt: skip
    file = write(tmp_path / "style.safetensors", tensors)
    fuse_lora(base, [(file, 1.0)], tmp_path / "whole")
    monkeypatch.setattr("fluxkiln.export.checkpoint._BLOCK_BYTES", 6 * shapes[f"{Q}.weight"][1] + 1)
    monkeypatch.setattr("fluxkiln.export.change._BLOCK_ITEMS", 2 * shapes[f"{Q}.weight"][1])
    monkeypatch.setattr("fluxkiln.export.lora._BLOCK_BYTES", 777)
    fuse_lora(base, [(file, 1.0)], tmp_path / "blocks")
    whole, blocks, old = weights(tmp_path / "whole"), weights(tmp_path / "blocks"), weights(base)
    assert all(torch.equal(bits(whole[name]), bits(blocks[name])) for name in whole)
    reference = old[f"{Q}.weight"].double() + (
        tensors[f"transformer.{Q}.lora_B.weight"].double() @ tensors[f"transformer.{Q}.lora_A.weight"].double()
    )
    error = (blocks[f"{Q}.weight"].double() - reference).abs()
    assert bool((error <= reference.abs() * 2.0**-8 + 1e-6).all())


def test_several_and_the_same_twice(tmp_path, base, shapes):
    one = write(tmp_path / "one.safetensors", peft(shapes, Q))
    two = write(tmp_path / "two.safetensors", {
        f"transformer.{Q}.lora_A.weight": exact(2, shapes[f"{Q}.weight"][1], 8),
        f"transformer.{Q}.lora_B.weight": exact(shapes[f"{Q}.weight"][0], 2, 9),
    })  # fmt: skip
    fuse_lora(base, [(one, 0.5), (two, -0.25), (one, 0.25)], tmp_path / "fused")
    down, up = pair(shapes, Q)
    second = (exact(2, shapes[f"{Q}.weight"][1], 8), exact(shapes[f"{Q}.weight"][0], 2, 9))
    wanted = added(weights(base)[f"{Q}.weight"], (down, up, 0.5), (*second, -0.25), (down, up, 0.25))
    assert torch.equal(bits(weights(tmp_path / "fused")[f"{Q}.weight"]), bits(wanted))
    record = read_record(tmp_path / "fused")
    assert [(lora["file"], lora["strength"]) for lora in record["lora"]] == [
        ("one.safetensors", 0.5), ("two.safetensors", -0.25), ("one.safetensors", 0.25)
    ]  # fmt: skip
    assert record["tensors"] == [f"{Q}.weight"]
    # Fused once more, the record tells both.
    fuse_lora(tmp_path / "fused", [(two, 1.0)], tmp_path / "again")
    assert [lora["file"] for lora in read_record(tmp_path / "again")["lora"]][-2:] == [
        "one.safetensors", "two.safetensors"
    ]  # fmt: skip


def test_untouched_files_are_links(tmp_path, base, shapes):
    file = write(tmp_path / "style.safetensors", peft(shapes, Q))
    out = tmp_path / "fused"
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "flux1-dev.safetensors").write_bytes(b"the old weights in another form")
    (tmp_path / "base" / "transformer" / "old.bin").write_bytes(b"as well")
    fuse_lora(tmp_path / "base", [(file, 1.0)], out)
    touched = open_checkpoint(out).tensors["transformer"][f"{Q}.weight"].file
    new = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    old = {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()}
    assert new == old | {RECORD}
    apart = {name for name in old if not (out / name).samefile(tmp_path / "base" / name)}
    assert apart == {str(touched.relative_to(out))}
    # The header and every byte but the tensor's are the same.
    before, after = (tmp_path / "base" / next(iter(apart))).read_bytes(), touched.read_bytes()
    ref = open_checkpoint(out).tensors["transformer"][f"{Q}.weight"]
    assert len(before) == len(after)
    assert before[: ref.offset] == after[: ref.offset]
    assert before[ref.offset + ref.nbytes :] == after[ref.offset + ref.nbytes :]
    assert before != after


def test_files_that_cannot_be_linked_are_copied(tmp_path, base, shapes, monkeypatch):
    def refuse(*names):
        raise OSError(1, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    file = write(tmp_path / "style.safetensors", peft(shapes, Q))
    fuse_lora(base, [(file, 1.0)], tmp_path / "fused")
    config = tmp_path / "fused" / "model_index.json"
    assert config.read_bytes() == (base / "model_index.json").read_bytes()
    assert not config.samefile(base / "model_index.json")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_as_diffusers_fuses(tmp_path, base, shapes):
    pytest.importorskip("peft", reason="diffusers fuses with peft, which is no dependency of ours")
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel.from_pretrained(base / "transformer", torch_dtype=torch.float32)
    pipeline = FluxPipeline(None, None, None, None, None, None, transformer)
    down, up = torch.randn(4, shapes[f"{Q}.weight"][1]), torch.randn(3 * shapes[f"{Q}.weight"][0], 4)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    one = write(tmp_path / "one.safetensors", {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up,
                                               f"{name}.alpha": torch.tensor(3.0)})  # fmt: skip
    two = write(tmp_path / "two.safetensors", peft(shapes, Q, OUT, alpha=2.0))
    pipeline.load_lora_weights(str(one), adapter_name="one")
    pipeline.load_lora_weights(str(two), adapter_name="two")
    pipeline.set_adapters(["one", "two"], [0.7, 0.4])
    pipeline.fuse_lora(adapter_names=["one", "two"])
    theirs = transformer.state_dict()
    fused = fuse_lora(base, [(one, 0.7), (two, 0.4)], tmp_path / "fused")
    new, old = weights(tmp_path / "fused"), weights(base)
    assert len(fused.tensors) == 4
    for tensor in fused.tensors:
        wanted = theirs[tensor.replace(".weight", ".base_layer.weight")]
        assert torch.allclose(new[tensor].float(), wanted, rtol=2.0**-8, atol=1e-6)
        assert not torch.allclose(old[tensor].float(), wanted, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")])
def test_interrupted(tmp_path, base, shapes, error):
    def stop(done, total):
        raise error

    file = write(tmp_path / "style.safetensors", peft(shapes, Q))
    with pytest.raises(type(error)):
        fuse_lora(base, [(file, 1.0)], tmp_path / "out" / "fused", stop)
    assert list((tmp_path / "out").iterdir()) == []


# Fuses, and is killed when the first tensor is written.
KILLED = """
import os, signal, sys
from pathlib import Path
from fluxkiln.export.lora import fuse_lora
base, file, out = map(Path, sys.argv[1:])
fuse_lora(base, [(file, 1.0)], out, lambda *counts: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_killed_and_started_again(tmp_path, base, shapes):
    file, out = write(tmp_path / "style.safetensors", peft(shapes, Q)), tmp_path / "out"
    child = subprocess.run([sys.executable, "-c", KILLED, str(base), str(file), str(out / "fused")])
    assert child.returncode == -signal.SIGKILL
    assert [path.name.startswith(".fused.") for path in out.iterdir()] == [True]
    fuse_lora(base, [(file, 1.0)], out / "fused")
    assert [path.name for path in out.iterdir()] == ["fused"]


def damaged(tmp_path, shapes, what):
    """A file that must be refused."""
    path, tensors = tmp_path / "bad.safetensors", peft(shapes, Q)
    down, up = f"transformer.{Q}.lora_A.weight", f"transformer.{Q}.lora_B.weight"
    if what == "absent":
        return path
    if what == "folder":
        return tmp_path
    if what == "pickle":
        path.write_bytes(b"\x80\x02}q\x00." * 40)
        return path
    if what == "cut":
        write(path, tensors)
        path.write_bytes(path.read_bytes()[:-8])
        return path
    if what == "empty":
        path.write_bytes(struct.pack("<Q", 2) + b"{}")
        return path
    changed = {
        "none": lambda: {"some.weight": torch.ones(2, 2)},
        "layer": lambda: peft({"transformer_blocks.77.attn.to_q.weight": shapes[f"{Q}.weight"]},
                              "transformer_blocks.77.attn.to_q"),
        "shape": lambda: {down: torch.ones(4, 12), up: tensors[up]},
        "rank": lambda: {down: tensors[down], up: tensors[up][:, :3]},
        "half": lambda: {down: tensors[down]},
        "other half": lambda: {up: tensors[up], f"transformer.{K}.lora_A.weight": tensors[down],
                               f"transformer.{K}.lora_B.weight": tensors[up].clone()},
        "nan": lambda: {**tensors, up: torch.full_like(tensors[up], torch.nan)},
        "inf": lambda: {**tensors, down: torch.full_like(tensors[down], torch.inf)},
        "clip": lambda: {f"text_encoder.{CLIP}.lora_A.weight": torch.ones(1, 2)},
        "columns": lambda: {**tensors, f"transformer.{Q}.dora_scale": torch.ones(1, shapes[f"{Q}.weight"][1])},
        "oft": lambda: {f"transformer.{Q}.oft_blocks": torch.ones(2, 2, 2)},
        "tucker": lambda: {f"transformer.{Q}.lokr_t2": torch.ones(2, 2, 3, 3)},
        "lokr": lambda: {f"transformer.{Q}.lokr_w1": torch.ones(2, 2), f"transformer.{Q}.lokr_w2": torch.ones(5, 5)},
        "diff": lambda: {**tensors, "lora_unet_img_in.diff_b": torch.ones(2)},
        "kohya block": lambda: {"lora_unet_double_blocks_40_img_attn_proj.lora_down.weight": torch.ones(1, 2),
                                "lora_unet_double_blocks_40_img_attn_proj.lora_up.weight": torch.ones(2, 1)},
        "extra": lambda: {**tensors, f"transformer.{K}.weight": torch.ones(2, 2)},
    }[what]()  # fmt: skip
    return write(path, changed)


@pytest.mark.parametrize(
    ("what", "kind", "sentence"),
    [
        ("absent", UsageError, "No such file or directory; give a LoRA's .safetensors file"),
        ("folder", UsageError, "it is no regular file; give a LoRA's .safetensors file"),
        ("pickle", CheckpointError, "it is truncated or no safetensors file"),
        ("cut", CheckpointError, "it is truncated; fetch or copy the file again"),
        ("empty", CheckpointError, "holds no LoRA: none of its 0 tensors"),
        ("none", CheckpointError, r"holds no LoRA: none of its 1 tensors \(some.weight\)"),
        (
            "layer",
            CheckpointError,
            r"none of its 1 layers \(tr.*77.attn.to_q\) is in .* tiny-dev, near are transformer_",
        ),
        ("shape", CheckpointError, r"as \[\d+, 12\], in tiny-dev it is \[\d+, \d+\]; it is for another model"),
        ("rank", CheckpointError, r"a pair is \[rank, in\] and \[out, rank\]"),
        ("half", CheckpointError, "without its up"),
        ("other half", CheckpointError, "without its down"),
        ("nan", CheckpointError, "lora_B.weight in .* has a NaN or Inf"),
        ("inf", CheckpointError, "lora_A.weight in .* has a NaN or Inf"),
        ("clip", CheckpointError, "without its up"),
        ("columns", CheckpointError, "lengths of columns are not read"),
        ("oft", CheckpointError, "is an adapter of another kind; LoRA, DoRA, LoHa and LoKr are read"),
        ("tucker", CheckpointError, "has factors of convolutions"),
        ("lokr", CheckpointError, r"as \[10, 10\], in tiny-dev it is"),
        ("diff", CheckpointError, "has whole differences"),
        ("kohya block", CheckpointError, "converter cannot place in FLUX.1"),
        ("extra", CheckpointError, "which is no half of a low-rank pair with its other half beside it"),
    ],
)
def test_refused(tmp_path, base, shapes, what, kind, sentence):
    file = damaged(tmp_path, shapes, what)
    with pytest.raises(kind, match=sentence) as caught:
        fuse_lora(base, [(file, 1.0)], tmp_path / "out" / "fused")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_strength_that_is_no_number(tmp_path, base, shapes, strength):
    file = write(tmp_path / "style.safetensors", peft(shapes, Q))
    with pytest.raises(UsageError, match="is not finite"):
        fuse_lora(base, [(file, strength)], tmp_path / "fused")


def test_strength_that_is_too_large(tmp_path, base, shapes):
    file = write(tmp_path / "style.safetensors", peft(shapes, Q))
    with pytest.raises(CheckpointError, match=rf"{Q}.weight has a NaN or Inf in BF16 .* use a smaller strength"):
        fuse_lora(base, [(file, 1e39)], tmp_path / "out" / "fused")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_room(tmp_path, base, shapes, monkeypatch):
    file = write(tmp_path / "style.safetensors", peft(shapes, Q))
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(folders_shutil, "disk_usage", lambda path: usage(10**9, 0, 10**5))
    with pytest.raises(ResourceError, match="free some space, or choose another folder"):
        fuse_lora(base, [(file, 1.0)], tmp_path / "fused")


def test_destination_with_something_in_it(tmp_path, base, shapes):
    file = write(tmp_path / "style.safetensors", peft(shapes, Q))
    with pytest.raises(FluxkilnError, match="is not empty"):
        fuse_lora(base, [(file, 1.0)], tmp_path)


def test_checkpoint_that_changes_meanwhile(tmp_path, base, shapes):
    shutil.copytree(base, copy := tmp_path / "base")
    file = write(tmp_path / "style.safetensors", peft(shapes, Q))
    shard = open_checkpoint(copy).tensors["transformer"][f"{Q}.weight"].file

    def change(done, total):
        os.utime(shard, ns=(1, 1))

    with pytest.raises(CheckpointError, match="was written to meanwhile"):
        fuse_lora(copy, [(file, 1.0)], tmp_path / "fused", change)
    assert not (tmp_path / "fused").exists()


def test_fused_tensor_reads_as_any(tmp_path, base, shapes):
    file = write(tmp_path / "style.safetensors", peft(shapes, Q))
    fuse_lora(base, [(file, 1.0)], tmp_path / "fused")
    ref = open_checkpoint(tmp_path / "fused").tensors["transformer"][f"{Q}.weight"]
    assert read_tensor(ref).tobytes() == bits(weights(tmp_path / "fused")[f"{Q}.weight"]).numpy().tobytes()
