"""Recipes: from nothing to a small FLUX.1 that paints drawn scenes, by one command, on two cores, within an hour.

Every component is trained. The stages run one after another and each can be killed at any moment:

    vae, vae_colour pictures -> latents -> pictures; then with more weight on colours
    words           both text encoders learn what a picture shows that has the caption
    base, finer     the transformer: flow matching, a tenth of the captions left out; then again from a lower rate
    guidance        the transformer learns to give by its guidance input what two runs give by classifier-free guidance
    vae_tiny        the tiny VAE learns the other one's latents
    steps           (schnell) the transformer learns to go in one of four steps where its teacher goes in several
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln import __version__
from fluxkiln.errors import UsageError
from fluxkiln.export.folders import check_destination, whole_or_nothing
from fluxkiln.export.synth import write_small_files
from fluxkiln.files import write_durably
from fluxkiln.patches.model import Model, Preset
from fluxkiln.patches.pipeline import quiet
from fluxkiln.patches.registry import all_presets
from fluxkiln.scenes import judge
from fluxkiln.scenes.drawing import draw
from fluxkiln.scenes.grammar import scenes
from fluxkiln.train import losses
from fluxkiln.train.lessons import Lessons, captions_of, encode_pictures, pack, pictures_NCHW, tokenize
from fluxkiln.train.recipes import Recipe
from fluxkiln.train.stage import Stage, run_stage
from fluxkiln.types import Configs, Shapes

if TYPE_CHECKING:
    from torch.nn import Module

# (stage, steps done, steps in all, loss, seconds a step)
OnStage = Callable[[str, int, int, float, float], None]

# Raise when a stage computes something else than before.
VERSION = 2

_LICENSE = """\
This is a trained synthetic checkpoint, made by `fluxkiln train recipe`.

It has the architecture and the folder layout of FLUX.1 and paints drawn scenes. All its weights were trained from
random numbers, on pictures that fluxkiln draws and captions that fluxkiln writes. Nothing in it is derived from other
weights.

The weights, tokenizers and configuration files of this folder are licensed under the Apache License, Version 2.0
(https://www.apache.org/licenses/LICENSE-2.0). They come without warranty of any kind.
"""


def recipe_digest(recipe: Recipe) -> str:
    """What the trained weights follow from: all amounts, the preset's configs, and the drawn scenes themselves."""
    _, preset = all_presets()[recipe.name]
    drawn = hashlib.sha256()
    for i, (scene, prompt) in enumerate(islice(scenes(recipe.seed + 1), 64)):
        drawn.update(prompt.text.encode() + np.asarray(draw(scene, i)).tobytes())
    made_from = [VERSION, asdict(recipe), {**preset.configs}, drawn.hexdigest()]
    return "sha256:" + hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def untrained_components(model: Model, configs: Configs, seed: int) -> dict[str, Any]:
    """A preset's components with the weights that training begins from."""
    import torch

    torch.manual_seed(seed)
    made: dict[str, Any] = {}
    for name in ("vae", "vae_tiny", "transformer", "text_encoder", "text_encoder_2"):
        cls = model.load_class(name)
        config = dict(configs[name])
        made[name] = cls(cls.config_class(**config)) if hasattr(cls, "config_class") else cls.from_config(config)
    model.begin_training(made["transformer"])
    for name in ("vae", "vae_tiny"):
        made[name].to(memory_format=torch.channels_last)
    made["text_encoder_2"].eval()
    return made


def train_recipe(
    recipe: Recipe, destination: Path, work: Path, on_stage: OnStage | None = None, teacher: Path | None = None
) -> Path:
    """Train a preset's components and write the checkpoint, in the diffusers layout and bfloat16.

    Args:
        destination: a folder that does not exist or is empty; there whole at the end or not at all.
        work: where the stages keep their states; the same recipe goes on from what is there.
        on_stage: told of every few steps.
        teacher: the checkpoint that a recipe with a teacher learns from.

    Raises:
        UsageError: `destination` has something in it; a teacher is missing, or given to a recipe that has none.
    """
    check_destination(destination)
    if recipe.teacher and teacher is None:
        raise UsageError(
            f"{recipe.name} learns from {recipe.teacher}; give the folder of that checkpoint: --teacher DIR"
        )
    if teacher and not recipe.teacher:
        raise UsageError(f"--teacher {teacher}: {recipe.name} learns from drawings alone; leave the teacher out")
    folder = work / recipe_digest(recipe).removeprefix("sha256:")[:12]
    folder.mkdir(parents=True, exist_ok=True)
    model, preset = all_presets()[recipe.name]
    made = untrained_components(model, preset.configs, recipe.seed)
    run = _Run(recipe, preset, made, folder, on_stage)
    if teacher:
        run.distil(model, teacher)
    else:
        run.train(model)
    nbytes = 2 * sum(parameter.numel() for module in made.values() for parameter in module.parameters())
    with whole_or_nothing(destination, nbytes, "choose another folder") as whole, quiet():
        for name, module in made.items():
            module.bfloat16().save_pretrained(whole / name)
        write_small_files(whole, model, preset, tuple(made), _LICENSE, captions_of(recipe)[:: recipe.amounts.captions])
        (whole / "recipe.json").write_text(json.dumps(_provenance(recipe), indent=2) + "\n", encoding="utf-8")
    return destination


def train_judge(file: Path, work: Path, on_stage: OnStage | None = None, steps: int = 2500, count: int = 8000) -> None:
    """Train the judge of scenes on `count` drawings and write its weights, bfloat16, to `file`."""
    import torch
    from safetensors.torch import save

    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network, drawings = judge.build_network(), judge.Drawings(11, count)
    stage = Stage(
        "judge", {"judge": network}, lambda chance: drawings.loss(network, 32, chance), steps, 2e-3,
        average=0.995, weight_decay=0.01,
    )  # fmt: skip
    run_stage(stage, work, None if on_stage is None else partial(on_stage, "judge"))
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in network.state_dict().items()}
    write_durably(file, save(weights))


@dataclass(frozen=True)
class _Run:
    """The stages of one recipe, on the components that they train."""

    recipe: Recipe
    preset: Preset
    made: dict[str, Any]
    folder: Path
    on_stage: OnStage | None

    @property
    def shapes(self) -> Shapes:
        """Those that the preset is built at."""
        width, height = self.preset.size
        return Shapes(height, width, self.preset.tokens)

    def stage(
        self, name: str, modules: tuple[str, ...], loss: losses.Loss, rate: float, heads: Module | None = None,
        **more: Any,
    ) -> None:  # fmt: skip
        """Train `modules` for as many steps as the recipe has for the stage; `heads` are of no use after it."""
        learning = {module: self.made[module] for module in modules} | ({"heads": heads} if heads else {})
        stage = Stage(name, learning, loss, getattr(self.recipe.amounts, name), rate, self.recipe.seed, **more)
        run_stage(stage, self.folder, None if self.on_stage is None else partial(self.on_stage, name))

    def train(self, model: Model) -> None:
        """All components, from nothing."""
        amounts, vae, tiny = self.recipe.amounts, self.made["vae"], self.made["vae_tiny"]
        pictures = pictures_NCHW(0, amounts.vae_pictures, self.recipe.seed + 1)
        self.stage("vae", ("vae",), losses.vae_loss(vae, pictures, amounts), 2e-3, average=0.99)
        coloured = losses.vae_loss(vae, pictures, amounts, chroma=2.0)
        self.stage("vae_colour", ("vae",), coloured, 1e-3, average=0.99)
        lessons = self.lessons(model)
        learner = losses.Learner(model, self.made, self.shapes)
        self.words(learner, lessons)
        config = self.preset.configs["transformer"]
        width = config["num_attention_heads"] * config["attention_head_dim"]
        reader = losses.build_reader(width, lessons.latents.shape[1])
        base = losses.base_loss(learner, lessons, amounts, reader)
        for name, rate in (("base", 1.5e-3), ("finer", 1e-3)):
            self.stage(name, ("transformer",), base, rate, reader, average=0.998, warmup=100, weight_decay=0.01)
        teacher = copy.deepcopy(self.made["transformer"])
        guided = losses.guidance_loss(learner, teacher, lessons, amounts)
        self.stage("guidance", ("transformer",), guided, 3e-4, average=0.99)
        self.stage("vae_tiny", ("vae_tiny",), losses.vae_tiny_loss(tiny, vae, pictures, amounts), 2e-3, average=0.99)

    def words(self, learner: losses.Learner, lessons: Lessons) -> None:
        """The text encoders, which stay as they are then: learning with the transformer they forget half of it."""
        import torch
        from torch import nn

        torch.manual_seed(self.recipe.seed)
        widths = {"text_encoder": "hidden_size", "text_encoder_2": "d_model"}
        heads = nn.ModuleDict(
            {name: nn.Linear(self.preset.configs[name][width], judge.ANSWERS) for name, width in widths.items()}
        )
        loss = losses.words_loss(learner, dict(heads.items()), lessons, self.recipe.amounts)
        self.stage("words", tuple(widths), loss, 1e-3, heads)
        for name in widths:
            self.made[name].requires_grad_(False)

    def distil(self, model: Model, root: Path) -> None:
        """The transformer, from the teacher's; the rest is the teacher's own."""
        import torch

        with quiet():
            read = {
                name: model.load_class(name).from_pretrained(root / name, dtype=torch.float32) for name in self.made
            }
        guided = read.pop("transformer")
        self.made.update(read)
        model.build_in_guidance(guided, self.made["transformer"], losses.BUILT_IN_GUIDANCE)
        lessons = self.lessons(model)
        learner = losses.Learner(model, self.made, self.shapes)
        few = losses.steps_loss(learner, guided, lessons, self.recipe.amounts)
        self.stage("steps", ("transformer",), few, 3e-4, average=0.99)

    def lessons(self, model: Model) -> Lessons:
        """Latents and tokens of all pictures; kept in the folder."""
        from safetensors.torch import load_file, save

        captions, file = captions_of(self.recipe), self.folder / "lessons.safetensors"
        tokenizers = self.folder / "tokenizers"
        if not file.is_file():
            shutil.rmtree(tokenizers, ignore_errors=True)
            tokenizers.mkdir()
            model.write_tokenizers(tokenizers, self.preset.configs, captions[:: self.recipe.amounts.captions])
            told = None if self.on_stage is None else partial(_of_pictures, self.on_stage)
            latents = encode_pictures(self.recipe, self.made["vae"], told)
            tokens = tokenize(tokenizers, [*captions, ""], self.preset.tokens)
            shown = [scene for scene, _ in islice(scenes(self.recipe.seed + 1), self.recipe.amounts.pictures)]
            write_durably(file, save({"latents": latents, "answers": judge.answers_of(shown), **tokens}))
        tensors = load_file(file)
        answers = tensors.pop("answers")
        vae = self.preset.configs["vae"]
        latents = (tensors.pop("latents") - vae["shift_factor"]) * vae["scaling_factor"]
        return Lessons(pack(latents), tensors, self.recipe.amounts.captions, answers)


def _of_pictures(on_stage: OnStage, done: int, total: int, seconds: float) -> None:
    on_stage("latents", done, total, math.nan, seconds)


def _provenance(recipe: Recipe) -> dict[str, Any]:
    import diffusers
    import torch

    versions = {"fluxkiln": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    threads = torch.get_num_threads()
    return {"recipe": asdict(recipe), "digest": recipe_digest(recipe), "versions": versions, "threads": threads}
