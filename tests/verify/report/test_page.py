"""What a page carries of its document."""

from __future__ import annotations

import base64
import gzip
import json

from fluxkiln.verify.ladder import row_to_dict
from fluxkiln.verify.report.page import compact_json, embed_document, static_rows


def test_small_documents_are_json_without_markup():
    document = {"title": "</script><b>&\u2028", "images": {"reference": "data:"}, "value": float("inf")}
    embedded = embed_document(document)
    assert not embedded.packed
    assert not set("<>&\u2028") & set(embedded.text)
    assert json.loads(embedded.text) == {"title": document["title"], "value": "Infinity"}


def test_large_documents_are_packed(monkeypatch):
    monkeypatch.setattr("fluxkiln.verify.report.page.MOST_PLAIN_BYTES", 100)
    document = {"rows": [{"part": f"double.{i:02d}"} for i in range(50)]}
    embedded = embed_document(document)
    assert embedded.packed
    assert json.loads(gzip.decompress(base64.b64decode(embedded.text))) == document
    assert embed_document(document) == embedded, "the same bytes each time"


def test_pictures_of_runs_are_left_out_and_their_numbers_stay():
    entry = {"prompt": "a", "seed": 0, "psnr": 30.0, "reference": "data:x", "actual": "data:y"}
    kept = json.loads(embed_document({"runs": {"steps": 2, "entries": [entry]}}).text)
    assert kept == {"runs": {"steps": 2, "entries": [{"prompt": "a", "seed": 0, "psnr": 30.0}]}}
    assert "reference" in entry, "the document itself is not changed"


def test_the_rows_that_stand_in_a_page_are_the_worst_in_order(recording):
    recording.outputs["double.01", "hidden_states_out", 0]["simulator"][0, 0] += 100
    ladder = recording.compare()
    rows = [row_to_dict(row, ladder.gates) for row in ladder.rows]
    assert static_rows(rows) == rows
    few = static_rows(rows, 10)
    assert len(few) == 10
    places = [rows.index(row) for row in few]
    assert places == sorted(places)
    assert any(not row["passed"] for row in few)
    used = max(v["excess"] for v in few[0]["verdicts"])
    assert used > 0.1


def test_numbers_json_has_not():
    assert compact_json({"a": float("nan"), "b": [-float("inf")]}) == '{"a":"NaN","b":["-Infinity"]}'
