"""Several images held against the reference's."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest

from fluxkiln.errors import UsageError
from fluxkiln.verify.runs import (
    MOST_RUNS,
    MOST_SHOWN,
    THUMBNAIL,
    Run,
    Sampled,
    describe_runs,
    list_runs,
    measure_run,
    summarise_runs,
    thumbnail,
)


@pytest.fixture
def sampled():
    random = np.random.default_rng(0)
    latents = tuple(random.standard_normal((1, 16, 64)).astype(np.float32) for _ in range(3))
    return Sampled(latents, random.random((32, 32, 3)).astype(np.float32))


def test_every_prompt_with_every_seed():
    assert list_runs(("a", "b"), (0, 1), "p", 9) == (("a", 0), ("a", 1), ("b", 0), ("b", 1))
    assert list_runs(("a",), (), "p", 9) == (("a", 9),)
    assert list_runs((), (3, 4), "p", 9) == (("p", 3), ("p", 4))
    assert list_runs((), (), "p", 9) == ()
    with pytest.raises(UsageError, match=f"2 prompts with {MOST_RUNS} seeds are {2 * MOST_RUNS} images"):
        list_runs(("a", "b"), range(MOST_RUNS), "p", 9)


def test_drift_of_every_step(sampled):
    actual = Sampled(tuple(x * (1 + 0.01 * (i + 1)) for i, x in enumerate(sampled.latents)), sampled.image * 0.99)
    run = measure_run("a", 0, sampled, actual)
    assert run.drift == pytest.approx((0.01, 0.02, 0.03), rel=1e-3)
    assert run.cosine == pytest.approx(1.0)
    assert 40 < run.psnr < 50
    assert 0.99 < run.ssim < 1.0
    equal = measure_run("a", 0, sampled, sampled)
    assert (equal.drift, equal.psnr, equal.ssim) == ((0.0, 0.0, 0.0), math.inf, 1.0)


def test_a_run_of_another_length_is_refused(sampled):
    with pytest.raises(ValueError, match="zip"):
        measure_run("a", 0, sampled, Sampled(sampled.latents[:2], sampled.image))


def test_mean_and_worst_of_every_measure():
    runs = [
        Run("a", 0, (0.1, 0.2), 0.99, 30.0, 0.9), Run("a", 1, (0.3, 0.1), 0.98, 34.0, 0.8),
        Run("b", 0, (0.2, 0.6), 0.97, 32.0, 0.7),
    ]  # fmt: skip
    lines = {line["name"]: line for line in summarise_runs(runs)}
    psnr = lines["PSNR of the image"]
    assert (psnr["mean"], psnr["worst"], psnr["where"], psnr["unit"]) == (32.0, 30.0, "a, seed 0", "dB")
    first, last = (lines[f"drift of the latents after the {which} step, relative L2"] for which in ("first", "last"))
    assert (first["mean"], first["worst"], first["where"]) == (pytest.approx(0.2), 0.3, "a, seed 1")
    assert (last["mean"], last["worst"], last["where"]) == (pytest.approx(0.3), 0.6, "b, seed 0")
    assert lines["SSIM of the image"]["where"] == lines["cosine of the last latents"]["where"] == "b, seed 0"


def test_equal_and_broken_images_have_statistics():
    lines = summarise_runs([Run("a", 0, (0.0,), 1.0, math.inf, 1.0), Run("a", 1, (math.nan,), 0.0, math.nan, 0.0)])
    assert lines[0]["where"] == "a, seed 1"
    assert math.isnan(lines[0]["mean"])
    assert summarise_runs([Run("a", 0, (0.0,), 1.0, math.inf, 1.0)])[0]["mean"] == math.inf


def test_the_worst_of_many_are_shown(sampled):
    runs = [Run("a", seed, (0.1,), 0.9, 30.0 + seed % 7, 0.9) for seed in range(MOST_SHOWN + 5)]
    pictures = {("a", run.seed): (sampled.image, sampled.image) for run in runs}
    described = describe_runs(runs, pictures, "simulator")
    assert (described["rung"], described["steps"], len(described["entries"])) == ("simulator", 1, len(runs))
    left_out = [entry["psnr"] for entry in described["entries"] if "reference" not in entry]
    assert len(left_out) == 5
    assert min(left_out) >= max(entry["psnr"] for entry in described["entries"] if "reference" in entry)


def test_thumbnails_are_small():
    from PIL import Image

    image = np.linspace(0, 1, 500 * 300 * 3, dtype=np.float32).reshape(500, 300, 3)
    uri = thumbnail(image)
    assert uri.startswith("data:image/webp;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert picture.size == (96, THUMBNAIL)
