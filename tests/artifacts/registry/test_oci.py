"""Against Debian's docker-registry, with skopeo as the independent client."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess

import pytest

from fluxkiln.artifacts.intact import read_bundle
from fluxkiln.artifacts.registry import oci
from fluxkiln.artifacts.registry.distribution import look_up, push, quarantine_of
from fluxkiln.artifacts.registry.oci import add_hints, open_registry
from fluxkiln.artifacts.registry.place import parse_reference
from fluxkiln.artifacts.registry.session import AuthorizationError
from fluxkiln.artifacts.registry.transfer import Patience, Stop
from fluxkiln.artifacts.store import open_store
from fluxkiln.build.publish import Transfers, _compose, list_tags, publish_bundle, pull_bundle, tag_reference
from fluxkiln.errors import IntegrityError, RegistryError, UsageError

pytestmark = pytest.mark.registry

QUICK = Transfers(patience=Patience(3, 2.0, 2.0, 0.01, 0.05))
SECRET = "correct horse battery staple"


def log_in(config, host: str, user: str, password: str) -> None:
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    config.write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def skopeo(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    return subprocess.run(["skopeo", "--policy", str(policy), *arguments], capture_output=True, check=False)


def test_there_and_back(build, start_registry, tmp_path, tree):
    reference = f"{start_registry().host}/group/tiny:v1"
    folder = build(files={"large.data": os.urandom(5 << 20), "empty": b""})
    done = publish_bundle(folder, reference)
    assert done.pushed.present == 0
    pulled = pull_bundle(reference, tmp_path / "out")
    assert pulled.found.document == done.document
    bundle = tree(folder / "bundle")
    del bundle["build.json"]
    assert tree(tmp_path / "out" / "bundle") == bundle
    by_digest = f"{reference.rsplit(':', 1)[0]}@{done.document.digest}"
    assert pull_bundle(by_digest, tmp_path / "again").found.document == done.document


def test_only_what_changed_is_sent_and_counted(build, start_registry):
    reference = f"{start_registry().host}/group/tiny"
    first = publish_bundle(build("one", files={"large.data": b"L" * (2 << 20)}), f"{reference}:v1")
    assert first.pushed.sent == sum(layer.size for layer in first.document.layers) + first.document.config.size
    again = publish_bundle(build("one", files={"large.data": b"L" * (2 << 20)}), f"{reference}:v1")
    assert (again.pushed.files, again.pushed.sent) == ((), 0)
    folder = build("two", files={"large.data": b"L" * (2 << 20), "transformer.bmodel": b"new" * 1000})
    other = publish_bundle(folder, f"{reference}:v2")
    changed = ("manifest.json", "provenance.json", "transformer.bmodel")
    assert other.pushed.files == changed
    sizes = {layer.path: layer.size for layer in other.document.layers}
    assert other.pushed.sent == sum(sizes[path] for path in changed) + other.document.config.size


def test_another_repository_takes_over_what_the_registry_has(build, start_registry, tmp_path):
    server = start_registry()
    large = {"large.data": b"L" * (2 << 20)}
    publish_bundle(build("one", files=large), f"{server.host}/group/one:v1")
    folder = build("two", files={**large, "transformer.bmodel": b"new" * 1000})
    other = publish_bundle(folder, f"{server.host}/group/two:v1")
    assert other.pushed.sent < 20_000
    pull_bundle(f"{server.host}/group/two:v1", tmp_path / "out")
    # Hints that are wrong cost nothing but a question.
    fresh = start_registry("fresh")
    add_hints(fresh.host, "group/one", [layer.digest for layer in other.document.layers])
    assert publish_bundle(folder, f"{fresh.host}/group/two:v1").pushed.sent > 2 << 20
    pull_bundle(f"{fresh.host}/group/two:v1", tmp_path / "again")


def test_a_file_changed_since_is_noticed_also_when_nothing_is_sent(build, start_registry):
    server = start_registry()
    publish_bundle(build("one"), f"{server.host}/one:v1")
    folder = build("two")
    path = folder / "bundle" / "text_encoder" / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"clip", b"clap", 1))
    for repository in ("one", "two"):
        with pytest.raises(IntegrityError, match=r"model\.onnx: sha256:\w+, the manifest says"):
            publish_bundle(folder, f"{server.host}/{repository}:v2")
    assert list(list_tags(f"{server.host}/one")[1]) == ["v1"]


def test_tags_and_repositories_that_are_not_there(build, start_registry):
    server = start_registry()
    publish_bundle(build(), f"{server.host}/tiny:v1")
    tag_reference(f"{server.host}/tiny:v1", "latest")
    assert list(list_tags(f"{server.host}/tiny")[1]) == ["latest", "v1"]
    with pytest.raises(UsageError, match=r"no tag or manifest 'v9'; `fluxkiln ls"):
        pull_bundle(f"{server.host}/tiny:v9", server.root / "out")
    with pytest.raises(UsageError, match="no repository"):
        list_tags(f"{server.host}/none")


def test_many_tags_come_in_pages(build, start_registry, monkeypatch):
    server = start_registry()
    publish_bundle(build(), f"{server.host}/tiny:v0")
    for number in range(1, 7):
        tag_reference(f"{server.host}/tiny:v0", f"v{number}")
    place = open_registry(parse_reference(f"{server.host}/tiny:v0"))
    ask = place._session.ask
    monkeypatch.setattr(
        place._session,
        "ask",
        lambda method, url, **more: ask(method, f"{url}?n=2" if "list" in url and "?" not in url else url, **more),
    )
    assert sorted(place.tags()) == [f"v{number}" for number in range(7)]
    place.close()


def test_large_blobs_go_in_chunks(build, start_registry, tmp_path, monkeypatch):
    server = start_registry()
    folder = build(files={"large.data": os.urandom((1 << 20) + 17)})
    reference = parse_reference(f"{server.host}/tiny:v1")
    from fluxkiln.artifacts.intact import read_manifest
    from fluxkiln.build.publish import Terms

    document, config, sources = _compose(folder / "bundle", read_manifest(folder / "bundle"), b"", Terms())
    place = open_registry(reference)
    monkeypatch.setattr(oci, "CHUNK_BYTES", 100_000)
    done = push(place, document, config, sources, "v1", stop=Stop())
    assert done.sent == sum(layer.size for layer in document.layers) + document.config.size
    assert look_up(place, "v1").document == document
    place.close()
    pull_bundle(str(reference), tmp_path / "out")


def test_no_login_the_wrong_one_and_the_right_one(build, start_registry, own_credentials, tmp_path, capfd):
    server = start_registry(ann=SECRET)
    folder, reference = build(), f"{server.host}/tiny:v1"
    with pytest.raises(AuthorizationError, match=rf"asks for a login.*docker login {server.host}"):
        publish_bundle(folder, reference)
    log_in(own_credentials, server.host, "ann", "a wrong guess")
    with pytest.raises(AuthorizationError, match="does not accept the credential of ann") as found:
        publish_bundle(folder, reference)
    assert "a wrong guess" not in str(found.value)
    log_in(own_credentials, "elsewhere.example", "ann", SECRET)
    with pytest.raises(AuthorizationError, match="asks for a login"):
        publish_bundle(folder, reference)
    log_in(own_credentials, server.host, "ann", SECRET)
    publish_bundle(folder, reference)
    pull_bundle(reference, tmp_path / "out")
    shown = "".join(capfd.readouterr())
    for secret in (SECRET, base64.b64encode(f"ann:{SECRET}".encode()).decode()):
        assert secret not in shown
        assert not [
            path for path in (tmp_path / "out").rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
        ]


def test_a_credential_helper_is_asked(build, start_registry, own_credentials, tmp_path, monkeypatch):
    server = start_registry(ann=SECRET)
    helper = tmp_path / "bin" / "docker-credential-tests"
    helper.parent.mkdir()
    answer = json.dumps({"ServerURL": server.host, "Username": "ann", "Secret": SECRET})
    helper.write_text(f"#!/bin/sh\n[ \"$1\" = get ] && [ \"$(cat)\" = '{server.host}' ] && echo '{answer}'\n")
    helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    own_credentials.write_text(json.dumps({"credHelpers": {server.host: "tests"}}))
    publish_bundle(build(), f"{server.host}/tiny:v1")


def test_a_read_only_registry_is_named(build, start_registry):
    server = start_registry(read_only=True)
    with pytest.raises(RegistryError, match="read-only"):
        publish_bundle(build(), f"{server.host}/tiny:v1", transfers=QUICK)


def test_no_registry_there(build, unused_port):
    with pytest.raises(RegistryError, match=r"cannot be reached; tried 3 times"):
        publish_bundle(build(), f"127.0.0.1:{unused_port}/tiny:v1", transfers=QUICK)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_byte_flipped_on_the_servers_disk_is_found(build, start_registry, tmp_path):
    """The server itself does not look."""
    server = start_registry()
    done = publish_bundle(build(), f"{server.host}/tiny:v1")
    layer = done.document.find("transformer.bmodel")
    path = server.blob(layer.digest)
    data = bytearray(path.read_bytes())
    data[1234] ^= 4
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"transformer\.bmodel .*fetched again: it is damaged there") as found:
        pull_bundle(f"{server.host}/tiny:v1", tmp_path / "out")
    assert found.value.exit_code == 4
    assert not (tmp_path / "out").exists()
    assert [path.read_bytes() for path in quarantine_of(tmp_path / "out").iterdir()] == [bytes(data)]


@pytest.mark.parametrize("which", ["manifest", "config"])
def test_a_manifest_or_config_flipped_on_the_servers_disk_is_found(build, start_registry, tmp_path, which):
    server = start_registry()
    done = publish_bundle(build(), f"{server.host}/tiny:v1")
    path = server.blob(done.document.digest if which == "manifest" else done.document.config.digest)
    data = path.read_bytes()
    assert data.count(b"tiny-dev") == 1
    path.write_bytes(data.replace(b"tiny-dev", b"tiny-dEv"))
    server.kill()
    server.start()
    with pytest.raises((IntegrityError, RegistryError, UsageError)):
        pull_bundle(f"{server.host}/tiny:v1", tmp_path / "out", transfers=QUICK)
    assert not (tmp_path / "out").exists()


def test_a_blob_that_vanished_after_it_was_promised_is_sent_again(build, start_registry, tmp_path, monkeypatch):
    server = start_registry()
    folder = build()
    reference = f"{server.host}/tiny:v1"
    asked = []
    with monkeypatch.context() as patched:
        patched.setattr(oci.OciPlace, "has", lambda self, layer: asked.append(layer) or True)
        done = publish_bundle(folder, reference)
    assert asked
    assert done.pushed.present == 0
    pull_bundle(reference, tmp_path / "out")


def test_skopeo_copies_what_was_pushed_and_reads_our_layout(build, start_registry, tmp_path):
    server = start_registry()
    folder = build(files={"large.data": os.urandom(2 << 20)})
    done = publish_bundle(folder, f"{server.host}/tiny:v1")
    source = f"docker://{server.host}/tiny:v1"
    raw = skopeo(tmp_path, "inspect", "--raw", "--tls-verify=false", source)
    assert raw.stdout == done.document.data
    copied = skopeo(tmp_path, "copy", "--src-tls-verify=false", source, f"oci:{tmp_path / 'copied'}:v1")
    assert copied.returncode == 0, copied.stderr
    # A layout that another program wrote.
    pulled = pull_bundle(f"oci-layout:{tmp_path / 'copied'}:v1", tmp_path / "out")
    assert pulled.found.document == done.document
    # And one that we wrote, into the registry.
    publish_bundle(folder, f"oci-layout:{tmp_path / 'layout'}:v1")
    target = f"docker://{server.host}/other:v2"
    back = skopeo(tmp_path, "copy", "--dest-tls-verify=false", f"oci:{tmp_path / 'layout'}:v1", target)
    assert back.returncode == 0, back.stderr
    assert pull_bundle(f"{server.host}/other:v2", tmp_path / "third").found.document == done.document
    read_bundle(tmp_path / "third" / "bundle")


def test_skopeo_refuses_what_was_tampered_with(build, tmp_path):
    """The negative control of the independent client."""
    done = publish_bundle(build(), f"oci-layout:{tmp_path / 'layout'}:v1")
    path = open_store(tmp_path / "layout").path(done.document.find("transformer.bmodel").digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"n", b"m", 1))
    copied = skopeo(tmp_path, "copy", f"oci:{tmp_path / 'layout'}:v1", f"oci:{tmp_path / 'copied'}:v1")
    assert copied.returncode != 0
    assert b"igest did not match" in copied.stderr
