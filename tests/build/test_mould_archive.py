"""Moulds that travel: from a store with the compiler to one without, and what is refused on the way."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import replace

import pytest

from fluxkiln.artifacts.actions import Action, ActionCache
from fluxkiln.artifacts.store import Store
from fluxkiln.build.mould_archive import MOULDS_FILE, export_moulds, import_moulds, list_moulds
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir import environment
from fluxkiln.compile.toolchains.tpu_mlir.jobs import make_files
from fluxkiln.compile.toolchains.tpu_mlir.moulds import make_mould
from fluxkiln.errors import IntegrityError, ToolchainError, UsageError
from fluxkiln.progress import Laps, Silent
from fluxkiln.settings import Settings
from tests.builds import altered

pytestmark = pytest.mark.tpu_mlir
KINDS = ("double", "single")


def only_blocks(small_build):
    return altered(small_build, parts=tuple(part for part in small_build.parts if part.kind in KINDS))


@pytest.fixture(scope="module")
def filled(small_build, tmp_path_factory):
    """A build of blocks in whose store all of them are, and the file of their moulds."""
    blocks = only_blocks(small_build())
    root = tmp_path_factory.mktemp("travelling")
    shutil.copytree(blocks.cache.store.root, root / "store")
    blocks = altered(replace(blocks, cache=ActionCache(Store(root / "store"))), folder=root / "build")
    made = make_files(*blocks, Settings("bm1684x"), Silent(), Laps())
    export_moulds(blocks.cache.store, root / "moulds.tar")
    return blocks, made, root / "moulds.tar"


@pytest.fixture(scope="module")
def signed(filled, tmp_path_factory):
    """(file, public key): the same file, signed."""
    pytest.importorskip("model_signing", reason="the extra signing is not installed")
    folder = tmp_path_factory.mktemp("signed")
    private, public, tar = folder / "key.pem", folder / "pub.pem", folder / "moulds.tar"
    for command in (
        ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private],
        ["ec", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)
    export_moulds(filled[0].cache.store, tar, sign_key=private)
    return tar, public


def elsewhere_of(blocks, folder):
    return altered(replace(blocks, cache=ActionCache(Store(folder / "store"))), folder=folder / "build")


def stages(store):
    return {str(record["stage"]) for record in ActionCache(store).records()}


def test_what_nobody_signed_is_proven_on_first_use(filled, tmp_path):
    """Template, proof and combined shell are not believed: they are made again, and give the same files."""
    blocks, before, tar = filled
    elsewhere = elsewhere_of(blocks, tmp_path)
    taken = import_moulds(elsewhere.cache.store, tar)
    assert stages(elsewhere.cache.store) == {"mould"}
    assert len(taken) == len(list_moulds(elsewhere.cache.store)) >= len(KINDS)
    made = make_files(*elsewhere, Settings("bm1684x"), Silent(), Laps())
    assert [file.blob for file in made.files] == [file.blob for file in before.files]
    assert elsewhere.cache.counts["mould"] == [len(KINDS), 0]
    assert elsewhere.cache.counts["template"][1] == elsewhere.cache.counts["compile"][1] == len(KINDS)


def test_a_signature_by_another_key_or_none_is_refused(filled, signed, tmp_path):
    tar, public = signed
    other = tmp_path / "other.pem"
    for command in (
        ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", tmp_path / "private.pem"],
        ["ec", "-in", tmp_path / "private.pem", "-pubout", "-out", other],
    ):
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)
    store = Store(tmp_path / "store")
    for file, key, words in ((tar, other, "does not hold for the key"), (filled[2], public, "is not signed, and")):
        with pytest.raises(IntegrityError, match=words):
            import_moulds(store, file, key)
        assert stages(store) == set()
    changed = rewritten(tar, tmp_path / "changed.tar", lambda m: [(m[0][0], m[0][1].replace(b"W4", b"W8")), *m[1:]])
    with pytest.raises(IntegrityError, match="does not hold for the key"):
        import_moulds(store, changed, public)


def test_imported_moulds_need_no_compiler(filled, signed, tmp_path, monkeypatch):
    blocks, before, _ = filled
    monkeypatch.setattr(environment, "installed", lambda: None)
    elsewhere = elsewhere_of(blocks, tmp_path)
    with pytest.raises(ToolchainError, match=r"is not in the store, and TPU-MLIR, which makes it, is not installed in"):
        make_files(*elsewhere, Settings("bm1684x"), Silent(), Laps())
    taken = import_moulds(elsewhere.cache.store, *signed)
    assert {"double_00 W4BF16", "single_00 W4BF16"} <= {entry.what for entry in taken}
    made = make_files(*elsewhere, Settings("bm1684x"), Silent(), Laps())
    assert [file.blob for file in made.files] == [file.blob for file in before.files]
    assert [binary.digest for binary in made.binaries] == [binary.digest for binary in before.binaries]
    counts = elsewhere.cache.counts
    assert counts["mould"] == [len(KINDS), 0]
    assert counts["combine"] == [1, 0]
    assert "compile" not in counts


def test_a_list_says_what_can_be_cast(filled, small_build):
    blocks, *_ = filled
    make_mould(*blocks, make_template(*blocks, "double", "onnx17"))
    moulds = list_moulds(blocks.cache.store)
    # the other form of the block takes its modulation as an input, and is called the same
    double = next(entry for entry in moulds if entry.what == "double_00 W4BF16" and "temb" in entry.inputs)
    assert (double.chip, double.scheme, double.why) == ("bm1684x", "W4BF16", "")
    assert double.weight_bytes > 1_000_000
    assert json.loads(json.dumps(double.to_json()))["castable"] is True


def rewritten(tar, target, change):
    """The tar with `change` applied to its list of (name, data); None leaves a member out."""
    with tarfile.open(tar) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(target, "w") as archive:
        for name, data in change(members):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return target


def flip(members):
    name, data = members[-1]
    return [*members[:-1], (name, data[:-1] + bytes([data[-1] ^ 1]))]


def forge(members):
    """A record whose settings were changed under its old key."""
    index = json.loads(members[0][1])
    index["records"][0]["tools"] = {"torch": "0"}
    return [(MOULDS_FILE, json.dumps(index).encode()), *members[1:]]


def last_mould(change):
    """The last mould of the file changed by `change`, with the key of what it then is made of."""

    def spoil(members):
        index = json.loads(members[0][1])
        record = [record for record in index["records"] if record["stage"] == "mould"][-1]
        change(record)
        record["key"] = Action(*(record[name] for name in INGREDIENTS)).key
        return [(MOULDS_FILE, json.dumps(index).encode()), *members[1:]]

    return spoil


INGREDIENTS = ("stage", "what", "code_version", "inputs", "settings", "tools")
# what came before it in the file was adopted once, and `mould list` failed for good
BAD_MOULDS = {
    "inputs that are none": (lambda r: r["facts"].update(inputs=[3]), "a mould is not in its form"),
    "inputs of another": (lambda r: r["facts"]["inputs"][0].__setitem__(2, [1, 2]), "has the inputs"),
    "no facts": (lambda r: r.update(facts=[]), "does not have that key, outputs and facts"),
    "a size that is none": (lambda r: r["facts"].update(weight_bytes="many"), "a mould is not in its form"),
    "another chip": (lambda r: r["settings"].update(chip="bm1688"), "has the chip bm1684x, its record says bm1688"),
    "another net": (lambda r: r["settings"].update(net="x"), "has the net"),
    "shell and map exchanged": (
        lambda r: r["outputs"].update(shell=r["outputs"]["map"], map=r["outputs"]["shell"]), "is no bmodel",
    ),
    "an output less": (lambda r: r["outputs"].pop("map"), "does not name so"),
    "an output that is none": (lambda r: r["outputs"].update(map=3), "an output without digest"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_MOULDS)
def test_one_bad_record_and_none_is_taken(filled, tmp_path, what):
    change, words = BAD_MOULDS[what]
    spoilt = rewritten(filled[2], tmp_path / "spoilt.tar", last_mould(change))
    store = Store(tmp_path / "store")
    with pytest.raises(IntegrityError, match=words):
        import_moulds(store, spoilt)
    assert stages(store) == set()
    assert list_moulds(store) == []


def test_swapped_templates_are_not_believed(filled, tmp_path):
    """Each record is whole in itself and names the other's graph: it is not taken over."""

    def swap(members):
        index = json.loads(members[0][1])
        one, other = [record for record in index["records"] if record["stage"] == "template"][:2]
        one["outputs"], other["outputs"] = other["outputs"], one["outputs"]
        return [(MOULDS_FILE, json.dumps(index).encode()), *members[1:]]

    store = Store(tmp_path / "store")
    import_moulds(store, rewritten(filled[2], tmp_path / "swapped.tar", swap))
    assert stages(store) == {"mould"}


def test_what_the_store_has_stays(filled, tmp_path):
    """A file of somebody else's does not replace a mould that was made here."""
    store = Store(tmp_path / "store")
    import_moulds(store, filled[2])
    before = {path: path.read_bytes() for path in (store.root / "actions").iterdir()}
    facts = rewritten(filled[2], tmp_path / "other.tar", last_mould(lambda r: r["facts"].update(fused_rope=99)))
    import_moulds(store, facts)
    assert {path: path.read_bytes() for path in (store.root / "actions").iterdir()} == before


def test_a_sparse_member_is_refused(filled, tmp_path):
    """A few bytes that stand for gigabytes: they are not written."""
    target = tmp_path / "sparse.tar"
    with tarfile.open(filled[2]) as archive, tarfile.open(target, "w") as out:
        for number, member in enumerate(archive):
            if number == 1:
                member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": member.name,
                                      "GNU.sparse.realsize": str(3 << 30)}  # fmt: skip
            out.addfile(member, archive.extractfile(member))
    with pytest.raises((IntegrityError, UsageError), match=r"does not name so|is no file of moulds"):
        import_moulds(Store(tmp_path / "store"), target)


SPOILT = {
    "a flipped bit": (flip, IntegrityError, "a blob has sha256:"),
    "a blob is missing": (lambda members: members[:-1], IntegrityError, "ends before sha256:"),
    "one too many": (
        lambda m: [*m, ("blobs/sha256/" + "0" * 64, b"")],
        IntegrityError,
        "holds 'blobs/sha256/0+', which its",
    ),
    "a path that leads out": (lambda m: [*m, ("../../evil", b"x")], IntegrityError, r"holds '\.\./\.\./evil'"),
    "no index": (lambda members: members[1:], UsageError, "does not begin with moulds.json"),
    "an index that is no JSON": (lambda m: [(m[0][0], b"["), *m[1:]], UsageError, "is not valid JSON"),
    "another format": (lambda m: [(MOULDS_FILE, b'{"format": "x"}'), *m[1:]], UsageError, "is not of the format"),
    "a forged record": (forge, IntegrityError, "its ingredients have"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_files_are_refused_and_leave_nothing(filled, tmp_path, what):
    change, error, sentence = SPOILT[what]
    spoilt = rewritten(filled[2], tmp_path / "spoilt.tar", change)
    store = Store(tmp_path / "store")
    with pytest.raises(error, match=sentence):
        import_moulds(store, spoilt)
    assert list_moulds(store) == []
    assert not (tmp_path / "evil").exists()
    # the control: nothing but the change was wrong
    assert import_moulds(store, rewritten(filled[2], tmp_path / "same.tar", lambda members: members))


def test_what_is_no_tar_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"not a tar" * 100)
    with pytest.raises(UsageError, match="is no file of moulds"):
        import_moulds(Store(tmp_path / "store"), tmp_path / "x")
    with pytest.raises(UsageError, match="has no moulds for bm1688; fluxkiln mould build makes some"):
        export_moulds(Store(tmp_path / "store"), tmp_path / "y", "bm1688")
    assert not (tmp_path / "y").exists()
