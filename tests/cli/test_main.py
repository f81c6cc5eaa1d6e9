from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fluxkiln import errors
from fluxkiln.cli import main as command_line
from fluxkiln.compile.targets import target_names

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "rich", "numpy", "safetensors", "jinja2")


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def heavy_modules_after(*arguments: str) -> set[str]:
    script = "import sys; from fluxkiln.cli.main import main; main(sys.argv[1:]); print('\\n' + ' '.join(sys.modules))"
    done = python(script, *arguments)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()) & set(HEAVY)


def fails_with(monkeypatch, error: BaseException) -> None:
    """Make `fluxkiln doctor` raise `error`."""

    def examine():
        raise error

    monkeypatch.setattr("fluxkiln.compile.doctor.examine", examine)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["build", "--help"], ["build", "nope"], ["cache", "ls"]], ids=" ".join
)
def test_starts_without_heavy_modules(arguments):
    assert heavy_modules_after(*arguments) == set()


def test_heavy_modules_would_be_seen(built):
    assert "jinja2" in heavy_modules_after("report", str(built))


def test_help_says_what_each_command_says(fluxkiln):
    shown = " ".join(fluxkiln("--help").out.split())
    context = click.Context(command_line.fluxkiln_command)
    for name, (_, summary) in command_line.COMMANDS.items():
        command = command_line.fluxkiln_command.get_command(context, name)
        assert command is not None
        assert command.help.splitlines()[0] == summary
        assert f"{name} {summary}" in shown


@pytest.mark.parametrize("command", ["build", "plan", "mould build", "debug", "report", "publish", "doctor"])
def test_help_names_the_targets_there_are(fluxkiln, monkeypatch, command):
    names = target_names()
    assert {"bm1684x", "bm1688", "cpu", "inf2", "trn1"} <= set(names)
    assert f"Targets: {', '.join(names)} " in " ".join([*fluxkiln(*command.split(), "--help").out.split(), ""])
    monkeypatch.setattr("fluxkiln.compile.targets.target_names", lambda: ("another", *names))
    assert "Targets:\n  another, " in fluxkiln(*command.split(), "--help").out


def test_without_a_command_help_and_exit_2(fluxkiln):
    run = fluxkiln()
    assert run.code == 2
    assert "Commands:" in run.err
    assert run.out == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bake"], "fluxkiln has no command 'bake'; there are build, plan, compile, mould, doctor"),
        (["cache", "rm"], "fluxkiln cache has no command 'rm'; there are gc, ls, verify"),
        (["--bake"], "fluxkiln has no option --bake; `fluxkiln --help`"),
        (["build"], "TARGET is missing; the command reads: fluxkiln build [OPTIONS] TARGET"),
        (["synth", "tiny-dev"], "DIR is missing"),
        (["build", "cpu", "now"], "got unexpected extra argument (now); the command reads: fluxkiln build"),
        (["build", "cpu", "--sice", "3"], "did you mean --size"),
        (["build", "cpu", "--tokens"], "write --tokens VALUE"),
        (["build", "cpu", "--tokens", "many"], "--tokens many: 'many' is no whole number; write 512"),
        (["build", "cpu", "--tokens", "0"], "tokens 0: at least 1"),
        (["build", "cpu", "--jobs", "0"], "jobs 0: at least 1"),
        (["build", "gpu"], "no target is called 'gpu'; there are bm1684x, bm1684x2, bm1688, cpu"),
        (["plan", "gpu"], "no target is called 'gpu'"),
        (["doctor", "gpu"], "no target is called 'gpu'"),
        (["build", "cpu", "--scheme", "W5"], "no scheme is called 'W5'; there are F32"),
        (["build", "cpu", "--scheme", "W8BF16"], "target cpu cannot store W8BF16; it has"),
        (["build", "cpu", "--size", "1000x1024"], "width 1000 is not a positive multiple of 16; the nearest"),
        (["build", "cpu", "--size", "0x64"], "width 0 is not"),
        (["build", "cpu", "--size", "large"], "size 'large' is not WIDTHxHEIGHT"),
        (["build", "cpu", "--vae", "huge"], "no VAE is called 'huge'; there are kl"),
        (["build", "cpu", "--lora", "style"], "--lora style: there is no such file; give a LoRA's .safetensors file"),
        (["export", "tiny-dev", "out", "--kind", "triple"], "no kind of part is called 'triple'; there are clip"),
        (["export", "tiny-dev", "out", "--format", "onnx18"], "no graph format is called 'onnx18'; there are onnx17"),
        (["export", "tiny-dev", "out", "--kind", "vae_decoder", "--vae", "tiny"], "use --vae kl"),
        (["export", "nowhere", "out"], "'nowhere' is no model"),
        (["synth", "huge-dev", "out"], "no preset is called 'huge-dev'; synthetic presets are tiny-dev"),
        (
            ["synth", "tiny-dev", "out", "--statistics", "fluks"],
            "no statistics are called 'fluks'; tiny-dev has uniform",
        ),
        (
            ["synth", "scenes-dev", "out", "--statistics", "flux"],
            "--statistics flux: scenes-dev is trained and has its",
        ),
        (["synth", "tiny-dev", "out", "--components", "unet"], "no component is called 'unet'; there are"),
        (["verify", "nowhere"], "is no bundle: there is no such folder"),
        (["report", "."], "has no report.json; give a bundle"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["cache", "ls"], "build/store is no store"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_ends_in_one_sentence_and_exit_2(fluxkiln, arguments, sentence):
    run = fluxkiln(*arguments)
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: ")
    assert run.err.count("\n") == 1
    assert sentence in run.err
    assert list(Path.cwd().iterdir()) == [], "something was left behind"


@pytest.mark.parametrize(
    "kind",
    [
        errors.UsageError, errors.ShapeError, errors.CheckpointError, errors.CompileError, errors.ResourceError,
        errors.ParityError, errors.IntegrityError, errors.ToolchainError,
    ],
)  # fmt: skip
def test_errors_carry_their_exit_code(fluxkiln, monkeypatch, kind):
    fails_with(monkeypatch, kind("seven is odd; give an even number"))
    run = fluxkiln("doctor")
    assert run == type(run)(kind.exit_code, "", "error: seven is odd; give an even number\n")


def test_json_tells_errors_too(fluxkiln, monkeypatch):
    fails_with(monkeypatch, errors.IntegrityError("bytes differ"))
    run = fluxkiln("doctor", "--json")
    assert run.code == 4
    assert run.document == {"error": {"kind": "IntegrityError", "message": "bytes differ", "exit_code": 4}}
    assert fluxkiln("build", "--json").document["error"]["kind"] == "UsageError"


def test_json_stays_one_document_when_the_error_comes_after_it(fluxkiln, monkeypatch):
    from fluxkiln.compile.doctor import Tool

    missing = Tool("tpu-mlir", False, "", "", ("bm1684x",), "run make env-tpu-mlir")
    monkeypatch.setattr("fluxkiln.compile.doctor.examine", lambda: [missing])
    run = fluxkiln("doctor", "bm1684x", "--json")
    assert run.code == 5
    assert run.document["missing"]["bm1684x"] == ["tpu-mlir"]
    assert run.err == "error: bm1684x lacks tpu-mlir; tpu-mlir: run make env-tpu-mlir\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_interrupt(fluxkiln, monkeypatch, error):
    fails_with(monkeypatch, error)
    run = fluxkiln("doctor")
    assert run.code == 130
    assert run.err.strip() == "error: interrupted; finished work is kept, the same command resumes"


def test_full_disk(fluxkiln, monkeypatch):
    fails_with(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/big/file"))
    run = fluxkiln("doctor", "--json")
    assert (run.code, run.document["error"]["kind"]) == (1, "ResourceError")
    assert "the disk is full (/big/file); free some space" in run.err


def test_no_memory(fluxkiln, monkeypatch):
    fails_with(monkeypatch, MemoryError())
    run = fluxkiln("doctor")
    assert (run.code, run.err) == (1, f"error: {command_line.OUT_OF_MEMORY}\n")


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.EACCES, "may read and write"), (errno.ENOTDIR, "a folder is needed there"), (errno.EIO, "check the path")],
)
def test_files_that_cannot_be_used(fluxkiln, monkeypatch, code, remedy):
    fails_with(monkeypatch, OSError(code, os.strerror(code), "/some/place"))
    run = fluxkiln("doctor")
    assert run.code == 1
    assert run.err.startswith(f"error: /some/place: {os.strerror(code)}; ")
    assert remedy in run.err


def test_a_bug_is_one_sentence_and_a_file(fluxkiln, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(command_line.TRACEBACK_VARIABLE, raising=False)
    fails_with(monkeypatch, ZeroDivisionError("division by zero\nsecond line"))
    run = fluxkiln("doctor")
    assert run.code == 1
    assert run.err.startswith("error: a bug in fluxkiln: ZeroDivisionError: division by zero (traceback in ")
    assert run.err.count("\n") == 1
    [written] = tmp_path.glob("fluxkiln-*.txt")
    assert str(written) in run.err
    assert "in examine" in written.read_text()


def test_a_bug_with_its_traceback(fluxkiln, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(command_line.TRACEBACK_VARIABLE, "1")
    fails_with(monkeypatch, ZeroDivisionError("division by zero"))
    run = fluxkiln("doctor")
    assert run.err.startswith("Traceback (most recent call last)")
    assert list(tmp_path.glob("fluxkiln-*.txt")) == []


def test_reader_that_goes_away_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fluxkiln", "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_terminated_like_interrupted(number):
    script = (
        "import sys, time, fluxkiln.compile.doctor as d; from fluxkiln.cli.main import main; sys.argv = ['fluxkiln', "
        "'doctor']; d.examine = lambda: (print('ready', file=sys.stderr, flush=True), time.sleep(60)); sys.exit(main())"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == f"error: {command_line.INTERRUPTED}"


def test_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "fluxkiln", "cache", "ls", "--json"], cwd=ROOT / "tests", capture_output=True,
        text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT), "FLUXKILN_STORE": "/nowhere"},
    )  # fmt: skip
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["exit_code"] == 2
    assert done.stderr.startswith("error: /nowhere is no store")


def test_make_hands_its_variables_over_as_they_are():
    values = {"MODEL": "it's \"a\" folder; echo", "SIZE": "64x32", "TOKENS": "-5", "SCHEME": "W4BF16-g32",
              "VAE": "tiny", "LORA": "a b", "JOBS": "2"}  # fmt: skip
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/made-from.sha256", "cpu", *(f"{name}={value}" for name, value in values.items())],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
    )  # fmt: skip
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[1:3] == ["build", "cpu"]
    assert words[3:] == [f"--{name.lower()}={value}" for name, value in values.items()]
    known = {option for parameter in _options_of_build() for option in parameter.opts}
    assert {word.split("=")[0] for word in words[3:]} <= known


def _options_of_build() -> list[click.Parameter]:
    command = command_line.fluxkiln_command.get_command(click.Context(command_line.fluxkiln_command), "build")
    assert command is not None
    return command.params


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["generate", "x", "--bundle"], ["serve", "--bundle"]])
def test_a_folder_without_a_manifest_is_no_intact_bundle(fluxkiln, command):
    run = fluxkiln(*command, ".")
    assert run.code == 4
    assert "is no bundle: it has no manifest.json" in run.err
    assert run.err.count("\n") == 1
