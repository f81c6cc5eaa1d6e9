"""AWS Inferentia 2, through neuronx-cc: tensor-parallel over the NeuronCores of an instance.

Sources (AWS Neuron documentation): as in `trn1`, for "AWS Inf2 Architecture" (inf2-arch), NeuronLink-v2 192 GiB/s per
chip. Degrees: the "NxD Inference Features Configuration Guide" lists "Inf2: 1, 2, 4, 8, and 24"; 6 and 12, half an
instance's cores, are not in that list and were not run on a device.
"""

from fluxkiln.compile.targets import Target
from fluxkiln.compile.targets.trn1 import instance

_DEGREES = (1, 2, 4, 6, 8, 12, 24)

TARGET = Target(
    name="inf2",
    toolchain="neuron",
    chip="inf2",
    graph_format="pt2",  # of templates; what is lowered is the part's module itself
    schemes=("BF16",),
    uniform=True,
    device_bytes=16 << 30,
    instances=(
        instance("inf2.48xlarge", 24, 192, 768, 192, _DEGREES),
        instance("inf2.24xlarge", 12, 96, 384, 192, _DEGREES),
        instance("inf2.8xlarge", 2, 32, 128, 0, _DEGREES),
    ),
)
