"""A whole build for OpenVINO: verified, and an image from its bundle, by the commands that users have."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fluxkiln.build.make import build
from fluxkiln.cli.main import main
from fluxkiln.settings import Settings

pytest.importorskip("openvino", reason="OpenVINO is not installed: make env")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tiny_checkpoint, tmp_path_factory):
    """target -> its build in 8-bit codes where it has them."""
    folder, root = tmp_path_factory.mktemp("built"), str(tiny_checkpoint().root)
    return {
        target: build(Settings(target, root, scheme=scheme, build_dir=folder, store=folder / "store"))
        for target, scheme in (("openvino", "W8BF16"), ("cpu", "BF16"))
    }


def test_verified_by_what_runs_it(built):
    result = built["openvino"]
    assert result.parity["passed"], result.parity["failure"]
    assert {"dequantized", "executed"} <= set(result.parity["rungs"])
    report = json.loads((result.bundle.parent / "report.json").read_text())
    assert set(report["provenance"]["products on CPU"].replace(",", "").split()) & {"float32", "bfloat16"}
    assert "u8" not in report["provenance"]["products on CPU"], "what codes are stored in is no arithmetic"
    assert any(timing["name"] == "image by parts" for timing in report["timings"])
    assert {part["scheme"] for part in report["parts"] if part["kind"] == "single_modulated"} == {"W8BF16"}


@pytest.fixture
def paint(built, capsys, tmp_path, monkeypatch):
    """(target, options) -> exit code, document or error, latents."""
    monkeypatch.chdir(tmp_path)

    def run(target, *options):
        words = ["--bundle", str(built[target].bundle), "a kiln", "--steps", "2", "--out", f"{target}.png", "--json"]
        code = main(["generate", *words, "--save-latents", *options])
        shown = capsys.readouterr()
        latents = np.load(tmp_path / f"{target}.npy") if code == 0 else None
        return code, json.loads(shown.out) if code == 0 else shown.err, latents

    return run


def test_an_image_is_onnx_runtimes_but_for_the_codes(paint):
    code, document, latents = paint("openvino", "--device", "cpu", "--threads", "1")
    assert code == 0, document
    assert document["executor"]["runtime"].startswith("OpenVINO 20")
    assert document["executor"]["device"].startswith("CPU (")
    _, _, exact = paint("cpu")
    # a product's weights err by 0.5 %, of which two steps of random weights make no more than this
    assert 0 < np.linalg.norm(latents - exact) / np.linalg.norm(exact) < 0.02


@pytest.mark.parametrize(("device", "code", "words"), [("NPU", 5, "OpenVINO finds CPU"), ("0", 2, "have names")])
def test_a_device_that_is_not_there(paint, device, code, words):
    import openvino

    if device in openvino.Core().available_devices:
        pytest.skip(f"this machine has the device {device}")
    found, told, _ = paint("openvino", "--device", device)
    assert (found, words in told) == (code, True)
