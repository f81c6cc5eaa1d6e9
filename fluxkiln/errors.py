"""Every error that fluxkiln raises on purpose.

FluxkilnError                  exit 1   something the user or the machine can put right
├── UsageError                 exit 2   an option, preset, target, scheme or part that does not exist or is not legal
│   ├── ShapeError             exit 2   a size or token count the model or the chip cannot take
│   └── SchemeError            exit 2   a quantization scheme that does not fit a weight
├── CheckpointError            exit 1   a folder that is no FLUX.1 checkpoint, or a damaged one
├── DatasetError               exit 1   pictures and prompts that cannot be trained on; says which line
├── TrainingError              exit 1   a training whose loss is no number any more
├── PatchError                 exit 1   upstream code differs from what a patch was written for
├── ExportError                exit 1   a template that could not be traced or does not hold what it must
├── CompileError               exit 1   a compiler that failed, or whose result is not what was asked for
├── ResourceError              exit 1   not enough disk, memory or time; or another process holds the lock
├── RegistryError              exit 1   a registry that cannot be reached, refuses, or answers what it must not
├── ParityError                exit 3   a gate of the parity ladder was missed
├── IntegrityError             exit 4   bytes that do not have the digest they should have
└── ToolchainError             exit 5   a compiler or interpreter that is not installed or is the wrong one

A message gives the value found, the rule, and the remedy.
"""

from __future__ import annotations


class FluxkilnError(Exception):
    """Base of all errors whose message is meant for the user. `details` is a table to show above it, or empty."""

    exit_code = 1
    details = ""


class UsageError(FluxkilnError):
    """An option, preset, target, scheme or part that does not exist or is not legal."""

    exit_code = 2


class ShapeError(UsageError):
    """A size or token count that the model or the chip cannot take."""


class SchemeError(UsageError):
    """A quantization scheme that does not fit a weight."""


class CheckpointError(FluxkilnError):
    """A folder that is no FLUX.1 checkpoint, or a damaged one."""


class DatasetError(FluxkilnError):
    """Pictures and prompts that cannot be trained on; says which line."""


class TrainingError(FluxkilnError):
    """A training whose loss is no number any more."""


class PatchError(FluxkilnError):
    """Upstream code differs from what a patch was written for."""


class ExportError(FluxkilnError):
    """A template that could not be traced or does not hold what it must."""


class CompileError(FluxkilnError):
    """A compiler that failed, or whose result is not what was asked for."""


class ResourceError(FluxkilnError):
    """Not enough disk or memory, or another process holds the lock."""


class RegistryError(FluxkilnError):
    """A registry that cannot be reached, refuses, or answers what it must not."""


class ParityError(FluxkilnError):
    """A gate of the parity ladder was missed. `bundle` and `report` are the paths of what was written all the same."""

    exit_code = 3
    bundle = ""
    report = ""


class IntegrityError(FluxkilnError):
    """Bytes that do not have the digest they should have."""

    exit_code = 4


class ToolchainError(FluxkilnError):
    """A compiler or interpreter that is not installed or is the wrong one. `result` is that of a build that was made
    all the same, but for what that compiler makes."""

    exit_code = 5
    result: object = None
