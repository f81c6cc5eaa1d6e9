"""How much is verified, and at which shapes."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from fluxkiln.build.budget import (
    Limits,
    count_work,
    executed_parts,
    filling_prompt,
    multiplications,
    name_shapes,
    replayed_shapes,
    widest_convolution,
)
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir import toolchain as tpu_mlir
from fluxkiln.compile.toolchains.tpu_mlir.executors import MOST_MULTIPLICATIONS
from fluxkiln.compile.toolchains.tpu_mlir.toolchain import MOST_CONVOLVED
from fluxkiln.patches.flux1.kinds import KINDS, list_parts
from fluxkiln.types import Shapes
from tests.builds import altered


@pytest.fixture(scope="module")
def cpu(small_build):
    """tiny-dev for the cpu target, at 32x32 with 16 tokens."""
    return small_build(scheme="BF16", target="cpu")


def test_a_small_model_is_replayed_at_its_own_shapes(cpu):
    assert replayed_shapes(cpu.checkpoint, cpu.plan) == cpu.plan.shapes
    assert multiplications(cpu.checkpoint, cpu.plan.shapes) < MOST_MULTIPLICATIONS


@pytest.mark.parametrize(("halvings", "expected"), [(1, (64, 96, 32)), (2, (32, 48, 16)), (9, (16, 16, 8))])
def test_shapes_are_halved_until_a_step_is_within_the_limit(cpu, halvings, expected):
    model = altered(cpu, shapes=Shapes(height=128, width=192, tokens=64))
    wanted = Shapes(*expected)
    most = multiplications(model.checkpoint, wanted) if halvings < 9 else 1.0
    assert replayed_shapes(model.checkpoint, model.plan, Limits(replayed=most)) == wanted


def test_shapes_are_halved_for_what_an_interpreter_convolves_slowly(small_build):
    chip = small_build(scheme="W4BF16", target="bm1684x")
    large = altered(chip, shapes=Shapes(height=1024, width=1024, tokens=16))
    assert widest_convolution(large.checkpoint, large.plan, large.plan.shapes) == 1024 * 1024 * 32 > MOST_CONVOLVED
    assert replayed_shapes(large.checkpoint, large.plan) == Shapes(height=512, width=512, tokens=8)
    assert replayed_shapes(chip.checkpoint, chip.plan) == chip.plan.shapes
    without = replace(large.plan, parts=tuple(part for part in large.plan.parts if not part.traits.convolutional))
    assert widest_convolution(large.checkpoint, without, large.plan.shapes) == 0


def test_the_whole_flux_is_replayed_at_128x128(cpu):
    """11.9e9 weights: 1.5e12 multiplications with 128 tokens."""
    shapes = Shapes(height=1024, width=1024, tokens=512)
    refs = cpu.checkpoint.tensors["transformer"]
    weight = replace(refs["proj_out.weight"], shape=(11_900, 1_000_000))
    checkpoint = replace(cpu.checkpoint, tensors={"transformer": {"w": weight}})
    assert replayed_shapes(checkpoint, altered(cpu, shapes=shapes).plan) == Shapes(height=128, width=128, tokens=64)


def test_the_costliest_component_counts(cpu):
    """The decoder's is right for FLUX.1's own; all levels of this one are equally wide, so more of it is at the end."""

    def alone(component):
        return replace(cpu.checkpoint, tensors={component: cpu.checkpoint.tensors[component]})

    counts = {
        name: multiplications(alone(name), cpu.plan.shapes)
        for name in ("text_encoder", "text_encoder_2", "transformer", "vae")
    }
    assert counts["text_encoder"] == 0
    assert multiplications(cpu.checkpoint, cpu.plan.shapes) == max(counts.values())
    blocks = [ref for name, ref in cpu.checkpoint.tensors["text_encoder_2"].items() if ".layer." in name]
    matrices = sum(ref.shape[0] * ref.shape[1] for ref in blocks if len(ref.shape) == 2)
    assert counts["text_encoder_2"] == 16 * matrices
    decoder = count_work(make_template(*cpu, "vae_decoder", "onnx23").path).multiplications
    assert 0.2 < counts["vae"] / decoder < 1


def test_some_blocks_and_all_that_exist_once_are_executed(cpu):
    parts = executed_parts(*cpu, seed=0)
    kinds = [part.kind for part in parts]
    assert [kinds.count(kind) for kind in ("double", "single", "t5_block")] == [2, 2, 1]
    assert {"clip", "t5_embed", "t5_final", "head", "tail", "vae_decoder"} <= set(kinds)
    assert [part for part in cpu.parts if part in parts] == list(parts), "in the order they run"
    assert executed_parts(*cpu, seed=0) == parts


def test_other_seeds_choose_other_blocks(cpu):
    chosen = {tuple(part.name for part in executed_parts(*cpu, seed, Limits(blocks=1))) for seed in range(12)}
    assert len(chosen) >= 6
    singles = {name for names in chosen for name in names if name.startswith("single")}
    assert singles == {"single.00", "single.01", "single.02"}


def test_what_is_too_large_is_not_executed(cpu):
    counts = {
        kind: count_work(make_template(*cpu, kind, "onnx23").path).multiplications
        for kind in ("double", "single", "vae_decoder", "tail")
    }
    assert counts["vae_decoder"] > counts["double"] > counts["tail"]
    kinds = {part.kind for part in executed_parts(*cpu, 0, Limits(executed=counts["double"]))}
    assert "vae_decoder" not in kinds
    assert {"double", "tail"} <= kinds
    assert {part.kind for part in executed_parts(*cpu, 0, Limits(executed=0))} == {"t5_embed", "t5_final"}


def test_the_interpreter_is_given_no_wide_convolution(cpu, monkeypatch):
    widest = count_work(make_template(*cpu, "vae_decoder", "onnx23").path).widest_convolution
    assert widest == 32 * 32 * 32
    assert count_work(make_template(*cpu, "tail", "onnx23").path).widest_convolution == 0
    chip = altered(cpu, target=replace(cpu.target, toolchain="tpu_mlir"))
    for model, most, expected in ((cpu, 0, True), (chip, widest, True), (chip, widest - 1, False)):
        monkeypatch.setattr(tpu_mlir, "MOST_CONVOLVED", most)
        kinds = {part.kind for part in executed_parts(*model, 0, Limits())}
        assert ("vae_decoder" in kinds) == expected
        assert "double" in kinds


def test_kinds_that_share_blocks_share_the_choice(cpu):
    """A block's modulation is of use with the block alone."""
    parts = list_parts(cpu.checkpoint.configs, modulation="hoisted")
    model = altered(cpu, parts=parts)
    for seed in range(4):
        chosen = executed_parts(*model, seed, Limits(executed=inf, blocks=1))
        prefixes = {kind: {part.prefix for part in chosen if part.kind == kind} for kind in KINDS}
        assert prefixes["double_modulation"] == prefixes["double_modulated"]
        assert prefixes["single_modulation"] == prefixes["single_modulated"]
        assert len(prefixes["single_modulated"]) == 1


@pytest.mark.parametrize("graph_format", ["onnx17", "onnx23"])
def test_multiplications_are_counted(cpu, graph_format):
    """tail at 32x32: 4 tokens times [64, 256], and AdaLN's [512, 256] once."""
    template = make_template(*cpu, "tail", graph_format)
    assert count_work(template.path).multiplications == 4 * 64 * 256 + 512 * 256


def test_attention_and_convolutions_are_counted(cpu):
    """Of the opset 23 forms, where attention is one operation, and of the decoder's first convolution at least."""
    single = count_work(make_template(*cpu, "single", "onnx23").path).multiplications
    weights = sum(
        ref.shape[0] * ref.shape[1] * (1 if "norm.linear" in name else 20)
        for name, ref in cpu.checkpoint.tensors["transformer"].items()
        if name.startswith("single_transformer_blocks.0.") and len(ref.shape) == 2
    )
    assert single == weights + 2 * 20 * 20 * 256
    assert count_work(make_template(*cpu, "vae_decoder", "onnx23").path).multiplications > 4 * 4 * 32 * 16 * 9


def test_a_filling_prompt_fills_and_repeats():
    prompt = filling_prompt("a kiln", 512, seed=3)
    assert prompt.startswith("a kiln ")
    words = prompt.split()
    assert len(words) > 1000
    assert len(set(words)) > 900
    assert prompt == filling_prompt("a kiln", 512, seed=3) != filling_prompt("a kiln", 512, seed=4)


def test_shapes_have_a_name():
    assert name_shapes(Shapes(height=768, width=1024, tokens=512)) == "1024x768, 512 tokens"
