"""AWS Trainium 1, through neuronx-cc: tensor-parallel over the NeuronCores of an instance.

Sources (AWS Neuron documentation): cores, memory, bandwidths and host of an instance from "Amazon EC2 Trn1/Trn1n
Architecture" (trn1-arch): 820 GiB/s of device memory and 190 bfloat16 TFLOPS per chip of two cores (older editions say
820 GB/s, which is taken), NeuronLink-v2 384 GiB/s per chip on trn1.32xlarge. Degrees from the "NxD Inference Features
Configuration Guide", tensor-parallelism support: "Trn1: 1, 2, 8, 16, and 32".
"""

from fluxkiln.compile.target import Target
from fluxkiln.compile.toolchains.neuron.core_v2 import instance

_DEGREES = (1, 2, 8, 16, 32)


TARGET = Target(
    name="trn1",
    toolchain="neuron",
    chip="trn1",
    graph_format="pt2",  # of templates; what is lowered is the part's module itself
    schemes=("BF16",),
    uniform=True,
    device_bytes=16 << 30,
    instances=(instance("trn1.32xlarge", 32, 128, 512, 384, _DEGREES), instance("trn1.2xlarge", 2, 8, 32, 0, _DEGREES)),
)
