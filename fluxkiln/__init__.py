"""fluxkiln brings FLUX.1 onto accelerators that are not GPUs, and proves that it computes the same thing."""

__version__ = "0.1.0"
