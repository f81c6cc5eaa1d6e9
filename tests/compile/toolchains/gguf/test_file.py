"""GGUF files of tiny-dev, read by gguf's own reader, by transformers, and by diffusers' converter."""

from __future__ import annotations

import json
import os
import shutil

import gguf
import numpy as np
import pytest
import torch

from fluxkiln.compile.toolchains.gguf import file as gguf_file
from fluxkiln.compile.toolchains.gguf.file import file_name, open_file, plan_file, write_file
from fluxkiln.compile.toolchains.gguf.toolchain import TOOLCHAIN
from fluxkiln.errors import IntegrityError
from fluxkiln.export.checkpoint import read_tensor
from fluxkiln.export.safetensors_header import read_header
from fluxkiln.patches.model import Joined, OtherLayout
from fluxkiln.quantize.formats import FILE_FORMATS
from fluxkiln.verify.ladder import Ladder

FORM = "Q5_1"


@pytest.fixture(scope="module")
def build(small_build):
    return small_build("tiny-dev", FORM, "gguf")


@pytest.fixture(scope="module")
def files(build, tmp_path_factory):
    """Folder of the checkpoint -> its file."""
    root = tmp_path_factory.mktemp("files")
    made = {}
    for folder in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        made[folder] = root / file_name(folder)
        write_file(build.checkpoint, build.plan, folder, made[folder], lambda done: None)
    return made


def test_names_types_and_metadata_are_those_of_published_files(files):
    reader = gguf.GGUFReader(files["transformer"])
    assert reader.get_field("general.architecture").contents() == "flux"
    assert reader.get_field("general.quantization_version").contents() == 2
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q5_1
    types = {one.name: one.tensor_type.name for one in reader.tensors}
    assert {one.name: list(one.shape[::-1]) for one in reader.tensors}["single_blocks.0.linear1.weight"] == [1792, 256]
    assert types["double_blocks.1.img_attn.qkv.weight"] == types["single_blocks.0.linear2.weight"] == FORM
    assert types["img_in.weight"] == types["final_layer.adaLN_modulation.1.weight"] == "BF16"
    vectors = {name for name in types if name.endswith((".bias", ".scale"))}
    assert {types[name] for name in vectors} == {"F32"}
    assert {one.data_offset % 32 for one in reader.tensors} == {0}


@pytest.mark.parametrize("folder", ["text_encoder", "text_encoder_2", "transformer", "vae"])
def test_every_tensor_comes_back_as_it_is_stored(build, files, folder):
    reader, forms = open_file(build.checkpoint, folder, files[folder]), {}
    for one in plan_file(build.checkpoint, build.plan, folder):
        forms |= dict.fromkeys((rows.ref.name for rows in one.rows), one.form)
    assert forms.keys() == build.checkpoint.tensors[folder].keys()
    for name, ref in build.checkpoint.tensors[folder].items():
        expected = read_tensor(ref).astype(np.float32)
        if forms[name] in FILE_FORMATS:
            expected = FILE_FORMATS[forms[name]].unpack(FILE_FORMATS[forms[name]].pack(expected))
        elif forms[name] == "F16":
            expected = expected.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(reader(name), expected, err_msg=name)


def test_t5_is_read_by_transformers(build, files, tmp_path, tiny_checkpoint):
    from transformers import T5EncoderModel

    shutil.copy(files["text_encoder_2"], tmp_path / "t5.gguf")
    config = {**build.checkpoint.configs["text_encoder_2"], "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, told = T5EncoderModel.from_pretrained(
        tmp_path, gguf_file="t5.gguf", dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    reader = open_file(build.checkpoint, "text_encoder_2", files["text_encoder_2"])
    state = model.state_dict()
    for name in build.checkpoint.tensors["text_encoder_2"]:
        np.testing.assert_array_equal(state[name].numpy(), reader(name), err_msg=name)


def test_encoder_and_decoder_have_their_publishers_names(build, files):
    assert "text_model.encoder.layers.0.mlp.fc1.weight" in read_header(files["text_encoder"])
    assert "encoder.conv_in.weight" in read_header(files["vae"])


def named(build):
    ladder = Ladder(TOOLCHAIN.rungs, TOOLCHAIN.gates)
    TOOLCHAIN.read_back(ladder, build.checkpoint, build.plan, None, None)
    return {row.part: row.passed for row in ladder.rows}


def test_diffusers_converter_finds_every_row(build):
    found = named(build)
    assert all(found.values())
    assert len(found) == sum(part.folder == "transformer" for part in build.parts)


def altered_layout(change):
    """The layout of the transformer with `change` made to each of its tensors."""
    real = gguf_file.layout_of

    def layout_of(checkpoint, folder):
        found = real(checkpoint, folder)
        tensors = tuple(change(one) for one in found.tensors)
        return OtherLayout(tensors, found.architecture, found.facts, found.stretch)

    return layout_of


def unswapped(one):
    return Joined(one.name, one.sources)


def streams_exchanged(one):
    other = {"img_mlp": "txt_mlp", "txt_mlp": "img_mlp"}
    for name, instead in other.items():
        if f".{name}." in one.name:
            return Joined(one.name.replace(name, instead), one.sources)
    return one


def keys_first(one):
    return Joined(one.name, (one.sources[1], one.sources[0], *one.sources[2:])) if "qkv" in one.name else one


@pytest.mark.parametrize(
    ("change", "bad"), [(unswapped, "tail"), (streams_exchanged, "double."), (keys_first, "double.")]
)
def test_a_wrong_layout_is_caught(build, monkeypatch, change, bad):
    """What reads the file back undoes it: the gate against diffusers' converter is the one that sees it."""
    monkeypatch.setattr(gguf_file, "layout_of", altered_layout(change))
    found = named(build)
    assert {part for part, passed in found.items() if not passed} == {part for part in found if part.startswith(bad)}


def test_files_that_were_cut_or_lack_a_tensor_are_refused(build, files, tmp_path):
    cut = tmp_path / "cut.gguf"
    shutil.copy(files["transformer"], cut)
    os.truncate(cut, 1000)
    with pytest.raises(IntegrityError, match=r"no GGUF file, or a damaged one .*; build or fetch it again"):
        open_file(build.checkpoint, "transformer", cut)
    with pytest.raises(IntegrityError, match=r"has no tensor time_in\.in_layer\.weight"):
        open_file(build.checkpoint, "transformer", files["text_encoder_2"])
