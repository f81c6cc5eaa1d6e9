import ml_dtypes
import numpy as np
import pytest

from fluxkiln.compile.forms import LANES, Form, SlotForms
from fluxkiln.quantize.pack import bf16_to_float32, dequantize, pack_int4, pack_int8


@pytest.fixture
def weight():
    return np.random.default_rng(3).standard_normal((192, 128)).astype(ml_dtypes.bfloat16)


def test_codes_scales_and_zeros_are_the_packers(weight):
    for bits, pack in ((4, pack_int4), (8, pack_int8)):
        forms, packed = SlotForms(weight, 64, bits), pack(weight, 64)
        assert forms.make(Form("w", "codes")).tobytes() == packed.codes_OI.tobytes()
        assert forms.make(Form("w", "scale")).tobytes() == packed.scales_OG.tobytes()
        assert forms.make(Form("w", "zero")).tobytes() == packed.zeros_OG.tobytes()
        assert np.abs(dequantize(forms.packed, 64) - weight.astype(np.float32)).max() < 6 / 2**bits


def test_lanes_are_dealt_row_by_row(weight):
    made = SlotForms(weight, 64, 4).make(Form("w", "scale_lanes")).reshape(LANES, 3, 2)
    plain = pack_int4(weight, 64).scales_OG
    for lane, turn in ((0, 0), (5, 1), (63, 2)):
        assert made[lane, turn].tolist() == plain[turn * LANES + lane].tolist()
    assert made.reshape(-1).tolist() != plain.reshape(-1).tolist()


@pytest.mark.parametrize("name", ["codes", "scale", "zero", "scale_lanes", "bf16", "f32"])
def test_chunks_are_slices_of_the_rows(weight, name):
    forms = SlotForms(weight, 64, 4)
    for chunk in range(3):
        cut = SlotForms(np.ascontiguousarray(weight[chunk * 64 : (chunk + 1) * 64]), 64, 4)
        assert forms.make(Form("w", name, chunk, 3)).tobytes() == cut.make(Form("w", name)).tobytes()


def test_transposed_and_16_bit_forms(weight):
    forms = SlotForms(weight, 0, 0)
    assert forms.make(Form("w", "bf16")).tobytes() == weight.tobytes()
    assert forms.make(Form("w", "bf16_t")).tobytes() == np.ascontiguousarray(weight.T).tobytes()
    assert np.array_equal(bf16_to_float32(forms.make(Form("w", "bf16"))), forms.make(Form("w", "f32")))
    assert forms.make(Form("w", "f16_t")).dtype == np.float16
    assert forms.make(Form("w", "f16_t")).flags.c_contiguous


def test_only_what_can_be_is_a_candidate(weight):
    def names(array, group, bits):
        return {form.name for form in SlotForms(array, group, bits).candidates("w")}

    assert "codes" in names(weight, 64, 4)
    assert "codes" not in names(weight[:, :96], 64, 4)
    assert names(weight[:, 0], 64, 4) == {"bf16", "f16", "f32"}
    assert names(weight, 0, 0) == {"bf16", "f16", "f32", "bf16_t", "f16_t", "f32_t"}
    slices = {(form.chunk, form.chunks) for form in SlotForms(weight[:10], 0, 0).candidates("w")}
    assert slices == {(0, 1), (0, 2), (1, 2)}


def test_rows_that_do_not_divide_into_lanes_are_no_form(weight):
    with pytest.raises(ValueError, match="reshape"):
        SlotForms(weight[:100], 64, 4).make(Form("w", "scale_lanes"))
