"""AWS Trainium 2, through neuronx-cc. A core is a logical one, of two physical ones, as compiler and runtime have it.

Sources (AWS Neuron documentation): "Amazon EC2 Trn2 Architecture" (trn2-arch): 16 chips, 1,536 GiB and 46.4 TB/s of
device memory, 1,024 GB/s of NeuronLink-v3 for a chip. "Trainium2 Architecture": 667 bfloat16 TFLOPS for a chip of eight
cores. Degrees from the "NxD Inference Features Configuration Guide": "Trn2: 1, 2, 4, 8, 16, 32, and 64 (with LNC2)".
"""

from fluxkiln.compile.targets import Instance, Target

_CHIPS, _CORES = 16, 8
DEGREES = (1, 2, 4, 8, 16, 32, 64)


def trn2_instance(name: str, lnc: int) -> Instance:
    """A trn2.48xlarge or trn2u.48xlarge whose logical cores are `lnc` physical ones each."""
    cores = _CHIPS * _CORES // lnc
    return Instance(
        name=name,
        cores=cores,
        core_bytes=(1536 << 30) // cores,
        core_flops=667e12 * lnc / _CORES,
        core_bandwidth=46.4e12 / cores,
        link_bandwidth=1024e9,
        vcpus=192,
        host_bytes=2048 << 30,
        degrees=DEGREES,
    )


TARGET = Target(
    name="trn2",
    toolchain="neuron",
    chip="trn2",
    graph_format="pt2",  # of templates; what is lowered is the part's module itself
    schemes=("BF16",),
    uniform=True,
    device_bytes=24 << 30,
    lnc=2,
    instances=(trn2_instance("trn2.48xlarge", 2),),
)
