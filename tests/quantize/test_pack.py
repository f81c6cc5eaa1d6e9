"""4-bit and 8-bit packing against a slow restatement of the rule and against the compiler's own bytes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.compile.process import run_tool
from fluxkiln.compile.toolchains.tpu_mlir.environment import tool_argv, tpu_mlir_environ
from fluxkiln.errors import SchemeError
from fluxkiln.quantize.pack import bf16_to_float32, dequantize, to_bf16_bits
from tests.quantize.weights import pack_int4, pack_int8

F = np.float32
PACK = {4: pack_int4, 8: pack_int8}


def round_away(value):
    """Half away from zero, on float32, with nothing that can be vectorised wrongly."""
    magnitude = F(abs(value))
    whole = F(math.floor(magnitude))
    if F(magnitude - whole) >= F(0.5):
        whole = F(whole + F(1))
    return whole if value >= 0 else F(-whole)


def pack_slowly(weight, group_size, bits):
    """The module docstring of `quantize.pack`, one number at a time: codes [O, I], scales [O, G] float32, zeros."""
    levels = F(2**bits - 1)
    codes = np.zeros(weight.shape, np.uint8)
    scales = np.zeros((weight.shape[0], weight.shape[1] // group_size), F)
    zeros = np.zeros(scales.shape, np.uint8)
    for row, group in np.ndindex(scales.shape):
        columns = slice(group * group_size, (group + 1) * group_size)
        values = [F(value) for value in weight[row, columns]]
        scale = F(max(F(max(values) - min(values)), F(1e-5)) / levels)
        zero = min(max(round_away(F(-min(values) / scale)), F(0)), levels)
        scales[row, group], zeros[row, group] = scale, zero
        codes[row, columns] = [min(max(F(round_away(F(value / scale)) + zero), F(0)), levels) for value in values]
    return codes, scales, zeros


def unpack(codes):
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)


def gaussian(rng, shape):
    return rng.standard_normal(shape) * 0.02


def heavy(rng, shape):
    return rng.standard_t(2, shape) * 0.02


def one_signed(rng, shape):
    return 0.5 + 0.1 * rng.random(shape)


def negative(rng, shape):
    return -0.5 - 0.1 * rng.random(shape)


def constant(rng, shape):
    return np.full(shape, 0.25)


def zero(rng, shape):
    return np.zeros(shape)


def tiny(rng, shape):
    return rng.standard_normal(shape) * 1e-7


def outlier(rng, shape):
    values = rng.standard_normal(shape)
    values[:, 3] = 1e30
    return values


def halves(rng, shape):
    """Multiples of half a step: every quotient is a tie or next to one.

    The steps are odd numbers, whose reciprocals are not exact; 257 and 259 lie halfway between two bfloat16 numbers.
    """
    values = rng.integers(0, 31, shape) / 2
    values[:, 0::16], values[:, 1::16] = 0, 15
    values[:, 2::16] = np.nextafter(F(7.5), F(0))
    return values * np.resize([1, 257, 259, 11, 41], shape[0])[:, None]


KINDS_OF_WEIGHT = (gaussian, heavy, one_signed, negative, constant, zero, tiny, outlier, halves)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("make", KINDS_OF_WEIGHT, ids=lambda make: make.__name__)
def test_equals_the_restated_rule(make, group_size, bits):
    weight = make(np.random.default_rng(group_size), (5, 256)).astype(F)
    packed = PACK[bits](weight, group_size)
    codes, scales, zeros = pack_slowly(weight, group_size, bits)
    np.testing.assert_array_equal(unpack(packed.codes_OI) if bits == 4 else packed.codes_OI, codes)
    np.testing.assert_array_equal(packed.scales_OG, scales.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(packed.zeros_OG, zeros)


@pytest.mark.parametrize("bits", [4, 8])
def test_many_random_weights_equal_the_restated_rule(bits):
    """Enough quotients for some to fall just beside a half."""
    weight = np.random.default_rng(7).standard_normal((64, 512)).astype(F)
    packed = PACK[bits](weight, 64)
    codes, _, _ = pack_slowly(weight, 64, bits)
    np.testing.assert_array_equal(unpack(packed.codes_OI) if bits == 4 else packed.codes_OI, codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("make", KINDS_OF_WEIGHT, ids=lambda make: make.__name__)
def test_bfloat16_and_float32_input_agree(make, bits):
    narrow = make(np.random.default_rng(1), (8, 128)).astype(ml_dtypes.bfloat16)
    first, second = PACK[bits](narrow, 64), PACK[bits](narrow.astype(F), 64)
    np.testing.assert_array_equal(first.codes_OI, second.codes_OI)
    np.testing.assert_array_equal(first.scales_OG, second.scales_OG)
    np.testing.assert_array_equal(first.zeros_OG, second.zeros_OG)


def test_views_are_packed_as_what_they_show():
    weight = np.random.default_rng(2).standard_normal((256, 128)).astype(ml_dtypes.bfloat16)
    for view in (weight.T, weight[:, 64:], weight[::2]):
        np.testing.assert_array_equal(pack_int4(view, 64).codes_OI, pack_int4(view.copy(), 64).codes_OI)


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_cut_at_groups_keep_their_groups(bits):
    """A weight that a part uses in slices has the same codes as the whole: what the compiler sees are the slices."""
    weight = np.random.default_rng(3).standard_normal((16, 512)).astype(ml_dtypes.bfloat16)
    whole = dequantize(PACK[bits](weight, 64), 64)
    for columns in (slice(0, 128), slice(128, 512)):
        np.testing.assert_array_equal(dequantize(PACK[bits](weight[:, columns], 64), 64), whole[:, columns])
    elsewhere = dequantize(PACK[bits](weight[:, 32:160], 64), 64)
    assert not np.array_equal(elsewhere, whole[:, 32:160])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("make", [gaussian, heavy], ids=lambda make: make.__name__)
def test_dequantized_weights_are_within_their_step(make, group_size, bits):
    weight = make(np.random.default_rng(4), (32, 512)).astype(F)
    packed = PACK[bits](weight, group_size)
    groups = weight.reshape(32, -1, group_size)
    steps = (groups.max(-1) - groups.min(-1)) / (2**bits - 1)
    error = np.abs(dequantize(packed, group_size) - weight).reshape(groups.shape).max(-1)
    # half a step for the code and half for the zero point, and what bfloat16 loses of the scale over the whole range
    assert (error <= steps * (1 + 2**bits * 2.0**-8)).all()
    assert error.max() > 0.25 * steps.max()


def test_eight_bits_are_closer_than_four():
    weight = gaussian(np.random.default_rng(5), (64, 512)).astype(F)
    errors = {bits: np.linalg.norm(dequantize(PACK[bits](weight, 64), 64) - weight) for bits in (4, 8)}
    assert errors[8] < errors[4] / 10


def test_zero_stays_zero():
    weight = gaussian(np.random.default_rng(6), (4, 64)).astype(F)
    weight[:, ::3] = 0
    assert (dequantize(pack_int4(weight, 64), 64)[:, ::3] == 0).all()


@pytest.mark.parametrize("group_size", [48, 0, -64, 256, 3])
def test_group_size_that_does_not_divide_is_refused(group_size):
    with pytest.raises(SchemeError, match=str(group_size)):
        pack_int4(np.zeros((2, 128), F), group_size)


def test_bf16_bits_there_and_back():
    values = np.array([0.0, -0.0, 1.0, -2.5, 3e38, 1e-40, np.inf], F)
    narrow = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(bf16_to_float32(to_bf16_bits(values)), narrow.astype(F))
    assert to_bf16_bits(narrow).base is narrow


@pytest.mark.tpu_mlir
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (8, 64)])
def test_equals_the_compiler(tpu_mlir, tmp_path, bits, group_size):
    """Codes, scales and zero points that the compiler makes of all kinds of weights, byte for byte."""
    weights = compile_weights(tpu_mlir, tmp_path, bits, group_size)
    assert len(weights) == 2
    for (weight, stored), name in zip(weights, ("MatMul", "Gemm"), strict=True):
        packed = PACK[bits](weight, group_size)
        np.testing.assert_array_equal(stored["uint"].reshape(packed.codes_OI.shape), packed.codes_OI, name)
        np.testing.assert_array_equal(stored["scale_bf16"].reshape(packed.scales_OG.shape), packed.scales_OG, name)
        np.testing.assert_array_equal(stored["zp"].reshape(packed.zeros_OG.shape), packed.zeros_OG, name)


def compile_weights(env, folder, bits, group_size):
    """Compile y = x @ w1 + b and z = Gemm(v, w2, b): [(weight [O, I], the compiler's arrays of it)]."""
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(8)
    inner, columns = 256, 64
    rows = [make(rng, (4, inner)) for make in KINDS_OF_WEIGHT] + [gaussian(rng, (28, inner))]
    first = np.concatenate(rows).astype(ml_dtypes.bfloat16).astype(F)
    second = rng.standard_normal((columns, inner)).astype(ml_dtypes.bfloat16).astype(F)
    bias = rng.standard_normal(columns).astype(F)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["product"]),
            helper.make_node("Add", ["product", "b"], ["y"]),
            helper.make_node("Gemm", ["v", "w2", "b2"], ["z"], transB=1),
        ],
        "weights",
        [helper.make_tensor_value_info("x", 1, [1, 16, inner]), helper.make_tensor_value_info("v", 1, [1, inner])],
        [helper.make_tensor_value_info("y", 1, [1, 16, columns]), helper.make_tensor_value_info("z", 1, [1, columns])],
        [
            numpy_helper.from_array(np.ascontiguousarray(first.T), "w1"),
            numpy_helper.from_array(second, "w2"),
            numpy_helper.from_array(bias, "b"),
            numpy_helper.from_array(bias[::-1].copy(), "b2"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "weights.onnx")
    environ, log = tpu_mlir_environ(env), folder / "log"
    transform = ["--model_name", "weights", "--model_def", "weights.onnx", "--mlir", "top.mlir"]
    shapes = ["--input_shapes", f"[[1,16,{inner}],[1,{inner}]]"]
    run_tool([*tool_argv(env, "model_transform"), *transform, *shapes], folder, environ, log, "transform")
    deploy = ["--mlir", "top.mlir", "--chip", "bm1684x", "--model", "net.bmodel", "--quantize", f"W{bits}BF16"]
    groups = ["--q_group_size", str(group_size), "--debug"]
    run_tool([*tool_argv(env, "model_deploy"), *deploy, *groups], folder, environ, log, "deploy")
    (path,) = folder.glob("*_tpu_weights.npz")
    with np.load(path) as arrays:
        suffixes = ("uint", "scale_bf16", "zp")
        found = [
            {
                suffix: next(arrays[key] for key in arrays if key.startswith(start) and key.endswith(suffix))
                for suffix in suffixes
            }
            for start in ("y_", "z_")
        ]
    return list(zip((first, second), found, strict=True))
