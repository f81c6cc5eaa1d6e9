"""click's usage errors in the words of this package: the value found, the rule, the remedy."""

from __future__ import annotations

import click

from fluxkiln.errors import UsageError


class NamedCommands(click.Group):
    """A group that names its commands when it is given another one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            raise UsageError(f"{ctx.command_path} has no command {args[0]!r}; there are {', '.join(names)}")
        return super().resolve_command(ctx, args)


class TargetCommand(click.Command):
    """A command whose help ends with the names of all targets; they are looked for when it is asked for."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from fluxkiln.compile.targets import target_names

        with formatter.section("Targets"):
            formatter.write_text(", ".join(target_names()))


class BundleCommand(click.Command):
    """A command whose help ends with what can run a bundle; looked for when it is asked for."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from fluxkiln.compile.targets import find_target, target_names
        from fluxkiln.compile.toolchain import toolchain_of

        with formatter.section("Executors, the default of a target first"):
            formatter.write_dl(
                [(name, ", ".join(toolchain_of(find_target(name)).executors)) for name in target_names()]
            )


def explain_usage(error: click.ClickException) -> str:
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
