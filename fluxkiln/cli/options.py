"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fluxkiln.components import Shapes
from fluxkiln.errors import UsageError
from fluxkiln.settings import DEFAULT_MODEL, DEFAULT_PROMPT, STORE_VARIABLE, Settings, parse_loras, parse_size

if TYPE_CHECKING:
    from fluxkiln.artifacts.store import Store

_F = TypeVar("_F", bound=Callable[..., Any])

# A target's name -> settings from the options of the command line.
SettingsFor = Callable[[str], Settings]

BUILD_DIR = Path("build")
MOST_SEEDS = 256
MOST_SEED = 2**63 - 1

size_option = click.option(
    "--size", metavar="WxH", help="Image size in pixels, multiples of 16. Default: the model's own, 1024x1024."
)
tokens_option = click.option(
    "--tokens", type=int, metavar="N", help="Text tokens. Default: the most the model takes (dev 512, schnell 256)."
)
vae_option = click.option("--vae", metavar="kl|tiny", default="kl", help="The checkpoint's own decoder, or taef1.")
lora_option = click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[:STRENGTH]",
    help="A LoRA to fuse into the transformer, style.safetensors:0.8 say; again, or after a comma, for another.",
)
build_dir_option = click.option(
    "--build-dir", type=click.Path(path_type=Path), default=BUILD_DIR, help="Where builds go. Default: ./build."
)
store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="The store that builds share. Default: $FLUXKILN_STORE, or `store` in the build folder.",
)


def settings_options(command: _F) -> _F:
    """Adds the options of a build and hands them over as `settings_for`, a function from a target's name."""

    @functools.wraps(command)
    def wrapped(
        *args: Any,
        model: str,
        size: str | None,
        tokens: int | None,
        scheme: str | None,
        vae: Any,
        components: str | None,
        modulation: Any,
        instance: str | None,
        tp_degree: int | None,
        granularity: str,
        lnc: int,
        flags: Any,
        jobs: int | None,
        build_dir: Path,
        store: Path | None,
        seed: int,
        steps: int,
        prompt: str | None,
        prompts: Path | None,
        seeds: str | None,
        no_verify: bool,
        prove: bool,
        loras: tuple[str, ...],
        **kwargs: Any,
    ) -> Any:
        def settings_for(target: str) -> Settings:
            from fluxkiln.compile.targets import find_target

            found = find_target(target)
            settings = Settings(
                target=target,
                model=model,
                size=check_size(size),
                tokens=tokens,
                scheme=scheme,
                vae=vae,
                components=None if components is None else tuple(components.replace(",", " ").split()),
                loras=parse_loras(loras),
                modulation=modulation,
                instance=instance,
                tp_degree=tp_degree,
                granularity=granularity,
                lnc=lnc,
                flags=flags,
                jobs=jobs,
                build_dir=build_dir,
                store=store,
                seed=seed,
                steps=steps,
                verify=not no_verify,
                prove=prove,
                prompt=prompt or DEFAULT_PROMPT,
                prompts=() if prompts is None else read_prompts(prompts),
                seeds=() if seeds is None else parse_seeds(seeds),
            )
            found.parse_schemes(scheme)
            return settings

        return command(*args, settings_for=settings_for, **kwargs)

    options = (
        click.option(
            "--model",
            default=DEFAULT_MODEL,
            help=f"A synthetic preset, a folder or a Hugging Face id. Default: {DEFAULT_MODEL}.",
        ),
        size_option,
        tokens_option,
        click.option(
            "--scheme",
            metavar="NAME",
            help="How the blocks' weights are stored, W4BF16 or BF16 say; W4BF16,head=F32 for one kind of part "
            "otherwise. Default: the target's.",
        ),
        vae_option,
        click.option("--components", metavar="A,B", help="Build only these, transformer,vae say. Default: all."),
        lora_option,
        click.option(
            "--modulation",
            metavar="inline|hoisted",
            default="hoisted",
            help="AdaLN modulation once per image, before the first step (the default), or in every block and step.",
        ),
        click.option(
            "--instance",
            metavar="NAME",
            help="trn1, inf2: the instance type, trn1.32xlarge say. Default: the target's.",
        ),
        click.option(
            "--tp",
            "tp_degree",
            type=int,
            metavar="N",
            help="trn1, inf2: cores that share the transformer and T5. Default: 8, or what the instance has.",
        ),
        click.option(
            "--granularity",
            metavar="block|group:N|whole",
            default="block",
            help="trn1, inf2: blocks in a compiled module. Default: block.",
        ),
        click.option(
            "--lnc", type=int, metavar="N", default=1, help="trn1, inf2: cores of a logical core; 1 is legal."
        ),
        click.option(
            "--flags",
            metavar="default|published",
            default="default",
            help="trn1, inf2: the compiler's flags, ours or those of the published sample.",
        ),
        click.option("--jobs", type=int, metavar="N", help="Compilers at once. Default: one per core."),
        build_dir_option,
        store_option,
        click.option(
            "--seed", type=int, metavar="N", default=0, help="Seed of the reference run, and of which casts are proven."
        ),
        click.option(
            "--steps", type=int, metavar="N", default=2, help="Denoising steps of the reference run. Default: 2."
        ),
        click.option("--prompt", help="What the reference run draws."),
        click.option(
            "--prompts",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Compare whole images of these prompts too, one a line, each with every seed of --seeds.",
        ),
        click.option("--seeds", metavar="A,B-C", help="Compare whole images of these seeds too, 0-3,7 say."),
        click.option("--no-verify", is_flag=True, help="Build without climbing the parity ladder."),
        click.option(
            "--prove", is_flag=True, help="Compile one part of each cast kind again, also for moulds of the store."
        ),
    )
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file, one a line; empty lines and lines that start with # are left out.

    Raises:
        UsageError: no such file, no text, no prompt, or one twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {path} is no UTF-8 text ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"--prompts {path}: {error.strerror}; give a text file with a prompt a line") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UsageError(f"--prompts {path} has no prompt in it; write one a line")
    twice = next((prompt for prompt in prompts if prompts.count(prompt) > 1), None)
    if twice is not None:
        raise UsageError(f"--prompts {path} has {twice[:60]!r} twice; write each prompt once")
    return tuple(prompts)


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0-3,7` -> (0, 1, 2, 3, 7).

    Raises:
        UsageError: no such list, too many, a seed twice or too large.
    """
    seeds: list[int] = []
    for piece in text.replace(",", " ").split():
        first, dash, last = piece.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(
                f"--seeds {text}: {piece!r} is no seed and no range; write whole numbers from 0, 0-3,7 say"
            )
        start, stop = int(first), int(last) if dash else int(first)
        if stop < start or stop - start >= MOST_SEEDS:
            raise UsageError(f"--seeds {text}: {piece!r} must rise, over at most {MOST_SEEDS} seeds")
        seeds += range(start, stop + 1)
    if not seeds or len(seeds) > MOST_SEEDS:
        raise UsageError(f"--seeds {text!r} has {len(seeds)} seeds; give 1 to {MOST_SEEDS}")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text} has a seed twice; give each once")
    if max(seeds) > MOST_SEED:
        raise UsageError(f"--seeds {text}: {max(seeds)} is too large; a seed is at most {MOST_SEED}")
    return tuple(seeds)


def store_options(command: _F) -> _F:
    """Adds the two options that name a store."""
    return build_dir_option(store_option(command))


def check_size(text: str | None) -> tuple[int, int] | None:
    """Width and height of `--size`; ShapeError at once when the model cannot take them."""
    if text is None:
        return None
    width, height = parse_size(text)
    Shapes(height, width, tokens=1)
    return width, height


def open_existing(build_dir: Path, store: Path | None) -> Store:
    """The store that the two options name; UsageError when there is none."""
    from fluxkiln.artifacts.store import Store

    root = Settings(target="", build_dir=build_dir, store=store).store_path
    if not (root / "index.json").is_file():
        raise UsageError(
            f"{root} is no store: it has no index.json; a build makes one there, --store, --build-dir and "
            f"{STORE_VARIABLE} name another"
        )
    return Store(root)
