"""Against a stub of the Hugging Face Hub: huggingface_hub itself is real, what answers it is a few lines of ours.

No Hub can be installed, so these tests prove the order of what we do and our handling of answers, not that the Hub
answers so. That is for the test marked `hub`, which talks to huggingface.co when it is asked to.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
from urllib.parse import unquote

import httpx2
import huggingface_hub
import pytest

from fluxkiln.artifacts.registry import hub
from fluxkiln.artifacts.registry.session import AuthorizationError, Session
from fluxkiln.artifacts.registry.transfer import Patience
from fluxkiln.build.publish import Transfers, list_tags, publish_bundle, pull_bundle, tag_reference
from fluxkiln.errors import IntegrityError, RegistryError, UsageError

TOKEN = "hf_stub_token"
QUICK = Transfers(patience=Patience(2, 1.0, 1.0, 0.01, 0.01))


class StubHub:
    """Commits, branches and tags of repositories in memory. `log`: what was asked for that changes something."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.created = False
        self.log: list[str] = []
        self.elsewhere: list[str | None] = []
        self.damage: str | None = None
        self.token = TOKEN

    def commit(self, tree: dict[str, bytes]) -> str:
        sha = hashlib.sha1(json.dumps([len(self.commits), sorted(tree)]).encode()).hexdigest()
        self.commits[sha] = tree
        return sha

    def find(self, revision: str) -> str | None:
        return (
            self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)
        )

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        path = unquote(request.url.path)
        authorization = request.headers.get("Authorization")
        if request.url.host == "cdn.example":
            self.elsewhere.append(authorization)
            _, revision, name = path.split("/", 2)
            return self._file(request, self.commits[revision][name])
        if authorization != f"Bearer {self.token}":
            return httpx2.Response(401, headers={"X-Error-Message": "Invalid credentials"}, request=request)
        if path == "/api/repos/create":
            if self.created:
                return httpx2.Response(409, json={"url": "https://huggingface.co/ann/tiny"}, request=request)
            self.created = True
            self.log.append(f"create {json.loads(request.content)['visibility']}")
            self.branches["main"] = self.commit({".gitattributes": b""})
            return httpx2.Response(200, json={"url": "https://huggingface.co/ann/tiny"}, request=request)
        if path == "/api/validate-yaml":
            return httpx2.Response(200, json={"errors": [], "warnings": []}, request=request)
        if not self.created or "/ann/tiny" not in path:
            return httpx2.Response(404, headers={"X-Error-Code": "RepoNotFound"}, request=request)
        return self._repository(request, path)

    def _repository(self, request: httpx2.Request, path: str) -> httpx2.Response:
        answer = functools.partial(httpx2.Response, request=request)
        if found := re.fullmatch(r"/ann/tiny/resolve/([^/]+)/(.*)", path):
            tree = self.commits.get(found[1], {})
            if found[2] not in tree:
                return answer(404, headers={"X-Error-Code": "EntryNotFound"}, content=iter([b""]))
            if found[2].endswith(".bmodel"):
                return answer(302, headers={"Location": f"https://cdn.example/{found[1]}/{found[2]}"})
            return self._file(request, tree[found[2]])
        found = re.fullmatch(r"/api/models/ann/tiny/(refs|revision|branch|preupload|commit|tree|tag)/?(.*)", path)
        assert found, path
        what, rest = found[1], found[2]
        sha = self.find(rest)
        if what == "refs":
            refs = {
                kind: [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": s} for n, s in names.items()]
                for kind, names in (("branches", self.branches), ("tags", self.tags))
            }
            return answer(200, json={**refs, "converts": []})
        if what in ("revision", "tree", "commit", "preupload") and sha is None:
            return answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        if what == "revision":
            return answer(200, json={"id": "ann/tiny", "sha": sha, "siblings": [], "tags": []})
        if what == "tree":
            return answer(200, json=[_entry(name, data, self.damage) for name, data in self.commits[sha].items()])
        if what == "preupload":
            files = json.loads(request.content)["files"]
            return answer(
                200,
                json={"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]},
            )
        if what == "commit":
            lines = [json.loads(line) for line in request.content.splitlines()]
            new = {
                one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"
            }
            self.branches[rest] = self.commit({**self.commits[sha], **new})
            self.log.append(f"commit {'main' if rest == 'main' else 'branch'} {' '.join(sorted(new))}")
            url = f"https://huggingface.co/ann/tiny/commit/{self.branches[rest]}"
            return answer(200, json={"success": True, "commitUrl": url, "commitOid": self.branches[rest]})
        if what == "branch" and request.method == "POST":
            self.branches[rest] = self.branches["main"]
        elif what == "branch":
            del self.branches[rest]
            self.log.append("delete branch")
        elif what == "tag" and request.method == "POST":
            self.tags[json.loads(request.content)["tag"]] = sha
            self.log.append(f"tag {json.loads(request.content)['tag']}")
        else:
            del self.tags[rest]
            self.log.append(f"untag {rest}")
        return answer(200, json={})

    def _file(self, request: httpx2.Request, data: bytes) -> httpx2.Response:
        found = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if found else {}
        return httpx2.Response(206 if found else 200, content=iter([data[start:]]), headers=headers, request=request)


def _entry(name: str, data: bytes, damage: str | None) -> dict:
    data = data[:-1] + b"?" if name == damage else data
    digest = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"type": "file", "path": name, "size": len(data), "oid": digest}


@pytest.fixture
def stub(monkeypatch):
    made = StubHub()
    transport = httpx2.MockTransport(made)
    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=transport))
    monkeypatch.setattr(hub, "Session", lambda *given, **more: Session(*given, **{**more, "transport": transport}))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    huggingface_hub.close_session()
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def test_manifest_comes_last_then_the_check_then_the_tag(stub, build, tmp_path, tree):
    folder = build(files={"copies/a": b"same", "copies/b": b"same"})
    done = publish_bundle(folder, "hf://ann/tiny@v1")
    files, manifest, tagged, tidied, card = stub.log[1:]
    assert stub.log[0] == "create private"
    assert files.startswith("commit branch ")
    assert {"modelpack-config.json", "copies/a", "copies/b", "manifest.json", "README.md"} <= set(files.split())
    assert "modelpack.json" not in files.split()
    assert (manifest, tagged, tidied) == ("commit branch modelpack.json", "tag v1", "delete branch")
    assert card == "commit main README.md"
    pulled = pull_bundle("hf://ann/tiny@v1", tmp_path / "out")
    assert pulled.found.document == done.document
    bundle = tree(folder / "bundle")
    del bundle["build.json"]
    assert tree(tmp_path / "out" / "bundle") == bundle
    assert stub.elsewhere == [None], "the token went to another host"


def test_a_file_that_did_not_arrive_whole_is_not_tagged(stub, build):
    for damaged in ("transformer.bmodel", "modelpack.json"):
        stub.damage = damaged
        with pytest.raises(IntegrityError, match=rf"{damaged} has another digest .*nothing was tagged"):
            publish_bundle(build(damaged[:3]), "hf://ann/tiny@v1")
        assert stub.tags == {}
    stub.damage = None
    publish_bundle(build("whole"), "hf://ann/tiny@v1")
    assert list(stub.tags) == ["v1"]


def test_what_the_hub_serves_is_compared(stub, build, tmp_path):
    publish_bundle(build(), "hf://ann/tiny@v1")
    tree = stub.commits[stub.tags["v1"]]
    tree["transformer.bmodel"] = b"nEt" * 1000
    with pytest.raises(IntegrityError, match=r"transformer\.bmodel .* damaged there"):
        pull_bundle("hf://ann/tiny@v1", tmp_path / "out")
    del tree["transformer.bmodel"]
    with pytest.raises((IntegrityError, RegistryError)):
        pull_bundle("hf://ann/tiny@v1", tmp_path / "out", transfers=QUICK)
    assert not (tmp_path / "out").exists()


def test_tags(stub, build):
    publish_bundle(build(), "hf://ann/tiny@v1")
    tag_reference("hf://ann/tiny@v1", "latest")
    assert stub.tags["latest"] == stub.tags["v1"]
    publish_bundle(build("two", files={"transformer.bmodel": b"two"}), "hf://ann/tiny@v2")
    tag_reference("hf://ann/tiny@v2", "latest")
    assert stub.tags["latest"] == stub.tags["v2"] != stub.tags["v1"]
    assert list(list_tags("hf://ann/tiny")[1]) == ["latest", "v1", "v2"]


def test_what_is_refused(stub, build, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="there is no repository"):
        pull_bundle("hf://ann/tiny@v1", tmp_path / "out")
    publish_bundle(build(), "hf://ann/tiny@v1")
    with pytest.raises(UsageError, match="has no tag, branch or commit 'v9'"):
        pull_bundle("hf://ann/tiny@v9", tmp_path / "out")
    with pytest.raises(UsageError, match=r"has no modelpack\.json, so it is no bundle"):
        pull_bundle("hf://ann/tiny@main", tmp_path / "out")
    with pytest.raises(UsageError, match="has a branch 'main'"):
        publish_bundle(build("b"), "hf://ann/tiny@main")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    for work in (
        lambda: publish_bundle(build("c"), "hf://ann/tiny@v2"),
        lambda: pull_bundle("hf://ann/tiny@v1", tmp_path / "out"),
    ):
        with pytest.raises(AuthorizationError, match="HF_TOKEN") as found:
            work()
        assert "hf_another" not in str(found.value)
    assert list(stub.tags) == ["v1"]


@pytest.mark.hub
def test_the_hub_itself(build, tmp_path, monkeypatch):
    repository = os.environ["FLUXKILN_TEST_HUB"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    done = publish_bundle(build(), f"hf://{repository}@fluxkiln-test")
    assert pull_bundle(f"hf://{repository}@fluxkiln-test", tmp_path / "out").found.document == done.document
    huggingface_hub.HfApi().delete_tag(repository, tag="fluxkiln-test")
