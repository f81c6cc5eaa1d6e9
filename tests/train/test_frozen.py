"""Frozen layers multiply with what is stored, and hand gradients through it."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.pack import PackedWeight, dequantize
from fluxkiln.train import frozen
from fluxkiln.train.frozen import FrozenLinear, load_frozen, parse_base


@pytest.fixture(scope="module", params=["BF16", "W8BF16", "W4BF16-g32"])
def loaded(request, tiny_checkpoint):
    scheme = parse_base(request.param)
    return scheme, load_frozen(tiny_checkpoint(), scheme, torch.float32)


def layers(module):
    return [(name, one) for name, one in module.named_modules() if isinstance(one, FrozenLinear)]


def test_blocks_are_in_codes_and_the_rest_is_not(loaded):
    scheme, module = loaded
    packed = {name for name, one in layers(module) if one.scales_OG is not None}
    blocks = {name for name, _ in layers(module) if "blocks." in name}
    assert packed == (blocks if scheme.weight_bits else set())
    assert not any(one.requires_grad for one in module.parameters())


def test_numbers_are_those_of_the_codes(loaded):
    scheme, module = loaded
    for _, layer in layers(module)[:6]:
        rows = slice(0, layer.out_features)
        if layer.scales_OG is None:
            assert layer.weight.dtype == torch.bfloat16
            continue
        scales = layer.scales_OG.view(torch.int16).numpy().view(np.uint16)
        packed = PackedWeight(layer.weight.numpy(), scales, layer.zeros_OG.numpy(), scheme.weight_bits)
        assert np.array_equal(layer.numbers(rows).numpy(), dequantize(packed, scheme.group_size))


def test_product_and_gradient_are_torchs_own(loaded, monkeypatch):
    _, module = loaded
    monkeypatch.setattr(frozen, "_AT_ONCE", 5000)  # several pieces
    for _, layer in layers(module)[-4:]:
        weight = layer.numbers(slice(0, layer.out_features)).float()
        ours = torch.randn(2, 3, layer.in_features, requires_grad=True)
        theirs = ours.detach().clone().requires_grad_()
        made, expected = layer(ours), F.linear(theirs, weight, layer.bias)
        torch.testing.assert_close(made, expected)
        made.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_the_whole_is_diffusers_own(tiny_checkpoint):
    """In BF16 the base is what `from_pretrained` loads: the synthetic checkpoint is stored in bfloat16."""
    from diffusers import FluxTransformer2DModel

    checkpoint = tiny_checkpoint()
    ours = load_frozen(checkpoint, parse_base("BF16"), torch.float32)
    theirs = FluxTransformer2DModel.from_pretrained(checkpoint.root / "transformer", torch_dtype=torch.float32)
    inputs = {
        "hidden_states": torch.randn(1, 4, 64), "encoder_hidden_states": torch.randn(1, 3, 128),
        "pooled_projections": torch.randn(1, 64), "timestep": torch.rand(1), "guidance": torch.ones(1),
        "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).sample, theirs(**inputs).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["F32", "W4BF16-gptq", "W4BF16-svd", "F16"])
def test_schemes_that_are_more_than_codes_are_refused(text):
    with pytest.raises(SchemeError, match=r"a frozen base is BF16, W8BF16 or W4BF16"):
        parse_base(text)
