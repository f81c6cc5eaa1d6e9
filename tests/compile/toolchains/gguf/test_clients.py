"""The programs that GGUF files are for: diffusers' loader, and stable-diffusion.cpp against diffusers in float32."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from fluxkiln.compile.plan import Plan
from fluxkiln.compile.targets import find_target
from fluxkiln.compile.toolchains.gguf import environment
from fluxkiln.compile.toolchains.gguf import file as gguf_file
from fluxkiln.compile.toolchains.gguf.environment import SD_CPP_ROOT_VARIABLE, run_client, sd_cpp_environment
from fluxkiln.compile.toolchains.gguf.file import file_name, write_file
from fluxkiln.errors import ToolchainError, UsageError
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.synth import synthesize
from fluxkiln.patches.model import Joined, OtherLayout
from fluxkiln.types import Shapes

SIDE, SEED, GUIDANCE = 64, 7, 3.5


def open_preset(root, preset, components):
    folder = root / preset
    return open_checkpoint(folder if folder.exists() else synthesize(preset, folder, components), components)


def write(checkpoint, scheme, folder, path):
    target = find_target("gguf")
    _, schemes = target.parse_schemes(scheme, checkpoint.model.kinds)
    parts = tuple(part for part in checkpoint.model.list_parts(checkpoint.configs, "kl", "hoisted")
                  if part.folder in checkpoint.tensors)  # fmt: skip
    write_file(checkpoint, Plan(target, Shapes(SIDE, SIDE, 16), schemes, parts, path.parent), folder, path, int)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def wide(root):
    """The transformer of wide-dev: diffusers' converter takes its width for granted, stable-diffusion.cpp its pooled
    width."""
    return open_preset(root, "wide-dev", ("transformer",))


def load_original(wide):
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(wide.root / "transformer", torch_dtype=torch.float32)


def load_file(wide, path):
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    how = GGUFQuantizationConfig(compute_dtype=torch.float32)
    return FluxTransformer2DModel.from_single_file(
        str(path), config=str(wide.root), subfolder="transformer", quantization_config=how, torch_dtype=torch.float32
    )


def run(model):
    """The output for a few tokens."""
    random = torch.Generator().manual_seed(0)
    made = {"hidden_states": (1, 16, 64), "encoder_hidden_states": (1, 16, 4096), "pooled_projections": (1, 768)}
    inputs = {name: torch.randn(*shape, generator=random) for name, shape in made.items()}
    with torch.no_grad():
        return model(
            **inputs, timestep=torch.tensor([0.5]), guidance=torch.tensor([GUIDANCE]),
            img_ids=torch.arange(48).reshape(16, 3) % 4.0, txt_ids=torch.zeros(16, 3),
        ).sample  # fmt: skip


def unswapped(checkpoint, folder, real=gguf_file.layout_of):
    found = real(checkpoint, folder)
    tensors = tuple(Joined(one.name, one.sources) for one in found.tensors)
    return OtherLayout(tensors, found.architecture, found.facts, found.stretch)


@pytest.mark.thorough
def test_diffusers_loads_the_files(root, wide, monkeypatch):
    expected = run(load_original(wide))

    def error(scheme):
        path = write(wide, scheme, "transformer", root / f"{scheme}.gguf")
        return float((run(load_file(wide, path)) - expected).norm() / expected.norm())

    assert error("BF16") == 0.0
    assert error("Q8_0") <= 0.01
    assert error("Q4_1") <= 0.08
    # halves that did not change places: the loader swaps them all the same
    monkeypatch.setattr(gguf_file, "layout_of", unswapped)
    assert error("BF16") > 0.1


def reference(root, wide):
    """What stable-diffusion.cpp is to paint: an empty prompt, CLIP-L alone, zeros for T5, one step."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextModel

    small = root / "full-dev"
    with torch.no_grad():
        clip = CLIPTextModel.from_pretrained(small / "text_encoder", dtype=torch.float32)
        pooled = clip(torch.tensor([[49406] + [49407] * 76])).pooler_output
        vae = AutoencoderKL.from_pretrained(small / "vae", torch_dtype=torch.float32)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(wide.root / "scheduler")
        pipe = FluxPipeline(scheduler, vae, None, None, None, None, load_original(wide))
        return pipe(
            prompt_embeds=torch.zeros(1, 256, 4096), pooled_prompt_embeds=pooled, height=SIDE, width=SIDE,
            num_inference_steps=1, guidance_scale=GUIDANCE, output_type="np",
            generator=torch.Generator("cpu").manual_seed(SEED),
        ).images[0]  # fmt: skip


@pytest.mark.thorough
@pytest.mark.skipif(sd_cpp_environment().find() is None, reason="stable-diffusion.cpp is not built: make env-sd-cpp")
def test_stable_diffusion_cpp_paints_what_diffusers_paints(root, wide):
    from PIL import Image

    # its encoders and VAE have one size each
    small = open_preset(root, "full-dev", ("text_encoder", "vae"))
    files = {f"{key}_path": str(write(small, "BF16", folder, root / file_name(folder)))
             for key, folder in (("clip_l", "text_encoder"), ("vae", "vae"))}  # fmt: skip
    expected = reference(root, wide)
    for scheme, least in (("BF16", 55.0), ("Q8_0", 50.0), ("Q4_0", 34.0)):
        path = write(wide, scheme, "transformer", root / f"{scheme}.gguf")
        asked = {"width": SIDE, "height": SIDE, "steps": 1, "guidance": GUIDANCE, "seed": SEED, **files}
        run_client({**asked, "diffusion_model_path": str(path)}, root / "out.png", root / "log")
        painted = np.asarray(Image.open(root / "out.png").convert("RGB"), np.float32) / 255
        assert -10 * np.log10(np.mean((painted - expected) ** 2)) >= least, scheme


def empty(path, widths):
    """A GGUF file of matrices of one row."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, width in widths.items():
        writer.add_tensor(name, np.zeros((1, width), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"diffusion_model_path": str(path)}


def test_a_missing_client_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv(SD_CPP_ROOT_VARIABLE, str(tmp_path / "nowhere"))
    asked = empty(tmp_path / "own.gguf", {"vector_in.in_layer.weight": 768, "txt_in.weight": 4096})
    with pytest.raises(ToolchainError, match=r"is not installed in .*nowhere; make env-sd-cpp builds it") as caught:
        run_client(asked, tmp_path / "out.png", tmp_path / "log")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("pooled", "text", "what"),
    [
        (64, 4096, "a pooled prompt of width 64, .* has 768 alone"),
        (768, 128, "T5's output of width 128, .* has 4096 alone"),
    ],
)
def test_widths_that_it_has_not_are_refused(tmp_path, pooled, text, what):
    """It takes them for granted, and would end without a word."""
    asked = empty(tmp_path / "own.gguf", {"vector_in.in_layer.weight": pooled, "txt_in.weight": text})
    with pytest.raises(UsageError, match=f"own.gguf takes {what}; give the file to ComfyUI or diffusers") as caught:
        run_client(asked, tmp_path / "out.png", tmp_path / "log")
    assert caught.value.exit_code == 2


def test_it_is_not_built_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    with pytest.raises(ToolchainError, match=r"there is no cmake and no g\+\+ on PATH; install Debian's cmake g\+\+"):
        sd_cpp_environment().ensure(lambda line: None, tmp_path / "env")
