"""What each way to put the blocks saves on a BM1684X, by the compiler's own estimate, at FLUX.1-dev's own size."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.figure import WORK, Figure
from fluxkiln.compile.onnx.filled import fill
from fluxkiln.compile.targets import Target
from fluxkiln.compile.targets.bm1684x import TARGET
from fluxkiln.compile.toolchains.tpu_mlir import compiler as tpu_mlir
from fluxkiln.compile.toolchains.tpu_mlir import gelu
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import probe_reader
from fluxkiln.compile.toolchains.tpu_mlir.compiler import CompileJob, compile_graph
from fluxkiln.compile.toolchains.tpu_mlir.environment import TpuMlirEnv, default_tpu_mlir_root, find_tpu_mlir
from fluxkiln.compile.toolchains.tpu_mlir.graphs import add_side_tensors, small_work_first
from fluxkiln.export import trace
from fluxkiln.export.join import join_halves
from fluxkiln.patches.flux1 import transformer
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.quantize.schemes import Scheme, parse_schemes
from fluxkiln.types import Shapes

CONFIGS = MODEL.presets["full-dev"].configs
SHAPES = Shapes(1024, 1024, 512)
SCHEME = "W4BF16"
SINGLES, DOUBLES = (int(CONFIGS["transformer"][count]) for count in ("num_single_layers", "num_layers"))
# what is set, while a form is traced and compiled, to something other than what a build uses
Changes = tuple[tuple[Any, str, Any], ...]


class UpstreamDouble(nn.Module):
    """diffusers' own forward of a double block."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Any, encoder_hidden_states: Any, temb: Any, cos: Any, sin: Any) -> Any:
        text, image = self.block(hidden_states, encoder_hidden_states, temb, image_rotary_emb=(cos, sin))
        return image, text


class UpstreamSingle(nn.Module):
    """diffusers' own forward of a single block, joining and splitting left to the caller of all of them."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Any, temb: Any, cos: Any, sin: Any) -> Any:
        tokens = SHAPES.tokens
        text, image = hidden_states[:, :tokens], hidden_states[:, tokens:]
        return torch.cat(self.block(image, text, temb, image_rotary_emb=(cos, sin)), dim=1)


def whole_mlp(x: Any, up: Any, down: Any, bias: Any) -> Any:
    """`fluxkiln.patches.flux1.transformer._mlp` without the two halves."""
    inner = functional.gelu(up(x), approximate="tanh")
    return functional.linear(inner, down.weight[:, -up.weight.shape[0] :], bias)


UPSTREAM: Changes = (
    (transformer, "DoublePart", UpstreamDouble),
    (transformer, "SinglePart", UpstreamSingle),
    (tpu_mlir, "check_fusions", lambda *_: None),
)
SORTED: Changes = ((tpu_mlir, "_ORDERED", []),)
CHAIN: Changes = ((gelu, "fuse_tanh_gelu", lambda model: 0),)
FORMS: Mapping[str, tuple[str, Changes]] = {
    "diffusers' own forward": ("", (*UPSTREAM, *SORTED, *CHAIN)),
    "ours, GELU as a chain of operations": ("", CHAIN),
    "ours, MLPs in one piece": ("", ((transformer, "_mlp", whole_mlp),)),
    "ours, operations sorted by the compiler": ("", SORTED),
    "ours, the compiler's usual search for slices": ("", ((tpu_mlir, "_ORDERED", ["--disable_topo_sort"]),)),
    "**ours**": ("", ()),
    "**ours, modulation hoisted**": ("_modulated", ()),
}


def measure() -> Figure:
    env = find_tpu_mlir(default_tpu_mlir_root())
    if env is None:
        raise RuntimeError("TPU-MLIR's environment is not there; run make env-tpu-mlir")
    scheme, _ = parse_schemes(SCHEME, SCHEME, MODEL.kinds)
    rows = []
    for form, (suffix, changes) in FORMS.items():
        with changed(changes):
            single, double = (estimate(env, TARGET, scheme, f"{kind}{suffix}")[0] for kind in ("single", "double"))
        step = SINGLES * single + DOUBLES * double
        rows.append((form, f"{single:.1f} ms", f"{double:.1f} ms", f"{step / 1000:.2f} s"))
    return Figure(
        f"Formulations of the blocks at 1024x1024, 512 tokens, {SCHEME}",
        ("form", "single", "double", f"{SINGLES} + {DOUBLES} blocks"),
        tuple(rows),
        (
            "By the schedule that TPU-MLIR makes of its own code; no board ran. Head and tail are left out: 6 ms a "
            "step, 4 with the modulation hoisted; the linears of that run once an image, for all steps. Each row "
            "differs from `ours` in what it says.",
        ),
    )


def estimate(env: TpuMlirEnv, target: Target, scheme: Scheme, kind: str) -> tuple[float, int]:
    """Milliseconds of one run of `kind` with probe weights, and the bytes of these.

    Raises:
        RuntimeError: the compiler left no estimate.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as scratch:
        folder, work = Path(scratch), Path(scratch) / "work"
        work.mkdir()
        template = trace.export_template(MODEL, kind, CONFIGS, SHAPES, "onnx17", folder)
        if scheme.integer:
            template = join_halves(template, folder / "joined.onnx")
        if not scheme.codes_only:
            template = add_side_tensors(template, scheme, folder / "sided.onnx")
        activations = frozenset(spec.name for spec in template.inputs)
        graph, rewrites = folder / "filled.onnx", (gelu.fuse_tanh_gelu, small_work_first)
        fill(template.path, set(activations), probe_reader(template.slots), graph, rewrites)
        traits = MODEL.kinds[kind]
        narrow = target.narrows(traits)
        job = CompileJob(
            kind, graph, template.path, activations, scheme, target.chip, *narrow, traits.rotated, traits.ordered
        )
        facts = compile_graph(env, job, work, WORK / "logs" / f"{kind}.log").facts
    if facts["estimate_ms"] is None:
        raise RuntimeError(f"the compiler left no estimate of {kind}")
    return float(facts["estimate_ms"]), int(facts["weight_bytes"])


@contextmanager
def changed(changes: Changes) -> Iterator[None]:
    """Attributes set to other values for a while."""
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
