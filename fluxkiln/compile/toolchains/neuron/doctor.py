"""What is installed of what lowers, compiles and runs."""

from __future__ import annotations

import shutil

from fluxkiln.compile.installed import installed_version, package_status, runtime_status, version_line
from fluxkiln.compile.toolchain import ToolStatus
from fluxkiln.compile.toolchains.neuron.frontend import VERSIONS
from fluxkiln.compile.toolchains.neuron.neff import COMMAND


def doctor() -> list[ToolStatus]:
    """The frontend's packages, the compiler, the runtime; nothing but the compiler's `--version` is started."""
    return [
        *(package_status(name, "`make env`, or `pip install 'fluxkiln[trn1]'`") for name in sorted(VERSIONS)),
        _compiler(),
        runtime_status(
            "nrtpy",
            "nrtpy",
            ("nrtpy",),
            "the executor neuron needs it, on a Trainium or Inferentia instance: install nrtpy and "
            "aws-neuronx-runtime-lib from the AWS Neuron package index",
        ),
    ]


def _compiler() -> ToolStatus:
    """What PyPI has under its name is a placeholder without the command."""
    source = "install it from the AWS Neuron package index, not from PyPI; all up to its call works without it"
    command = shutil.which(COMMAND)
    if command is None:
        placeholder = installed_version(COMMAND)
        why = f"the package {COMMAND} {placeholder} is PyPI's placeholder, without a compiler: " if placeholder else ""
        return ToolStatus(COMMAND, False, "", "", why + source)
    version = version_line(command)
    remedy = "" if version else f"{command} --version names no version, so it is no compiler: {source}"
    return ToolStatus(COMMAND, bool(version), version, command, remedy)
