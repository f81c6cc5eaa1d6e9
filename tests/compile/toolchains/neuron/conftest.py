"""A tensor-parallel block small enough to lower in milliseconds, and the processes that execute what it becomes."""

from __future__ import annotations

import functools
from contextlib import ExitStack

import pytest

from fluxkiln.compile.toolchains.neuron.frontend import lower_module
from fluxkiln.compile.toolchains.neuron.hlo_module import canonicalise
from fluxkiln.compile.toolchains.neuron.replicas import Replicas
from fluxkiln.types import TensorSpec

TOKENS, WIDTH, HEADS = 6, 32, 4


@pytest.fixture(scope="session")
def replicas():
    """How many ranks -> their process, one a session."""
    with ExitStack() as stack:
        yield functools.cache(lambda ranks: stack.enter_context(Replicas(ranks)))


@pytest.fixture(scope="session")
def block_type():
    """A transformer block written against collectives: its constructor takes them, its forward [1, 6, 32]."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        """Attention and MLP, both with a row-parallel end whose bias is added once; gathers its norm's output too."""

        def __init__(self, collectives, device="meta"):
            super().__init__()
            self.collectives = collectives
            local = WIDTH // collectives.ranks
            with torch.device(device):
                self.norm = nn.LayerNorm(WIDTH)
                self.qkv = nn.Linear(WIDTH, 3 * local)
                self.out = nn.Linear(local, WIDTH, bias=False)
                self.out_bias = nn.Parameter(torch.zeros(WIDTH))
                self.up = nn.Linear(WIDTH, 2 * local)
                self.down = nn.Linear(2 * local, WIDTH, bias=False)
                self.down_bias = nn.Parameter(torch.zeros(WIDTH))
                self.gate = nn.Linear(WIDTH, local)

        def forward(self, x):
            query, key, value = (
                part.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1)
            )
            attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            x = x + self.collectives.all_reduce(self.out(attended)) + self.out_bias
            hidden = functional.gelu(self.up(x), approximate="tanh")
            x = x + self.collectives.all_reduce(self.down(hidden)) + self.down_bias
            gate = self.collectives.all_gather(torch.sigmoid(self.gate(x)))
            return x, gate.permute(1, 2, 0, 3).flatten(2)

        @staticmethod
        def shard(name, tensor, rank, ranks):
            """Rank `rank`'s part of a weight of the unsplit block."""
            if name.startswith("qkv"):
                return torch.cat([part.chunk(ranks)[rank] for part in tensor.chunk(3)])
            if name.startswith(("up", "gate")):
                return tensor.chunk(ranks)[rank]
            if name in ("out.weight", "down.weight"):
                return tensor.chunk(ranks, 1)[rank]
            return tensor

    return Block


@pytest.fixture(scope="session")
def lower_block(block_type):
    """(ranks, dtype) -> the block lowered, and its canonical proto."""

    @functools.cache
    def make(ranks, dtype="float32"):
        inputs = [TensorSpec("x", (1, TOKENS, WIDTH), dtype)]
        lowered = lower_module(block_type, inputs, ranks, dtype)
        return lowered, canonicalise(lowered.proto)

    return make


@pytest.fixture(scope="session")
def block_weights(block_type):
    """The unsplit block with weights, biases not zero, and an input."""
    import torch

    class Alone:
        ranks = 1

        def all_reduce(self, x):
            return x

        def all_gather(self, x):
            return x.unsqueeze(0)

    generator = torch.Generator().manual_seed(7)
    block = block_type(Alone(), device="cpu").eval().requires_grad_(False)
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / (WIDTH if parameter.ndim > 1 else 4) ** 0.5)
    return block, torch.randn(1, TOKENS, WIDTH, generator=generator)


@pytest.fixture(scope="session")
def block_arguments(block_type, block_weights):
    """How many ranks -> the input and each rank's weights, float32."""

    def make(ranks):
        block, x = block_weights
        image = x.numpy()
        return [
            [image, *(block_type.shard(name, weight, rank, ranks).numpy() for name, weight in block.named_parameters())]
            for rank in range(ranks)
        ]

    return make
