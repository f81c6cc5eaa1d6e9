"""What a target is, and all of them as data, one file per chip: each module of this folder has a `TARGET`.

Other distributions add theirs through the entry-point group `fluxkiln.targets`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from fluxkiln.errors import SchemeError, UsageError
from fluxkiln.plugins import find_plugins
from fluxkiln.quantize.schemes import Scheme, block_schemes, parse_schemes
from fluxkiln.types import GraphFormat, Kind, Part

GROUP = "fluxkiln.targets"


@dataclass(frozen=True, slots=True)
class Instance:
    """A machine of a target whose cores share one model, tensor-parallel.

    Attributes:
        cores: NeuronCores, logical ones where there are such, each a rank of its own.
        core_bytes: device memory of one core.
        core_flops: peak bfloat16 operations of one core per second.
        core_bandwidth: bytes per second between one core and its memory.
        link_bandwidth: bytes per second between one chip and the others; 0 where there is one chip.
        vcpus, host_bytes: of the machine around them.
        degrees: tensor-parallel degrees that its topology has collectives for.
    """

    name: str
    cores: int
    core_bytes: int
    core_flops: float
    core_bandwidth: float
    link_bandwidth: float
    vcpus: int
    host_bytes: int
    degrees: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """A machine or card of a target whose chips hold whole parts.

    Attributes:
        chips: that one host has of it.
        chip_bytes: memory that one chip gives to models.
        source: where that figure comes from, for people.
    """

    name: str
    chips: int
    chip_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class Target:
    """A chip and how to build for it.

    Attributes:
        toolchain: the adapter that compiles for it.
        chip: what the toolchain calls it.
        graph_format: the templates the toolchain reads.
        schemes: legal block schemes, the default first.
        narrow: what passes between blocks comes and goes in 16 bits (`Kind.narrow_inputs`, `narrow_outputs`).
        float_norms: its norms and SiLU take float32, so what they alone read does not come in 16 bits.
        narrow_gelus: its GELUs take 16 bits alone, and lose what is small.
        float_groups: its GroupNorms are told to be in float32; in 16 bits they lose a spread beside a large mean.
        boards: that it is on, the default first; none where a model is not planned for devices.
        device_bytes: memory that a device gives to models; the default board's where there are boards.
        devices: the most that a model is spread over: as many as one host has, unless a board is named.
        instances: machines that a model is split for, the default first; none where a device holds whole parts.
        uniform: all kinds are stored in one scheme, without exceptions.
        lanes: weights in codes have a multiple of so many output channels; 0 where any number will do.
        partial_lanes: or fewer than that.
        lnc: how many physical cores are one of an instance's, where the compiler is to be told; 0 where it is not.
    """

    name: str
    toolchain: str
    chip: str
    graph_format: GraphFormat
    schemes: tuple[str, ...]
    narrow: bool = False
    float_norms: bool = False
    narrow_gelus: bool = False
    float_groups: bool = False
    boards: tuple[Board, ...] = ()
    device_bytes: int = 0
    devices: int = 8
    instances: tuple[Instance, ...] = ()
    uniform: bool = False
    lanes: int = 0
    partial_lanes: bool = False
    lnc: int = 0

    def __post_init__(self) -> None:
        if self.boards and not self.device_bytes:
            object.__setattr__(self, "device_bytes", self.boards[0].chip_bytes)

    def on_board(self, name: str | None, device_bytes: int | None, devices: int | None) -> Target:
        """The target on a board, the default where none is named, with other figures than the board's where given.

        Raises:
            UsageError: no such board.
        """
        known = {board.name.lower(): board for board in self.boards}
        if name is not None and name.lower() not in known:
            names = ", ".join(board.name for board in self.boards)
            raise UsageError(
                f"no board with a {self.name} is called {name!r}; there are {names}: name one, or give --device-memory "
                "and --devices"
            )
        board = known[name.lower()] if name is not None else Board("", self.devices, self.device_bytes, "")
        return replace(self, device_bytes=device_bytes or board.chip_bytes, devices=devices or board.chips)

    def takes_codes(self, out_features: int) -> bool:
        """Whether its compiler multiplies with codes of a weight with so many output channels."""
        return not self.lanes or out_features % self.lanes == 0 or (self.partial_lanes and out_features < self.lanes)

    def narrows(self, kind: Kind) -> tuple[bool, bool]:
        """Whether a kind's activations come, and whether they go, in 16 bits."""
        comes = kind.narrow_inputs == "all" or (kind.narrow_inputs == "norms" and not self.float_norms)
        return self.narrow and comes, self.narrow and kind.narrow_outputs

    def parse_schemes(self, text: str | None, kinds: Mapping[str, Kind]) -> tuple[Scheme, dict[str, Scheme]]:
        """The block scheme and every kind's scheme (see `quantize.schemes.parse_schemes`).

        Raises:
            SchemeError: one does not exist, or this target cannot store it.
        """
        blocks, schemes = parse_schemes(text, self.schemes[0], kinds, self.schemes)
        if self.uniform:
            if text not in (None, *self.schemes):
                legal = " or ".join(self.schemes)
                raise SchemeError(f"scheme {text!r}: target {self.name} stores all kinds alike; use {legal}")
            schemes = dict.fromkeys(schemes, blocks)
        self._check_schemes((blocks, *schemes.values()))
        return blocks, schemes

    def block_schemes(self, text: str | None, parts: Iterable[Part]) -> dict[str, Scheme]:
        """The schemes of single blocks, by the names of these; see `quantize.schemes.block_schemes`, and above."""
        found = block_schemes(text, parts)
        self._check_schemes(found.values())
        return found

    def _check_schemes(self, schemes: Iterable[Scheme]) -> None:
        for scheme in schemes:
            if scheme.name.split("-")[0] not in self.schemes:
                raise SchemeError(f"target {self.name} cannot store {scheme.name}; it has {', '.join(self.schemes)}")


@cache
def all_targets() -> dict[str, Target]:
    """Those of this package and those that are registered, by name."""
    own = {name: _own_target(name) for name in _own_names()}
    found = own | {target.name: target for target in find_plugins(GROUP, Target, None, own)}
    return dict(sorted(found.items()))


def target_names() -> tuple[str, ...]:
    """All targets, in the order of their names."""
    return tuple(all_targets())


def find_target(name: str) -> Target:
    """The target called `name`; UsageError with the legal names otherwise."""
    if name in _own_names():
        return _own_target(name)
    if name not in all_targets():
        raise UsageError(f"no target is called {name!r}; there are {', '.join(all_targets())}")
    return all_targets()[name]


@cache
def _own_names() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


def _own_target(name: str) -> Target:
    target: Target = importlib.import_module(f"{__name__}.{name}").TARGET
    return target
