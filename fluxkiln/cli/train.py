"""`fluxkiln train`: weights that are learnt: a LoRA from pictures and prompts, a small model from nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fluxkiln.cli.main import NamedCommands
from fluxkiln.cli.options import PATH, build_dir_option, read_size, store_option
from fluxkiln.cli.output import Output, json_option, open_progress, path_text, seconds_text
from fluxkiln.cli.recipe import recipe_command
from fluxkiln.train.settings import WEIGHTING_SCHEMES, LoraSettings

_F = TypeVar("_F", bound=Callable[..., Any])
DEFAULT_RESOLUTION = (512, 512)
_DEFAULTS = {name: field.default for name, field in LoraSettings.__dataclass_fields__.items()}


def _option(name: str, kind: Any, metavar: str | None, text: str) -> Callable[[_F], _F]:
    """An option of `LoraSettings`, with its default."""
    default = _DEFAULTS[name]
    shown = f" Default: {default}." if default not in (None, "", False) else ""
    return click.option(
        f"--{name.replace('_', '-')}", name, type=kind, metavar=metavar, default=default, help=text + shown
    )


@click.group(cls=NamedCommands)
def train_command() -> None:
    """Train: a LoRA from pictures and prompts, a small model from nothing."""


train_command.add_command(recipe_command, "recipe")


@train_command.command(name="lora")
@click.argument("model")
@click.argument("dataset")
@_option("iterations", int, "N", "Forward and backward passes of each process.")
@_option("batch_size", int, "N", "Pictures of a pass.")
@_option("grad_accumulate", int, "N", "Passes of a step of the optimizer.")
@_option("lora_rank", int, "N", "Rank of every pair.")
@_option("lora_blocks", int, "N", "Train the last N blocks of the transformer; -1 is all.")
@_option("learning_rate", float, "X", "After warming up; it falls to 0 by a cosine.")
@_option("warmup_steps", int, "N", "Steps of the optimizer until the learning rate is reached.")
@click.option("--resolution", metavar="WIDTHxHEIGHT", help="Of the pictures. Default: a preset's own, else 512x512.")
@click.option("--tokens", type=int, metavar="N", help="Text tokens. Default: the preset's, or the most it takes.")
@_option("num_augmentations", int, "N", "Random crops of each picture.")
@_option("guidance", float, "X", "What the transformer is told in training, dev only.")
@_option("weighting_scheme", str, "NAME", f"diffusers' sampling of timesteps: {', '.join(WEIGHTING_SCHEMES)}.")
@_option("base", str, "SCHEME", "How the frozen weights are kept: BF16, W8BF16, W4BF16 (QLoRA).")
@click.option(
    "--gradient-checkpointing", is_flag=True, help="Keep no activations inside blocks: less memory, a third more time."
)
@_option("progress_prompt", str, "TEXT", "Paint this every so often, into the page.")
@_option("progress_every", int, "N", "Iterations from picture to picture.")
@_option("progress_steps", int, "N", "Denoising steps of a picture. Default: the model's own.")
@_option("checkpoint_every", int, "N", "Iterations from state to state on disk.")
@_option("seed", int, "N", "Of the adapters, the noise and the crops.")
@click.option("--output-dir", type=PATH, default=Path("lora"), metavar="DIR", help="Default: ./lora.")
@build_dir_option
@store_option
@json_option
@click.pass_obj
def train_lora_command(
    output: Output,
    /,
    model: str,
    dataset: str,
    resolution: str | None,
    tokens: int | None,
    output_dir: Path,
    build_dir: Path,
    store: Path | None,
    **asked: Any,
) -> None:
    """Train a LoRA of MODEL on the pictures of DATASET.

    MODEL is a preset, a folder or a Hugging Face id. DATASET is a folder with train.jsonl, a line for each picture:
    {"image": "00.png", "prompt": "a striped kiln"}; or a Hugging Face data set. The same command goes on where it was
    stopped. Several processes: torchrun --nproc-per-node 2 -m fluxkiln train lora ...
    """
    settings = LoraSettings(**asked)
    size = read_size(resolution)
    from fluxkiln.train.adapters import need_peft
    from fluxkiln.train.dataset import read_dataset

    need_peft()
    samples = read_dataset(dataset)
    from fluxkiln.export.checkpoint import open_checkpoint
    from fluxkiln.export.fingerprint import DigestMemo
    from fluxkiln.export.source import resolve_model
    from fluxkiln.patches.registry import all_presets
    from fluxkiln.progress import count_bytes
    from fluxkiln.settings import Settings
    from fluxkiln.train.lora import Places, train_lora
    from fluxkiln.types import Shapes

    preset = all_presets()[model][1] if model in all_presets() else None
    width, height = size or (preset.size if preset else DEFAULT_RESOLUTION)
    memo = DigestMemo(Settings("", build_dir=build_dir, store=store).store_path.absolute() / "memo" / "tensors.json")
    with open_progress() as progress:
        root = resolve_model(model, build_dir / "models", count_bytes(progress, "synthesize", "written"))
        checkpoint = open_checkpoint(root)
        most = checkpoint.model.most_tokens[checkpoint.variant]
        shapes = Shapes(height, width, tokens or (preset.tokens if preset else most))
        places = Places(output_dir, build_dir / "train", memo)
        result = train_lora(checkpoint, samples, shapes, settings, places, progress)
    if not result.files:  # another process speaks
        return
    files = {what: str(path) for what, path in result.files.items()}
    last = result.losses[-1]
    output.document(
        {
            **files,
            "losses": result.losses,
            "iterations": settings.iterations,
            "resumed_after": result.resumed * settings.grad_accumulate,
            "processes": result.processes,
            "seconds": round(result.seconds, 3),
        }
    )
    output.facts(
        {
            "adapters": path_text(result.files["adapters"]),
            "page": path_text(result.files["page"]),
            "loss": f"{last:.4f} at the end of {settings.iterations} iterations",
            "time": seconds_text(result.seconds),
            "use it": f"fluxkiln build cpu --model {model} --lora {path_text(result.files['adapters'])}",
        }
    )
