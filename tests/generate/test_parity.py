"""A recording that travels with a bundle, and what it finds where the bundle is executed."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.artifacts.intact import read_manifest
from fluxkiln.build.make import build, plan
from fluxkiln.cli.main import main
from fluxkiln.compile.opener import open_bundle
from fluxkiln.compile.toolchain import open_executor
from fluxkiln.errors import IntegrityError, ParityError, UsageError
from fluxkiln.generate.parity import choose_replayed, open_carried, replay_bundle
from fluxkiln.settings import Settings
from fluxkiln.verify.gates import DEVICE
from fluxkiln.verify.reference import read_recording


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return Settings(
        "cpu", "tiny-dev", size=((32, 32),), tokens=(16,), components=("transformer",), scheme="W4BF16",
        recording=("double_modulated", "tail"), build_dir=tmp_path_factory.mktemp("build"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(settings):
    return build(settings)


@pytest.fixture(scope="module")
def bundle(built):
    return open_bundle(built.bundle)


class Changed:
    """An executor whose outputs are changed on the way."""

    name = "changed"

    def __init__(self, inner, change):
        self._inner, self._change, self._last = inner, change, None

    def __call__(self, part, inputs):
        made = self._change(self, part, self._inner(part, inputs))
        self._last = made
        return made

    def drop(self, part):
        self._inner.drop(part)


def test_what_travels(bundle, built, settings):
    recording = open_carried(bundle)
    assert list(recording.calls) == ["double.00", "double.01", "tail"]
    assert recording.below == dict.fromkeys(recording.calls, "executed")
    listed = {file.path for file in read_manifest(built.bundle).files if file.path.startswith("recording/")}
    there = {str(path.relative_to(built.bundle)) for path in (built.bundle / "recording").rglob("*") if path.is_file()}
    assert listed == there
    assert build(settings).nothing_to_do


def test_replayed(bundle):
    executor = open_executor(bundle, "ort")
    found = replay_bundle(bundle, executor)
    executor.close()
    rows = found.ladder.rows
    assert {row.at for row in rows} == {DEVICE}
    assert {row.part for row in rows} == {"double.00", "double.01", "tail"}
    assert {row.step for row in rows} == {0, 1}
    assert all(row.passed and row.previous == "executed" for row in rows)
    # the very sessions that verification ran
    assert max(row.vs_previous.relative_l2 for row in rows) < 1e-6
    assert found.milliseconds.keys() == {"double.00", "double.01", "tail"}


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("previous step", lambda self, part, made: self._last or made),
        ("scale", lambda self, part, made: {name: 1.05 * array for name, array in made.items()}),
        ("nothing", lambda self, part, made: {name: np.full_like(array, np.nan) for name, array in made.items()}),
    ],
)
def test_gates_decide(bundle, what, change):
    inner = open_executor(bundle, "ort")
    found = replay_bundle(bundle, Changed(inner, change), ["tail"])
    inner.close()
    with pytest.raises(ParityError, match=r"first bad rung: device, worst in tail"):
        found.ladder.raise_if_failed("report.html")


def test_command(bundle, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["parity", str(bundle.folder), "--executor", "ort", "--parts", "tail", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"]
    assert list(document["parts"]) == ["tail"]
    report = json.loads((tmp_path / "parity" / "report.json").read_text())
    assert {(row["rung"], row["previous"]) for row in report["rows"]} == {("device", "executed")}
    assert "measured_ms" in report["parts"][0]
    monkeypatch.setattr(
        "fluxkiln.generate.parity.run_rows",
        lambda run, part, inputs: {name: 2 * array for name, array in run(part.name, inputs).items()},
    )
    assert main(["parity", str(bundle.folder), "--parts", "tail"]) == 3
    assert "first bad rung: device" in capsys.readouterr().err


def test_refused(bundle, settings, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"--parts single.00: the recording has none of it; it has double.00"):
        choose_replayed(bundle, open_carried(bundle), ["single.00"])
    with pytest.raises(UsageError, match="--with-recording doubel: no part is called so, and no kind; give all"):
        plan(replace(settings, recording=("doubel",)))
    with pytest.raises(UsageError, match="drop either"):
        replace(settings, verify=False)
    shutil.copytree(bundle.folder, copy := tmp_path / "bundle")
    shutil.rmtree(copy / "recording")
    with pytest.raises(UsageError, match="has no recording; build it again with --with-recording all"):
        open_carried(replace(bundle, folder=copy))
    assert main(["parity", str(copy)]) == 4


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"fingerprint": "0" * 64}, "is the recording of another bundle"),
        ({"shapes": {"height": 64, "width": 32, "tokens": 16}}, "is the recording of another bundle"),
        ({"calls": {"tail": [{"inputs": {"temb": "../../../etc/passwd"}}]}}, "does not match|matching regex|pattern"),
        ({"calls": {"double.00": 3}}, "expected array"),
        ({"calls": {"elsewhere": []}}, "is the recording of another bundle"),
    ],
)
def test_recordings_of_strangers(bundle, tmp_path, change, fault):
    shutil.copytree(bundle.folder, copy := tmp_path / "bundle")
    index = json.loads((copy / "recording" / "recording.json").read_text())
    (copy / "recording" / "recording.json").write_text(json.dumps(index | change))
    with pytest.raises(IntegrityError, match=fault):
        open_carried(replace(bundle, folder=copy))


def test_a_recording_of_all_is_a_recording(bundle):
    recording = read_recording(bundle.folder / "recording")
    assert recording.inputs("tail", 1).keys() == recording.inputs("tail", 0).keys()
    assert recording.made_below("tail").keys() == recording.outputs("tail").keys()
