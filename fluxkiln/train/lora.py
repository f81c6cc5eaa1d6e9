"""LoRA fine-tuning: diffusers' flow-matching loss on cached latents, gradients for the adapters alone.

Everything random of a batch comes from the seed and the batch's number in the whole run. So a run that goes on draws
what it would have drawn, and N processes that accumulate A batches draw what one does that accumulates N times A.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxkiln.digests import digest_json
from fluxkiln.errors import TrainingError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.export.fingerprint import DigestMemo, digest_tensors
from fluxkiln.files import build_lock
from fluxkiln.progress import Progress, Silent
from fluxkiln.train.adapters import (
    DIFFUSERS_FILE,
    MLX_FILE,
    adapted_layers,
    add_adapters,
    need_peft,
    write_adapters,
    write_mlx_adapters,
)
from fluxkiln.train.dataset import Sample
from fluxkiln.train.encode import CachedSample, Encoder, fill_cache, open_encoder
from fluxkiln.train.frozen import compute_dtype, load_frozen, parse_base
from fluxkiln.train.page import paint_progress, write_page
from fluxkiln.train.processes import Processes, open_processes
from fluxkiln.train.settings import LoraSettings, check_same
from fluxkiln.train.state import TrainingState, keep_state, load_state, load_tensors, save_state
from fluxkiln.types import Shapes

# diffusers' own in its DreamBooth examples
MOST_NORM, LOGIT_MEAN, LOGIT_STD, MODE_SCALE = 1.0, 0.0, 1.0, 1.29


@dataclass(frozen=True, slots=True)
class Places:
    """Folders of a training: what it writes, the cache of latents and embeddings, and the memo of digests."""

    output: Path
    cache: Path
    memo: DigestMemo


@dataclass(frozen=True, slots=True)
class LoraResult:
    """What a training left. `resumed` is the update that it went on from; losses are one an update; files by what they
    are for; seconds of this call alone."""

    files: Mapping[str, Path]
    losses: tuple[float, ...]
    resumed: int
    processes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Run:
    """What the steps of a training share."""

    checkpoint: Checkpoint
    shapes: Shapes
    settings: LoraSettings
    output: Path
    encoder: Encoder
    samples: tuple[CachedSample, ...]
    processes: Processes
    module: Any
    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer


def train_lora(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    shapes: Shapes,
    settings: LoraSettings,
    places: Places,
    progress: Progress | None = None,
) -> LoraResult:
    """Train a LoRA, or go on with one; see the module.

    Raises:
        UsageError: settings that do not fit the model, or not the run that is to go on.
        DatasetError: a picture that cannot be read. TrainingError: the loss is no number any more.
        ResourceError: another process trains there, or one of this training ended.
        ToolchainError: peft is not installed. CheckpointError, SchemeError, IntegrityError: as said elsewhere.
    """
    need_peft()
    scheme = parse_base(settings.base)
    layers = adapted_layers(checkpoint, settings.lora_rank, settings.lora_blocks)
    started = time.perf_counter()
    with ExitStack() as held:
        processes = held.enter_context(open_processes())
        tell: Progress = progress if progress is not None and processes.rank == 0 else Silent()
        places.output.mkdir(parents=True, exist_ok=True)
        if processes.rank == 0:
            held.enter_context(build_lock(places.output / ".lock", f"the LoRA in {places.output}"))
        encoder = open_encoder(checkpoint, shapes, places.cache, places.memo)
        cached = _encode(encoder, samples, settings, processes, tell)
        facts = _facts(checkpoint, shapes, settings, cached, places.memo) | settings.fixed(processes.count)
        state = load_state(places.output) or TrainingState(facts)
        check_same(state.facts, facts, str(places.output))
        dtype = compute_dtype(processes.device)
        if dtype is torch.float32:
            tell.note("computing in float32: this processor does not multiply bfloat16")
        module = load_frozen(checkpoint, scheme, dtype).to(processes.device)
        parameters = add_adapters(module, layers, settings.lora_rank, settings.seed)
        if settings.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW([*parameters.values()], lr=settings.learning_rate, weight_decay=0.0)
        if state.update:
            _restore(parameters, optimizer, load_tensors(places.output, state))
            tell.note(f"going on after {state.update * settings.grad_accumulate} of {settings.iterations} iterations")
        run = _Run(
            checkpoint, shapes, settings, places.output, encoder, cached, processes, module, parameters, optimizer
        )
        resumed = state.update
        _train(run, state, tell)
        files = _finish(run, state) if processes.rank == 0 else {}
        processes.wait()
        return LoraResult(files, tuple(state.losses), resumed, processes.count, time.perf_counter() - started)


def _encode(
    encoder: Encoder, samples: Sequence[Sample], settings: LoraSettings, processes: Processes, progress: Progress
) -> tuple[CachedSample, ...]:
    """Each process makes its share; what a disk of its own has not got it makes as well."""
    asked = settings.num_augmentations, settings.seed
    fill_cache(encoder, samples[processes.rank :: processes.count], *asked, progress)
    processes.wait()
    return fill_cache(encoder, samples, *asked, Silent())


def _facts(
    checkpoint: Checkpoint,
    shapes: Shapes,
    settings: LoraSettings,
    cached: Sequence[CachedSample],
    memo: DigestMemo,
) -> dict[str, Any]:
    """What else makes the numbers of a run."""
    adapted = checkpoint.model.adapted
    config: Any = checkpoint.configs[adapted]
    return {
        "model": digest_json([digest_tensors(checkpoint.tensors[adapted].values(), memo), config]),
        "data set": digest_json([[one.text.name, [path.name for path in one.latents]] for one in cached]),
        "resolution": [shapes.width, shapes.height],
        "tokens": shapes.tokens,
    }


def _train(run: _Run, state: TrainingState, progress: Progress) -> None:
    from diffusers.optimization import get_cosine_schedule_with_warmup

    settings, processes = run.settings, run.processes
    total, each = settings.updates, settings.grad_accumulate
    factor = get_cosine_schedule_with_warmup(run.optimizer, settings.warmup_steps, total).lr_lambdas[0]
    sigmas = run.encoder.pipe.scheduler.sigmas[: run.encoder.pipe.scheduler.config.num_train_timesteps]
    leader = processes.rank == 0
    if leader and not state.update:
        _paint(run, 0)
    progress.stage("train", total - state.update)
    while state.update < total:
        for group in run.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor(state.update)
        loss = _update(run, state.update, sigmas)
        if leader:
            keep_state(run.output, good=True)
        state.losses.append(loss)
        state.update += 1
        iteration = state.update * each
        progress.done("train", f"iteration {iteration}", f"loss {loss:.4f}")
        if leader and (_passes(iteration, each, settings.checkpoint_every) or state.update == total):
            _save(run, state)
        if leader and (_passes(iteration, each, settings.progress_every) or state.update == total):
            _paint(run, iteration)
            _write_page(run, state)


def _passes(iteration: int, step: int, every: int) -> bool:
    """Whether a multiple of `every` was reached in the last step."""
    return iteration // every > (iteration - step) // every


def _update(run: _Run, update: int, sigmas: Tensor) -> float:
    """One step of the optimizer; the mean loss of its batches in all processes.

    Raises: TrainingError: the loss, the gradients or the adapters are no numbers any more; nothing of it is kept.
    """
    settings, processes = run.settings, run.processes
    mean_loss = torch.zeros((), device=processes.device)
    for batch in range(settings.grad_accumulate):
        number = (update * settings.grad_accumulate + batch) * processes.count + processes.rank
        loss = _loss(run, number, sigmas) / settings.grad_accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        mean_loss += loss.detach()
    parameters = [*run.parameters.values()]
    gradients = torch.cat([_gradient(one).flatten() for one in parameters] + [mean_loss[None]])
    reduced = processes.mean(gradients) if processes.count > 1 else gradients
    norm, value = float(reduced[:-1].norm()), float(reduced[-1])
    clip = min(1.0, MOST_NORM / (norm + 1e-6)) if math.isfinite(norm) else 0.0
    pieces = torch.split(reduced[:-1], [one.numel() for one in parameters])
    for parameter, gradient in zip(parameters, pieces, strict=True):
        parameter.grad = gradient.view_as(parameter) * clip
    if math.isfinite(value) and math.isfinite(norm):
        run.optimizer.step()
        run.optimizer.zero_grad()
    if not (math.isfinite(value) and math.isfinite(norm) and all(bool(one.isfinite().all()) for one in parameters)):
        raise TrainingError(_diverged(run, update, value, norm))
    return value


def _diverged(run: _Run, update: int, loss: float, norm: float) -> str:
    """Why training stops; a state that gave no loss at all goes."""
    each = run.settings.grad_accumulate
    newest = load_state(run.output)
    run.processes.wait()  # all have seen it
    if newest and newest.update == update and not math.isfinite(loss):
        if run.processes.rank == 0:
            keep_state(run.output, good=False)
        run.processes.wait()
    kept = load_state(run.output)
    good = f"of iteration {kept.update * each} is kept in {run.output}" if kept else "was before the first on disk"
    return (
        f"iteration {(update + 1) * each}: the loss is {loss:.3g} and its gradient {norm:.3g}, so training stops; the "
        f"last good state {good}; use a --learning-rate below {run.settings.learning_rate:g} and another --output-dir"
    )


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _loss(run: _Run, number: int, sigmas: Tensor) -> Tensor:
    """diffusers' flow-matching loss of batch `number` of the whole run.

    Source: diffusers' examples/dreambooth/train_dreambooth_lora_flux.py, whose functions are called here.
    """
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

    settings, device = run.settings, run.processes.device
    random = _generator(settings.seed, f"batch {number}")
    latents_BSC, encoded = _batch(run, number)
    noise_BSC = torch.randn(latents_BSC.shape, generator=random)
    density_B = compute_density_for_timestep_sampling(
        settings.weighting_scheme, len(latents_BSC), LOGIT_MEAN, LOGIT_STD, MODE_SCALE, generator=random
    )
    steps_B = (density_B * len(sigmas)).long().clamp(0, len(sigmas) - 1)
    sigma_B = sigmas[steps_B].to(torch.float32)
    share_B11 = sigma_B[:, None, None]
    noisy_BSC = (1.0 - share_B11) * latents_BSC + share_B11 * noise_BSC
    dtype = compute_dtype(device)
    moved = {name: one.to(device, dtype) for name, one in encoded.items()}
    predicted_BSC = run.checkpoint.model.predict(
        run.module, noisy_BSC.to(device, dtype), sigma_B.to(device), moved, run.shapes, settings.guidance
    )
    weighting = compute_loss_weighting_for_sd3(settings.weighting_scheme, share_B11)
    target_BSC = noise_BSC - latents_BSC
    loss: Tensor = (weighting.to(device) * (predicted_BSC.float() - target_BSC.to(device)) ** 2).mean()
    return loss


def _batch(run: _Run, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents [B, S, 4C] and encoded prompts of batch `number`; every augmentation comes once before any does again."""
    settings = run.settings
    each = settings.num_augmentations
    count = len(run.samples) * each
    latents, texts = [], []
    for place in range(number * settings.batch_size, (number + 1) * settings.batch_size):
        epoch, index = divmod(place, count)
        order = _order(settings.seed, epoch, count)
        sample, augmentation = divmod(int(order[index]), each)
        latents.append(torch.from_numpy(run.samples[sample].load_latents(augmentation)))
        texts.append(run.samples[sample].load_text())
    return torch.cat(latents), {name: torch.cat([one[name] for one in texts]) for name in texts[0]}


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=_generator(seed, f"epoch {epoch}"))


def _generator(seed: int, what: str) -> torch.Generator:
    key = hashlib.sha256(f"{seed}/{what}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _save(run: _Run, state: TrainingState) -> None:
    """Everything that a run goes on with, and the adapters as they are now."""
    moments = {
        f"{what}/{name}": run.optimizer.state[one][what].cpu()
        for name, one in run.parameters.items()
        for what in _MOMENTS
    }
    tensors = {f"adapter/{name}": one.detach().cpu() for name, one in run.parameters.items()}
    save_state(run.output, state, {**tensors, **moments})
    iteration = state.update * run.settings.grad_accumulate
    write_adapters(run.output / f"{iteration:07d}_{DIFFUSERS_FILE}", run.checkpoint.model, run.parameters)


def _restore(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    for name, one in parameters.items():
        one.data.copy_(tensors[f"adapter/{name}"])
        optimizer.state[one] = {
            what: tensors[f"{what}/{name}"].to("cpu" if what == "step" else one.device) for what in _MOMENTS
        }


def _paint(run: _Run, iteration: int) -> None:
    if run.settings.progress_prompt:
        paint_progress(run.encoder, run.module, run.settings, run.output, iteration)


def _write_page(run: _Run, state: TrainingState) -> Path:
    return write_page(run.output, run.checkpoint, run.settings, state)


def _finish(run: _Run, state: TrainingState) -> dict[str, Path]:
    """The files to use: the adapters in both layouts, and the page."""
    model, settings = run.checkpoint.model, run.settings
    files = {"adapters": run.output / DIFFUSERS_FILE, "mlx": run.output / MLX_FILE}
    write_adapters(files["adapters"], model, run.parameters)
    read_by_mlx = {"lora_rank": settings.lora_rank, "lora_blocks": settings.lora_blocks}
    if not write_mlx_adapters(files["mlx"], model, run.parameters, read_by_mlx):
        del files["mlx"]
    return {**files, "page": _write_page(run, state)}
