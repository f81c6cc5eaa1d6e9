"""The command line of the compiler, and the command itself: `stub-neuronx-cc` in its place, which compiles nothing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from pathlib import Path

import pytest

from fluxkiln.compile.targets import find_target
from fluxkiln.compile.toolchains.neuron.neff import FORMS, ModuleJob, compile_flags
from fluxkiln.compile.toolchains.neuron.neuronx_cc import (
    advise,
    compile_argv,
    compile_module,
    compiler_missing,
    find_codes,
    find_neuronx_cc,
    known_advice,
)
from fluxkiln.errors import CompileError, IntegrityError, ToolchainError, UsageError
from tests.stub_compiler import STUB_VERSION, install_stub

TRN1, INF2 = find_target("trn1"), find_target("inf2")
TRN2, TRN2_LNC1 = find_target("trn2"), find_target("trn2_lnc1")


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The stub first on PATH; the folder of its calls."""
    return install_stub(tmp_path, monkeypatch)


# Flags


@pytest.mark.parametrize("form", FORMS)
def test_argv_is_exact(form):
    model_type = "unet-inference" if form == "image" else "transformer"
    assert " ".join(compile_argv(form, TRN1, "default", "model.hlo_module.pb", "model.neff")) == (
        "neuronx-cc compile --framework=XLA model.hlo_module.pb --output model.neff --target=trn1 --auto-cast=none "
        f"--model-type={model_type} --lnc=1 -O1"
    )
    assert compile_argv(form, INF2, "default", "a", "b")[6:] == [
        "--target=inf2", "--auto-cast=none", f"--model-type={model_type}", "-O1",
    ]  # fmt: skip
    for target, lnc in ((TRN2, 2), (TRN2_LNC1, 1)):
        assert compile_argv(form, target, "default", "a", "b")[6:] == [
            "--target=trn2", "--auto-cast=none", f"--model-type={model_type}", f"--lnc={lnc}", "-O1",
        ]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_flags_of_the_published_sample(form):
    flag = "--enable-fast-loading-neuron-binaries" if form == "text" else "--model-type=unet-inference"
    assert compile_argv(form, TRN1, "published", "m", "n", "/opt/neuronx-cc") == [
        "/opt/neuronx-cc", "compile", "--framework=XLA", "m", "--output", "n", "--target=trn1", flag,
    ]  # fmt: skip


def test_forms_and_presets_that_do_not_exist():
    with pytest.raises(UsageError, match="'t5_block'; there are text, image, blocks"):
        compile_flags("t5_block", TRN1)
    with pytest.raises(UsageError, match="'fast'; there are default, published"):
        compile_flags("blocks", TRN1, "fast")
    for name in ("", "../x", "a b", "a'b", "-x", "A"):
        with pytest.raises(UsageError, match="files are named by it"):
            ModuleJob(name, "blocks", Path("x"), "sha256:0")


# The command


def test_the_command_is_found_by_its_version(calls, monkeypatch):
    found = find_neuronx_cc()
    assert found == (calls.parent / "bin" / "neuronx-cc", STUB_VERSION)
    monkeypatch.setenv("STUB_VERSION", "2.25.3371.0+f524f7f8")
    assert find_neuronx_cc().version == "2.25.3371.0+f524f7f8"


def test_a_relative_path_is_made_absolute(calls, monkeypatch):
    monkeypatch.chdir(calls.parent)
    monkeypatch.setenv("PATH", f"bin{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert find_neuronx_cc().path == calls.parent / "bin" / "neuronx-cc"


def command(tmp_path, monkeypatch, body):
    path = tmp_path / "other" / "neuronx-cc"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))


def test_no_command(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match="neuronx-cc is not on PATH; install the Neuron SDK's") as raised:
        find_neuronx_cc()
    assert raised.value.exit_code == 5


def test_placeholder_package_without_a_command(tmp_path, monkeypatch):
    """The package's metadata are there, as pip leaves them, and no command is."""
    site = tmp_path / "site" / "neuronx_cc-1.0.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: neuronx-cc\nVersion: 1.0.0\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(site.parent))
    assert importlib.metadata.version("neuronx-cc") == "1.0.0"
    with pytest.raises(
        ToolchainError, match=r"not on PATH \(the installed package neuronx-cc 1\.0\.0 is PyPI's placeholder"
    ):
        find_neuronx_cc()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "echo 'ImportError: WRONG PACKAGE. Please install from the Neuron repository' >&2; exit 1",
            "PyPI's placeholder",
        ),
        ("echo hello 1.2.3", r"ended with 0 and printed 'hello 1\.2\.3'; the Neuron compiler prints"),
        ("echo NeuronX Compiler version 2.26.1+a; exit 3", "ended with 3"),
        (":", "printed 'nothing'"),
    ],
)
def test_commands_that_are_no_compiler(tmp_path, monkeypatch, body, said):
    command(tmp_path, monkeypatch, body)
    with pytest.raises(ToolchainError, match=said):
        find_neuronx_cc()


def test_missing_compiler_names_what_is_ready(tmp_path):
    folder = tmp_path / "build"
    (folder / "hlo").mkdir(parents=True)
    for name in ("double", "single"):
        (folder / "hlo" / f"{name}.hlo_module.pb").touch()
    (folder / "weights").mkdir()
    (folder / "compile_neff.sh").touch()
    error = compiler_missing(ToolchainError("neuronx-cc is not on PATH"), folder)
    assert error.exit_code == 5
    ready = f"ready in {folder}: hlo/ (2 modules), weights/, compile_neff.sh. To go on, run `bash compile_neff.sh`"
    assert ready in str(error)
    assert "fluxkiln compile --resume" in str(error)
    assert "ready in" in str(compiler_missing(error, tmp_path / "nowhere"))
    assert "weights/" not in str(compiler_missing(ToolchainError("x"), tmp_path / "nowhere"))


# One module


@pytest.fixture
def compile_one(tmp_path, calls):
    hlo = tmp_path / "tail.hlo_module.pb"
    hlo.write_bytes(b"module tail\n")
    digest = "sha256:" + hashlib.sha256(hlo.read_bytes()).hexdigest()
    (tmp_path / "work").mkdir()

    def run(digest=digest, target=TRN1, preset="default"):
        job = ModuleJob("tail", "blocks", hlo, digest)
        return compile_module(job, find_neuronx_cc(), target, preset, tmp_path / "work", tmp_path / "logs" / "tail.log")

    return run


def test_one_module_is_compiled_from_a_copy(compile_one, calls, tmp_path):
    stub_output = compile_one(target=INF2, preset="published")
    assert stub_output == tmp_path / "work" / "tail.neff"
    assert stub_output.read_text().startswith("This is output of stub-neuronx-cc")
    (call,) = calls.iterdir()
    argv = compile_argv("blocks", INF2, "published", "tail.hlo_module.pb", "tail.neff")
    assert call.read_text().splitlines() == argv[1:]
    log = (tmp_path / "logs" / "tail.log").read_text()
    assert log.startswith(f"$ {tmp_path / 'bin' / 'neuronx-cc'} compile --framework=XLA tail.hlo_module.pb")


def test_a_module_of_another_digest_is_not_compiled(compile_one, calls):
    with pytest.raises(IntegrityError, match="it was changed or damaged"):
        compile_one(digest="sha256:" + "0" * 64)
    assert list(calls.iterdir()) == []


def test_an_error_says_what_to_do(compile_one, monkeypatch):
    monkeypatch.setenv("STUB_FAIL", "tail")
    monkeypatch.setenv("STUB_SAYS", "ERROR: [NCC_EUOC002] An unsupported operator was used")
    with pytest.raises(CompileError, match=r"exit code 70: ERROR: .*tail\.log\. NCC_EUOC002: .*list-operators"):
        compile_one()


@pytest.mark.parametrize(
    ("line", "codes"),
    [
        ("[ERROR] [NCC_EBVF030] Instructions generated by compiler 6101424 exceeds the limit", ("EBVF030",)),
        ("2024-03-10T18:15:07Z [LUR015] Compiler generated too many instructions (13929091).", ("LUR015",)),
        ("error EXTP004: and again NCC_EXTP004", ("EXTP004",)),
        ("[F137] neuronx-cc was forcibly killed - This most commonly occurs due to", ("F137",)),
        ("NCC_EOOM001 then [NCC_INLA001] then NCC_EOOM001", ("EOOM001", "INLA001")),
        ("F137 bytes; line ERROR123; XEVRF001; evrf001; NCC_E1; commit EBVF0301", ()),
    ],
)
def test_codes_are_found(line, codes):
    assert find_codes(line) == codes


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("NCC_EBVF030", "more instructions than the compiler allows .*granularity block, a larger tp"),
        ("NCC_EXTP004", "more instructions than the compiler allows"),
        ("NCC_EVRF007", "more instructions than the compiler allows"),
        ("NCC_EOOM002", "larger tp"),
        ("NCC_EUOC002", "list-operators"),
        ("NCC_EVRF004", "complex"),
        ("NCC_EARG001", "lnc 1"),
        ("NCC_EMOD025", "dynamic shape"),
        ("[F137]", "memory"),
    ],
)
def test_every_code_has_its_sentence(code, part):
    sentence = advise(f"[ERROR] {code} something")
    assert sentence.startswith(code.strip("[]") + ": ")
    assert re.search(part, sentence)


def test_several_codes_and_unknown_ones():
    both = advise("NCC_EOOM001, NCC_EVRF004")
    assert both == f"NCC_EOOM001: {known_advice()['EOOM001']}; NCC_EVRF004: {known_advice()['EVRF004']}"
    assert advise("NCC_EZZZ999").startswith("NCC_EZZZ999: no advice is known here; see the page")
    assert "report it to AWS" in advise("[NCC_IBIR001] assertion")
    assert advise("it simply broke") == ""


def test_the_table_is_in_the_form_that_is_looked_up():
    for code, sentence in known_advice().items():
        assert find_codes(f"[{code}]" if code.startswith("F1") else f"NCC_{code}" if code[0] == "E" else code) == (
            code,
        )
        assert ":" in sentence or " " in sentence
        assert not sentence.endswith(".")
