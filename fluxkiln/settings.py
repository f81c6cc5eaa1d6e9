"""The settings of a build, each described once; what they leave open the model and the target decide.

The command line's options are made from the description. The Makefile's variables and the table of them in the
documentation are held equal to it by a test.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from fluxkiln.errors import ShapeError, UsageError

DEFAULT_MODEL = "scenes-dev"
DEFAULT_PROMPT = "a small kiln by a river at night"
DEFAULT_STATISTICS = "uniform"
STORE_VARIABLE = "FLUXKILN_STORE"
VAES: tuple[Literal["kl", "tiny"], ...] = ("kl", "tiny")
MODULATIONS: tuple[Literal["hoisted", "inline"], ...] = ("hoisted", "inline")
MOST_SEEDS, MOST_SHAPES = 256, 16
# Of jobs, tokens, steps and cores: more than any machine or model takes.
MOST_COUNT = 10_000
MOST_SEED = 2**63 - 1

_T = TypeVar("_T")


def parse_text(text: str) -> str:
    """An argument that is no path, in UTF-8 whatever the shell says of the names of files; UsageError if it is not."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError as error:
        raise UsageError(f"{text[:80]!r} is no UTF-8 text; type it in a terminal that is set to UTF-8") from error


def parse_names(text: str) -> tuple[str, ...]:
    """`transformer,vae` -> ("transformer", "vae")."""
    return tuple(text.replace(",", " ").split())


def parse_size(text: str) -> tuple[int, int]:
    """`1024x768` -> (width, height), `1024` -> a square; ShapeError when it is no size, or none the model can take."""
    match = re.fullmatch(r"(\d{1,6})(?:[xX*](\d{1,6}))?", text.strip())
    if match is None:
        raise ShapeError(f"size {text!r} is not WIDTHxHEIGHT in pixels; 1024x1024 is FLUX.1's own")
    width, height = int(match.group(1)), int(match.group(2) or match.group(1))
    from fluxkiln.types import Shapes  # not for `--help`

    Shapes(height, width, tokens=1)
    return width, height


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """`1024x1024,768x1344` -> the sizes; as `parse_size`, and UsageError for one that is there twice."""
    return _each_once("size", text, tuple(map(parse_size, text.split(","))))


def parse_tokens(text: str) -> tuple[int, ...]:
    """`512,256` -> numbers of text tokens; UsageError for what is none, or for one that is there twice."""
    pieces = [piece.strip() for piece in text.split(",")]
    if odd := [piece for piece in pieces if not re.fullmatch(r"-?[0-9]{1,9}", piece)]:
        raise UsageError(f"--tokens {text}: {odd[0]!r} is no whole number; write 512, or 512,256 for several")
    return _each_once("tokens", text, tuple(map(int, pieces)))


def _each_once(name: str, text: str, values: tuple[_T, ...]) -> tuple[_T, ...]:
    if len(values) > MOST_SHAPES or len(set(values)) < len(values):
        raise UsageError(f"--{name} {text}: give each once, and at most {MOST_SHAPES}")
    return values


_UNITS = {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate(("", "k", "M", "G", "T"))
}


def parse_bytes(text: str) -> int:
    """`16GiB` -> 17179869184, `12.9GB` -> 12900000000; UsageError when it is no size of a memory, or one of 0."""
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([a-z]+)", text.strip().lower())
    size = round(float(match[1]) * units.get(match[2], 0)) if match else 0
    if not size:
        raise UsageError(f"{text[:80]!r} is no size of a memory; write a number and GB, GiB, MB or MiB: 16GiB say")
    return size


def parse_loras(texts: Iterable[str]) -> tuple[tuple[Path, float], ...]:
    """`style.safetensors:0.8,other.safetensors` -> files and strengths, 1 where none is given.

    The name of a file that exists is taken as it is, colons and commas included.

    Raises:
        UsageError: no such file, or a strength that is no finite number.
    """
    return tuple(
        _parse_lora(piece.strip())
        for text in texts
        for piece in ([text] if _is_file(text) else text.split(","))
        if piece.strip()
    )


def _parse_lora(text: str) -> tuple[Path, float]:
    head, colon, tail = text.rpartition(":")
    if not colon or _is_file(text):
        head, tail = text, "1"
    file = Path(head).expanduser()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "there is no such file"
        raise UsageError(f"--lora {text}: {what}; give a LoRA's .safetensors file, as FILE or FILE:STRENGTH")
    try:
        strength = float(tail)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise UsageError(f"--lora {text}: strength {tail!r} is no number; 1 is as trained, 0.8 is weaker")
    return file, strength


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # no name that a file could have
        return False


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file, one a line; empty lines and lines that start with # are left out.

    Raises:
        UsageError: no such file, no text, or no prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {path} is no UTF-8 text ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"--prompts {path}: {error.strerror}; give a text file with a prompt a line") from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise UsageError(f"--prompts {path} has no prompt in it; write one a line")
    return prompts


def read_distinct_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file; UsageError too when one is there twice."""
    prompts = read_prompts(path)
    twice = next((prompt for prompt in prompts if prompts.count(prompt) > 1), None)
    if twice is not None:
        raise UsageError(f"--prompts {path} has {twice[:60]!r} twice; write each prompt once")
    return prompts


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


@dataclass(frozen=True, slots=True)
class Option:
    """How a setting is given: as `--flag` and, where `make` says so, as the variable of make that is called FLAG.

    Attributes:
        default: the field's own.
        help: one or two sentences.
        metavar: stands for the value; of several between | those in small letters are what there is.
        flag: without dashes; where it is empty, the field's name is.
        kind: of a value as it is given; bool for a flag without one.
        parse: given -> setting; None where they are the same.
        several: the flag may be given again, and `parse` takes the list.
        make: what the variable is for: what is built, or the recorded images only; empty where there is none.
    """

    default: Any
    help: str
    metavar: str | None = None
    flag: str = ""
    kind: type[str | int | Path] = str
    parse: Callable[[Any], Any] | None = None
    several: bool = False
    make: Literal["build", "images", ""] = "build"


def _option(default: _T, text: str, metavar: str | None = None, **how: Any) -> _T:
    return field(default=default, metadata={"option": Option(default, text, metavar, **how)})


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user asks for; None is for the model or the target to decide.

    Attributes:
        size: widths and heights; tokens: of text. A bundle is for each of the one with each of the other.
        recording: parts, kinds or components whose calls travel with the bundle; see `verify.carried`.
        loras: files and strengths, in the checkpoint's weights as they are read.
        instance, tp_degree, granularity, flags: of a target that cuts the model over cores.
        board, device_memory, devices: of a target whose chips hold whole parts; bytes of one chip, and how many.
        seed, steps, prompt: of the recorded reference run.
        prompts, seeds: whole images besides it: each of one with each of the other. `prompt` or `seed` stands in for
            the one that is empty; none where both are.
    """

    target: str
    model: str = _option(DEFAULT_MODEL, f"A preset, a folder or a Hugging Face id. Default: {DEFAULT_MODEL}.")
    statistics: str = _option(
        DEFAULT_STATISTICS,
        "How weights of a synthetic preset are drawn: uniform (the default), or flux, with outliers as published for "
        "FLUX.1.",
        "uniform|flux",
    )
    size: tuple[tuple[int, int], ...] | None = _option(
        None,
        "Image size in pixels, multiples of 16; one number is a square; several after commas share a bundle's weights. "
        "Default: the model's own, 1024x1024.",
        "WIDTHxHEIGHT,...", parse=parse_sizes,
    )  # fmt: skip
    tokens: tuple[int, ...] | None = _option(
        None, "Text tokens, as sizes. Default: the most the model takes (dev 512, schnell 256).", "N,...",
        parse=parse_tokens,
    )  # fmt: skip
    scheme: str | None = _option(
        None,
        "How the blocks' weights are stored, W4BF16 or BF16 say; W4BF16,head=F32 for one kind of part otherwise. "
        "Default: the target's.",
        "NAME",
    )
    vae: Literal["kl", "tiny"] = _option("kl", "The checkpoint's own decoder, or taef1.", "kl|tiny")
    components: tuple[str, ...] | None = _option(
        None, "Build only these, transformer,vae say. Default: all.", "A,B", parse=parse_names
    )
    loras: tuple[tuple[Path, float], ...] = _option(
        (),
        "A LoRA to read the weights with, style.safetensors:0.8 say; again, or after a comma, for another.",
        "FILE[:STRENGTH]", flag="lora", parse=parse_loras, several=True,
    )  # fmt: skip
    modulation: Literal["inline", "hoisted"] = _option(
        "hoisted",
        "AdaLN modulation once per image, before the first step (the default), or in every block and step.",
        "inline|hoisted",
    )
    instance: str | None = _option(
        None, "trn1, trn2, inf2: the instance type, trn1.32xlarge say. Default: the target's.", "NAME"
    )
    tp_degree: int | None = _option(
        None,
        "trn1, trn2, inf2: cores that share the transformer and T5. Default: 8, or what the instance has.",
        "N", flag="tp", kind=int,
    )  # fmt: skip
    granularity: str = _option(
        "block", "trn1, trn2, inf2: blocks in a compiled module. Default: block.", "block|group:N|whole"
    )
    flags: Literal["default", "published"] = _option(
        "default", "trn1, trn2, inf2: the compiler's flags, ours or those of the published sample.", "default|published"
    )
    board: str | None = _option(
        None,
        "bm1684x, bm1688: the board or card, SE7-32 say; `fluxkiln plan` lists them. Default: its first.",
        "NAME",
    )
    device_memory: int | None = _option(
        None, "Memory that a chip gives to models, 16GiB say. Default: the board's.", "SIZE", parse=parse_bytes, make=""
    )
    devices: int | None = _option(
        None, "Most chips that the transformer is cut over. Default: the board's; without a board, 8.", "N", kind=int
    )
    jobs: int | None = _option(None, "Compilers at once. Default: one per core.", "N", kind=int)
    build_dir: Path = _option(Path("build"), "Where builds go. Default: ./build.", kind=Path, make="")  # noqa: RUF009
    store: Path | None = _option(  # noqa: RUF009
        None, f"The store that builds share. Default: ${STORE_VARIABLE}, or `store` in the build folder.",
        kind=Path, make="",
    )  # fmt: skip
    seed: int = _option(0, "Seed of the reference run, and of which casts are proven.", "N", kind=int, make="")
    steps: int | None = _option(
        None, "Denoising steps of the reference run. Default: 2; of a trained preset as many as its picture needs.",
        "N", kind=int, make="images",
    )  # fmt: skip
    prompt: str = _option(
        DEFAULT_PROMPT, "What the reference run draws.", parse=lambda text: parse_text(text) or DEFAULT_PROMPT, make=""
    )
    prompts: tuple[str, ...] = _option(
        (), "Compare whole images of these prompts too, one a line, each with every seed of --seeds.", "FILE",
        kind=Path, parse=read_distinct_prompts, make="images",
    )  # fmt: skip
    seeds: tuple[int, ...] = _option(
        (), "Compare whole images of these seeds too, 0-3,7 say.", "A,B-C", parse=parse_seeds, make="images"
    )
    verify: bool = _option(
        True, "Build and compare nothing.", flag="no-verify", kind=bool, parse=operator.not_, make=""
    )
    recording: tuple[str, ...] = _option(
        (),
        "Put inputs and outputs of these parts into the bundle, for `fluxkiln parity`: all, or parts or kinds.",
        "all|A,B", flag="with-recording", parse=parse_names, make="",
    )  # fmt: skip
    force: bool = _option(False, "With --no-verify: replace a bundle that was verified.", kind=bool, make="")
    prove: bool = _option(
        False, "Compile one part of each cast kind again, also for moulds of the store.", kind=bool, make=""
    )

    def __post_init__(self) -> None:
        if self.vae not in VAES:
            raise UsageError(f"no VAE is called {self.vae!r}; there are kl (the checkpoint's own) and tiny (taef1)")
        if self.modulation not in MODULATIONS:
            raise UsageError(f"no form of the transformer is called {self.modulation!r}; there are inline, hoisted")
        if self.flags not in ("default", "published"):
            raise UsageError(f"no preset of compiler flags is called {self.flags!r}; there are default, published")
        if self.recording and not self.verify:
            raise UsageError(
                "--with-recording keeps what verification compares, which --no-verify leaves out; drop either"
            )
        if (self.prompts or self.seeds) and not self.verify:
            raise UsageError("prompts and seeds are for verification, which --no-verify leaves out; drop either")
        for name, value in (
            ("jobs", self.jobs),
            *(("tokens", count) for count in self.tokens or ()),
            ("steps", self.steps),
            ("tp", self.tp_degree),
            ("devices", self.devices),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{name} {value}: at least 1 is needed; leave the option out for the default")
            if value is not None and value > MOST_COUNT:
                raise UsageError(f"{name} {value}: {MOST_COUNT} are the most; leave the option out for the default")
        if not 0 <= self.seed <= MOST_SEED:
            raise UsageError(f"seed {self.seed}: a seed is a whole number from 0 to {MOST_SEED}; give another")

    @property
    def store_path(self) -> Path:
        return self.store or Path(os.environ.get(STORE_VARIABLE) or self.build_dir / "store")


# Setting -> how it is given; all but the target.
OPTIONS: Mapping[str, Option] = {
    one.name: replace(option, flag=option.flag or one.name.replace("_", "-"))
    for one in fields(Settings)
    if (option := one.metadata.get("option"))
}


def read_settings(target: str, given: Mapping[str, Any]) -> Settings:
    """Settings from what was given for them by name, as `Option.kind`; None stands for what was not given.

    Raises:
        UsageError, ShapeError: a text that means nothing, or settings that contradict each other.
    """
    read = {
        name: parse(value) if (parse := OPTIONS[name].parse) else value
        for name, value in given.items()
        if value is not None
    }
    return Settings(target, **read)
