"""What instances take and refuse; sizes are those of FLUX.1-dev, in bytes per core."""

from __future__ import annotations

import pytest

from fluxkiln.compile.targets import find_target
from fluxkiln.compile.toolchains.neuron.split import (
    RUNTIME_BYTES,
    CoreMemory,
    all_instances,
    check_degree,
    check_memory,
    default_degree,
    find_instance,
    legal_degrees,
    padded_heads,
)
from fluxkiln.errors import ResourceError, SchemeError, UsageError
from fluxkiln.patches.flux1.kinds import KINDS

TRN1, INF2 = find_target("trn1"), find_target("inf2")
HEADS = 24
# bfloat16; CLIP and the decoder are on one core, the others split
SPLIT = {"transformer": 23_802_816_640, "text_encoder_2": 9_524_600_832}
WHOLE = {"text_encoder": 246_120_960, "vae": 99_000_000}
FLUX = {
    degree: {**{name: size // degree for name, size in SPLIT.items()}, **WHOLE}
    for degree in (1, 2, 4, 6, 8, 12, 16, 24, 32, 64)
}


def instance(name):
    return next(each for each in all_instances() if each.name == name)


def test_instances_as_the_documentation_has_them():
    facts = {
        each.name: (each.cores, each.vcpus, each.host_bytes >> 30, each.link_bandwidth) for each in all_instances()
    }
    assert facts == {
        "trn1.32xlarge": (32, 128, 512, 384 << 30),
        "trn1.2xlarge": (2, 8, 32, 0),
        "inf2.48xlarge": (24, 192, 768, 192 << 30),
        "inf2.24xlarge": (12, 96, 384, 192 << 30),
        "inf2.8xlarge": (2, 32, 128, 0),
        "trn2.48xlarge": (64, 192, 2048, 1024e9),
        "trn2.48xlarge-lnc1": (128, 192, 2048, 1024e9),
    }
    logical = {"trn2.48xlarge": (24 << 30, 166.75e12, 725e9), "trn2.48xlarge-lnc1": (12 << 30, 83.375e12, 362.5e9)}
    for each in all_instances():
        expected = logical.get(each.name, (16 << 30, 95e12, 410e9))
        assert (each.core_bytes, each.core_flops, each.core_bandwidth) == expected
        assert max(each.degrees) <= each.cores


def test_the_first_instance_is_the_default():
    assert find_instance(TRN1).name == "trn1.32xlarge"
    assert find_instance(TRN1, "trn1.2xlarge").cores == 2
    with pytest.raises(UsageError, match=r"'inf2\.8xlarge'; there are trn1\.32xlarge, trn1\.2xlarge"):
        find_instance(TRN1, "inf2.8xlarge")
    with pytest.raises(UsageError, match="it does not split a model"):
        find_instance(find_target("cpu"))


def test_all_kinds_are_stored_alike():
    """Shards are bfloat16, and one module has one dtype; float32 is for verification."""
    blocks, schemes = TRN1.parse_schemes(None, KINDS)
    assert blocks.name == "BF16"
    assert {scheme.name for scheme in schemes.values()} == {"BF16"}
    assert {scheme.name for scheme in INF2.parse_schemes("BF16", KINDS)[1].values()} == {"BF16"}
    with pytest.raises(SchemeError, match="target trn1 stores all kinds alike; use BF16"):
        TRN1.parse_schemes("BF16,clip=F32", KINDS)
    with pytest.raises(SchemeError, match="F16"):
        TRN1.parse_schemes("F16", KINDS)


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("trn1.32xlarge", (1, 2, 8, 16, 32)),
        ("trn1.2xlarge", (1, 2)),
        ("inf2.48xlarge", (1, 2, 4, 6, 8, 12, 24)),
        ("inf2.24xlarge", (1, 2, 4, 6, 8, 12)),
        ("inf2.8xlarge", (1, 2)),
        ("trn2.48xlarge", (1, 2, 4, 8, 16, 32)),
        ("trn2.48xlarge-lnc1", (1, 2, 4, 8, 16, 32)),
    ],
)
def test_legal_degrees(name, legal):
    assert legal_degrees(instance(name), HEADS) == legal
    assert default_degree(instance(name), HEADS) == min(8, legal[-1])
    for degree in range(-1, 70):
        if degree in legal:
            check_degree(instance(name), degree, HEADS)
            assert padded_heads(HEADS, degree) == (32 if degree in (16, 32) else 24)
        else:
            with pytest.raises(UsageError, match=rf"tp {degree}(:| does not).*: tp {', '.join(map(str, legal))}$"):
                check_degree(instance(name), degree, HEADS)


def test_padding_keeps_every_rank_at_work():
    assert [padded_heads(24, degree) for degree in (1, 8, 16, 24, 32)] == [24, 24, 32, 24, 32]
    assert [padded_heads(64, degree) for degree in (6, 12, 24, 32)] == [66, 72, 72, 64]
    assert padded_heads(4, 8) is None
    with pytest.raises(
        UsageError, match=r"tp 8 does not divide 4 heads, and of 8 with padding 4 would be zeros.*tp 1, 2$"
    ):
        check_degree(instance("trn1.32xlarge"), 8, 4)
    assert default_degree(instance("trn1.32xlarge"), 4) == 2
    assert default_degree(instance("inf2.48xlarge"), 4) == 4


def test_widths_must_be_divided():
    """T5's feed-forward of 10240 does not split over 6, 12 or 24 ranks."""
    inf2, widths = instance("inf2.48xlarge"), {"T5's feed-forward": 10240}
    assert legal_degrees(inf2, 64, widths) == (1, 2, 4, 8)
    with pytest.raises(UsageError, match=r"tp 12 does not divide T5's feed-forward, which is 10240; .*tp 1, 2, 4, 8$"):
        check_degree(inf2, 12, 64, widths)
    check_degree(inf2, 8, 64, widths)
    check_degree(instance("trn1.32xlarge"), 32, 64, widths)
    assert padded_heads(64, 8) == padded_heads(64, 32) == 64


@pytest.mark.parametrize("name", ["trn1.2xlarge", "inf2.8xlarge"])
def test_two_cores_do_not_hold_the_model(name):
    with pytest.raises(ResourceError) as raised:
        check_memory(instance(name), 2, FLUX)
    message, details = str(raised.value), raised.value.details
    assert message.startswith(f"{name} with tp 2 needs 18.08 GB on each core (17.01 weights + 0.00 activations + 1.07 ")
    assert "a core has 17.18 GB; it fits" in message
    assert "trn1.32xlarge with tp 8, 16, 32" in message
    assert "inf2.48xlarge with tp 4, 6, 8, 12, 24" in message
    assert "inf2.24xlarge with tp 4, 6, 8, 12" in message
    assert "2xlarge with tp 1" not in message
    lines = {" ".join(line.split()[:-1]): float(line.split()[-1]) for line in details.splitlines()[1:]}
    assert lines["transformer"] == 11.901
    assert lines["weights"] == pytest.approx(sum(FLUX[2].values()) / 1e9, abs=6e-4)
    assert lines["needed on each core"] == pytest.approx(
        lines["weights"] + lines["runtime, programs, DMA rings"], abs=2e-3
    )
    assert lines["too much"] == pytest.approx(lines["needed on each core"] - lines["a core has (16 GiB)"], abs=2e-3)


def test_the_default_holds_it_with_room():
    memory = check_memory(instance("trn1.32xlarge"), 8, FLUX, 2_000_000_000)
    assert memory.fits
    assert memory.weight_bytes == pytest.approx(4.51e9, rel=1e-2)
    assert memory.needed == memory.weight_bytes + 2_000_000_000 + RUNTIME_BYTES
    assert "free" in memory.table()
    with pytest.raises(ResourceError, match="fits no instance; use a smaller SIZE"):
        check_memory(instance("trn1.32xlarge"), 8, FLUX, 30_000_000_000)


def test_memory_is_refused_by_one_byte():
    core = instance("trn1.2xlarge")
    room = core.core_bytes - RUNTIME_BYTES
    assert CoreMemory(core, 2, {"transformer": room - 7}, 7).fits
    assert not CoreMemory(core, 2, {"transformer": room - 7}, 8).fits
    with pytest.raises(ResourceError):
        check_memory(core, 2, {2: {"transformer": room}}, 1)
    assert check_memory(core, 2, {2: {"transformer": room}}).fits
