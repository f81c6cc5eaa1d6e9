"""Whatever bytes a reader is given, it takes them or says in a sentence why not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.hostile.readers import READERS, samples, survives
from tests.hostile.spoiled import spoiled

ROOT = Path(__file__).parents[2]
SECONDS = 40  # of a reader under atheris
EXAMPLES = 60
MORE_EXAMPLES = 2000


@pytest.mark.parametrize("name", READERS)
def test_samples_are_taken(name, tmp_path):
    for number, data in enumerate(samples(name)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert survives(name, data, folder)


@pytest.mark.parametrize("count", [EXAMPLES, pytest.param(MORE_EXAMPLES, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", READERS)
def test_spoiled_input_is_refused_in_a_sentence(name, count):
    @settings(
        max_examples=count, deadline=None, database=None, derandomize=count == EXAMPLES,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=spoiled(samples(name), READERS[name].document))
    def spoil(data):
        with tempfile.TemporaryDirectory() as folder:
            survives(name, data, Path(folder))

    spoil()


@pytest.mark.thorough
@pytest.mark.parametrize("name", READERS)
def test_coverage_finds_no_bytes_either(name, tmp_path):
    command = [
        sys.executable, "-m", "tests.hostile.fuzz", name, str(tmp_path), f"-max_total_time={SECONDS}", "-timeout=25",
        "-rss_limit_mb=3000", "-max_len=200000", f"-artifact_prefix={tmp_path}/",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    assert "Done" in done.stderr


def test_a_file_whose_name_is_no_text_is_refused(tmp_path):
    """protobuf gives bytes for a string that is no UTF-8."""
    data = next(one for one in samples("graph") if b"location" in one)
    start = data.index(b"location") + len(b"location") + 2  # behind the value's tag and length
    assert survives("graph", data, tmp_path / "good")
    assert not survives("graph", data[:start] + b"\xff" + data[start + 1 :], tmp_path / "bad")


def test_a_bug_is_seen(monkeypatch):
    """The control: a reader that raises something else fails."""
    monkeypatch.setitem(READERS, "broken", type(READERS["bmodel"])(lambda data, folder: {}[data]))
    with pytest.raises(KeyError):
        survives("broken", b"", Path())
