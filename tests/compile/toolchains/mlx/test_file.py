"""Files for MLX's example of tiny-dev, and for mflux of a transformer of its width, read back and against diffusers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from fluxkiln.compile.toolchains.mlx import file as mlx_file
from fluxkiln.compile.toolchains.mlx.environment import MLX_ROOT_VARIABLE, run_mlx
from fluxkiln.compile.toolchains.mlx.file import plan_file, read_components, write_components
from fluxkiln.compile.toolchains.mlx.toolchain import TOOLCHAIN
from fluxkiln.errors import IntegrityError, SchemeError, ToolchainError
from fluxkiln.export.checkpoint import read_tensor
from fluxkiln.export.safetensors_header import encode_header, read_header
from fluxkiln.patches.model import Joined, OtherLayout
from fluxkiln.verify.ladder import Ladder
from tests.builds import altered

FOLDERS = ("text_encoder", "text_encoder_2", "transformer", "vae")


@pytest.fixture(scope="module")
def example(small_build):
    return small_build("tiny-dev", "BF16", "mlx_example")


@pytest.fixture(scope="module")
def written(example, tmp_path_factory):
    """Folder of the checkpoint -> name of a file -> where it is."""
    root = tmp_path_factory.mktemp("example")
    names = {one: write_components(example.checkpoint, example.plan, one, root, int) for one in FOLDERS}
    return {folder: {name: root / name for name in files} for folder, files in names.items()}


def test_the_example_finds_the_files_that_it_loads(written):
    files = [name for names in written.values() for name in names]
    assert files == [
        "text_encoder/model.safetensors", "text_encoder/model.safetensors.index.json",
        "text_encoder_2/model.safetensors", "text_encoder_2/model.safetensors.index.json",
        "flux1-dev.safetensors", "ae.safetensors",
    ]  # fmt: skip
    index = json.loads(written["text_encoder_2"]["text_encoder_2/model.safetensors.index.json"].read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert (
        index["weight_map"].keys() == read_header(written["text_encoder_2"]["text_encoder_2/model.safetensors"]).keys()
    )
    decoder = read_header(written["vae"]["ae.safetensors"])
    assert decoder["decoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_tensor_comes_back_as_it_is_stored(example, written, folder):
    reader = read_components(example.checkpoint, example.plan, folder, written[folder])
    forms = {
        rows.ref.name: one.form for one in plan_file(example.checkpoint, example.plan, folder) for rows in one.rows
    }
    assert forms.keys() == example.checkpoint.tensors[folder].keys()
    for name, ref in example.checkpoint.tensors[folder].items():
        expected = read_tensor(ref).astype(np.float32)
        if forms[name] == "F16":
            expected = expected.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(reader(name), expected, err_msg=name)


def named(build):
    ladder = Ladder(TOOLCHAIN.rungs, TOOLCHAIN.gates)
    TOOLCHAIN.read_back(ladder, build.checkpoint, build.plan, None, None)
    return {row.part: row.passed for row in ladder.rows}


def test_diffusers_converters_find_every_row(example):
    found = named(example)
    assert all(found.values())
    assert {part for part in found if not part.startswith(("head", "double", "single", "tail"))} == {"vae_decoder"}


def altered_layout(change):
    real = mlx_file.layout_of

    def layout_of(checkpoint, layout, folder):
        found = real(checkpoint, layout, folder)
        tensors = tuple(change(one) for one in found.tensors)
        return OtherLayout(tensors, found.architecture, found.facts, found.stretch, found.fixed, found.file)

    return layout_of


def test_blocks_of_the_decoder_in_diffusers_order_are_caught(example, monkeypatch):
    def counted_up(one):
        pairs = {".up.3.": ".up.0.", ".up.0.": ".up.3."}
        for there, here in pairs.items():
            if there in one.name:
                return Joined(one.name.replace(there, here), one.sources, kernel=one.kernel)
        return one

    monkeypatch.setattr(mlx_file, "layout_of", altered_layout(counted_up))
    assert [part for part, passed in named(example).items() if not passed] == ["vae_decoder"]


def test_sizes_that_mflux_has_not_are_refused(example):
    from fluxkiln.compile.targets import find_target

    build = altered(example, target=find_target("mlx"))
    with pytest.raises(SchemeError, match=r"transformer has num_attention_heads 2, mflux is made for 24 alone; build"):
        plan_file(build.checkpoint, build.plan, "transformer")


@pytest.fixture
def sharded(small_build, monkeypatch):
    """mflux's layout of tiny-dev, whose widths it has not; shards of 2 MB."""
    from fluxkiln.compile.targets import find_target

    build = small_build("tiny-dev", "BF16", "mlx_example")
    _, schemes = find_target("mlx").parse_schemes("MLX4,single=MLX8", build.checkpoint.model.kinds)
    real = mlx_file.layout_of

    def without_sizes(checkpoint, layout, folder):
        found = real(checkpoint, layout, folder)
        return OtherLayout(found.tensors, found.architecture, found.facts, found.stretch, {}, found.file)

    monkeypatch.setattr(mlx_file, "layout_of", without_sizes)
    monkeypatch.setattr(mlx_file, "SHARD_BYTES", 2_000_000)
    return altered(build, target=find_target("mlx"), schemes=schemes)


def write_sharded(build, root):
    names = write_components(build.checkpoint, build.plan, "transformer", root, int)
    return {name: root / name for name in names}


def test_mflux_has_shards_of_three_tensors_a_matrix(sharded, tmp_path):
    from safetensors import safe_open

    files = write_sharded(sharded, tmp_path)
    shards = [path for path in files.values() if path.suffix == ".safetensors"]
    assert [path.name for path in shards] == [f"{i}.safetensors" for i in range(len(shards))]
    assert len(shards) > 3
    refs = {name: ref for path in shards for name, ref in read_header(path).items()}
    assert all(path.stat().st_size < 2_100_000 for path in shards)
    first = "transformer_blocks.0.ff.linear1"
    assert {name: (ref.dtype, ref.shape) for name, ref in refs.items() if name.startswith(first)} == {
        f"{first}.weight": ("U32", (1024, 32)), f"{first}.scales": ("BF16", (1024, 4)),
        f"{first}.biases": ("BF16", (1024, 4)), f"{first}.bias": ("BF16", (1024,)),
    }  # fmt: skip
    assert refs["single_transformer_blocks.0.proj_mlp.weight"].shape == (1024, 64)
    assert refs["x_embedder.weight"].dtype == refs["transformer_blocks.0.attn.norm_q.weight"].dtype == "BF16"
    told = {"quantization_level": "4", "mflux_version": "0.24.0"}
    with safe_open(shards[0], "np") as opened:
        assert opened.metadata() == told
    index = json.loads((tmp_path / "transformer/model.safetensors.index.json").read_text())
    assert index["metadata"] == told
    assert index["weight_map"] == {name: ref.file.name for name, ref in refs.items()}


def test_scales_of_another_dtype_are_refused(sharded, tmp_path):
    """MLX would take them, and compute everything behind them in float32."""
    files = write_sharded(sharded, tmp_path)
    read_components(sharded.checkpoint, sharded.plan, "transformer", files)
    path = files["transformer/1.safetensors"]
    refs, raw = read_header(path), path.read_bytes()
    widened = {one: "F32" if one.endswith(".scales") else ref.dtype for one, ref in refs.items()}
    data = b"".join(
        np.repeat(np.frombuffer(raw[ref.offset : ref.offset + ref.nbytes], "<u2"), 2).tobytes()
        if widened[one] != ref.dtype else raw[ref.offset : ref.offset + ref.nbytes]
        for one, ref in refs.items()
    )  # fmt: skip
    path.write_bytes(encode_header((one, widened[one], ref.shape) for one, ref in refs.items()) + data)
    with pytest.raises(
        IntegrityError, match=r"\.scales is F32 \[\d+, \d+\], MLX[48] has BF16 \[\d+, \d+\] there; build it"
    ):
        read_components(sharded.checkpoint, sharded.plan, "transformer", files)
    shutil.copy(files["transformer/0.safetensors"], path)
    with pytest.raises(IntegrityError, match=r"there is no tensor .*; build it again"):
        read_components(sharded.checkpoint, sharded.plan, "transformer", files)


def test_a_missing_client_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv(MLX_ROOT_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ToolchainError, match=r"is not installed in .*nowhere; make env-mlx makes it") as caught:
        run_mlx([], tmp_path / "log")
    assert caught.value.exit_code == 5
