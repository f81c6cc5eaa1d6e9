"""MLX itself on bundles of tiny-dev: parts beside the reference, whole images beside diffusers, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fluxkiln.compile.opener import open_bundle
from fluxkiln.compile.targets import find_target
from fluxkiln.compile.toolchain import open_executor
from fluxkiln.compile.toolchains.mlx import executor
from fluxkiln.compile.toolchains.mlx import file as mlx_file
from fluxkiln.compile.toolchains.mlx.environment import MLX_ROOT_VARIABLE
from fluxkiln.compile.toolchains.mlx.graphs import read_graphs
from fluxkiln.compile.toolchains.mlx.operations import Codes
from fluxkiln.errors import CompileError, IntegrityError, ToolchainError, UsageError
from fluxkiln.generate.painter import Painter, Request, paint
from fluxkiln.settings import Settings

# SIDE and TOKENS: those of the recording of tiny-dev
PROMPT, SIDE, TOKENS, STEPS = "a small kiln", 64, 32, 2


def has_mlx() -> bool:
    try:
        executor.load_mlx()
    except ToolchainError:
        return False
    return True


pytestmark = pytest.mark.skipif("not has_mlx()", reason="MLX is not installed: make env-mlx")


@pytest.fixture(scope="module")
def make_bundle(tiny_checkpoint, tmp_path_factory):
    """(scheme, settings) -> an opened bundle of tiny-dev's smallest shapes."""
    from fluxkiln.build.make import build

    folder = tmp_path_factory.mktemp("mlx")

    def make(scheme="F32", target="mlx_example", **settings):
        asked = {"size": ((SIDE, SIDE),), "tokens": (TOKENS,), "verify": False, "store": folder / "store", **settings}
        name = "-".join([target, scheme, *map(str, settings.values())])
        made = build(Settings(target, str(tiny_checkpoint().root), scheme=scheme, build_dir=folder / name, **asked))
        return open_bundle(made.bundle)

    return make


@pytest.fixture(scope="module")
def plain(make_bundle):
    return make_bundle()


@pytest.fixture
def coded(make_bundle, monkeypatch):
    """mflux's layout with codes, of tiny-dev, whose widths it has not."""
    real = mlx_file.layout_of

    def without_sizes(checkpoint, layout, folder):
        return replace(real(checkpoint, layout, folder), fixed={})

    for module in (mlx_file, executor):
        monkeypatch.setattr(module, "layout_of", without_sizes)
    return make_bundle("MLX4,single=MLX8", "mlx", modulation="inline")


def off(made, expected):
    return float(np.linalg.norm(made - expected) / np.linalg.norm(expected))


def test_every_part_is_the_references(make_bundle, tiny_recording):
    """Both in float32: 1e-6 was measured, 2e-6 through convolutions."""
    bundle, recording = make_bundle(modulation="inline"), tiny_recording()
    runner = open_executor(bundle)
    for part in bundle.parts:
        made, expected = runner(part.name, recording.inputs(part.name)), recording.outputs(part.name)
        assert made.keys() == expected.keys()
        for name, values in made.items():
            assert off(values, expected[name]) <= 1e-5, (part.name, name)


@pytest.mark.parametrize("padded", [True, False])
def test_an_image_is_diffusers(plain, tiny_checkpoint, padded):
    """Without padding T5 has the prompt's own tokens, as diffusers has with as many at most."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tiny_checkpoint().root, dtype=torch.float32)
    tokens = TOKENS if padded else len(pipe.tokenizer_2(PROMPT).input_ids)
    assert padded or tokens < TOKENS
    how = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "max_sequence_length": tokens}
    expected = pipe(
        PROMPT, **how, guidance_scale=3.5, output_type="latent", generator=torch.Generator().manual_seed(0)
    ).images.numpy()
    with Painter(plain, open_executor(plain, **{"no-t5-padding": not padded})) as painter:
        request = Request(PROMPT, steps=STEPS, padded=padded)
        (picture,) = paint(painter, [request])
    assert off(picture.latents, expected) <= 1e-5
    assert picture.image.shape == (SIDE, SIDE, 3)


CODED = ("double.01", "single.02", "t5_block.01")


def test_codes_are_multiplied_as_they_stand(coded, tiny_recording, monkeypatch):
    """Beside the numbers that the reader of the files makes of them, each a bfloat16: 1.4e-3 was measured."""
    inputs = {name: tiny_recording().inputs(name) for name in CODED}
    runner = open_executor(coded)
    made = {name: runner(name, inputs[name]) for name in CODED}
    weights = {name: runner.session(name).weights for name in CODED}
    held = [one for name in CODED for one in weights[name].values() if isinstance(one, Codes)]
    assert {one.bits for one in held} == {4, 8}
    monkeypatch.setattr(executor, "planes_of", lambda *given: {})
    numbers = open_executor(coded)

    def worst(made):
        return max(off(values, numbers(name, inputs[name])[output])
                   for name in CODED for output, values in made[name].items())  # fmt: skip

    assert worst(made) <= 4e-3
    slot, right = next((slot, one) for slot, one in weights["single.02"].items() if isinstance(one, Codes))
    codes, scales, biases = right.planes
    weights["single.02"][slot] = replace(right, planes=(codes, scales * 1.5, biases))
    assert worst({name: runner(name, inputs[name]) for name in CODED}) > 1e-2


def test_codes_made_while_loading(plain, coded):
    """As MLX's example makes them: of matrices whose columns are a multiple of 512."""
    runner, before = open_executor(plain, quantize=True), open_executor(plain)
    assert "4-bit codes made now" in runner.facts["device"]
    part = next(part.name for part in plain.parts if part.kind == "double_modulated")
    held = [one for one in runner.session(part).weights.values() if isinstance(one, Codes)]
    assert held
    assert all(one.planes[1].shape[1] * 64 % 512 == 0 and one.bits == 4 for one in held)
    assert not any(isinstance(one, Codes) for one in before.session(part).weights.values())
    with pytest.raises(UsageError, match=r"--quantize: the weights of this bundle are in codes already, MLX4"):
        open_executor(coded, quantize=True)


def test_what_is_refused(plain, coded, monkeypatch, tmp_path):
    with pytest.raises(ToolchainError, match=r"--device gpu: MLX finds cpu on this machine; name one of these"):
        open_executor(plain, device="gpu")
    for device in (0, "npu"):
        with pytest.raises(UsageError, match=f"--device {device}: MLX's devices are cpu and gpu"):
            open_executor(plain, device=device)
    other = replace(plain, target=find_target("cpu"))
    for option in ("quantize", "no-t5-padding"):
        with pytest.raises(UsageError, match=f"^--{option}: the executor ort does not use it; leave it out"):
            open_executor(other, **{option: True})
    runner = open_executor(plain)
    name = next(part.name for part in plain.parts if part.kind == "tail_modulated")
    shapes = {"hidden_states": (1, 5, 256), "modulation": (1, 2, 256)}
    with pytest.raises(
        CompileError, match=r"input hidden_states has shape \[1, 5, 256\], it was made for \[1, 16, 256\]"
    ):
        runner(name, {key: np.zeros(shape, np.float32) for key, shape in shapes.items()})
    with pytest.raises(CompileError, match=r"modulation is missing or one too many"):
        runner(name, {"hidden_states": np.zeros((1, 16, 256), np.float32)})
    graphs = runner.graphs["kinds"]
    graphs["tail_modulated"]["operations"][-1]["inputs"][0] = "nowhere"
    with pytest.raises(CompileError, match=rf"could not run part {name} \(KeyError: 'nowhere'\); build or fetch"):
        runner(name, {key: np.zeros((1, 16, 256) if key != "modulation" else shape, np.float32)
                      for key, shape in shapes.items()})  # fmt: skip
    graphs["token_embed"]["operations"][0]["type"] = "Loop"
    with pytest.raises(CompileError, match="token_embed has operations that MLX is not given here: Loop"):
        runner.open("token_embed")
    del graphs["token_embed"]
    with pytest.raises(CompileError, match=r"host/graphs.json has no graph of token_embed; build the bundle again"):
        runner.open("token_embed")
    monkeypatch.setenv(MLX_ROOT_VARIABLE, str(tmp_path))
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(
        ToolchainError, match=r"is not installed .*; pip install mlx, 'mlx\[cpu\]' on Linux, or make env-mlx"
    ):
        open_executor(plain)


@pytest.mark.parametrize(
    "change", [{"shape": [1 << 40]}, {"shape": [-1]}, {"values": [1, 2]}, {"by_token": [1, 2, 3]}, {"values": []}]
)
def test_constants_that_cannot_be_are_refused(tmp_path, change):
    one = {"dtype": "int64", "shape": [3], "values": [7], **change}
    graph = {"inputs": [], "outputs": [], "slots": {}, "operations": [], "constants": {"c": one}}
    (tmp_path / "graphs.json").write_text(json.dumps({"tokens": 16, "kinds": {"tail": graph}}))
    with pytest.raises(IntegrityError, match="constant 'c' of tail has shape"):
        read_graphs(tmp_path / "graphs.json")
