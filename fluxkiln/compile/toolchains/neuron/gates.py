"""The rungs of a model that is split over ranks, and their gates."""

from __future__ import annotations

from fluxkiln.verify.gates import PIPELINE, Gate, Rung

RUNGS: tuple[Rung, ...] = (
    Rung("split", 5, "the lowered modules of all ranks in float32, executed by XLA on the CPU",
         "splitting or lowering: a weight cut or bound wrongly, a reduction, a gather, or one operator", series=3),
    Rung("unsplit", 6, "the lowered modules on one rank in bfloat16, executed by XLA on the CPU",
         "what bfloat16 costs this model, split or not", series=4),
    Rung("replicas", 7, "the bundle's modules and shards, all ranks executed by XLA on the CPU",
         "a shard, or what bfloat16 loses between the ranks", series=5),
)  # fmt: skip

GATES: tuple[Gate, ...] = (
    Gate("split|replicas", "*", "*", "ranks", "max_abs", 0.0, "reference",
         "every rank holds the same activations after a reduction, to the bit, or they would drift apart"),
    Gate("split", "*", "part", "*", "relative_l2", 5e-6, "reference",
         "float32 on every rank; partial sums are added in another order than one rank adds them in"),
    Gate("unsplit", "BF16", "part", "*", "relative_l2", 5e-2, "reference",
         "eager PyTorch in bfloat16 leaves 1e-2 behind T5's and the VAE's many layers; a wrong operator leaves 1",
         proposed=True),
    Gate("replicas", "BF16", "part", "*", "noise_ratio", 1.25, "previous",
         "two ways to round the same sums lie as far apart as either from the exact sum (8e-3 of 9e-3 was "
         "measured), so what counts is that splitting does not add to it: 1.0 to 1.15 was measured", proposed=True),
    Gate("split", "*", PIPELINE, "latents", "relative_l2", 5e-5, "reference",
         "the per-part 5e-6 adds up over blocks and steps", proposed=True),
    Gate("replicas", "BF16", PIPELINE, "latents", "relative_l2", 6e-2, "reference",
         "ten times what bfloat16 costs one block", proposed=True),
    Gate("replicas", "BF16", PIPELINE, "image", "psnr", 25.0, "reference",
         "the usual limit of a visible difference is about 30 dB; random weights amplify more than trained ones",
         proposed=True),
)  # fmt: skip
