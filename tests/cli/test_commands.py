from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fluxkiln.build.finish import BuildResult
from fluxkiln.compile.doctor import Tool
from fluxkiln.compile.targets import target_names
from fluxkiln.errors import ParityError, ToolchainError
from fluxkiln.export.checkpoint import open_checkpoint

TOOLS = [
    Tool("torch", True, "2.13.0", "/lib", target_names(), ""),
    Tool("tpu-mlir", False, "", "", ("bm1684x", "bm1688"), "run make env-tpu-mlir"),
    Tool("skopeo", False, "", "", (), "only a test needs it"),
    Tool("sail", False, "", "", (), "install its wheel", ("bm1684x", "bm1688")),
]


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.setattr("fluxkiln.compile.doctor.examine", lambda: TOOLS)


def test_doctor(fluxkiln, tools):
    run = fluxkiln("doctor")
    assert run.code == 0
    lines = [line.split() for line in run.out.splitlines()]
    assert ["torch", "ok", "2.13.0", "every", "target"] in lines
    assert ["tpu-mlir", "missing", "bm1684x,", "bm1688"] in lines
    assert ["skopeo", "absent", "-"] in lines
    assert ["sail", "absent", "optional:", "bm1684x,", "bm1688"] in lines
    assert ["cpu", "ready:", "fluxkiln", "build", "cpu"] in lines
    assert ["bm1684x", "not", "ready:", "tpu-mlir", "missing"] in lines
    assert "run make env-tpu-mlir" in run.out


def test_doctor_of_a_target(fluxkiln, tools):
    run = fluxkiln("doctor", "cpu")
    assert (run.code, "sail" in run.out) == (0, False)
    run = fluxkiln("doctor", "bm1684x")
    assert run.code == 5
    assert "skopeo" not in run.out
    assert "install its wheel" in run.out
    assert run.err == "error: bm1684x lacks tpu-mlir; tpu-mlir: run make env-tpu-mlir\n"


def test_patches(fluxkiln):
    run = fluxkiln("patches", "--json")
    assert run.code == 0
    listed = {patch["name"]: patch for patch in run.document["patches"]}
    assert listed["explicit_rms_norm"]["state"] == "ok"
    assert listed["explicit_rms_norm"]["attribute"] is True
    assert "diffusers" in listed["double_block"]["installed"]


def test_patches_that_no_longer_fit(fluxkiln, monkeypatch):
    monkeypatch.setattr("fluxkiln.patches.patch.source_digest", lambda dotted: "0" * 64)
    run = fluxkiln("patches")
    assert run.code == 0
    table = run.out.split("\n\n")[0].splitlines()[1:]
    assert {line.split()[1] for line in table} == {"changed"}
    assert "head restates FluxTransformer2DModel.forward" in run.out
    assert "  changed: diffusers.models.transformers" in run.out


def test_synth(fluxkiln):
    run = fluxkiln("synth", "tiny-schnell", "model", "--json")
    assert run.code == 0
    assert run.document["model"] == "model"
    assert run.err == "synthesize: 18.5 MB written\n"
    assert open_checkpoint(Path("model")).variant == "schnell"
    again = fluxkiln("synth", "tiny-dev", "model")
    assert again.code == 2
    assert "model is not empty" in again.err


def test_synth_with_other_statistics(fluxkiln):
    run = fluxkiln("synth", "tiny-dev", "model", "--components", "transformer", "--statistics", "flux", "--json")
    assert (run.code, run.document["statistics"]) == (0, "flux")
    assert fluxkiln("synth", "tiny-dev", "plain", "--components", "transformer").code == 0
    files = [
        Path(folder, "transformer/diffusion_pytorch_model-00001-of-00003.safetensors") for folder in ("model", "plain")
    ]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_synth_of_some_components(fluxkiln):
    assert fluxkiln("synth", "tiny-dev", "model", "--components", "vae_tiny, vae").code == 0
    assert {path.name for path in Path("model").iterdir()} >= {"vae", "vae_tiny"}
    assert not Path("model/transformer").exists()


def test_export(fluxkiln):
    assert fluxkiln("synth", "tiny-dev", "model").code == 0
    run = fluxkiln(
        "export", "model", "out", "--kind", "tail", "--kind", "single", "--format", "torchscript", "--size", "32x64",
        "--tokens", "16", "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    index = json.loads(Path("out/export.json").read_text())
    assert {**index, "directory": "out", "seconds": run.document["seconds"]} == run.document
    assert index["shapes"] == {"height": 64, "width": 32, "tokens": 16}
    assert [part["name"] for part in index["parts"]] == ["single.00", "single.01", "single.02", "tail"]
    template = index["templates"][0]
    assert Path("out", template["file"]).stat().st_size == template["size"]
    bound = index["parts"][1]["bindings"]["torchscript"]
    assert [slot["slot"] for slot in bound] == [slot["name"] for slot in template["slots"]]
    assert all(slot["sources"][0].startswith("single_transformer_blocks.1.") for slot in bound)


def test_export_that_fails_leaves_nothing(fluxkiln, monkeypatch):
    from fluxkiln.errors import ExportError

    def refuse(*arguments):
        (arguments[-1] / "half.pt").write_text("half")
        raise ExportError("the graph is not what it must be")

    assert fluxkiln("synth", "tiny-dev", "model").code == 0
    monkeypatch.setattr("fluxkiln.export.trace.export_template", refuse)
    run = fluxkiln("export", "model", "out")
    assert run.code == 1
    assert [path.name for path in Path.cwd().iterdir()] == ["model"]


def test_export_needs_the_tiny_vae(fluxkiln):
    assert (
        fluxkiln("synth", "tiny-dev", "model", "--components", "text_encoder,text_encoder_2,transformer,vae").code == 0
    )
    run = fluxkiln("export", "model", "out", "--vae", "tiny")
    assert run.code == 1
    assert "has no folder vae_tiny, --vae tiny needs it" in run.err


def test_inspect(fluxkiln, built):
    run = fluxkiln("inspect", built / "bundle")
    assert run.code == 0
    lines = [line.split() for line in run.out.splitlines()]
    assert ["transformer", "double", "W4BF16", "2", "3", "kB"] in lines
    assert ["shapes", "128x64,", "32", "tokens"] in lines
    assert "parity    passed: 12 comparisons on 1 rung, all within their gates\n" in run.out
    assert fluxkiln("inspect", built).out == run.out, "the folder around a bundle will do"
    assert "double_01" in fluxkiln("inspect", built, "--parts").out
    assert "tokenizer/vocab.json" in fluxkiln("inspect", built, "--files").out
    document = fluxkiln("inspect", built, "--json").document
    assert document == json.loads((built / "bundle" / "manifest.json").read_text()) | {"summary": document["summary"]}


def test_inspect_of_a_damaged_manifest(fluxkiln, built):
    (built / "bundle" / "manifest.json").write_text("{")
    run = fluxkiln("inspect", built)
    assert run.code == 4
    assert run.err.count("\n") == 1


def test_verify(fluxkiln, built):
    run = fluxkiln("verify", built)
    assert (run.code, run.err) == (0, "")
    assert "3 files" in run.out
    path = built / "bundle" / "transformer.bmodel"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    damaged = fluxkiln("verify", built / "bundle", "--json")
    assert damaged.code == 4
    assert "transformer.bmodel" in damaged.document["error"]["message"]


def test_report(fluxkiln, built):
    page = (built / "report.html").read_bytes()
    for given in (built, built / "bundle", built / "report.json"):
        (built / "report.html").unlink()
        run = fluxkiln("report", given)
        assert run.code == 0, run.err
        assert (built / "report.html").read_bytes() == page
    assert "Nothing was compared." in run.out
    assert fluxkiln("report", built, "--json").document["verdict"]["passed"] is False


@pytest.mark.parametrize(
    ("text", "code", "sentence"),
    [
        ("not json", 4, "is not valid JSON"),
        ("[]", 4, "no object"),
        ('{"schema": "other/1"}', 2, "has the schema 'other/1'"),
        ('{"schema": "fluxkiln.report/2"}', 4, "is not complete"),
    ],
)
def test_report_of_something_else(fluxkiln, built, text, code, sentence):
    (built / "report.json").write_text(text)
    page = (built / "report.html").read_bytes()
    run = fluxkiln("report", built)
    assert run.code == code
    assert sentence in run.err
    assert (built / "report.html").read_bytes() == page


def test_cache(fluxkiln, built, store):
    run = fluxkiln("cache", "ls", "--store", store.root)
    assert run.code == 0
    assert "3 blobs" in run.out
    assert fluxkiln("cache", "verify", "--store", store.root).code == 0
    blob = next(store.digests())
    store.path(blob.digest).chmod(0o644)
    store.path(blob.digest).write_bytes(b"other")
    damaged = fluxkiln("cache", "verify", "--store", store.root, "--json")
    assert damaged.code == 4
    assert damaged.document["damaged"] == [blob.digest]
    assert len(damaged.document) == 4, "one document, the error is told on stderr"
    assert "the next build makes what it needs again" in damaged.err
    assert fluxkiln("cache", "verify", "--store", store.root).code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(fluxkiln):
    Path("closed").mkdir(mode=0o555)
    run = fluxkiln("synth", "tiny-dev", "closed/model")
    assert run.code == 1
    assert "Permission denied; give a folder that you may read and write" in run.err


def test_file_in_the_place_of_a_folder(fluxkiln):
    Path("taken").write_text("")
    run = fluxkiln("synth", "tiny-dev", "taken/model")
    assert run.code == 1
    assert run.err.startswith("error: ")
    assert run.err.endswith("a folder is needed there: give another path, or move away what is in its place\n")


def result_of(tmp_path: Path, **changes: object) -> BuildResult:
    facts = {
        "name": "tiny-dev", "target": "cpu", "bundle": tmp_path / "bundle", "report": tmp_path / "report.html",
        "digest": "sha256:00", "nothing_to_do": False, "seconds": 81.0, "compiler_runs": 3,
        "parts": {"head": "compiled", "double.00": "cast", "double.01": "cast"},
        "parity": {"verified": True, "passed": True, "rows": 12, "rungs": ["patched", "simulator"]},
    }  # fmt: skip
    return BuildResult(**{**facts, **changes})


def test_build_hands_its_options_over(fluxkiln, monkeypatch, tmp_path):
    seen = []

    def build(settings, progress):
        seen.append(settings)
        progress.stage("compile", 1)
        progress.done("compile", "head", "compiled in 2.0 s")
        return result_of(tmp_path)

    monkeypatch.setattr("fluxkiln.build.make.build", build)
    run = fluxkiln(
        "build", "cpu", "--model", "m", "--size", "64x32", "--tokens", "16", "--scheme", "w4bf16-g32", "--vae", "tiny",
        "--jobs", "1", "--build-dir", "b", "--store", "s", "--seed", "7", "--steps", "3", "--prompt", "a cup",
        "--no-verify", "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert run.document["compiler_runs"] == 3
    assert run.err == "compile: head compiled in 2.0 s\n"
    [settings] = seen
    assert (settings.target, settings.model, settings.size, settings.tokens) == ("cpu", "m", ((64, 32),), (16,))
    assert (settings.scheme, settings.vae, settings.jobs) == ("w4bf16-g32", "tiny", 1)
    assert (settings.build_dir, settings.store_path) == (Path("b"), Path("s"))
    assert (settings.seed, settings.steps, settings.prompt, settings.verify) == (7, 3, "a cup", False)


def test_build_for_people(fluxkiln, monkeypatch, tmp_path):
    monkeypatch.setattr("fluxkiln.build.make.build", lambda *_: result_of(tmp_path))
    lines = dict(line.split(maxsplit=1) for line in fluxkiln("build", "cpu").out.splitlines())
    assert lines["parity"] == "passed: 12 comparisons on 2 rungs, all within their gates"
    assert lines["parts"] == "2 cast; 1 compiled"
    assert lines["compiler"] == "ran 3 times"
    assert lines["time"] == "1 min 21 s"
    stored = result_of(tmp_path, compiler_runs=0, parity={"verified": False}, report=None)
    monkeypatch.setattr("fluxkiln.build.make.build", lambda *_: stored)
    shown = fluxkiln("build", "cpu").out
    assert "not verified" in shown
    assert "not started: all of it was in the store" in shown
    assert "report" not in shown
    linked = result_of(tmp_path, compiler_runs=0, parts={"head": "linked"})
    monkeypatch.setattr("fluxkiln.build.make.build", lambda *_: linked)
    assert "compiler" not in fluxkiln("build", "cpu").out
    monkeypatch.setattr("fluxkiln.build.make.build", lambda *_: result_of(tmp_path, nothing_to_do=True))
    assert fluxkiln("build", "cpu").out.startswith("nothing to do: ")


def test_the_end_of_a_build_says_what_it_is_about_and_how_to_go_on(fluxkiln, monkeypatch, tmp_path):
    about = {"weights": "random (synthetic)", "ran": "simulator: ...; no board ran", "speed": "about 6 s"}
    made = result_of(tmp_path, parity={**result_of(tmp_path).parity, "about": about}, paints=True)
    monkeypatch.setattr("fluxkiln.build.make.build", lambda *_: made)
    lines = dict(line.split(maxsplit=1) for line in fluxkiln("build", "bm1684x").out.splitlines())
    assert {name: lines[name] for name in about} == about
    assert [lines[name].split()[1] for name in ("look", "paint", "publish")] == ["inspect", "generate", "publish"]
    monkeypatch.setattr("fluxkiln.build.make.build", lambda *_: result_of(tmp_path))
    assert "paint" not in fluxkiln("build", "gguf").out


def test_a_build_without_its_compiler_ends_with_the_summary_of_the_others(fluxkiln, monkeypatch, tmp_path):
    def build(settings, progress):
        error = ToolchainError("neuronx-cc is not on PATH. To go on, run `bash compile_neff.sh`")
        error.result = result_of(tmp_path)
        raise error

    monkeypatch.setattr("fluxkiln.build.make.build", build)
    run = fluxkiln("build", "trn1")
    assert run.code == 5
    assert "passed: 12 comparisons" in run.out
    assert run.err == "error: neuronx-cc is not on PATH. To go on, run `bash compile_neff.sh`\n"
    run = fluxkiln("build", "trn1", "--json")
    assert (run.code, run.document["name"], run.document["error"]["exit_code"]) == (5, result_of(tmp_path).name, 5)
    monkeypatch.setattr("fluxkiln.build.make.build", lambda *_: (_ for _ in ()).throw(ToolchainError("nothing")))
    run = fluxkiln("build", "trn1")
    assert (run.code, run.out) == (5, "")


def test_doctor_knows_what_alone_is_missing(fluxkiln, monkeypatch):
    missing = Tool("neuronx-cc", False, "", "", ("trn1",), "install it", makes="NEFF")
    monkeypatch.setattr("fluxkiln.compile.doctor.examine", lambda: [*TOOLS, missing])
    run = fluxkiln("doctor", "trn1")
    assert (run.code, "trn1  ready for all but NEFF: neuronx-cc missing" in run.out) == (5, True)


def test_build_that_misses_a_gate(fluxkiln, monkeypatch):
    def build(settings, progress):
        error = ParityError("double.01 at simulator; see report.html")
        error.bundle, error.report = "b/bundle", "b/report.html"
        raise error

    monkeypatch.setattr("fluxkiln.build.make.build", build)
    run = fluxkiln("build", "cpu", "--json")
    assert (run.code, run.err) == (3, "error: double.01 at simulator; see report.html\n")
    found = run.document["error"]
    assert (found["kind"], found["bundle"], found["report"]) == ("ParityError", "b/bundle", "b/report.html")
