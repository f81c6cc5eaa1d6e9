from __future__ import annotations

import hashlib

import pytest

from fluxkiln.compile.targets import find_target, target_names
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import read_bmodel
from fluxkiln.errors import SchemeError, UsageError
from fluxkiln.patches.flux1.kinds import KINDS, list_parts
from fluxkiln.quantize.schemes import SCHEME_NAMES, parse_scheme
from tests.builds import altered


def test_every_target_is_found_by_its_own_name():
    assert set(target_names()) >= {"bm1684x", "bm1688", "cpu"}
    for name in target_names():
        target = find_target(name)
        assert target.name == name
        assert target.schemes
        assert all(parse_scheme(scheme).name == scheme for scheme in target.schemes)
        if not target.narrow:
            assert not any(any(target.narrows(kind)) for kind in KINDS.values())


@pytest.mark.parametrize("name", ["bm1685", "", "BM1684X", "__init__", "../targets/cpu"])
def test_unknown_target_is_refused_with_the_legal_ones(name):
    with pytest.raises(UsageError, match="bm1684x, bm1684x2, bm1688, cpu") as raised:
        find_target(name)
    assert repr(name) in str(raised.value)
    assert raised.value.exit_code == 2


def test_blocks_hand_over_16_bits_to_what_takes_them():
    """Whatever a 16-bit output goes to takes 16 bits in; the host reads and writes float32."""
    for name in ("bm1684x", "bm1688"):
        narrows = {kind: find_target(name).narrows(traits) for kind, traits in KINDS.items()}
        comes, goes = ({kind for kind, sides in narrows.items() if sides[side]} for side in (0, 1))
        blocks = {"t5_block", "double", "single", "double_modulated", "single_modulated"}
        # the row of a step goes from the modulation to its block as it is, temb to SiLU in float32
        assert goes == blocks | {"head", "token_embed", "double_modulation", "single_modulation", "tail_modulation"}
        # the other chip's norms and SiLU, which alone read what the tail is given, take float32
        assert comes == blocks | {"t5_final", "tail_modulated"} | ({"tail"} if name == "bm1684x" else set())


def test_schemes_a_target_cannot_store_are_refused():
    target = find_target("cpu")
    with pytest.raises(SchemeError, match=r"target cpu cannot store W8BF16; it has BF16, F32, F16, W4BF16"):
        target.parse_schemes("W8BF16", KINDS)
    with pytest.raises(SchemeError, match="cannot store W8BF16"):
        target.parse_schemes("W4BF16,tail=W8BF16", KINDS)
    with pytest.raises(SchemeError, match="target cpu cannot store W8A8"):
        target.parse_schemes("W4BF16,single=W8A8", KINDS)
    chip = find_target("bm1684x")
    for name in SCHEME_NAMES:
        if parse_scheme(name).base_name not in chip.schemes:
            continue
        blocks, schemes = chip.parse_schemes(name, KINDS)
        assert schemes["double"] == blocks == parse_scheme(name)


def test_the_first_scheme_is_the_default():
    blocks, schemes = find_target("bm1684x").parse_schemes(None, KINDS)
    assert blocks.name == "W4BF16"
    assert {kind: scheme.name for kind, scheme in schemes.items()} == {
        "clip": "F16", "t5_embed": "F16", "t5_block": "W4BF16", "t5_final": "BF16", "head": "BF16",
        "double": "W4BF16", "single": "W4BF16", "tail": "BF16", "vae_decoder": "F16", "tiny_vae_decoder": "F16",
        "time_embed": "BF16", "double_modulation": "W4BF16", "single_modulation": "W4BF16",
        "tail_modulation": "BF16", "token_embed": "BF16", "double_modulated": "W4BF16",
        "single_modulated": "W4BF16", "tail_modulated": "BF16",
    }  # fmt: skip


@pytest.mark.tpu_mlir
@pytest.mark.parametrize("name", ["double_modulation.01", "double.01", "single.02", "tail"])
def test_hoisted_parts_are_cast_and_hand_over_16_bits(small_build, cast_and_direct, name):
    build = small_build(scheme="W4BF16-rtn")  # as the compiler rounds
    build = altered(build, parts=list_parts(build.checkpoint.configs, modulation="hoisted"))
    mould, cast, direct = cast_and_direct(build, name)
    assert mould.castable, mould.why
    (net,) = read_bmodel(build.cache.path(direct.blobs["bmodel"])).nets
    weights = build.cache.path(direct.blobs["bmodel"]).read_bytes()[net.coefficients.start : net.coefficients.stop]
    assert cast.digest == "sha256:" + hashlib.sha256(weights).hexdigest()
    assert net.name == cast.net
    found = {tensor.name.partition("_")[0]: tensor.dtype for tensor in (*net.inputs, *net.outputs)}
    assert found["modulation"] == "bfloat16"
    assert found.get("temb", "float32") == "float32"


def test_boards_are_data_and_the_first_is_the_default():
    target = find_target("bm1684x")
    assert target.device_bytes == target.boards[0].chip_bytes == (7615 + 2360 + 2360) << 20
    assert target.on_board(None, None, None) == target
    card = target.on_board("sc7-hp75", None, None)
    assert (card.devices, card.device_bytes) == (3, next(b.chip_bytes for b in target.boards if b.name == "SC7-HP75"))
    own = target.on_board("SE7-32", 5 << 30, 2)
    assert (own.devices, own.device_bytes) == (2, 5 << 30)
    for name in target_names():
        boards = find_target(name).boards
        assert len({board.name.lower() for board in boards}) == len(boards)
        assert all(board.source and board.chips and board.chip_bytes > 1 << 30 for board in boards)


def test_an_unknown_board_is_refused_with_the_list():
    with pytest.raises(UsageError, match="no board with a bm1684x is called 'SE5'; there are SE7-32, SM7, AIRBOX"):
        find_target("bm1684x").on_board("SE5", None, None)
