from __future__ import annotations

import base64
import json
import stat

import pytest

from fluxkiln.artifacts.registry.credentials import Credential, find_credential
from fluxkiln.errors import RegistryError


def auth(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """Install a credential helper that runs a shell script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def install(name: str, script: str) -> None:
        path = folder / f"docker-credential-{name}"
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return install


def test_nothing_configured():
    assert find_credential("ghcr.io") is None


def test_the_file_itself(own_credentials):
    own_credentials.write_text(json.dumps({"auths": {"ghcr.io": auth("ann:se:cret"), "https://x.io": auth("bob:1")}}))
    assert find_credential("ghcr.io") == Credential("ann", "se:cret")
    assert find_credential("x.io") == Credential("bob", "1")
    assert find_credential("evil-ghcr.io") is None
    assert find_credential("ghcr.io:443") is None


def test_docker_hub_goes_by_its_old_name(own_credentials):
    own_credentials.write_text(json.dumps({"auths": {"https://index.docker.io/v1/": auth("ann:x")}}))
    assert find_credential("registry-1.docker.io") == find_credential("docker.io") == Credential("ann", "x")


def test_skopeos_file_is_read_too(tmp_path, monkeypatch):
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {"ghcr.io": auth("ann:x")}}))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    assert find_credential("ghcr.io") == Credential("ann", "x")


@pytest.mark.parametrize(
    "answer", ["printf '\\377'", "printf '[%.0s' $(seq 60000)", "echo '[]'", "echo '{\"Username\": 1}'"]
)
def test_a_helper_that_answers_nonsense(own_credentials, helper, answer):
    own_credentials.write_text(json.dumps({"credHelpers": {"ghcr.io": "mine"}}))
    helper("mine", answer)
    with pytest.raises(RegistryError, match=r"answered no credential for ghcr\.io"):
        find_credential("ghcr.io")


def test_helpers_have_the_time_of_the_command(own_credentials, helper):
    own_credentials.write_text(json.dumps({"credHelpers": {"ghcr.io": "slow"}, "credsStore": "slow"}))
    helper("slow", "exec sleep 20; echo no credentials; exit 1")
    with pytest.raises(RegistryError, match=r"did not answer for ghcr\.io in 0 s"):
        find_credential("ghcr.io", 0.3)


def test_helpers_come_first_and_are_asked_for_the_host_only(own_credentials, helper, tmp_path):
    asked = tmp_path / "asked"
    helper("mine", f'cat >> {asked}; echo \'{{"Username": "ann", "Secret": "s"}}\'')
    helper("none", 'echo "credentials not found in native keychain"; exit 1')
    helper("token", 'echo \'{"Username": "<token>", "Secret": "id"}\'')
    own_credentials.write_text(
        json.dumps({
            "credHelpers": {"ghcr.io": "mine", "x.io": "token"},
            "credsStore": "none",
            "auths": {"ghcr.io": auth("bob:1"), "y.io": auth("bob:2")},
        })
    )  # fmt: skip
    assert find_credential("ghcr.io") == Credential("ann", "s")
    assert asked.read_text() == "ghcr.io"
    assert find_credential("x.io") == Credential(identity_token="id")
    assert find_credential("y.io") == Credential("bob", "2")


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("exit 3", "exit code 3"),
        ("echo not json", "answered no credential"),
        ('echo \'{"Username": "ann"}\'', "answered no credential"),
    ],
)
def test_broken_helpers_are_named_and_not_quoted(own_credentials, helper, script, sentence):
    helper("mine", "echo PASSWORD >&2\n" + script)
    own_credentials.write_text(json.dumps({"credHelpers": {"ghcr.io": "mine"}}))
    with pytest.raises(RegistryError, match=sentence) as found:
        find_credential("ghcr.io")
    assert "PASSWORD" not in str(found.value)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"credHelpers": {"ghcr.io": "gone"}}, "docker-credential-gone is not installed"),
        ({"credHelpers": {"ghcr.io": "../../bin/sh"}}, "no legal name"),
        ({"auths": {"ghcr.io": {"auth": "***"}}}, "no usable entry"),
        ({"auths": {"ghcr.io": {"auth": "\u0080"}}}, "no usable entry"),
        ({"auths": {"ghcr.io": {"auth": base64.b64encode(b"nocolon").decode()}}}, "no usable entry"),
        ([], "holds a JSON list, no object"),
    ],
)
def test_broken_files_are_named(own_credentials, helper, config, sentence):
    own_credentials.write_text(json.dumps(config))
    with pytest.raises(RegistryError, match=sentence):
        find_credential("ghcr.io")


def test_a_credential_does_not_show_itself():
    shown = repr(Credential("ann", "PASSWORD", "TOKEN"))
    assert "ann" in shown
    assert "PASSWORD" not in shown
    assert "TOKEN" not in shown
