"""Instances whose accelerators have NeuronCores of the second version: what a core can do is the same in all."""

from fluxkiln.compile.target import Instance


def instance(name: str, cores: int, vcpus: int, host_gib: int, link_gib: int, degrees: tuple[int, ...]) -> Instance:
    """An instance with `cores` NeuronCores-v2, of 16 GiB, 95 bfloat16 TFLOPS and 410 GB/s each.

    Args:
        link_gib: GiB per second between one chip and the others; 0 where there is one.
        degrees: what the chip's topology has collectives for; those beyond its cores are left out.

    Source: AWS Neuron documentation, architecture of Trn1 and Inf2 (see `compile/targets`).
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
