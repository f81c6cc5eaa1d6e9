"""Explicit RMSNorm.

Stands for `torch.nn.functional.rms_norm` (checked with torch 2.13.0). The TorchScript exporter has no symbolic for
`aten::rms_norm`; written as `x * rsqrt(mean(x^2) + eps) * w` it exports at opset 17, and TPU-MLIR fuses the chain back
into `top.RMSNorm`. It can go when TPU-MLIR reads the output of the dynamo exporter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxkiln.patches.patch import Patch

if TYPE_CHECKING:
    from torch import Tensor


def explicit_rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """RMSNorm over the last axes in plain operators; `eps` None means the machine epsilon, as in torch.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.rms_norm.html
    """
    import torch

    eps = torch.finfo(input.dtype).eps if eps is None else eps
    axes = list(range(-len(normalized_shape), 0))
    normed = input * torch.rsqrt(torch.mean(input * input, dim=axes, keepdim=True) + eps)
    return normed if weight is None else normed * weight


PATCHES = (
    Patch(
        name="explicit_rms_norm",
        replaces={
            "torch.nn.functional.rms_norm": {
                "ef6a0932f96f7d49a2b36bffcc04156b6962005ace7f519a945dd57cedc41c9e": "torch 2.13.0"
            },
            "torch.nn.RMSNorm.forward": {
                "624d70ec04d54553c55aebf7450c59b86f9f6270e9b4309f219eb2bea09dba27": "torch 2.13.0"
            },
        },
        reason="the TorchScript exporter has no symbolic for aten::rms_norm",
        until="TPU-MLIR reads opset 23 graphs of the dynamo exporter",
        kinds=("double", "single", "double_modulated", "single_modulated"),
        replacement={"torch.nn.functional.rms_norm": explicit_rms_norm},
        formats=("onnx17", "torchscript"),
    ),
)
