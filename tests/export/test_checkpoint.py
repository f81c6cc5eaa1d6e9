"""Opening checkpoints: everything is read from headers, and every kind of damage is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fluxkiln.errors import CheckpointError
from fluxkiln.export.checkpoint import TensorReader, expect_tensors, open_checkpoint, read_tensor
from fluxkiln.export.safetensors_header import read_header
from fluxkiln.export.synth import synthesize
from fluxkiln.patches.flux1.kinds import list_parts
from fluxkiln.patches.flux1.model import MODEL

SHARD = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return synthesize("tiny-dev", tmp_path_factory.mktemp("pristine") / "tiny-dev")


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "tiny-dev"))


def rewrite_header(file: Path, change) -> None:
    """Replace the header of a safetensors file by `change(header)`, leaving the data as it is."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = change(json.loads(raw[8 : 8 + size]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def rewrite_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_opens_all_components(pristine):
    checkpoint = open_checkpoint(pristine)
    assert checkpoint.name == "tiny-dev"
    assert checkpoint.variant == "dev"
    assert set(checkpoint.tensors) == {*MODEL.components, "vae_tiny"}
    assert set(checkpoint.configs) == {*MODEL.components, "vae_tiny", "scheduler"}
    assert checkpoint.licence == (pristine / "LICENSE").resolve()
    assert "tokenizer_2/spiece.model" in checkpoint.sidecars
    assert [part.kind for part in list_parts(checkpoint.configs)].count("single") == 3


def test_schnell_has_no_guidance(tmp_path):
    checkpoint = open_checkpoint(synthesize("tiny-schnell", tmp_path / "m"))
    assert checkpoint.variant == "schnell"
    assert not [name for name in checkpoint.tensors["transformer"] if "guidance" in name]


def test_tensors_are_those_that_safetensors_reads(pristine):
    from safetensors import safe_open

    for component, refs in open_checkpoint(pristine).tensors.items():
        seen = set()
        for file in (pristine / component).glob("*.safetensors"):
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (safe_open is no dict)
                    ref = refs[name.removeprefix("text_model.")]
                    ours = read_tensor(ref)
                    np.testing.assert_array_equal(ours.astype(np.float32), shard.get_tensor(name).float().numpy())
                    assert ref.name == name.removeprefix("text_model.")
                    seen.add(ref.name)
        assert seen == set(refs)


def test_reads_other_dtypes(tmp_path):
    from safetensors.numpy import save_file

    arrays = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "whole": np.array([-3, 9], np.int64),
        "truth": np.array([True, False]),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    for name, ref in read_header(tmp_path / "x.safetensors").items():
        assert read_tensor(ref).dtype == arrays[name].dtype
        np.testing.assert_array_equal(read_tensor(ref), arrays[name])


def test_resolves_links_of_the_hugging_face_cache(folder, tmp_path):
    repository = tmp_path / "hub" / "models--some-org--some-model"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    for i, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = Path(shutil.move(file, repository / "blobs" / str(i)))
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.name == "some-org/some-model"
    files = {ref.file for refs in checkpoint.tensors.values() for ref in refs.values()}
    assert {file.parent for file in files} == {(repository / "blobs").resolve()}
    assert not any(path.is_symlink() for path in checkpoint.sidecars.values())


def test_tied_and_renamed_tensors(folder):
    names = {"shared.weight": "encoder.embed_tokens.weight"}
    index_path = next((folder / "text_encoder_2").glob("*.index.json"))
    weight_map = json.loads(index_path.read_text())["weight_map"]
    rewrite_json(index_path, weight_map={names.get(name, name): shard for name, shard in weight_map.items()})
    shard = folder / "text_encoder_2" / weight_map["shared.weight"]
    rewrite_header(shard, lambda header: {names.get(name, name): entry for name, entry in header.items()})
    refs = open_checkpoint(folder).tensors["text_encoder_2"]
    assert refs["shared.weight"].name == "shared.weight"
    assert "encoder.embed_tokens.weight" not in refs


def test_some_components_only(tmp_path):
    folder = synthesize("tiny-dev", tmp_path / "m", components=["transformer"])
    assert set(open_checkpoint(folder, ["transformer"]).tensors) == {"transformer"}
    with pytest.raises(CheckpointError, match=r"None as text_encoder, FLUX\.1 has CLIPTextModel"):
        open_checkpoint(folder)


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, count):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


def append(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"0")


def edit(name, **changes):
    return lambda folder: rewrite_json(folder / name, **changes)


def forget_in_index(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    weight_map.pop(next(name for name, shard in weight_map.items() if "00002" in shard))
    rewrite_json(folder / INDEX, weight_map=weight_map)


def invent_in_index(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    rewrite_json(folder / INDEX, weight_map=weight_map | {"invented.weight": Path(SHARD).name})


def point_outside(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    rewrite_json(folder / INDEX, weight_map=dict.fromkeys(weight_map, "../vae/diffusion_pytorch_model.safetensors"))


def change_header(change):
    return lambda folder: rewrite_header(folder / SHARD, change)


def change_first_entry(**changes):
    def change(header):
        name = min((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        return header | {name: header[name] | changes}

    return change_header(change)


def drop_first_entry(folder):
    change_header(lambda h: {n: e for n, e in h.items() if n == "__metadata__" or e["data_offsets"][0] > 0})(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("model_index.json"), r"no diffusers checkpoint: model_index\.json is missing; give a folder"),
        (write("model_index.json", b"{"), r"model_index\.json is not valid JSON"),
        (write("model_index.json", b"[]"), r"holds a JSON list"),
        (
            edit("model_index.json", _class_name="SomePipeline"),
            r"is for 'SomePipeline', fluxkiln compiles FluxPipeline",
        ),
        (
            edit("model_index.json", _class_name="FluxFillPipeline"),
            r"FLUX\.1 Fill, which takes a picture.*is planned yet",
        ),
        (
            edit("model_index.json", _class_name="FluxKontextPipeline"),
            r"'FluxKontextPipeline', FLUX\.1 Kontext, which takes a",
        ),
        (
            edit("model_index.json", _class_name="Flux2Pipeline"),
            r"FLUX\.2, another model; FLUX\.2-klein is planned",
        ),
        (edit("model_index.json", vae=["diffusers", "AutoencoderTiny"]), r"as vae, FLUX\.1 has AutoencoderKL"),
        (remove("transformer/config.json"), r"transformer/config\.json is missing"),
        (write("vae/config.json", b"\xff"), r"vae/config\.json is not valid JSON"),
        (edit("transformer/config.json", num_layers="2"), r"num_layers = '2'"),
        (remove("scheduler/scheduler_config.json"), r"scheduler/scheduler_config\.json is missing"),
        (remove("vae/diffusion_pytorch_model.safetensors"), r"vae has no weights: model\.safetensors"),
        (write("transformer/model.safetensors", b""), r"index\.json and model\.safetensors, one of them"),
        (remove(SHARD), r"shard diffusion_pytorch_model-00002-of-00003\.safetensors is missing"),
        (cut(SHARD, 1), r"00002-of-00003\.safetensors has \d+ bytes, its header promises \d+: it is truncated"),
        (write(SHARD, b"12345"), r"has 5 bytes, a safetensors file has at least 8"),
        (write(SHARD, b"version https://git-lfs.github.com/spec/v1"), r"Git LFS pointer.*git lfs pull"),
        (write(SHARD, (1 << 40).to_bytes(8, "little") + b"{}"), r"claims a header of 1099511627776 bytes"),
        (append(SHARD), r"it was appended to"),
        (forget_in_index, r"00002-of-00003\.safetensors lists \S+ for .*index\.json does not"),
        (invent_in_index, r"index\.json lists invented\.weight for .*00002-of-00003\.safetensors does not"),
        (point_outside, r"names the shard '\.\./vae/.*shards lie in the folder of their index"),
        (edit(INDEX, weight_map=[]), r"has no weight_map"),
        (change_header(lambda header: b"{]"), r"the header of .* is not valid JSON"),
        (change_header(lambda header: b"[]"), r"holds a JSON list, no object"),
        (change_first_entry(shape=[1, 1]), r"bytes, but BF16 \[1, 1\] takes 2"),
        (change_first_entry(dtype="X9"), r"has the dtype 'X9'; known are"),
        (change_first_entry(shape=[-1, -1]), r"the header of .* describes"),
        (change_first_entry(data_offsets=[0]), r"the header of .* describes"),
        (drop_first_entry, r"allows neither holes nor overlaps"),
    ],
)
def test_damage_is_named(folder, damage, message):
    open_checkpoint(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_not_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "flux1-dev.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="from_single_file"):
        open_checkpoint(tmp_path / "flux1-dev.safetensors")


def test_file_cut_after_opening(folder):
    ref = open_checkpoint(folder).tensors["vae"]["decoder.conv_out.weight"]
    cut("vae/diffusion_pytorch_model.safetensors", 1 << 19)(folder)
    with pytest.raises(CheckpointError, match=r"ends inside decoder\.conv_out\.weight"):
        read_tensor(ref)


def test_opening_imports_nothing_heavy(pristine):
    code = (
        "import sys; from pathlib import Path; from fluxkiln.export.checkpoint import open_checkpoint;"
        f"open_checkpoint(Path({str(pristine)!r}));"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'transformers', 'safetensors') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_tensors_are_read_by_component_and_name(tiny_checkpoint):
    checkpoint = tiny_checkpoint()
    read = TensorReader(checkpoint)
    names = ("proj_out.bias", "no such tensor")
    read.expect("transformer", names)  # a hint: what does not exist is nobody's error
    ref = checkpoint.tensors["transformer"][names[0]]
    np.testing.assert_array_equal(read("transformer", names[0]), read_tensor(ref))
    with pytest.raises(CheckpointError, match=r"transformer of .* has no tensor no such tensor"):
        read("transformer", names[1])


def test_expected_files_that_are_gone_are_no_error(tiny_checkpoint, tmp_path):
    ref = tiny_checkpoint().tensors["transformer"]["proj_out.bias"]
    expect_tensors([replace(ref, file=tmp_path / "gone")])
