"""The Neuron compiler, a command that lives elsewhere: found, told from PyPI's placeholder, called with exact flags,
and what to do about its error codes. It runs on any host, no Neuron device is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fluxkiln.compile.doctor import installed_version, version_line
from fluxkiln.compile.process import run_tool
from fluxkiln.compile.targets import Target
from fluxkiln.compile.toolchain import ToolStatus
from fluxkiln.compile.toolchains.neuron.neff import (
    COMMAND,
    HLO_SUFFIX,
    SCRIPT,
    FlagPreset,
    ModuleForm,
    ModuleJob,
    check_module,
    compile_flags,
)
from fluxkiln.errors import CompileError, ResourceError, ToolchainError

_COMPILER_LOG = "log-neuron-cc.txt"
_VERSION = re.compile(r"NeuronX Compiler version ([0-9][0-9A-Za-z.+_-]*)")
# Flags for the compiler come from here alone; frameworks read these from the environment.
_FRAMEWORK_FLAGS = "NEURON_CC_FLAGS"
MAKES = "NEFF"
_SOURCE = "install the Neuron SDK's from the AWS Neuron package index"
# Errors of the user (E) and of the compiler (I), older codes, and those of the command itself.
_CODE = re.compile(r"\bNCC_([A-Z]{4}\d{3})\b|\b(E[A-Z]{3}\d{3}|LUR015)\b|\[(F1\d\d)\]")
_KILLED, _BUG = "F137", "F134"
_PAGE = "the page 'Neuron Compiler Error Codes' of the AWS Neuron documentation"


class NeuronxCc(NamedTuple):
    """Where the compiler lies and its version, such as `2.26.6360.0+abc`."""

    path: Path
    version: str


def find_neuronx_cc() -> NeuronxCc:
    """The compiler on PATH and its version.

    Raises:
        ToolchainError: no such command, PyPI's placeholder package in its place, or a command that names no version.
    """
    command = shutil.which(COMMAND)
    if command is None:
        placeholder = installed_version(COMMAND)
        why = f" (the installed package {COMMAND} {placeholder} is PyPI's placeholder, without the command)"
        raise ToolchainError(f"{COMMAND} is not on PATH{why * bool(placeholder)}; {_SOURCE}")
    try:
        done = subprocess.run(
            [command, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolchainError(f"{command} --version could not be run ({error}); {_SOURCE}") from error
    printed = done.stdout + done.stderr
    version = _VERSION.search(printed)
    if "WRONG PACKAGE" in printed:
        raise ToolchainError(f"{command} is PyPI's placeholder, which compiles nothing; uninstall it and {_SOURCE}")
    if done.returncode or version is None:
        said = " ".join(printed.split())[:200] or "nothing"
        raise ToolchainError(
            f"{command} --version ended with {done.returncode} and printed {said!r}; the Neuron compiler prints "
            f"'NeuronX Compiler version ...'; {_SOURCE}"
        )
    return NeuronxCc(Path(command).absolute(), version[1])  # PATH may be relative, compiles run elsewhere


def compiler_status() -> ToolStatus:
    """The compiler's row of `fluxkiln doctor`; nothing but its `--version` is started."""
    source = "install it from the AWS Neuron package index, not from PyPI; all up to its call works without it"
    command = shutil.which(COMMAND)
    if command is None:
        placeholder = installed_version(COMMAND)
        why = f"the package {COMMAND} {placeholder} is PyPI's placeholder, without a compiler: " if placeholder else ""
        return ToolStatus(COMMAND, False, "", "", why + source, makes=MAKES)
    version = version_line(command)
    remedy = "" if version else f"{command} --version names no version, so it is no compiler: {source}"
    return ToolStatus(COMMAND, bool(version), version, command, remedy, makes=MAKES)


def compile_argv(
    form: ModuleForm, target: Target, preset: FlagPreset, model: str, output: str, command: Path | str = COMMAND
) -> list[str]:
    """The command line that compiles the HLO module proto `model` to `output`.

    Source: AWS Neuron documentation, "Neuron Compiler CLI Reference Guide (neuronx-cc)", 'compile' command; the order
    is that of compile logs in published compiler caches.
    """
    flags = compile_flags(form, target, preset)
    return [str(command), "compile", "--framework=XLA", model, "--output", output, *flags]


def compile_module(
    job: ModuleJob, compiler: NeuronxCc, target: Target, preset: FlagPreset, work: Path, log: Path
) -> Path:
    """Compile one module in the folder `work`, from a copy of it; returns the output.

    Raises:
        IntegrityError: the module is not the one that was lowered.
        CompileError: the compiler failed; with the log's telling lines, advice for its error codes, the log's place.
        ResourceError: it was killed for memory, or the disk is full.
    """
    model = work / f"{job.name}{HLO_SUFFIX}"
    shutil.copyfile(job.hlo, model)
    check_module(job, model)
    output = work / f"{job.name}.neff"
    what = f"{job.name} for {target.chip}"
    argv = compile_argv(job.form, target, preset, model.name, output.name, compiler.path)
    environ = {name: value for name, value in os.environ.items() if name != _FRAMEWORK_FLAGS}
    start = log.stat().st_size if log.is_file() else 0
    try:
        run_tool(argv, work, environ, log, what)
    except CompileError as error:
        with log.open("ab") as file, suppress(FileNotFoundError):  # the compiler's own log is kept, `work` is not
            file.write(b"\n--- " + _COMPILER_LOG.encode() + b"\n" + (work / _COMPILER_LOG).read_bytes())
        said = log.read_bytes()[start:].decode(errors="replace")
        if _KILLED in find_codes(said):
            raise ResourceError(f"{what}: {known_advice()[_KILLED]}; whole log: {log}") from error
        advice = advise(said)
        raise CompileError(f"{error}{'. ' if advice else ''}{advice}") from error
    if not output.is_file() or not output.stat().st_size:
        raise CompileError(f"{what}: {COMMAND} ended well but wrote no output; whole log: {log}")
    return output


@cache
def known_advice() -> Mapping[str, str]:
    """Error code, without the prefix NCC_ -> one sentence."""
    table = tomllib.loads(Path(__file__).with_name("error_codes.toml").read_text("utf-8"))
    return {code: sentence for codes, sentence in table.items() for code in codes.split()}


def find_codes(text: str) -> tuple[str, ...]:
    """The error codes in a compiler's output, without the prefix NCC_, each once, in order."""
    return tuple(dict.fromkeys(next(filter(None, match.groups())) for match in _CODE.finditer(text)))


def advise(text: str) -> str:
    """One sentence for each error code in a compiler's output; empty when there is none."""
    known, sentences = known_advice(), []
    for code in find_codes(text):
        label = code if code.startswith(("F1", "LUR")) else f"NCC_{code}"
        unknown = known[_BUG] if code.startswith("I") else f"no advice is known here; see {_PAGE}"
        sentences.append(f"{label}: {known.get(code, unknown)}")
    return "; ".join(sentences)


def compiler_missing(why: str, folder: Path) -> ToolchainError:
    """`why` with what is ready in `folder` and how to go on; to be raised when everything else is finished."""
    modules = len(list((folder / "hlo").glob(f"*{HLO_SUFFIX}")))
    ready = [f"hlo/ ({modules} modules)"] * bool(modules)
    ready += [name for name in ("weights/", SCRIPT) if (folder / name).exists()]
    return ToolchainError(
        f"{why}. No NEFF was compiled; all before that is ready in {folder}: {', '.join(ready) or 'nothing'}. To go "
        f"on, run `bash {SCRIPT}` on any machine with the Neuron SDK, or `fluxkiln compile --resume` where {COMMAND} "
        "is on PATH"
    )
