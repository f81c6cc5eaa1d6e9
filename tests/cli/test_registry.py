"""`publish`, `pull`, `tag`, `ls`, `diff`, `inspect REF` and `cache gc` as commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fluxkiln.artifacts.bundle import write_bundle
from fluxkiln.artifacts.store import open_store
from tests.hostile.forged import forge


@pytest.fixture
def built(built) -> Path:
    """The build of the other tests, of schnell: nobody has to accept anything for it."""
    forge(built / "bundle", lambda document: document.update(variant="schnell"))
    return built


@pytest.fixture
def reference(tmp_path) -> str:
    return f"oci-layout:{tmp_path / 'layout'}:v1"


def test_publish_and_pull_as_documents(fluxkiln, built, reference, tmp_path):
    done = fluxkiln("publish", built, reference, "--json")
    assert done.code == 0
    assert done.document["reference"] == reference
    assert (done.document["parity"], done.document["signed"]) == ("passed", False)
    assert "transformer.bmodel" in done.document["sent_files"]
    again = fluxkiln("publish", built / "bundle", reference, "--json").document
    assert (again["sent"], again["sent_files"], again["digest"]) == (0, [], done.document["digest"])
    pulled = fluxkiln("pull", reference, tmp_path / "out", "--json").document
    assert pulled["digest"] == done.document["digest"]
    assert (pulled["signature"], pulled["parity"]) == ("unsigned", "passed")
    assert fluxkiln("verify", tmp_path / "out").code == 0
    assert fluxkiln("inspect", tmp_path / "out").code == 0


def test_what_is_larger_than_allowed_is_not_pulled(fluxkiln, built, reference, tmp_path):
    size = fluxkiln("publish", built, reference, "--json").document["size"]
    refused = fluxkiln("pull", reference, tmp_path / "out", "--max-size", f"{size - 1}B")
    assert refused.code == 2
    assert f"has {size} bytes, at most {size - 1} were allowed; give --max-size more" in refused.error
    assert not (tmp_path / "out").exists()
    assert fluxkiln("pull", reference, tmp_path / "out", "--max-size", "much").code == 2
    assert fluxkiln("pull", reference, tmp_path / "out", "--max-size", f"{size}B").code == 0


def test_publish_and_pull_for_people(fluxkiln, built, reference, tmp_path):
    published, pulled = fluxkiln("publish", built, reference), fluxkiln("pull", reference, tmp_path / "out")
    assert "unsigned" in published.out
    assert "unsigned: nothing but the registry vouches" in pulled.out
    assert "push: " in published.err
    assert "pull: " in pulled.err
    assert "passed" in pulled.out


def test_without_a_tag_the_target_is_the_tag(fluxkiln, built, reference):
    place = reference.removesuffix(":v1")
    assert fluxkiln("publish", built, place, "--json").document["reference"] == f"{place}:bm1684x"


def test_ls_tag_and_inspect(fluxkiln, built, reference):
    digest = fluxkiln("publish", built, reference, "--json").document["digest"]
    place = reference.removesuffix(":v1")
    assert fluxkiln("tag", reference, "latest", "--json").document == {"reference": f"{place}:latest", "digest": digest}
    rows = fluxkiln("ls", place, "--json").document["tags"]
    assert [(row["tag"], row["digest"], row["parity"], row["signed"]) for row in rows] == [
        ("latest", digest, "passed", False), ("v1", digest, "passed", False),
    ]  # fmt: skip
    assert fluxkiln("ls", place).out.splitlines()[0].split()[:3] == ["tag", "name", "target"]
    found = fluxkiln("inspect", reference, "--json").document
    assert found["published"]["digest"] == digest
    assert found["summary"] == fluxkiln("inspect", built, "--json").document["summary"]
    assert digest in fluxkiln("inspect", reference).out


def test_diff(fluxkiln, built, reference, store, tmp_path):
    fluxkiln("publish", built, reference)
    assert fluxkiln("diff", reference, built).out == "no difference\n"
    manifest = json.loads((built / "bundle" / "manifest.json").read_bytes())
    files = {"transformer.bmodel": store.add_bytes(b"new"), "LICENSE": store.add_bytes(b"licence text")}
    for key in ("digest", "schema_version", "files"):
        del manifest[key]
    manifest["parts"][0]["scheme"] = "BF16"
    manifest["parity"]["rows"] = 13
    write_bundle(tmp_path / "other", files, manifest, store)
    document = fluxkiln("diff", reference, tmp_path / "other", "--json").document
    assert document["same"] is False
    assert document["parts"]["changed"] == {"double.00": {"scheme": {"from": "W4BF16", "to": "BF16"}}}
    assert document["files"]["removed"] == ["tokenizer/vocab.json"]
    shown = fluxkiln("diff", reference, tmp_path / "other").out
    assert [line.split() for line in shown.splitlines() if "double.00" in line] == [
        ["parts", "double.00", "scheme", "W4BF16", "BF16"]
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["pull", "oci-layout:none:v1", "out"], 2, "none is no OCI image layout"),
        (["pull", "nowhere", "out"], 2, "begins with no host"),
        (["pull", "ghcr.io/a/b", "out"], 2, "has no tag"),
        (["pull", "LAYOUT:v9", "out"], 2, "no tag 'v9'"),
        (["pull", "LAYOUT:v1", "out", "--require-signature"], 2, "add --verify KEY"),
        (["pull", "LAYOUT:v1", "out", "--verify", "nokey"], 4, "without a signature"),
        (["pull", "LAYOUT:v1", "out", "--transfers", "0"], 2, "at least 1 is needed"),
        (["publish", "nothing", "LAYOUT:v2"], 2, "nothing does not exist; give the folder of a bundle"),
        (["publish", "BUILT", "LAYOUT:v2", "--sign", "nokey"], 2, "there is no such file"),
        (["publish", "BUILT", "LAYOUT:v2", "--accept-license", "mit"], 2, "no licence is called 'mit'"),
        (["publish", "BUILT"], 2, "REF is missing"),
        (["ls", "oci-layout:none"], 2, "no OCI image layout"),
        (["inspect", "oci-layout:none:v1"], 2, "no OCI image layout"),
        (["diff", "LAYOUT:v1", "none"], 2, "begins with no host"),
        (["cache", "gc", "--older-than", "-1"], 2, "0 or more"),
        (["cache", "gc", "--older-than", "nan"], 2, "0 or more"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_sentence(fluxkiln, built, reference, tmp_path, arguments, code, sentence):
    fluxkiln("publish", built, reference)
    layout = reference.removesuffix(":v1")
    given = [argument.replace("LAYOUT", layout).replace("BUILT", str(built)) for argument in arguments]
    run = fluxkiln(*given)
    assert (run.code, run.out) == (code, "")
    assert run.err.startswith("error: ")
    assert sentence in run.err
    assert run.err.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []
    assert list(open_store(tmp_path / "layout").tags()) == ["v1"]


def test_what_is_damaged_ends_with_4_and_names_the_file(fluxkiln, built, reference, tmp_path):
    fluxkiln("publish", built, reference)
    layout = open_store(tmp_path / "layout")
    layers = fluxkiln("inspect", reference, "--json").document["published"]["layers"]
    digest = next(layer["digest"] for layer in layers if layer["path"] == "transformer.bmodel")
    layout.path(digest).chmod(0o644)
    layout.path(digest).write_bytes(b"nEt" * 1000)
    run = fluxkiln("pull", reference, tmp_path / "out")
    assert run.code == 4
    assert "transformer.bmodel" in run.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_parity_that_failed_ends_with_3(fluxkiln, built, reference, store):
    manifest = json.loads((built / "bundle" / "manifest.json").read_bytes())
    files = {entry["path"]: built / "bundle" / entry["path"] for entry in manifest["files"]}
    for key in ("digest", "schema_version", "files"):
        del manifest[key]
    manifest["parity"] = {"verified": True, "passed": False, "rows": 3, "failed_rows": 1, "failure": "double.00"}
    write_bundle(built.parent / "failed" / "bundle", files, manifest, store)
    run = fluxkiln("publish", built.parent / "failed", reference)
    assert run.code == 3
    assert "--allow-failed-parity" in run.err
    run = fluxkiln("publish", built.parent / "failed", reference, "--allow-failed-parity")
    assert run.code == 0
    assert "FAILED" in run.out
    assert "failed" in fluxkiln("ls", reference.removesuffix(":v1")).out


def test_gc(fluxkiln, store):
    blob = store.add_bytes(b"loose")
    os.utime(store.path(blob.digest), (0, 0))
    young = store.add_bytes(b"young")
    options = ("--store", store.root, "--json")
    dry = fluxkiln("cache", "gc", "--dry-run", *options).document
    assert (dry["removed"], dry["young"], store.has(blob)) == ([blob.digest], 1, True)
    assert fluxkiln("cache", "gc", *options).document["removed"] == [blob.digest]
    assert (store.has(blob), store.has(young)) == (False, True)
    shown = fluxkiln("cache", "gc", "--store", store.root, "--older-than", "0").out
    assert "1 blob, 5 B, removed; 0 blobs kept" in shown


def test_nothing_heavy_is_imported(built, reference, repository, tmp_path):
    """Pushing and pulling gigabytes takes some 40 MB, of which an import of torch or numpy would make hundreds."""
    script = (
        "import sys\nfrom fluxkiln.build import publish\nfrom fluxkiln.cli.main import main\n"
        "from fluxkiln.artifacts.intact import read_bundle\n"
        "publish.open_bundle = lambda folder, progress=None: read_bundle(folder)  # no toolchain knows its parts\n"
        "code = main(['publish', sys.argv[1], sys.argv[2]]) or main(['pull', sys.argv[2], sys.argv[3]])\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'huggingface_hub', 'rich', 'model_signing'}\n"
        "sys.exit(code or ', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    command = [sys.executable, "-c", script, str(built), reference, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_publish_target_by_name_and_make(repository):
    """`make publish` is thin: it hands its variables to the command."""
    given = ["REGISTRY=localhost:5000/me/x:v1", "TARGET=cpu", "ACCEPT_LICENSE=flux-1-dev", "MODEL=it's"]
    done = subprocess.run(
        ["make", "--dry-run", "publish", *given], cwd=repository, capture_output=True, text=True, check=True
    )
    line = " ".join(done.stdout.replace("\\\n", " ").split())
    assert "fluxkiln publish 'cpu' 'localhost:5000/me/x:v1' --accept-license='flux-1-dev' --model='it'\\''s'" in line
