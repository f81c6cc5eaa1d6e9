"""Casting: combined shells plus every part's weights give the file of a component, without the compiler.

A part is never a file of its own. The combined shell says where each part's weights belong; they are cast, or copied
from where the store has them already, straight to that place, several parts at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.plan import Binary, BundleFile, Plan
from fluxkiln.compile.templates import make_template, weights_digest
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import Span, find_bmodel_net, hash_span, read_bmodel
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap, Placement
from fluxkiln.compile.toolchains.tpu_mlir.devices import find_owners
from fluxkiln.compile.toolchains.tpu_mlir.forms import FormMaker, SlotRows
from fluxkiln.compile.toolchains.tpu_mlir.shell import (
    combine_shells,
    copy_bytes,
    copy_region,
    lay_out,
    write_check_code,
)
from fluxkiln.compile.weights import part_rounders, part_weights, rounding_key
from fluxkiln.errors import CompileError
from fluxkiln.export.bindings import bind_part, binding_refs
from fluxkiln.export.checkpoint import Checkpoint, expect_tensors
from fluxkiln.export.fingerprint import check_states
from fluxkiln.files import disk_full_named
from fluxkiln.progress import FROM_STORE, Progress
from fluxkiln.quantize.pack import RounderOf
from fluxkiln.quantize.rounders import as_compiler
from fluxkiln.types import Binding, Part, WeightReader

# of one thread: the largest weight that is stored transposed, in float32
CAST_MEMORY = 256 << 20


def cast_file(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    name: str,
    binaries: list[Binary],
    progress: Progress,
    jobs: int | None = None,
) -> tuple[BundleFile, list[Binary]]:
    """The file `name` with all these parts, and the parts with their digests.

    Killed at any moment, the next call goes on with the part it was at: finished ones are read back and kept.

    Raises:
        IntegrityError: a weight in the file is not what was written there. ToolchainError: no combined shell in the
        store, and no compiler. ResourceError: the disk is full.
    """
    shell = combine_shells(plan, cache, name, binaries)
    keys = {binary.net: part_action(checkpoint, plan, cache, binary).key for binary in binaries}
    action = Action("file", name, code_version(cast_file), {"shell": "sha256:" + shell.name, **keys})

    def produce(folder: Path) -> tuple[dict[str, Path | Blob], dict[str, Any]]:
        place = plan.logs.parent / "casting" / name
        owners = find_owners(binaries)
        made = _fill((checkpoint, plan, cache), shell, binaries, keys, place, action.key, progress, jobs)
        check_states(checkpoint)
        nets = {net.name: net.coefficients for net in read_bmodel(place).nets}
        blob = cache.store.add_file(place, move=True)
        facts = {net: [made[owner], nets[net].start, nets[net].size] for net, owner in owners.items()}
        for binary in binaries:
            digest, start, size = facts[binary.net]
            where: dict[str, Any] = {"digest": digest, "start": start, "size": size}
            cache.record(part_action(checkpoint, plan, cache, binary), {"file": blob}, where)
        _journal(place).unlink()
        with suppress(OSError):  # other files are still being cast there
            place.parent.rmdir()
        return {"bmodel": blob}, {"nets": facts}

    result = run_action(cache, action, produce)
    nets: Any = result.facts["nets"]
    if result.hit:
        for binary in binaries:
            cache.count("cast", hit=True)
            progress.done("cast", binary.part.name, FROM_STORE)
    finished = [
        replace(binary, digest="sha256:" + nets[binary.net][0], size=nets[binary.net][2], hit=result.hit)
        for binary in binaries
    ]
    file = BundleFile(name, result.outputs["bmodel"], tuple(b.part.name for b in binaries), result.hit)
    return file, finished


def part_action(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, binary: Binary) -> Action:
    """The key of one part's stored weights, whatever file they are in."""
    settings: dict[str, Any] = {}
    if "map" not in binary.blobs:
        inputs = {"bmodel": binary.blobs["bmodel"].digest}
    else:
        weights = weights_digest(checkpoint, _binding(checkpoint, plan, cache, binary.part))
        settings, calibration = rounding_key(checkpoint, plan, cache, binary.part)
        inputs = {"map": binary.blobs["map"].digest, "weights": weights, **calibration}
    return Action("cast", f"{binary.part.name} {binary.scheme.name}", code_version(_fill_part), inputs, settings)


def cast_source(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part) -> tuple[WeightReader, RounderOf]:
    """What a part is cast of: its weights, and what rounds them."""
    template = make_template(checkpoint, plan.of(part), cache, part.kind, plan.target.graph_format)
    reader = part_weights(checkpoint, plan, cache, part, template)
    return reader, part_rounders(checkpoint, plan, cache, part)


def read_map(cache: ActionCache, blob: Blob) -> CoefficientMap:
    """Which bytes of a cast part come from which slot."""
    return CoefficientMap.from_json(json.loads(cache.path(blob).read_text()))


def _binding(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part) -> Binding:
    template = make_template(checkpoint, plan.of(part), cache, part.kind, plan.target.graph_format)
    return bind_part(part, template.slots, checkpoint)


def _fill(
    context: tuple[Checkpoint, Plan, ActionCache],
    shell: Path,
    binaries: list[Binary],
    keys: Mapping[str, str],
    place: Path,
    file_key: str,
    progress: Progress,
    jobs: int | None,
) -> dict[str, str]:
    """Write the file at `place`, going on where an earlier call was killed; net -> sha256 of its weights, of those
    that share some but the first."""
    journal = _journal(place)
    finished = _read_journal(journal, file_key) if place.is_file() else {}
    sizes = {binary.net: int(binary.facts["weight_bytes"]) for binary in binaries}
    owners = find_owners(binaries)
    with disk_full_named(place.parent, sum(sizes[owner] for owner in {*owners.values()})):
        if not finished:
            place.parent.mkdir(parents=True, exist_ok=True)
            journal.unlink(missing_ok=True)
            lay_out(shell, sizes, place)
            journal.write_text(json.dumps(["file", file_key]) + "\n")
        spans = {net.name: net.coefficients for net in read_bmodel(place).nets}
        written = threading.Lock()

        # What was hashed last is in memory still, so the last parts come first; the system reads ahead of the threads.
        order = [binary for binary in binaries[::-1] if owners[binary.net] == binary.net]
        threads = jobs or os.cpu_count() or 1
        following = dict(zip((binary.net for binary in order), order[threads:], strict=False))

        def fill(binary: Binary) -> tuple[str, str]:
            net, started = binary.net, time.perf_counter()
            if net in following and "map" in following[net].blobs:
                expect_tensors(binding_refs(_binding(*context, following[net].part), context[0]))
            digest = finished.get(net, "")
            if digest and hash_span(place, spans[net]).hex() == digest:
                how = "was finished before"
            else:
                digest, how = _fill_part(*context, binary, keys[net], place, spans[net])
                how = how or f"cast in {time.perf_counter() - started:.1f} s"
            sharing = [one for one in binaries if owners[one.net] == net]
            for one in sharing:
                write_check_code(place, one.net, bytes.fromhex(digest))
            with written, journal.open("a") as file:
                file.write(json.dumps([net, digest]) + "\n")
            progress.done("cast", binary.part.name, how)
            for one in sharing[1:]:
                progress.done("cast", one.part.name, f"has the weights of {binary.part.name}")
            return net, digest

        with ThreadPoolExecutor(threads, "cast") as pool:
            futures = [pool.submit(fill, binary) for binary in order]
            try:
                return dict(future.result() for future in futures)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _fill_part(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, binary: Binary, key: str, place: Path, span: Span
) -> tuple[str, str]:
    """One part's weights: copied from a file of the store that has them, or from its own bmodel, or else cast."""
    known = cache.lookup(key)
    if known is not None:
        facts: Any = known.facts
        digest = copy_bytes(cache.path(known.outputs["file"]), int(facts["start"]), place, span).hex()
        if digest == facts["digest"]:
            cache.count("cast", hit=True)
            return digest, FROM_STORE
    cache.count("cast", hit=False)
    if "map" not in binary.blobs:
        return copy_region(cache.path(binary.blobs["bmodel"]), place, span).hex(), "copied from its own bmodel"
    source = cast_source(checkpoint, plan, cache, binary.part)
    return cast_region(place, span, read_map(cache, binary.blobs["map"]), *source).hex(), ""


def _journal(place: Path) -> Path:
    return place.with_name(place.name + ".journal")


def _read_journal(journal: Path, file_key: str) -> dict[str, str]:
    """Net -> sha256 of what an earlier call finished in the same file; nothing when it was another file."""
    lines = []
    with suppress(OSError, ValueError):  # no journal, or its last line is cut short
        for line in journal.read_text().splitlines():
            lines.append(json.loads(line))
    return dict(lines[1:]) if lines[:1] == [["file", file_key]] else {}


def cast_region(
    target: Path,
    region: Span,
    coefficients: CoefficientMap,
    read_weight: WeightReader,
    rounder_of: RounderOf = as_compiler,
) -> bytes:
    """Write a part's coefficients straight into their region of a file.

    Several threads may cast into regions of one file at once. A thread needs the memory of the largest weight that is
    stored transposed, of others a few rows.

    Args:
        target, region: a file that `lay_out` wrote, and the net's region in it.
        read_weight: slot -> weight in torch's layout, or by its method `read_rows(slot, start, stop)` some of its rows.
        rounder_of: slot -> what makes its codes, scales and zero points; those of the compiler by default.

    Returns:
        sha256 of the region as written: the net's check code.

    Raises:
        CompileError: the region has another size than the mould's, or a weight another shape than the probe's.
    """
    if region.size != coefficients.size:
        raise CompileError(
            f"the region has {region.size} bytes, the mould's coefficients {coefficients.size}; lay the file out with "
            "the mould's own size"
        )
    digest, position = hashlib.sha256(), 0
    file = os.open(target, os.O_WRONLY)
    try:
        _reserve(file, region)

        def write(block: NDArray[np.uint8]) -> None:
            nonlocal position
            digest.update(block.data)
            while block.size:
                count = os.pwrite(file, block.data, region.start + position)
                position += count
                block = block[count:]

        for placement, blocks in _made(coefficients, coefficients.binary, read_weight, rounder_of):
            write(np.zeros(placement.offset - position, np.uint8))
            for block in blocks:
                write(block)
        write(np.zeros(region.size - position, np.uint8))
    finally:
        os.close(file)
    return digest.digest()


def _reserve(file: int, region: Span) -> None:
    """Have the region's disk blocks now: one by one they cost more than copying does, and a full disk shows early."""
    try:
        os.posix_fallocate(file, region.start, region.size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise  # others: a file system that cannot
    except AttributeError:
        pass  # a system that cannot


def cast_weight_file(
    coefficients: CoefficientMap, read_weight: WeightReader, target: Path, rounder_of: RounderOf = as_compiler
) -> None:
    """Write the weight file (npz) that the compiler's interpreter reads beside the mould's `*_tpu.mlir`."""
    with zipfile.ZipFile(target, "w") as archive:
        for placement, blocks in _made(coefficients, coefficients.interpreter, read_weight, rounder_of):
            header = {"descr": placement.dtype, "fortran_order": False, "shape": placement.shape}
            with archive.open(f"{placement.array}.npy", "w", force_zip64=True) as file:
                npy.write_array_header_1_0(file, header)
                for block in blocks:
                    file.write(block.data)


def compare_stored(
    bmodel: Path, net: str, coefficients: CoefficientMap, read_weight: WeightReader, rounder_of: RounderOf = as_compiler
) -> dict[str, NDArray[np.float32]]:
    """Read the weights of one net of a file back and compare them with what casting makes of the checkpoint's.

    Returns:
        Slot, or key of a constant -> for each of its stored ranges the share of bytes that differ: 0 in a sound file.

    Raises:
        CompileError: no such net, or its weights have another size than the mould's.
    """
    own = find_bmodel_net(bmodel, net).coefficients
    if own.size != coefficients.size:
        raise CompileError(
            f"{bmodel} has {own.size} bytes of weights for net {net}, its mould has {coefficients.size}; combine it "
            "again"
        )
    differing: dict[str, list[float]] = defaultdict(list)
    with bmodel.open("rb") as file:
        for placement, blocks in _made(coefficients, coefficients.binary, read_weight, rounder_of):
            file.seek(own.start + placement.offset)
            wrong = size = 0
            for block in blocks:
                stored = np.frombuffer(file.read(block.size), np.uint8)
                wrong += int(np.count_nonzero(stored != block))
                size += block.size
            differing[placement.form.slot].append(wrong / max(size, 1))
    return {slot: np.array(shares, np.float32) for slot, shares in differing.items()}


def _made(
    coefficients: CoefficientMap, placements: tuple[Placement, ...], read_weight: WeightReader, rounder_of: RounderOf
) -> Iterator[tuple[Placement, Iterator[NDArray[np.uint8]]]]:
    """Every placement with its bytes, in blocks that are good until the next."""
    rows_of = _row_reader(coefficients, read_weight)
    maker = FormMaker(coefficients.group_size, coefficients.bits, rounder_of, rows_of)
    for placement in placements:
        form = placement.form
        if form.name == "constant":
            yield placement, iter([np.array(bytearray(coefficients.constants[form.slot]), np.uint8)])
        else:
            blocks = maker.blocks(form, rows_of(form.slot))
            yield placement, (block.reshape(-1).view(np.uint8) for block in blocks)


def _row_reader(coefficients: CoefficientMap, read_weight: WeightReader) -> Callable[[str], SlotRows]:
    """Slot -> its rows, from a reader that has `read_rows`, or cut from a whole weight, of which one is kept."""
    read_rows = getattr(read_weight, "read_rows", None)
    kept: dict[str, NDArray[Any]] = {}

    def rows_of(slot: str) -> SlotRows:
        shape = coefficients.shapes[slot]

        def read(start: int, stop: int) -> NDArray[Any]:
            if read_rows is None and slot not in kept:
                kept.clear()
                kept[slot] = read_weight(slot)
            found: NDArray[Any] = read_rows(slot, start, stop) if read_rows else kept[slot]
            expected = (stop - start, *shape[1:]) if read_rows else shape
            if found.shape != expected:
                raise CompileError(
                    f"slot {slot} gets a weight of shape {list(found.shape)}, its mould was compiled with "
                    f"{list(expected)}; make the mould for this checkpoint's config"
                )
            return found if read_rows else found[start:stop]

        return SlotRows(shape, read)

    return rows_of
