"""AWS Trainium 1, through neuronx-cc: tensor-parallel over the NeuronCores of an instance.

Sources (AWS Neuron documentation): cores, memory, bandwidths and host of an instance from "Amazon EC2 Trn1/Trn1n
Architecture" (trn1-arch): 820 GiB/s of device memory and 190 bfloat16 TFLOPS per chip of two cores (older editions say
820 GB/s, which is taken), NeuronLink-v2 384 GiB/s per chip on trn1.32xlarge. Degrees from the "NxD Inference Features
Configuration Guide", tensor-parallelism support: "Trn1: 1, 2, 8, 16, and 32".
"""

from fluxkiln.compile.targets import Instance, Target

_DEGREES = (1, 2, 8, 16, 32)


def instance(name: str, cores: int, vcpus: int, host_gib: int, link_gib: int, degrees: tuple[int, ...]) -> Instance:
    """An instance with `cores` NeuronCores-v2, as Trainium 1 and Inferentia 2 have them: 16 GiB, 95 bfloat16 TFLOPS
    and 410 GB/s each.

    Args:
        link_gib: GiB per second between one chip and the others; 0 where there is one.
        degrees: what the chip's topology has collectives for; those beyond its cores are left out.
    """
    return Instance(
        name=name,
        cores=cores,
        core_bytes=16 << 30,
        core_flops=95e12,
        core_bandwidth=410e9,
        link_bandwidth=float(link_gib << 30),
        vcpus=vcpus,
        host_bytes=host_gib << 30,
        degrees=tuple(degree for degree in degrees if degree <= cores),
    )


TARGET = Target(
    name="trn1",
    toolchain="neuron",
    chip="trn1",
    graph_format="pt2",  # of templates; what is lowered is the part's module itself
    schemes=("BF16",),
    uniform=True,
    device_bytes=16 << 30,
    lnc=1,
    instances=(instance("trn1.32xlarge", 32, 128, 512, 384, _DEGREES), instance("trn1.2xlarge", 2, 8, 32, 0, _DEGREES)),
)
