"""The whole pipeline under a scheme, against BF16: nothing changes for BF16 itself, and a better method is nearer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fluxkiln.build.quantization import measure_effects
from fluxkiln.errors import SchemeError, UsageError
from fluxkiln.settings import Settings


@pytest.fixture
def settings(tiny_checkpoint, tmp_path_factory):
    return Settings("bm1684x", str(tiny_checkpoint().root), build_dir=tmp_path_factory.getbasetemp() / "effects")


def test_effects(settings):
    found = {one.scheme: one for one in measure_effects(settings, ["BF16", "W8BF16", "W4BF16", "W4BF16-rtn"], (2,))}
    assert found["BF16"].latents_relative_l2 == 0
    assert found["BF16"].ssim == 1
    assert 0 < found["W8BF16"].latents_relative_l2 < 0.02
    assert found["W8BF16"].latents_relative_l2 < found["W4BF16"].latents_relative_l2 < 0.15
    assert found["W4BF16"].latents_relative_l2 < found["W4BF16-rtn"].latents_relative_l2
    assert found["W8BF16"].psnr > found["W4BF16"].psnr > 30
    assert found["W4BF16"].steps == 2


def test_what_cannot_be_had_is_refused(settings, tmp_path):
    with pytest.raises(UsageError, match="needs all components"):
        measure_effects(replace(settings, components=("transformer",)), ["W4BF16"])
    with pytest.raises(SchemeError, match="needs calibration, and the store has none"):
        measure_effects(replace(settings, store=tmp_path / "store"), ["W4BF16-gptq"], (2,))
