"""Which file goes where, what it takes there, and what is refused."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fluxkiln.compile.plan import Binary
from fluxkiln.compile.templates import net_name
from fluxkiln.compile.toolchains.tpu_mlir.devices import RESIDENT, group_parts, plan_devices, split_devices
from fluxkiln.errors import ResourceError
from fluxkiln.patches.flux1.kinds import make_part
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.types import Shapes

GB = 10**9
PARTS = (
    make_part("clip", "clip"),
    make_part("t5_block.00", "t5_block"),
    make_part("head", "head"),
    *(make_part(f"double.{index:02d}", "double") for index in range(4)),
    make_part("tail", "tail"),
    make_part("vae_decoder", "vae_decoder"),
)


def binary(part, weights=GB, instructions=0, runtime=0):
    facts = {"weight_bytes": weights, "instruction_bytes": instructions, "runtime_bytes": runtime}
    return Binary(part, net_name(part), parse_scheme("BF16"), facts, "planned")


def plan_of(budget):
    return SimpleNamespace(target=SimpleNamespace(name="chip", device_bytes=budget, devices=8), further=())


def plan(budget, binaries):
    return plan_devices(plan_of(budget), group_parts(plan_of(budget), binaries))


def test_a_file_takes_all_weights_and_the_largest_run_time_memory():
    binaries = [binary(part, 100, 10, index) for index, part in enumerate(PARTS)]
    found = {file.file: file for file in plan(10**6, binaries).files}
    assert list(found) == ["text_encoder.bmodel", "text_encoder_2.bmodel", "transformer.bmodel", "vae_decoder.bmodel"]
    transformer = found["transformer.bmodel"]
    assert (transformer.weights, transformer.instructions, transformer.runtime) == (600, 60, 7)
    assert transformer.total == 667
    assert (transformer.device, transformer.phase) == (0, "denoise")


@pytest.mark.parametrize(
    ("budget", "way"),
    [
        (9 * GB, "everything resident"),
        (9 * GB - 1, "text encoders and modulation released"),
        (7 * GB, "text encoders and modulation released"),
        (7 * GB - 1, "one phase at a time"),
        (6 * GB, "one phase at a time"),
    ],
)
def test_the_way_with_the_fewest_loads_that_fits(budget, way):
    made = plan(budget, [binary(part) for part in PARTS])
    assert made.devices == 1
    assert made.best_way() == way
    assert [made.peak(0, one) for one in RESIDENT] == [9 * GB, 7 * GB, 6 * GB]
    assert made.to_json()["load"] == way
    assert made.to_json()["peaks"]["while denoising"] == [6 * GB]


def test_a_transformer_that_is_too_large_gets_as_few_devices_as_hold_it():
    groups = group_parts(plan_of(3 * GB), [binary(part) for part in PARTS])
    assert list(groups) == [
        "text_encoder.bmodel", "text_encoder_2.bmodel", "transformer.0.bmodel", "transformer.1.bmodel",
        "vae_decoder.bmodel",
    ]  # fmt: skip
    chain = [one.part.name for name in groups if name.startswith("transformer") for one in groups[name]]
    assert chain == [part.name for part in PARTS[2:-1]]
    assert [len(groups[f"transformer.{index}.bmodel"]) for index in (0, 1)] == [3, 3]
    assert [file.device for file in plan(3 * GB, [binary(part) for part in PARTS]).files] == [0, 0, 0, 1, 0]
    # one byte less, and three devices are needed
    groups = group_parts(plan_of(3 * GB - 1), [binary(part) for part in PARTS])
    assert sum(name.startswith("transformer") for name in groups) == 3


def test_run_time_memory_counts_when_a_device_is_filled():
    groups = group_parts(plan_of(3 * GB), [binary(part, runtime=1) for part in PARTS])
    assert sum(name.startswith("transformer") for name in groups) == 3


def test_modulation_is_a_file_and_a_phase_of_its_own():
    parts = (*PARTS, make_part("time_embed", "time_embed"), make_part("double_modulation.00", "double_modulation"))
    groups = group_parts(plan_of(20 * GB), [binary(part) for part in parts])
    assert [one.part.name for one in groups["modulation.bmodel"]] == ["time_embed", "double_modulation.00"]
    made = plan_devices(plan_of(20 * GB), groups)
    assert {file.phase for file in made.files if file.file == "modulation.bmodel"} == {"modulate"}
    assert made.peak(0, "everything resident") - made.peak(0, "text encoders and modulation released") == 4 * GB


@pytest.mark.parametrize(
    ("name", "file"), [("vae_decoder", r"vae_decoder\.bmodel"), ("double.02", r"transformer\.\d\.bmodel")]
)
def test_what_fits_no_device_is_refused_with_the_table(name, file):
    binaries = [binary(part, weights=5 * GB if part.name == name else GB) for part in PARTS]
    with pytest.raises(
        ResourceError, match=rf"{file} takes 5\.00 GB, a chip gives 4\.00 GB to models; choose"
    ) as caught:
        plan(4 * GB, binaries)
    assert "one phase at a time" in caught.value.details
    assert "over 4.000" in caught.value.details
    assert plan(5 * GB, binaries).best_way() is not None


def test_files_that_are_needed_at_once_are_refused_together():
    binaries = [binary(part, weights=3 * GB if part.component.startswith("text") else GB) for part in PARTS]
    with pytest.raises(ResourceError) as caught:
        plan(5 * GB, binaries)
    assert str(caught.value).startswith("text_encoder.bmodel and text_encoder_2.bmodel take 6.00 GB together, a chip")


def test_a_further_size_takes_instructions_beside_the_weights_of_its_parts():
    size = Shapes(height=48, width=32, tokens=16)
    more = [replace(part, name=f"{part.name}@{size.label}", sizes=(size,)) for part in PARTS[2:]]
    binaries = [binary(part, instructions=10) for part in (*PARTS, *more)]
    found = {file.file: file for file in plan(9 * GB, binaries).files}
    transformer, decoder = found["transformer.bmodel"], found["vae_decoder.bmodel"]
    assert (transformer.weights, transformer.instructions) == (6 * GB, 120)
    assert (decoder.weights, decoder.instructions) == (2 * GB, 20), "convolutions' are ordered by the picture"
    # cut over devices, a part stays with its weights
    groups = group_parts(plan_of(4 * GB), binaries)
    for name in ("transformer.0.bmodel", "transformer.1.bmodel"):
        bases = [one.part.base for one in groups[name]]
        assert all(bases.count(base) == 2 for base in bases), (name, bases)


def chain(*sizes):
    """Blocks whose nets have a byte of instructions each."""
    return [binary(make_part(f"double.{at:02d}", "double"), size - 1, 1) for at, size in enumerate(sizes)]


@pytest.mark.parametrize("seed", range(6))
def test_devices_are_balanced(seed):
    """Against all ways to cut the chain."""
    choose = random.Random(seed)
    sizes = [choose.randint(1, 100) for _ in range(choose.randint(3, 11))]
    parts = chain(*sizes)
    runs = split_devices(parts, 3)
    assert [part for run in runs for part in run] == parts
    assert 1 <= len(runs) <= 3
    cuts = itertools.combinations(range(1, len(sizes)), 2)
    best = min(max(sum(sizes[:a]), sum(sizes[a:b]), sum(sizes[b:])) for a, b in cuts)
    assert max(sum(part.facts["weight_bytes"] + 1 for part in run) for run in runs) == best


def test_few_parts_take_few_devices():
    assert [len(run) for run in split_devices(chain(5), 3)] == [1]
    assert [len(run) for run in split_devices(chain(5, 5), 3)] == [1, 1]
