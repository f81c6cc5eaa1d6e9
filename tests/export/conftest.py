"""A tiny checkpoint for LoRAs to be fused into."""

import pytest

from fluxkiln.export.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return tiny_checkpoint("tiny-dev").root


@pytest.fixture(scope="module")
def shapes(base):
    return {name: ref.shape for name, ref in open_checkpoint(base, ("transformer",)).tensors["transformer"].items()}
