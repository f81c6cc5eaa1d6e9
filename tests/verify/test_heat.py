"""Maps of where in a tensor an error sits."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest

from fluxkiln.verify.heat import MAP_CHANNELS, MAP_TOKENS, MOST_MAPS, WorstMaps, error_map, map_picture
from fluxkiln.verify.ladder import Ladder

PLACE = ("double.00", "hidden_states_out", 0, "simulator")


@pytest.fixture
def tensor():
    return np.random.default_rng(0).standard_normal((1, 100, 300)).astype(np.float32)


def test_one_channel_is_a_column(tensor):
    spoilt = tensor.copy()
    spoilt[..., 299] *= 2
    made = error_map(PLACE, 1.0, spoilt, tensor, None)
    assert made.shades.shape == (MAP_TOKENS, MAP_CHANNELS)
    assert (made.tokens, made.channels) == (100, 300)
    assert made.shades[:, -1].min() > 0
    assert made.shades[:, :-1].max() == 0
    assert made.shades.max() == 255


def test_one_token_is_a_row_and_small_tensors_have_a_cell_each(tensor):
    small = tensor[:, :10, :20]
    spoilt = small.copy()
    spoilt[0, 3] += 1.0
    made = error_map(PLACE, 1.0, spoilt, small, None)
    assert made.shades.shape == (10, 20)
    assert set(np.flatnonzero(made.shades.any(1))) == {3}
    size = float(np.sqrt(np.mean(np.square(small.astype(np.float64)))))
    assert made.peak == pytest.approx(1.0 / size, rel=1e-5)


def test_a_delta_is_measured_by_what_the_part_adds(tensor):
    spoilt = tensor + np.float32(0.01)
    whole = error_map(PLACE, 1.0, spoilt, tensor, None)
    added = error_map(PLACE, 1.0, spoilt, tensor, tensor * np.float32(0.9))
    assert added.peak == pytest.approx(10 * whole.peak, rel=1e-3)


def test_what_is_not_finite_is_full_and_said(tensor):
    spoilt = tensor.copy()
    spoilt[0, 0, 0] = np.nan
    made = error_map(PLACE, 1.0, spoilt, tensor, None)
    assert math.isnan(made.peak)
    assert made.shades[0, 0] == 255
    assert made.shades[1:].max() == 0


def test_vectors_have_no_map():
    assert error_map(PLACE, 1.0, np.ones(8), np.zeros(8), None) is None
    assert error_map(PLACE, 1.0, np.ones((8, 1)), np.zeros((8, 1)), None) is None


def test_the_worst_parts_are_kept_each_once(tensor):
    maps = WorstMaps()
    for part, severity in (("a", 1.0), ("b", 5.0), ("c", 2.0), ("d", 3.0), ("b", 4.0), ("c", 9.0), ("e", 0.0)):
        maps.offer((part, "x", 0, "simulator"), severity, tensor * 2, tensor, None)
    assert [(one.part, one.severity) for one in maps.by_rung["simulator"]] == [("c", 9.0), ("b", 5.0), ("d", 3.0)]
    assert len(maps.to_json()) == MOST_MAPS


def test_a_ladder_keeps_maps_and_another_s(recording):
    ladder, other = recording.compare(), recording.compare()
    known = {rung: len(maps) for rung, maps in ladder.maps.by_rung.items()}
    assert known["interpreter"] == MOST_MAPS
    rows = len(ladder.rows)
    ladder.absorb(other)
    assert len(ladder.rows) == 2 * rows
    assert len(ladder.maps.by_rung["interpreter"]) == 2 * MOST_MAPS
    assert Ladder().maps.to_json() == []


def test_a_doubled_scale_is_a_column_of_the_rung_it_enters_at(recording):
    for step in (0, 1):
        spoilt = recording.part("single.01").run("simulator", step, doubled=(1, 3))
        recording.outputs["single.01", "hidden_states_out", step]["simulator"] = spoilt
    worst = recording.compare().maps.by_rung["simulator"][0]
    assert worst.part == "single.01"
    assert set(np.flatnonzero((worst.shades > 40).any(0))) == {3}


def test_picture_of_a_map(tensor):
    from PIL import Image

    spoilt = tensor.copy()
    spoilt[..., 0] += 1
    made = error_map(PLACE, 1.0, spoilt, tensor, None)
    uri = map_picture(made.to_json())
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert np.array_equal(image[..., 1], made.shades)
    assert image[..., 0].max() == 0
