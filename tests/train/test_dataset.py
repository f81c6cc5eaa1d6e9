"""What a data set may be, and what is said of one that cannot be trained on."""

import json

import pytest
from PIL import Image

from fluxkiln.errors import DatasetError, ToolchainError, UsageError
from fluxkiln.train.dataset import read_dataset


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return tmp_path


def write(folder, *lines):
    (folder / "train.jsonl").write_text("\n".join(lines))
    return str(folder)


GOOD = '{"image": "a.png", "prompt": "a red square"}'


def test_lines_are_samples_and_empty_ones_are_not(folder):
    (sample,) = read_dataset(write(folder, "", GOOD, ""))
    digest, picture = sample.open()
    assert sample.prompt == "a red square"
    assert picture.size == (8, 8)
    assert len(digest) == 64


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{nonsense", "line 2 is not valid JSON"),
        ("[1]", "line 2 holds a JSON list, no object; a line is an object like"),
        ('{"image": "a.png"}', "line 2 has None as prompt"),
        ('{"image": 3, "prompt": "x"}', "line 2 has 3 as image"),
        ('{"image": "a.png", "prompt": " "}', "line 2 has ' ' as prompt"),
        ('{"image": "b.png", "prompt": "x"}', "line 2 names b.png, which is not in"),
    ],
)
def test_a_wrong_line_is_named(folder, line, said):
    with pytest.raises(DatasetError, match=said):
        read_dataset(write(folder, GOOD, line))


def test_a_broken_picture_is_named_with_its_line(folder):
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:40])
    samples = read_dataset(write(folder, GOOD, GOOD.replace("a.png", "b.png")))
    with pytest.raises(DatasetError, match=r"line 2 \(b.png\): the picture cannot be read .*; replace the file"):
        samples[1].open()


def test_a_data_set_without_lines_is_refused(folder):
    with pytest.raises(DatasetError, match=r"has no pictures; write a line for each into train\.jsonl"):
        read_dataset(write(folder, "\n"))


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is no data set: a name that cannot be fetched, and no folder"):
        read_dataset(str(tmp_path / "nothing"))


def test_without_the_library_a_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ToolchainError, match=r"`datasets` is needed .*pip install 'fluxkiln"):
        read_dataset(str(tmp_path))


def test_pictures_as_datasets_has_them(folder, monkeypatch, tmp_path_factory):
    """A folder of pictures with metadata, which `datasets` itself calls imagefolder."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a red square"}) + "\n")
    (sample,) = read_dataset(str(folder))
    assert sample.prompt == "a red square"
    assert sample.open()[1].size == (8, 8)
