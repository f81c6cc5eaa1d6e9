"""A transformer whose weights stay as they are: linear layers in bfloat16 or in our 4-bit or 8-bit codes.

Some rows of a weight at a time are made into numbers to multiply with, in the forward pass and again for the
gradient; nothing of that is kept. Shapes: O = out features, I = in features, G = groups of input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxkiln.errors import CheckpointError, SchemeError
from fluxkiln.export.checkpoint import Checkpoint, read_rows, read_tensor
from fluxkiln.progress import OnBytes, byte_counter
from fluxkiln.quantize.pack import empty_packed
from fluxkiln.quantize.rounders import make_rounder
from fluxkiln.quantize.schemes import Scheme, parse_scheme
from fluxkiln.types import TensorRef
from fluxkiln.verify.pipeline import unloaded_component

# Weights that are numbers at once: in float32 they fit a core's cache.
_AT_ONCE = 1 << 20


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained; its inputs get gradients.

    Attributes:
        weight: [O, I] bfloat16, or uint8 codes [O, I * bits / 8] as `PackedWeight` has them.
        scales_OG, zeros_OG: bfloat16 and uint8; None without codes.
    """

    scales_OG: Tensor | None
    zeros_OG: Tensor | None

    def __init__(
        self, features: tuple[int, int], weight: Tensor, bias: Tensor | None, groups: tuple[Tensor, Tensor] | None
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = features
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        scales, zeros = groups or (None, None)
        self.register_buffer("scales_OG", scales)
        self.register_buffer("zeros_OG", zeros)

    def forward(self, input: Tensor) -> Tensor:
        made: Tensor = _FrozenProduct.apply(input, self)  # type: ignore[no-untyped-call]
        return made

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the weight and their numbers [rows, I], all rows in their order."""
        step = max(1, _AT_ONCE // self.in_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            yield rows, self.numbers(rows).to(dtype)

    def numbers(self, rows: slice) -> Tensor:
        """Some rows of the weight: (code - zero point) * scale in float32, or as they are stored."""
        if self.scales_OG is None or self.zeros_OG is None:
            return self.weight[rows]
        codes = self.weight[rows]
        if codes.shape[1] < self.in_features:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1)
        grouped = codes.view(codes.shape[0], self.scales_OG.shape[1], -1).to(torch.float32)
        grouped -= self.zeros_OG[rows, :, None]
        grouped *= self.scales_OG[rows, :, None]
        return grouped.view(codes.shape[0], self.in_features)


class _FrozenProduct(torch.autograd.Function):
    """input @ weight.T + bias, whose backward makes the weight's numbers again."""

    @staticmethod
    def forward(ctx: Any, input_BI: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        output = input_BI.new_empty(*input_BI.shape[:-1], layer.out_features)
        for rows, weight in layer.pieces(input_BI.dtype):
            output[..., rows] = F.linear(input_BI, weight)
        return output if layer.bias is None else output.add_(layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_BO,) = gradients
        layer: FrozenLinear = ctx.layer
        made = gradient_BO.new_zeros(*gradient_BO.shape[:-1], layer.in_features)
        for rows, weight in layer.pieces(gradient_BO.dtype):
            made += gradient_BO[..., rows] @ weight
        return made, None


def compute_dtype(device: torch.device) -> torch.dtype:
    """What activations are computed in: bfloat16 where the device multiplies it, else float32."""
    if device.type == "cpu":
        able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        able = device.type != "cuda" or torch.cuda.is_bf16_supported()
    return torch.bfloat16 if able else torch.float32


def parse_base(text: str) -> Scheme:
    """The scheme of a frozen base; SchemeError for one that needs more than codes, calibration, or other arithmetic."""
    scheme = parse_scheme(text)
    if scheme.arithmetic != "BF16" or not scheme.codes_only or scheme.calibrated:
        raise SchemeError(f"--base {text}: a frozen base is BF16, W8BF16 or W4BF16, with codes alone (-ls, -g128 say)")
    return scheme


def load_frozen(checkpoint: Checkpoint, scheme: Scheme, dtype: torch.dtype, progress: OnBytes | None = None) -> Any:
    """The component that LoRAs are for, as diffusers' class, on the CPU and frozen.

    Linear layers of its blocks are stored by `scheme`, where its groups divide their width; other linear layers in
    bfloat16, the rest in `dtype`. Some rows of one weight at a time are in memory besides.

    Raises: CheckpointError: a tensor is missing or of another shape than the config says.
    """
    model, component = checkpoint.model, checkpoint.model.adapted
    refs = checkpoint.tensors[component]
    module = unloaded_component(model, checkpoint.root, component)
    count = byte_counter(sum(ref.nbytes for ref in refs.values()), progress)
    stacks = tuple(f"{stack}." for stack in model.stacks[component])
    for name, layer in [*module.named_modules()]:
        own = {leaf: _find(checkpoint, f"{name}.{leaf}", one) for leaf, one in layer.named_parameters(recurse=False)}
        if isinstance(layer, nn.Linear):
            bias = _read(own["bias"], dtype) if "bias" in own else None
            packed = scheme if name.startswith(stacks) and scheme.in_codes(name) else None
            module.set_submodule(name, _store(own["weight"], packed, bias, count))
            continue
        for leaf, ref in own.items():
            setattr(layer, leaf, nn.Parameter(_read(ref, dtype), requires_grad=False))
            count(ref.nbytes)
    return module.requires_grad_(False).eval()


def _find(checkpoint: Checkpoint, name: str, expected: Tensor) -> TensorRef:
    ref = checkpoint.tensors[checkpoint.model.adapted].get(name)
    if ref is None or ref.shape != tuple(expected.shape):
        found = "is missing" if ref is None else f"has shape {list(ref.shape)}"
        raise CheckpointError(
            f"tensor {name} of {checkpoint.name} {found}, config.json asks for {list(expected.shape)}; fetch the "
            "checkpoint again"
        )
    return ref


def _read(ref: TensorRef, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(read_tensor(ref).astype(np.float32)).to(dtype)


def _store(ref: TensorRef, scheme: Scheme | None, bias: Tensor | None, count: Callable[[int], None]) -> FrozenLinear:
    """A frozen linear layer, read and packed some rows at a time; in bfloat16 without a scheme or fitting groups."""
    rows, columns = ref.shape
    step = max(1, 4 * _AT_ONCE // columns)
    pieces = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    if scheme is None or columns % scheme.group_size:
        weight = torch.empty(rows, columns, dtype=torch.bfloat16)
        for start, stop in pieces:
            weight[start:stop] = torch.from_numpy(read_rows(ref, start, stop).astype(np.float32))
            count((stop - start) * ref.nbytes // rows)
        return FrozenLinear((rows, columns), weight, bias, None)
    packed, rounder = empty_packed(ref.shape, scheme.group_size, scheme.weight_bits), make_rounder(scheme)
    for start, stop in pieces:
        here = slice(start, stop)
        source = read_rows(ref, start, stop)
        rounder(source, scheme.weight_bits, packed.codes_OI[here], packed.scales_OG[here], packed.zeros_OG[here])
        count((stop - start) * ref.nbytes // rows)
    scales = torch.from_numpy(packed.scales_OG.view(np.int16)).view(torch.bfloat16)
    groups = scales, torch.from_numpy(packed.zeros_OG)
    return FrozenLinear((rows, columns), torch.from_numpy(packed.codes_OI), bias, groups)
