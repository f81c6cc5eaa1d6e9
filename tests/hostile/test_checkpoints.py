"""Checkpoints that lie: numbers no machine holds, types no class takes, links to what is not theirs."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from fluxkiln.errors import CheckpointError
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.lora_file import METADATA_KEY, read_lora
from fluxkiln.patches.flux1.model import MODEL
from tests.export.loras import Q, peft

FLUX, CLIP, T5, VAE = "transformer", "text_encoder", "text_encoder_2", "vae"
SCHEDULER = "scheduler/scheduler_config.json"
ABSENT = object()


@pytest.mark.parametrize(
    ("component", "key", "value", "fault"),
    [
        (FLUX, "num_layers", 10**6, "num_layers = '1000000': expected int <= 512"),
        (FLUX, "num_layers", 10**40, "num_layers = '10000000000000000000000000000000000000000': expected int"),
        (FLUX, "num_single_layers", -1, "expected int >= 1"),
        (FLUX, "num_layers", True, "expected int, got bool"),
        (FLUX, "attention_head_dim", ABSENT, "object missing required field attention_head_dim"),
        (FLUX, "attention_head_dim", 10**9, "expected int <= 4096"),
        (FLUX, "axes_dims_rope", "abc", "axes_dims_rope = 'abc': expected array, got str"),
        (FLUX, "axes_dims_rope", [16, 56], "expected array of length >= 3"),
        (FLUX, "axes_dims_rope", [16, 56, 58], "attention_head_dim is 128 and the sum of its axes_dims_rope is 130"),
        (FLUX, "guidance_embeds", "yes", "expected bool, got str"),
        (FLUX, "joint_attention_dim", 64, "joint_attention_dim is 64 and T5's d_model is 128"),
        (FLUX, "in_channels", 60, "in_channels is 60 and 4 times the VAE's latent_channels is 64"),
        (T5, "num_layers", 10**6, "expected int <= 512"),
        (T5, "d_kv", None, "expected int, got null"),
        (T5, "num_heads", 0, "expected int >= 1"),
        (CLIP, "hidden_size", "64", "expected int, got str"),
        (CLIP, "num_attention_heads", 3, "CLIP's hidden_size is 64 and the width of its heads together is 63"),
        (CLIP, "eos_token_id", [2], "expected int | null, got array"),
        (VAE, "scaling_factor", 0, "expected float > 1e-06"),
        (VAE, "scaling_factor", "NaN", "expected float, got str"),
        (VAE, "shift_factor", None, "expected float, got null"),
        (VAE, "block_out_channels", [32] * 400, "expected array of length <= 8"),
        (VAE, "block_out_channels", [30, 32, 32, 32], "a width of block_out_channels is 30"),
        (VAE, "up_block_types", ["UpDecoderBlock2D"], "the length of up_block_types is 1"),
    ],
)
def test_configs(folder, replace_file, component, key, value, fault):
    path = folder / component / "config.json"
    config = json.loads(path.read_text())
    config.pop(key, None)
    replace_file(path, json.dumps(config if value is ABSENT else config | {key: value}).encode())
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("num_train_timesteps", 0, "expected int >= 1"),
        ("_class_name", "EulerDiscreteScheduler", "invalid enum value EulerDiscreteScheduler"),
        ("_class_name", ABSENT, "object missing required field _class_name"),
        ("shift", -3.0, "expected float > 1e-06"),
        ("use_dynamic_shifting", 1, "expected bool, got int"),
        ("base_shift", None, "expected float, got null"),
        ("max_image_seq_len", 256, "shifts the schedule of images by nan, it must be from -80 to 80"),
        ("max_image_seq_len", 257, "shifts the schedule of images by -165.2 to "),
        ("max_shift", 1e5, "it must be from -80 to 80; take the scheduler of the published model"),
    ],
)
def test_schedulers(folder, replace_file, key, value, fault):
    config = json.loads((folder / SCHEDULER).read_text())
    config.pop(key)
    replace_file(folder / SCHEDULER, json.dumps(config if value is ABSENT else config | {key: value}).encode())
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert fault in str(caught.value).replace("'", "")


@pytest.mark.parametrize(
    "data",
    [b'{"scaling_factor": NaN}', b'{"num_layers": 1, "num_layers": 1}', b"[" * 60_000, b'{"a": 1e999}', b"\xff\xfe{}"],
)
def test_documents(folder, replace_file, data):
    for name in ("model_index.json", "vae/config.json", f"{FLUX}/diffusion_pytorch_model.safetensors.index.json"):
        before = (folder / name).read_bytes()
        replace_file(folder / name, data)
        with pytest.raises(CheckpointError, match="is not valid JSON"):
            open_checkpoint(folder)
        replace_file(folder / name, before)


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', "key 'a' appears twice"),
        (b'{"a":{"dtype":["U8"],"shape":[0],"data_offsets":[0,0]}}', "has the dtype"),
        (b'{"a":{"dtype":"U8","shape":[%b],"data_offsets":[0,0]}}' % b",".join([b"9" * 19] * 90_000), "describes 'a'"),
        (b'{"a":{"dtype":"U8","shape":[1e2],"data_offsets":[0,0]}}', "describes 'a'"),
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "surrogates not allowed"),
        (b'{"a":' * 40, "is not valid JSON"),
    ],
)
def test_headers(folder, replace_file, header, fault):
    replace_file(folder / "vae_tiny/diffusion_pytorch_model.safetensors", len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert fault in str(caught.value)


def test_links_lead_nowhere_else(folder, tmp_path):
    (tmp_path / "secret").write_text("the user's own")
    for name in ("tokenizer/extra.txt", "LICENSE", "vae/config.json"):
        kept = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match=r"leads out of the checkpoint, to .*secret; put the file itself"):
            open_checkpoint(folder)
        (folder / name).unlink()
        if kept is not None:
            (folder / name).write_bytes(kept)
    (folder / "tokenizer" / "inside.json").symlink_to("vocab.json")
    assert open_checkpoint(folder).sidecars["tokenizer/inside.json"] == (folder / "tokenizer/vocab.json").resolve()


def test_a_linked_component_is_outside(folder, tmp_path):
    shutil.move(folder / "vae", tmp_path / "vae")
    (folder / "vae").symlink_to(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        open_checkpoint(folder)


def test_only_files_are_read(folder, replace_file):
    for name in ("vae/config.json", "model_index.json", "tokenizer/fifo", "vae/diffusion_pytorch_model.safetensors"):
        kept = (folder / name).read_bytes() if (folder / name).exists() else b""
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match="is no regular file"):
            open_checkpoint(folder)
        (folder / name).unlink()
        replace_file(folder / name, kept)


def test_names_are_text(folder):
    os.rename(bytes(folder / "tokenizer" / "merges.txt"), bytes(folder) + b"/tokenizer/\xff.txt")
    with pytest.raises(CheckpointError, match="a name that is no text; rename the file"):
        open_checkpoint(folder)


def test_a_hole_beside_the_weights(folder):
    os.truncate(os.open(folder / "tokenizer" / "hole", os.O_CREAT | os.O_RDWR), 1 << 40)
    with pytest.raises(CheckpointError, match="are the most for a file beside the weights"):
        open_checkpoint(folder)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"model": {"type": "BPE"}}', b"\xff" * 100])
def test_tokenizers(folder, replace_file, data):
    replace_file(folder / "tokenizer_2" / "tokenizer.json", data)
    replace_file(folder / "tokenizer_2" / "spiece.model", data)
    with pytest.raises(CheckpointError, match=r"tokenizer_2 does not hold a T5"):
        MODEL.load_sidecars(folder, ("text_encoder_2",))
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match=r"tokenizer does not hold a CLIPTokenizer"):
        MODEL.load_sidecars(folder, ("text_encoder",))


@pytest.fixture
def write_lora(pristine, tmp_path):
    """A LoRA of one layer, changed by the test."""
    refs = open_checkpoint(pristine, (FLUX,)).tensors[FLUX]
    pairs = peft({name: ref.shape for name, ref in refs.items()}, Q)

    def write(change=lambda tensors: tensors, **metadata):
        told = {METADATA_KEY: json.dumps({f"transformer.{key}": value for key, value in metadata.items()})}
        file = tmp_path / "style.safetensors"
        save_file(change(dict(pairs)), file, metadata=told if metadata else None)
        return file

    return write


@pytest.mark.parametrize(
    ("metadata", "fault"),
    [
        ({"lora_alpha": "8"}, "lora_alpha = '8': expected float, got str"),
        ({"lora_alpha": None}, "expected float, got null"),
        ({"lora_alpha": -1}, "expected float >= 0"),
        ({"lora_alpha": 10**60}, "expected float < 1000000"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "has the pattern '(a+)+b'"),
        ({"alpha_pattern": {"a" * 300: 1}}, "names of layers are taken"),
        ({"alpha_pattern": {f"l{i}": 1 for i in range(3000)}}, "3000 patterns, 2000 are the most"),
        ({"alpha_pattern": [1]}, "expected object | null, got array"),
        ({"use_rslora": "no"}, "expected bool | null, got str"),
    ],
)
def test_lora_metadata(pristine, write_lora, metadata, fault):
    with pytest.raises(CheckpointError) as caught:
        read_lora(write_lora(**metadata), open_checkpoint(pristine, (FLUX,)))
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda one: one | {f"transformer.{Q}.alpha": torch.ones(3)}, "3 numbers as|cannot place"),
        (lambda one: {name: tensor.to(torch.int8) for name, tensor in one.items()}, "is I8, a LoRA's tensors are"),
        (lambda one: {name: tensor[:0] for name, tensor in one.items()}, "which is empty"),
        (lambda one: {name: tensor[:, :0].clone() for name, tensor in one.items()}, "which is empty"),
        (lambda one: {name: tensor[None] for name, tensor in one.items()}, "a pair is|cannot place"),
        (
            lambda one: {name.replace("lora_A", "lora_B"): tensor for name, tensor in one.items()},
            "without its down|holds no LoRA",
        ),
    ],
)
def test_lora_tensors(pristine, write_lora, change, fault):
    with pytest.raises(CheckpointError, match=fault):
        read_lora(write_lora(change), open_checkpoint(pristine, (FLUX,)))


def test_a_lora_larger_than_its_model(pristine, write_lora):
    file = write_lora(lambda one: {name: torch.cat([tensor] * 80, int("B.w" in name)) for name, tensor in one.items()})
    with pytest.raises(CheckpointError, match="more than twice as many as what it changes"):
        read_lora(file, open_checkpoint(pristine, (FLUX,)))
