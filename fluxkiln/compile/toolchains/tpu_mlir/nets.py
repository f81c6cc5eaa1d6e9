"""Whether nets of bmodels are what is said of them: by a bundle's manifest, by the record of a mould."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.manifest import PartEntry
from fluxkiln.compile.bundle import Bundle, refuse_part
from fluxkiln.compile.templates import net_name
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import BModel, BmodelNet, Span, hash_span, read_bmodel
from fluxkiln.documents import read_object_file
from fluxkiln.errors import IntegrityError
from fluxkiln.types import TensorSpec


def check_nets(bundle: Bundle, fresh: Collection[str]) -> None:
    """See `compile.toolchain.Toolchain.check_parts`. A part's digest is that of its net's coefficients, read here, and
    the check code by which a runtime shares them."""
    members: dict[str, list[PartEntry]] = {}
    for part, entry in zip(bundle.parts, bundle.manifest.parts, strict=True):
        if entry.net != net_name(part):
            raise refuse_part(bundle, entry.name, f"is said to be the net {entry.net!r}, it is called {net_name(part)}")
        members.setdefault(entry.file, []).append(entry)
    with ThreadPoolExecutor(os.cpu_count() or 1, "nets") as threads:
        for file, entries in members.items():
            if file not in fresh:
                continue
            model = read_bmodel(bundle.folder / file)
            nets = {net.name: net for net in model.nets}
            if model.chip != bundle.target.chip or len(nets) != len(model.nets):
                raise refuse_part(
                    bundle, entries[0].name, f"is in {file}, which is for {model.chip}, or has a net twice"
                )
            if odd := sorted(nets.keys() ^ {entry.net for entry in entries}):
                raise refuse_part(bundle, entries[0].name, f"is in {file}: the net {odd[0]} of it is missing or odd")
            regions = {nets[entry.net].coefficients for entry in entries}
            hashed = dict(zip(regions, threads.map(partial(hash_span, model.path), regions), strict=True))
            for entry in entries:
                _check_net(bundle, model, entry, nets[entry.net], hashed)


def _check_net(bundle: Bundle, model: BModel, entry: PartEntry, net: BmodelNet, hashed: Mapping[Span, bytes]) -> None:
    code = net.check_code
    with model.path.open("rb") as file:
        file.seek(code.start)
        stored = f"sha256:{file.read(code.size).hex()}"
    found = f"sha256:{hashed[net.coefficients].hex()}"
    for what, here, said in (
        ("weights with the digest", found, entry.digest),
        ("the check code", stored, entry.digest),
        ("weights of", net.coefficients.size, entry.size),
        ("the inputs", [(one.shape, one.dtype) for one in net.inputs], _forms(entry.inputs)),
        ("the outputs", [(one.shape, one.dtype) for one in net.outputs], _forms(entry.outputs)),
    ):
        if here != said:
            raise refuse_part(bundle, entry.name, f"has {what} {here} in {entry.file}, the manifest says {said}")


def _forms(specs: tuple[TensorSpec, ...]) -> list[tuple[tuple[int, ...], str]]:
    return [(spec.shape, spec.dtype) for spec in specs]


def check_mould(record: Mapping[str, Any], outputs: Mapping[str, Path]) -> None:
    """Raise IntegrityError unless a mould's shell has the net, the chip, the inputs and outputs and the sizes that its
    record says, and its map can be read."""
    from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap

    facts, settings, what = record["facts"], record["settings"], record["what"]
    try:
        model = read_bmodel(outputs["shell"])
        (net,) = model.nets
        sides = {
            side: [[one.name, one.dtype, list(one.shape)] for one in getattr(net, side)]
            for side in ("inputs", "outputs")
        }
        here = {
            "chip": model.chip, "net": net.name, **sides,
            "instruction_bytes": net.instruction_bytes, "runtime_bytes": net.runtime_bytes,
        }  # fmt: skip
        said = {name: {**facts, **settings}[name] for name in here}
        CoefficientMap.from_json(read_object_file(outputs["map"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"the mould {what} is not in its form ({type(error).__name__}: {error})") from error
    for name, value in here.items():
        if value != said[name]:
            raise IntegrityError(f"the mould {what} has the {name} {value}, its record says {said[name]}")
