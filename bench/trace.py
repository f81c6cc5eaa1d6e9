"""Templates of every kind at FLUX.1's full size, beside torch.onnx on one materialized block."""

from __future__ import annotations

import sys
import tempfile

from bench.figure import WORK, Figure, gigabytes, ratio, run

SHAPE = "1024x1024, 512 tokens"

_TEMPLATES = """
import json, sys, time
from pathlib import Path
from fluxkiln.types import Shapes
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.export.trace import export_template
folder, graph_format = Path(sys.argv[1]), sys.argv[2]
kinds = sys.argv[3].split(",") if sys.argv[3] else list(MODEL.kinds)
import torch, diffusers, transformers, onnxscript, onnx_ir
started = time.perf_counter()
for kind in kinds:
    export_template(MODEL, kind, MODEL.presets["full-dev"].configs, Shapes(1024, 1024, 512), graph_format, folder)
size = sum(path.stat().st_size for path in folder.iterdir())
print(json.dumps({"seconds": time.perf_counter() - started, "bytes": size}))
"""

_MATERIALIZED = """
import json, sys, time, warnings
from pathlib import Path
import torch, onnxscript
from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxSingleTransformerBlock
warnings.simplefilter("ignore")
started = time.perf_counter()
block = FluxSingleTransformerBlock(dim=3072, num_attention_heads=24, attention_head_dim=128).eval()
ids = torch.zeros(4608, 3)
arguments = {
    "hidden_states": torch.zeros(1, 4096, 3072),
    "encoder_hidden_states": torch.zeros(1, 512, 3072),
    "temb": torch.zeros(1, 3072),
    "image_rotary_emb": FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])(ids),
}
with torch.no_grad():
    program = torch.onnx.export(block, (), kwargs=arguments, dynamo=True, verbose=False)
    program.save(Path(sys.argv[1]) / "single.onnx", external_data=True)
size = sum(path.stat().st_size for path in Path(sys.argv[1]).iterdir())
print(json.dumps({"seconds": time.perf_counter() - started, "bytes": size}))
"""


def measure() -> Figure:
    cases = {
        "fluxkiln, all 10 kinds, for TPU-MLIR (opset 17)": (_TEMPLATES, "onnx17", ""),
        "fluxkiln, all 10 kinds, for ONNX Runtime (opset 23)": (_TEMPLATES, "onnx23", ""),
        "fluxkiln, the single block, opset 17": (_TEMPLATES, "onnx17", "single"),
        "fluxkiln, the single block, opset 23": (_TEMPLATES, "onnx23", "single"),
        "`torch.onnx.export(dynamo=True)`, one single block with weights, float32": (_MATERIALIZED,),
    }
    runs = {}
    WORK.mkdir(parents=True, exist_ok=True)
    for name, (code, *arguments) in cases.items():
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            runs[name] = run([sys.executable, "-c", code, folder, *arguments])
    *_, last = runs.values()
    base = last.document()
    rows = []
    for name, made in runs.items():
        document = made.document()
        rows.append(
            (
                name,
                f"{document['seconds']:.1f} s",
                ratio(document["seconds"], base["seconds"]),
                gigabytes(made.peak_bytes),
                ratio(made.peak_bytes, last.peak_bytes),
                f"{document['bytes'] / 1e3:,.0f} kB",
            )
        )
    return Figure(
        f"Tracing at full size ({SHAPE})",
        ("", "time without imports", "ratio", "peak memory", "ratio", "written"),
        tuple(rows),
        (
            "One process each; ratios to the last row. One template serves every part of its kind (19 double, 38 "
            "single and 24 T5 blocks), where the last row would be done for each of them. Peak memory includes the "
            "imported libraries.",
        ),
    )
