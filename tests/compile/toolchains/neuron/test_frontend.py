"""Lowering: what comes out computes what torch computes, and what cannot be lowered is refused in a sentence."""

from __future__ import annotations

import importlib.metadata
import os

import numpy as np
import pytest

from fluxkiln.compile.toolchains.neuron import frontend
from fluxkiln.compile.toolchains.neuron.check import check_hlo
from fluxkiln.compile.toolchains.neuron.frontend import load_frontend, lower_module
from fluxkiln.compile.toolchains.neuron.hlo_module import canonicalise, parse_module
from fluxkiln.compile.toolchains.neuron.replicas import Replicas
from fluxkiln.errors import CompileError, ToolchainError
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.flux1.presets import PRESETS
from fluxkiln.types import Shapes, TensorSpec

pytest.importorskip("jax")
import torch
from torch import nn
from torch.nn import functional

BOUND = 5e-6


def relative(found, expected):
    """Largest relative L2 distance over outputs, in float64."""
    return max(
        np.linalg.norm(np.asarray(f, np.float64) - np.asarray(e, np.float64))
        / np.linalg.norm(np.asarray(e, np.float64))
        for f, e in zip(found, expected, strict=True)
    )


def executed(replicas, make_module, arguments):
    """A module on one rank by way of HLO, and torch's own result: lists of outputs."""
    inputs = [TensorSpec(f"x{i}", tuple(x.shape), str(x.dtype).removeprefix("torch.")) for i, x in enumerate(arguments)]
    lowered = lower_module(lambda collectives: make_module().to("meta"), inputs, 1, "float32")
    proto = canonicalise(lowered.proto)
    check_hlo(proto, all_reduces=0, all_gathers=0, ranks=1)
    generator = torch.Generator().manual_seed(3)
    module = make_module().to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    process = replicas(1)
    arrays = [x.numpy() for x in arguments] + [parameter.numpy() for parameter in module.parameters()]
    found = process.run(process.load(proto), [arrays])[0]
    expected = module(*arguments)
    expected = list(expected) if isinstance(expected, tuple) else [expected]
    assert [(out.shape, out.dtype) for out in lowered.outputs] == [(f.shape, f.dtype.name) for f in found]
    return found, [result.numpy() for result in expected]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_split_block_equals_unsplit_torch(replicas, lower_block, block_weights, block_arguments, ranks):
    lowered, proto = lower_block(ranks)
    block, x = block_weights
    facts = check_hlo(proto, all_reduces=2 * (ranks > 1), all_gathers=ranks > 1, ranks=ranks)
    assert facts.operations["parameter"] == len(lowered.parameters) == 1 + len(list(block.parameters()))
    assert lowered.outputs == (TensorSpec("output_0", (1, 6, 32)), TensorSpec("output_1", (1, 6, 32)))
    process = replicas(ranks)
    results = process.run(process.load(proto), block_arguments(ranks))
    expected = [result.numpy() for result in block(x)]
    assert max(relative(result, expected) for result in results) <= BOUND
    for result in results[1:]:  # after a reduction the ranks are one
        assert all(np.array_equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_another_ranks_weights_are_seen(replicas, lower_block, block_weights, block_arguments):
    _, proto = lower_block(2)
    block, x = block_weights
    arguments = block_arguments(2)
    arguments[1] = arguments[0]
    process = replicas(2)
    results = process.run(process.load(proto), arguments)
    assert relative(results[0], [result.numpy() for result in block(x)]) > 0.01


class Stack(nn.Module):
    """Convolutions, group norm, SiLU and nearest upsampling, as in a VAE decoder."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8, eps=1e-6)
        self.second = nn.Conv2d(8, 6, 3, stride=2, bias=False)

    def forward(self, x):
        y = functional.silu(self.norm(self.first(x)))
        return self.second(functional.interpolate(y, scale_factor=2.0, mode="nearest"))


class Lookup(nn.Module):
    """Token and position embedding, RMS norm, causal attention, as in a text encoder."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 16), nn.Embedding(8, 16)
        self.norm = nn.RMSNorm(16, eps=1e-6)

    def forward(self, ids):
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.tokens(ids) + self.positions(positions)).unflatten(-1, (2, 8)).transpose(1, 2)
        return functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class Masked(nn.Module):
    """Scores with a bias and a mask of booleans, softmax in float32, written out."""

    def __init__(self):
        super().__init__()
        self.value = nn.Linear(16, 16)

    def forward(self, x, bias, mask):
        scores = torch.matmul(x, x.transpose(-1, -2)) + bias
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
        weights = functional.softmax(scores.float(), dim=-1).type_as(scores)
        half = x.pow(2).mean(-1, keepdim=True) + torch.rsqrt(x.abs() + 1) - 0.5
        return weights @ self.value(x), torch.stack([half, half.cos()]).split(1)[1]


@pytest.mark.parametrize(
    ("make_module", "shapes"),
    [(Stack, [(1, 4, 6, 6)]), (Masked, [(1, 5, 16), (1, 5, 5), (1, 5, 5)]), (Lookup, [(1, 8)])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_operators_of_the_parts_equal_torch(replicas, make_module, shapes):
    generator = torch.Generator().manual_seed(1)
    arguments = [torch.randn(shape, generator=generator) for shape in shapes]
    if make_module is Lookup:
        arguments = [torch.randint(0, 20, shapes[0], generator=generator, dtype=torch.int32)]
    if make_module is Masked:
        arguments[2] = arguments[2] > 1
    found, expected = executed(replicas, make_module, arguments)
    assert relative(found, expected) <= BOUND


@pytest.mark.parametrize("kind", ["clip", "t5_block", "double_modulated", "single_modulated", "tiny_vae_decoder"])
def test_parts_of_the_tiny_model_equal_torch(replicas, kind):
    configs, generator = PRESETS["tiny-dev"].configs, torch.Generator().manual_seed(2)
    arguments = [
        torch.randint(0, 50, spec.shape, generator=generator, dtype=torch.int32)
        if spec.dtype == "int64"
        else torch.randn(spec.shape, generator=generator)
        for spec in MODEL.part_inputs(kind, configs, Shapes(32, 32, 16))
    ]
    found, expected = executed(replicas, lambda: MODEL.build_part(kind, configs), arguments)
    assert relative(found, expected) <= BOUND


@pytest.mark.parametrize("kind", ["head", "t5_embed", "t5_final", "tail_modulated", "vae_decoder"])
def test_other_parts_are_lowered(kind):
    configs = PRESETS["tiny-dev"].configs
    special = {"input_ids": "int32", "timestep": "float32", "guidance": "float32"}
    inputs = [
        TensorSpec(spec.name, spec.shape, special.get(spec.name, "bfloat16"))
        for spec in MODEL.part_inputs(kind, configs, Shapes(32, 32, 16))
    ]
    proto = lower_module(lambda collectives: MODEL.build_part(kind, configs), inputs, 1, "bfloat16").proto
    facts = check_hlo(canonicalise(proto), all_reduces=0, all_gathers=0, ranks=1)
    assert (facts.flops > 0) == (kind not in ("t5_embed", "t5_final"))


def test_bfloat16_weights_and_float32_inputs_keep_their_types(block_type):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8, device="meta")
            self.register_buffer("table", torch.arange(8, dtype=torch.float32))

        def forward(self, x, angle):
            return self.linear(x), angle.sin() * self.table

    inputs = [TensorSpec("x", (2, 8), "bfloat16"), TensorSpec("angle", (8,), "float32")]
    lowered = lower_module(lambda collectives: Mixed(), inputs, 1, "bfloat16")
    assert [spec.dtype for spec in lowered.parameters] == ["bfloat16", "float32", "bfloat16", "bfloat16"]
    assert [spec.dtype for spec in lowered.outputs] == ["bfloat16", "float32"]
    dots = [i for i in parse_module(lowered.proto).computations[-1].instructions if i.opcode == "dot"]
    assert [dot.shape.element_type for dot in dots] == [11], "a product is summed in float32 and rounded once"


def test_float32_dots_ask_for_float32(lower_block):
    module = parse_module(lower_block(2)[1])
    dots = [i for c in module.computations for i in c.instructions if i.opcode == "dot"]
    assert dots
    assert all(list(dot.precision_config.operand_precision) == [2, 2] for dot in dots), "2 is HIGHEST"


def test_collectives_are_in_the_classic_form(lower_block):
    module = parse_module(lower_block(4)[0].proto)
    collectives = [i for c in module.computations for i in c.instructions if i.opcode.startswith("all-")]
    assert [i.opcode for i in collectives] == ["all-reduce", "all-reduce", "all-gather"]
    assert all(not i.channel_id and not i.use_global_device_ids for i in collectives)


def test_weights_that_nobody_reads_stay_parameters():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.empty(3, device="meta"))
            self.linear = nn.Linear(4, 4, bias=False, device="meta")

        def forward(self, x):
            return self.linear(x)

    for ranks in (1, 2):
        lowered = lower_module(lambda collectives: Idle(), [TensorSpec("x", (1, 4))], ranks, "float32")
        assert [spec.name for spec in lowered.parameters] == ["x", "unused", "linear.weight"]
        assert len(parse_module(lowered.proto).host_program_shape.parameters) == 3


def lower(forward, *inputs):
    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 4, device="meta"))
            self.register_buffer("without_value", torch.empty(4, device="meta"))

        def forward(self, *arguments):
            return forward(self, *arguments)

    return lower_module(lambda collectives: Made(), inputs or [TensorSpec("x", (4, 4))], 1, "float32")


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda module, x: x.double() @ x.double(), "double precision.*float64"),
        (lambda module, x: x + torch.ones(4), "reads a tensor that is neither"),
        (lambda module, x: x + module.without_value, "reads a tensor that is neither"),
        (lambda module, x: torch.nn.functional.conv2d(x[None], x[None, None], padding="same"), "padding 'same'"),
        (lambda module, x: torch.special.airy_ai(x), "airy_ai has no lowering"),
    ],
    ids=["float64", "constant", "meta buffer", "operator of ours", "operator of torchax"],
)
def test_what_cannot_be_lowered_is_named(forward, message):
    with pytest.raises(CompileError, match=message):
        lower(forward)


def test_inputs_and_parameters_must_be_legal():
    with pytest.raises(CompileError, match=r"ids has dtype int64.*give token ids as int32"):
        lower(lambda module, x: x, TensorSpec("ids", (1, 4), "int64"))
    with pytest.raises(CompileError, match=r"parameter weight is on cpu.*torch.device"):
        lower_module(lambda collectives: nn.Linear(2, 2), [TensorSpec("x", (1, 2))], 1, "float32")
    with pytest.raises(CompileError, match="0 ranks"):
        lower_module(lambda collectives: nn.Identity(), [TensorSpec("x", (1, 2))], 0, "float32")


def test_int64_is_narrowed_without_a_warning():
    lowered = lower(lambda module, x: x + torch.arange(4, device=x.device, dtype=torch.int64))
    facts = check_hlo(canonicalise(lowered.proto), all_reduces=0, all_gathers=0, ranks=1)
    assert facts.operations["iota"] == 1


@pytest.mark.parametrize(("found", "message"), [("0.9.0", "jaxlib: 0.9.0"), (None, "jaxlib: not installed")])
def test_other_versions_are_refused(monkeypatch, found, message):
    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ToolchainError, match=rf"{message}.*jaxlib 0\.10\.2 exactly.*fluxkiln\[trn1\]"):
        load_frontend.__wrapped__()
    with pytest.raises(ToolchainError, match=message):
        Replicas(1)


def test_torch_is_left_as_it_was():
    load_frontend()
    assert torch.backends.mha.get_fastpath_enabled()
    assert "ENABLE_RUNTIME_UPTIME_TELEMETRY" not in os.environ
    with pytest.raises(AttributeError, match="dimname"):
        torch.ops.aten.all.dimname  # noqa: B018


def test_type_as_leaves_its_tensor_alone():
    lowered = lower(lambda module, x: (x.type_as(x.to(torch.bfloat16)), x + 1))
    assert [spec.dtype for spec in lowered.outputs] == ["bfloat16", "float32"]


def test_a_changed_frontend_is_noticed(monkeypatch):
    """jax that does not wrap what a mesh runs: nothing may be lowered as if it had."""
    monkeypatch.setattr(frontend, "_on_ranks", lambda function, ranks: function)
    with pytest.raises(CompileError, match="0 manual computations of a module, one is expected"):
        lower_module(lambda collectives: nn.Identity(), [TensorSpec("x", (1, 2))], 2, "float32")
