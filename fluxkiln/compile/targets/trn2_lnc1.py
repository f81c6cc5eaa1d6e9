"""AWS Trainium 2 with logical cores of one physical core each: twice as many, each with half of memory and arithmetic.

Its runtime is to be told so: NEURON_LOGICAL_NC_CONFIG=1. No degrees are published for it; those of `trn2` are taken.
"""

from fluxkiln.compile.targets import Target
from fluxkiln.compile.targets.trn2 import trn2_instance

TARGET = Target(
    name="trn2_lnc1",
    toolchain="neuron",
    chip="trn2",
    graph_format="pt2",  # of templates; what is lowered is the part's module itself
    schemes=("BF16",),
    uniform=True,
    device_bytes=12 << 30,
    lnc=1,
    instances=(trn2_instance("trn2.48xlarge-lnc1", 1),),
)
