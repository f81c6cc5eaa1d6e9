"""What several commands share: options, made from `fluxkiln.settings`, and endings of their help."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from fluxkiln.errors import UsageError
from fluxkiln.settings import OPTIONS, Settings, parse_size, parse_sizes, parse_tokens, read_settings

_F = TypeVar("_F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


class SettingsFor:
    """A target's name -> settings from the options of the command line."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def __call__(self, target: str) -> Settings:
        from fluxkiln.compile.targets import find_target

        find_target(target)
        return read_settings(target, self._given)

    def refuse(self, why: str) -> None:
        """Raise UsageError when an option was given, which then means nothing."""
        for name, value in self._given.items():
            option = OPTIONS[name]
            if value not in (None, ()) and value != (None if option.parse else option.default):
                raise UsageError(f"--{option.flag}: {why}; leave it out")


def setting_option(name: str) -> Callable[[_F], _F]:
    """The click option of a setting; a command gets what was given, as `Option.kind`."""
    option = OPTIONS[name]
    return click.option(
        f"--{option.flag}",
        name,
        type=PATH if option.kind is Path else option.kind,
        is_flag=option.kind is bool,
        multiple=option.several,
        default=None if option.parse else option.default,
        metavar=option.metavar,
        help=option.help,
    )


statistics_option = setting_option("statistics")
size_option = setting_option("size")
tokens_option = setting_option("tokens")
vae_option = setting_option("vae")
lora_option = setting_option("loras")
build_dir_option = setting_option("build_dir")
store_option = setting_option("store")


def settings_options(command: _F) -> _F:
    """Adds the options of a build and hands them over as `settings_for`."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in OPTIONS}
        return command(*args, settings_for=SettingsFor(given), **kwargs)

    for name in reversed(tuple(OPTIONS)):
        wrapped = setting_option(name)(wrapped)
    return wrapped  # type: ignore[return-value]


def store_options(command: _F) -> _F:
    """Adds the two options that name a store."""
    return build_dir_option(store_option(command))


def read_shape(size: str | None, tokens: str | None) -> dict[str, Any]:
    """The settings `size` and `tokens` of a command that takes one of each; UsageError for several."""
    given: dict[str, Any] = {
        "size": None if size is None else parse_sizes(size), "tokens": None if tokens is None else parse_tokens(tokens)
    }  # fmt: skip
    if several := [name for name, values in given.items() if values and len(values) > 1]:
        raise UsageError(f"--{several[0]}: one at a time here; several are for build, plan and mould build")
    return given


def read_size(text: str | None) -> tuple[int, int] | None:
    """Width and height of `--size`; ShapeError at once when the model cannot take them."""
    return None if text is None else parse_size(text)


class TargetCommand(click.Command):
    """A command whose help ends with the names of all targets; they are looked for when it is asked for."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from fluxkiln.compile.targets import target_names

        with formatter.section("Targets"):
            formatter.write_text(", ".join(target_names()))


class BundleCommand(click.Command):
    """A command whose help ends with what can run a bundle; looked for when it is asked for."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from fluxkiln.compile.targets import all_targets
        from fluxkiln.compile.toolchain import all_toolchains

        known = all_toolchains()  # that of a plug-in's target may have been left out
        targets = [(name, target.toolchain) for name, target in all_targets().items() if target.toolchain in known]
        with formatter.section("Executors, the default of a target first"):
            formatter.write_dl(
                [(name, ", ".join(known[toolchain].executors) or "none: other programs") for name, toolchain in targets]
            )
