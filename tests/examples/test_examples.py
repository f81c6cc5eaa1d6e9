"""A toolchain, a target and a model of other distributions: built, verified, published, and made pictures with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.examples.conftest import BUILDS
from tests.examples.distributions import ROOT, fluxkiln, run_python

pytestmark = pytest.mark.slow

PROMPT = "a kiln"
OWN_RUNG = {"toy model": "onnxruntime", "toy target": "interpreted", "both": "interpreted"}
TITLE = {"toy model": "Toy-base", "toy target": "FLUX.1-dev", "both": "Toy-base"}


@pytest.fixture(scope="module", params=BUILDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def recorded(folder: Path) -> tuple[str, np.ndarray]:
    """The prompt of a build's reference run, and the image [height, width, 3] in 0..255 of the published pipeline."""
    index = json.loads((folder / "recording" / "recording.json").read_bytes())
    return index["prompt"], np.load(folder / "recording" / index["rendered"]["image"]) * 255


def distance(picture: Image.Image, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(picture).astype(float) - expected).max())


def test_a_build_is_verified_against_the_published_pipeline(name, built, work):
    run = built(name)
    document = run.document
    folder = (work / document["bundle"]).parent
    report = json.loads((folder / "report.json").read_bytes())
    rows = [row for row in report["rows"] if row["rung"] == OWN_RUNG[name]]
    blocks = {row["part"] for row in rows if row["kind"].startswith(("double", "single"))}
    assert document["parity"]["passed"]
    assert {"single.02", "double.01"} <= blocks
    assert [row for row in rows if row["kind"] == "pipeline"]
    assert all(row["passed"] for row in report["rows"])
    pipeline = "FluxPipeline" if name == "toy target" else "ToyPipeline"
    assert report["reference"] == f"diffusers {pipeline} as published, float32"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert OWN_RUNG[name] in page
    if OWN_RUNG[name] == "interpreted":
        assert "interpreted by the ONNX project&#39;s own evaluator" in page
        assert "9e-7 was measured" in page


def test_a_build_again_has_nothing_to_do(name, built, site, work):
    built(name)
    again = fluxkiln(site, work, "build", *BUILDS[name], "--build-dir", "build", "--store", "store", "--json")
    assert again.document["nothing_to_do"]


def test_a_bundle_goes_out_and_comes_back(name, built, site, work):
    bundle = work / built(name).document["bundle"]
    reference = f"oci-layout:registry:{name.replace(' ', '-')}"
    shown = fluxkiln(site, work, "inspect", bundle)
    assert f"{TITLE[name]} from" in shown.out
    sent = fluxkiln(site, work, "publish", bundle, reference, "--json").document
    fluxkiln(site, work, "pull", reference, f"pulled {name}")
    assert fluxkiln(site, work, "inspect", reference, "--json").document["published"]["digest"] == sent["digest"]
    card = (work / f"pulled {name}" / "README.md").read_text()
    assert f"the architecture of {TITLE[name]}, by fluxkiln" in card
    checked = fluxkiln(site, work, "verify", f"pulled {name}", "--json").document
    assert checked["intact"]
    assert (work / f"pulled {name}/bundle/manifest.json").read_bytes() == (bundle / "manifest.json").read_bytes()


def test_a_picture_is_the_reference_s(name, built, site, work):
    bundle = work / built(name).document["bundle"]
    prompt, expected = recorded(bundle.parent)
    out = f"pictures {name}"
    fluxkiln(site, work, "generate", "--bundle", bundle, prompt, "--steps", 2, "--n-images", 2, "--out", out)
    own, other = (Image.open(path) for path in sorted((work / out).glob("*.png")))
    assert (own.text["seed"], other.text["seed"]) == ("0", "1")
    # rounded to 8 bits
    assert distance(own, expected) <= 1
    assert distance(other, expected) > 20
    assert own.text["model"].startswith(f"{TITLE[name]} ")


# The toy model replayed with its blocks in its own order, and in FLUX.1's.
SWAPPED = """
import json, sys
from pathlib import Path
from toy_model.model import MODEL
from fluxkiln.build.make import prepare
from fluxkiln.build.verification import record, replay
from fluxkiln.compile.toolchain import OpenRungs
from fluxkiln.export.eager import PatchedRunner
from fluxkiln.patches.flux1.model import Flux1
from fluxkiln.progress import Silent
from fluxkiln.settings import Settings

prepared = prepare(Settings("cpu", "tiny-toy", build_dir=Path("build"), store=Path("store")))
checkpoint, plan, recording = prepared.checkpoint, prepared.plan, record(prepared)
found = {}
for name, model in (("own", MODEL), ("swapped", Flux1())):
    parts = model.list_parts(checkpoint.configs, "kl", "hoisted")
    opened = OpenRungs({"patched": PatchedRunner(checkpoint, parts)}, parts)
    rows = replay(prepared, plan, recording, opened, Silent()).ladder.rows
    found[name] = sorted({row.output for row in rows if not row.passed and row.kind == "pipeline"})
    assert all(row.passed for row in rows if row.kind != "pipeline")
print(json.dumps(found))
"""


def test_the_order_of_the_blocks_is_what_verification_sees(built, site, work):
    built("toy model")
    run = run_python(site, work, "-c", SWAPPED)
    assert run.code == 0, run.err
    assert run.document == {"own": [], "swapped": ["image", "latents"]}


# A model's own code is in the keys of what it decides.
KEYED = """
from fluxkiln.artifacts.code import reached_sources
from fluxkiln.compile.templates import make_template
from toy_model.model import Toy
classes = [("model", one.__module__, one.__qualname__) for one in Toy.__mro__]
print(sorted(path for path in reached_sources([(make_template.__module__, "make_template")], classes) if "toy" in path))
"""


def test_what_the_toy_publishes_counts_in_the_key_of_a_template(site, work):
    run = run_python(site, work, "-c", KEYED)
    assert run.out.strip() == "['toy_model/model.py', 'toy_model/published.py']", run.err


def test_doctor_and_help_name_the_toys(site, work):
    doctor = fluxkiln(site, work, "doctor", "toy")
    assert "onnx.reference" in doctor.out
    assert "ready: fluxkiln build toy" in doctor.out
    assert "toy" in fluxkiln(site, work, "build", "--help").out.split("TARGET")[-1]
    assert "toy" in fluxkiln(site, work, "generate", "--help").out
    assert not doctor.err


def test_a_plan_has_the_memory_of_every_job(site, work):
    planned = fluxkiln(site, work, "plan", "toy", "--model", "tiny-toy", "--build-dir", "build", "--store", "store",
                       "--json").document  # fmt: skip
    jobs = [job for job in planned["jobs"] if job["stage"] == "weights"]
    assert len(jobs) == 20
    assert all(job["memory_bytes"] > 0 for job in jobs)


def test_a_target_that_cuts_models_is_refused(site, work):
    run = run_python(site, work, "-m", "fluxkiln", "plan", "trn1", "--model", "tiny-toy", "--build-dir", "build")
    assert run.code == 2
    assert run.error == "nobody has cut the toy model over ranks; choose a target that holds whole parts"


def test_without_the_model_s_distribution_its_bundle_is_refused(built, work, tmp_path):
    bundle = work / built("toy model").document["bundle"]
    run = run_python(tmp_path, work, "-m", "fluxkiln", "generate", "--bundle", bundle, PROMPT)
    assert run.code == 2
    assert "the bundle's model is 'toy'; this fluxkiln knows flux1: install what made it" in run.error


def test_the_package_knows_nothing_of_the_toys():
    found = subprocess.run(["grep", "-rliE", r"\btoy", "fluxkiln", "--include=*.py"], cwd=ROOT, capture_output=True,
                           text=True, check=False)  # fmt: skip
    assert found.stdout == ""
