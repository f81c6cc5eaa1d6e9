"""Synthetic checkpoints: whole or not at all, loadable by FluxPipeline, every block of weight."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from fluxkiln.errors import ResourceError, UsageError
from fluxkiln.export import synth
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.fingerprint import fingerprint, scan_finite
from fluxkiln.export.synth import synthesize, synthesized_bytes
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.flux1.presets import PRESETS, Preset
from fluxkiln.patches.registry import pick_components

PROMPT = "A red fox in the forest"


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_folder_layout(tmp_path):
    folder = synthesize("tiny-dev", tmp_path / "m")
    shards = {"text_encoder_2/model": 2, "transformer/diffusion_pytorch_model": 3}
    assert listing(folder) == sorted(
        [
            "LICENSE",
            "model_index.json",
            "scheduler/scheduler_config.json",
            *(f"{name}/config.json" for name in ("text_encoder", "text_encoder_2", "transformer", "vae", "vae_tiny")),
            "text_encoder/model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "vae_tiny/diffusion_pytorch_model.safetensors",
            *(f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors" for stem, n in shards.items() for i in range(n)),
            *(f"{stem}.safetensors.index.json" for stem in shards),
            *(f"tokenizer/{name}" for name in ("vocab.json", "merges.txt")),
            *(f"tokenizer_2/{name}" for name in ("spiece.model", "tokenizer.json")),
            *(
                f"{t}/{n}.json"
                for t in ("tokenizer", "tokenizer_2")
                for n in ("tokenizer_config", "special_tokens_map")
            ),
        ]
    )
    assert "no trained\nweights" in (folder / "LICENSE").read_text()
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["use_dynamic_shifting"] is True
    checkpoint = open_checkpoint(folder)
    for refs in checkpoint.tensors.values():
        scan_finite(refs.values())
    stored = sum(ref.nbytes for refs in checkpoint.tensors.values() for ref in refs.values())
    assert stored == synthesized_bytes("tiny-dev")


def test_seeds(tmp_path):
    keys = [fingerprint(open_checkpoint(synthesize("tiny-dev", tmp_path / str(i), seed=i // 2))) for i in range(3)]
    assert keys[0] == keys[1] != keys[2]


def test_some_components(tmp_path):
    folder = synthesize("tiny-schnell", tmp_path / "m", components=["vae", "transformer"])
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"scheduler", "transformer", "vae"}
    assert set(json.loads((folder / "model_index.json").read_text())) == {
        *("_class_name", "_diffusers_version", "scheduler", "transformer", "vae")
    }


def test_progress_reaches_the_total(tmp_path):
    calls = []
    synthesize("tiny-dev", tmp_path / "m", progress=lambda *call: calls.append(call))
    total = synthesized_bytes("tiny-dev")
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_bad_requests_leave_nothing(tmp_path):
    with pytest.raises(UsageError, match=r"no preset is called 'tiny'; synthetic presets are tiny-dev, tiny-schnell"):
        synthesize("tiny", tmp_path / "m")
    with pytest.raises(UsageError, match=r"no component is called 'unet'; there are text_encoder, "):
        synthesize("tiny-dev", tmp_path / "m", components=["transformer", "unet"])
    with pytest.raises(UsageError, match="no component was asked for"):
        synthesize("tiny-dev", tmp_path / "m", components=[])
    assert list(tmp_path.iterdir()) == []
    assert pick_components(tuple(MODEL.classes), ["vae", "text_encoder"]) == ("text_encoder", "vae")


def test_destination_in_use(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("m", "file"):
        with pytest.raises(UsageError, match=f"{name} is not empty; give a folder that does not exist"):
            synthesize("tiny-dev", tmp_path / name)
    assert listing(tmp_path) == ["file", "m/precious"]
    (tmp_path / "m" / "precious").unlink()
    open_checkpoint(synthesize("tiny-dev", tmp_path / "m"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")])
def test_interrupted(tmp_path, error):
    def stop(done, total):
        if done > total // 2:
            raise error

    with pytest.raises(type(error)):
        synthesize("tiny-dev", tmp_path / "m", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_killed_and_started_again(tmp_path):
    code = (
        "import os; from pathlib import Path; from fluxkiln.export.synth import synthesize;"
        f"synthesize('tiny-dev', Path({str(tmp_path / 'm')!r}), progress=lambda done, total: done > total // 2 and "
        f"os.kill(os.getpid(), {int(signal.SIGKILL)}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert [path.name.startswith(".m.") for path in tmp_path.iterdir()] == [True]
    open_checkpoint(synthesize("tiny-dev", tmp_path / "m"))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path):
    other = tmp_path / ".m.abc.partial"
    other.mkdir()
    lock = os.open(other, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    synthesize("tiny-dev", tmp_path / "m")
    assert other.is_dir()
    os.close(lock)
    shutil.rmtree(tmp_path / "m")
    synthesize("tiny-dev", tmp_path / "m")
    assert not other.exists()


def test_destination_filled_meanwhile(tmp_path):
    def fill(done, total):
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / "precious").write_text("x")

    with pytest.raises(UsageError, match="was filled by another process"):
        synthesize("tiny-dev", tmp_path / "m", progress=fill)
    assert listing(tmp_path) == ["m/precious"]


def test_disk_too_small(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
    with pytest.raises(ResourceError, match=r"has 1\.0 GB free, m takes 33\.7 GB; free some space"):
        synthesize("full-dev", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_disk_full_on_the_way(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synth, "_draw", full)
    with pytest.raises(ResourceError, match=r"the disk of .* is full after part of 0\.0 GB; free some space"):
        synthesize("tiny-dev", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_streams_in_constant_memory(tmp_path):
    """A component of 246 MB in a process that may not grow by half of that."""
    code = (
        "import resource; from pathlib import Path; from fluxkiln.export.synth import synthesize;"
        f"synthesize('tiny-dev', Path({str(tmp_path / 'tiny')!r}));"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        f"synthesize('full-dev', Path({str(tmp_path / 'm')!r}), components=['text_encoder']);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown_kb = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert (tmp_path / "m/text_encoder/model.safetensors").stat().st_size > 240e6
    assert grown_kb < 40_000


def load(folder: Path):
    import torch
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, preset: Preset, prompt: str = PROMPT):
    import torch

    return pipeline(
        prompt,
        height=preset.size[0],
        width=preset.size[1],
        num_inference_steps=2,
        max_sequence_length=preset.tokens,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]


def record_deltas(modules, into):
    """Relative size of what each block adds to each of its streams."""

    def hook(module, args, kwargs, output):
        before = [kwargs["encoder_hidden_states"], kwargs["hidden_states"]] if kwargs.keys() >= {"temb"} else [args[0]]
        after = output if isinstance(output, tuple) and len(before) == 2 else [output[0]]
        if not isinstance(output, tuple):
            after = [output]
        for x, y in zip(before, after, strict=True):
            into.append(float((y - x).norm() / x.norm()))
            assert float(y.pow(2).mean().sqrt()) < 10

    for module in modules:
        module.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("name", ["tiny-dev", "tiny-schnell"])
def test_the_pipeline_loads_it_and_every_block_matters(tmp_path, name):
    import numpy as np
    from diffusers import AutoencoderTiny

    preset = PRESETS[name]
    folder = synthesize(name, tmp_path / name)
    pipeline = load(folder)
    assert pipeline.transformer.config.guidance_embeds == (name == "tiny-dev")
    deltas: list[float] = []
    transformer = pipeline.transformer
    record_deltas([*transformer.transformer_blocks, *transformer.single_transformer_blocks], deltas)
    record_deltas([*pipeline.text_encoder_2.encoder.block, *pipeline.text_encoder.encoder.layers], deltas)
    image = draw(pipeline, preset)
    # 2 layers of each text encoder; 2 steps of 5 blocks with 2 streams.
    assert len(deltas) == 4 + 20
    assert min(deltas) > 0.1
    assert max(deltas) < 1.2
    check_image(image)
    # The prompt reaches the image.
    assert np.abs(draw(pipeline, preset, "two copper bowls near the sea") - image).mean() > 0.005
    pipeline.vae = AutoencoderTiny.from_pretrained(folder / "vae_tiny")
    check_image(draw(pipeline, preset))


def check_image(image) -> None:
    """Neither flat nor clipped."""
    assert image.shape == (32, 32, 3)
    assert image.std(axis=(0, 1)).min() > 0.03
    assert ((image == 0) | (image == 1)).mean() < 0.1


@pytest.mark.parametrize("name", ["tiny-dev", "tiny-schnell"])
def test_weights_arrive_in_the_modules(tmp_path, name):
    """Nothing is missing or left over when diffusers and transformers load the folder."""
    import numpy as np

    from fluxkiln.export.checkpoint import read_tensor

    folder = synthesize(name, tmp_path / name)
    pipeline = load(folder)
    for component, refs in open_checkpoint(folder).tensors.items():
        if component == "vae_tiny":
            continue
        state = getattr(pipeline, component).state_dict()
        for tensor_name, ref in refs.items():
            np.testing.assert_array_equal(read_tensor(ref).astype(np.float32), state[tensor_name].numpy())
        assert set(state) - set(refs) <= {"encoder.embed_tokens.weight"}


def test_deep_streams_stay_bounded(tmp_path, monkeypatch):
    """All 57 blocks and 24 T5 blocks, narrow: deltas between 10 % and 120 %, streams below 10."""
    from dataclasses import replace

    tiny, full = PRESETS["tiny-dev"], PRESETS["full-dev"]
    depth = {
        "text_encoder": ("num_hidden_layers",),
        "text_encoder_2": ("num_layers",),
        "transformer": ("num_layers", "num_single_layers"),
    }
    configs = dict(tiny.configs)
    for component, keys in depth.items():
        configs[component] = {**tiny.configs[component], **{key: full.configs[component][key] for key in keys}}
    monkeypatch.setitem(PRESETS, "deep", deep := replace(tiny, name="deep", configs=configs))
    pipeline = load(synthesize("deep", tmp_path / "deep"))
    deltas: list[float] = []
    transformer = pipeline.transformer
    record_deltas([*transformer.transformer_blocks, *transformer.single_transformer_blocks], deltas)
    record_deltas([*pipeline.text_encoder_2.encoder.block, *pipeline.text_encoder.encoder.layers], deltas)
    draw(pipeline, deep)
    assert len(deltas) == 24 + 12 + 2 * 2 * 57
    assert min(deltas) > 0.1
    assert max(deltas) < 1.2


def test_swapped_blocks_show(tmp_path):
    """Blocks are distinct enough that an exchange of two is seen in the image."""
    import numpy as np

    pipeline = load(synthesize("tiny-dev", tmp_path / "m"))
    image = draw(pipeline, PRESETS["tiny-dev"])
    for blocks in (pipeline.transformer.transformer_blocks, pipeline.transformer.single_transformer_blocks):
        blocks[0], blocks[1] = blocks[1], blocks[0]
        assert np.abs(draw(pipeline, PRESETS["tiny-dev"]) - image).mean() > 0.02
        blocks[0], blocks[1] = blocks[1], blocks[0]
    np.testing.assert_allclose(draw(pipeline, PRESETS["tiny-dev"]), image, atol=1e-5)
