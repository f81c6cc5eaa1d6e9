"""The command `fluxkiln`: the list of its commands, each imported when it is called, and the one place errors end."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import click

import fluxkiln
from fluxkiln.cli.interrupt import end_soon
from fluxkiln.cli.output import Output, json_option, open_streams, say, visible
from fluxkiln.errors import FluxkilnError, ResourceError, ToolchainError, UsageError

TRACEBACK_VARIABLE = "FLUXKILN_TRACEBACK"
INTERRUPTED = "interrupted; finished work is kept, the same command resumes"
OUT_OF_MEMORY = (
    "memory ran out; use fewer --jobs or a smaller --size, or stop other work, and run the same command again"
)
# 128 + SIGINT, as shells count it.
INTERRUPTED_CODE = 130

# module -> what it is installed as, where the names differ
_DISTRIBUTIONS = {"PIL": "pillow", "google": "protobuf"}
# extra -> what it brings; all other packages are in `build`
_EXTRAS = {
    "runtime": ("PIL", "google", "ml_dtypes", "numpy", "safetensors", "tokenizers"), "ort": ("onnx", "onnxruntime"),
}  # fmt: skip

# Command -> module of this package, and what `--help` says about it without importing that.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "build": ("build", "Build a verified bundle for TARGET, from checkpoint to report."),
    "plan": (
        "plan",
        "Say whether a build fits, how fast its images come, how long it takes; build nothing.",
    ),
    "compile": ("build", "Complete a bundle for trn1 or inf2 where the compiler is."),
    "mould": ("store", "Make moulds, and carry them to machines without the compiler."),
    "doctor": ("build", "Show every tool, its version, and what is missing for which target."),
    "synth": ("model", "Write a synthetic checkpoint: a model's architecture, random weights."),
    "fuse": ("model", "Write a checkpoint with LoRAs fused into it."),
    "train": ("train", "Train: a LoRA from pictures and prompts, a small model from nothing."),
    "calibrate": ("quantize", "Record what goes into every layer, for the methods that round by it."),
    "quantize": ("quantize", "Compare methods layer by layer, and choose a scheme for each within a budget."),
    "export": ("export", "Write the template of every kind of part, and how each part fills its slots."),
    "patches": ("model", "List what is rewritten in diffusers and transformers, and whether it still fits."),
    "generate": ("generate", "Make images from a bundle; no checkpoint is needed."),
    "serve": ("generate", "Open a local page to type a prompt and watch the steps."),
    "judge": ("judge", "Paint fixed prompts and say how many of the facts that they state hold in the pictures."),
    "inspect": ("bundle", "Show what a bundle is made of, in a folder or in a registry."),
    "report": ("bundle", "Write a build's report.html again, or a page that compares several builds."),
    "verify": ("bundle", "Compare every file of a bundle with the digest its manifest gives."),
    "parity": ("parity", "Replay a bundle's recording on its device and judge what comes out."),
    "debug": ("debug", "Find the first operation inside a part that leaves its tolerance."),
    "publish": ("registry", "Publish a bundle to a registry: a folder, an OCI registry or the Hub."),
    "pull": ("registry", "Fetch a bundle from a registry and check every byte."),
    "ls": ("registry", "List the bundles of a repository by their tags."),
    "tag": ("registry", "Give a published bundle another tag."),
    "diff": ("registry", "Show what changed from one bundle to another."),
    "cache": ("store", "Look into the store that builds share, and tidy it."),
}


class NamedCommands(click.Group):
    """A group that names its commands when it is given another one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            raise UsageError(f"{ctx.command_path} has no command {args[0]!r}; there are {', '.join(names)}")
        return super().resolve_command(ctx, args)


class Commands(NamedCommands):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"fluxkiln.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        output = context.obj or Output()
        output.document({"version": fluxkiln.__version__})
        output.line(f"fluxkiln, version {fluxkiln.__version__}")
        context.exit()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="`fluxkiln COMMAND --help` says more. Every command takes --json: one JSON document on stdout. "
    "Exit codes: 0 ok, 1 failure, 2 usage, 3 parity failed, 4 integrity, 5 missing toolchain, "
    "130 interrupted.",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version, help="Show it.")
@json_option
def fluxkiln_command() -> None:
    """From a diffusers checkpoint to accelerator artifacts: compile each kind of block once, cast every block's weights
    into it, prove each step against diffusers.

    Start with `fluxkiln build cpu`: it makes a small synthetic checkpoint and needs no network.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; this is where every error becomes a sentence."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        open_streams()
        _quieten_libraries()
        _end_by_interrupt()
    output = Output(as_json="--json" in given)
    if arguments is None:
        end_soon(partial(output.error, "Interrupted", INTERRUPTED, INTERRUPTED_CODE))
    try:
        try:
            code = fluxkiln_command.main(given, prog_name="fluxkiln", standalone_mode=False, obj=output)
        finally:
            # A closed pipe or a full disk shows here, not when the interpreter ends.
            say("", end="")
        return code if isinstance(code, int) else 0
    except FluxkilnError as error:
        if error.details:
            say(visible(error.details), err=True)
        places = {name: place for name in ("bundle", "report") if (place := getattr(error, name, ""))}
        return output.error(type(error).__name__, str(error), error.exit_code, places)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return output.error("UsageError", _explain_usage(error), UsageError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return output.error("Interrupted", INTERRUPTED, INTERRUPTED_CODE)
    except BrokenPipeError:
        return 1
    except MemoryError:
        return output.error("ResourceError", OUT_OF_MEMORY, ResourceError.exit_code)
    except ImportError as error:
        if (error.name or "fluxkiln").partition(".")[0] == "fluxkiln":
            return _bug(output, error)
        return output.error("ToolchainError", _explain_import(error), ToolchainError.exit_code)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return output.error("ResourceError", _disk_full(error), ResourceError.exit_code)
        if error.filename is None:
            return _bug(output, error)
        return output.error(type(error).__name__, _explain_file(error), FluxkilnError.exit_code)
    except Exception as error:
        return _bug(output, error)


def _quieten_libraries() -> None:
    """Their warnings are for who calls them from Python; -W and these variables bring them back."""
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _end_by_interrupt() -> None:
    """A terminated command stops its compilers and cleans up just as after Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def _explain_usage(error: click.ClickException) -> str:
    """One sentence for an error that click found while it read the command line."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "fluxkiln"
    reads = " ".join([path, *context.command.collect_usage_pieces(context)]) if context else path
    if isinstance(error, click.NoSuchOption):
        near = f"did you mean {' or '.join(error.possibilities)}? " if error.possibilities else ""
        return f"{path} has no option {error.option_name}; {near}`{path} --help` lists them all"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"{_name(error.param, context)} is missing; the command reads: {reads}"
    if isinstance(error, click.BadParameter) and error.param is not None:
        rule = "give a whole number" if isinstance(error.param.type, click.types.IntParamType) else f"see {path} --help"
        return f"{_name(error.param, context)}: {_plain(error.message)}; {rule}"
    if isinstance(error, click.BadOptionUsage):
        return f"{_plain(error.message)}: write {error.option_name} VALUE"
    return f"{_plain(error.format_message())}; the command reads: {reads}"


def _name(parameter: click.Parameter, context: click.Context | None) -> str:
    if isinstance(parameter, click.Argument):
        return parameter.make_metavar(context or click.Context(click.Command("fluxkiln"))).strip("[]")
    return max(parameter.opts, key=len)


def _plain(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:].rstrip(".")


def _disk_full(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return (
        f"the disk is full{where}; free some space or name a folder on a larger one (--build-dir, --store), then run "
        "the same command: finished work is kept"
    )


def _explain_import(error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError):
        return f"{package} cannot be loaded ({error}): it is of another machine or Python; install it again here"
    extra = next((extra for extra, packages in _EXTRAS.items() if package in packages), "build")
    more = "; to make images alone 'fluxkiln[runtime]' is enough, 'fluxkiln[ort]' for a bundle of cpu"
    return (
        f"{_DISTRIBUTIONS.get(package, package)} is not installed, and this command needs it: pip install "
        f"'fluxkiln[{extra}]'{more * (extra == 'build')}"
    )


def _explain_file(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "give a folder that you may read and write, or change its permissions"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST):
        remedy = "a folder is needed there: give another path, or move away what is in its place"
    else:
        remedy = "check the path and run the same command again"
    return f"{error.filename}: {error.strerror}; {remedy}"


def _bug(output: Output, error: BaseException) -> int:
    """Not the user's doing: one sentence, and the traceback where it can be fetched from."""
    import tempfile  # not for `--help`
    import traceback

    text = "".join(traceback.format_exception(error))
    if os.environ.get(TRACEBACK_VARIABLE):
        say(text, err=True, end="")
        where = "traceback above"
    else:
        try:
            descriptor, path = tempfile.mkstemp(prefix="fluxkiln-", suffix=".txt")
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            where = f"traceback in {path}, or shown with {TRACEBACK_VARIABLE}=1"
        except OSError:
            where = f"{TRACEBACK_VARIABLE}=1 shows the traceback"
    first = next(iter(str(error).splitlines()), "")
    message = f"a bug in fluxkiln: {type(error).__name__}{': ' if first else ''}{first} ({where}); please report it"
    return output.error("Bug", message, 1)
