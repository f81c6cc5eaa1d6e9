"""A model repository on the Hugging Face Hub.

Files go to a branch of their own; when the Hub shows them with the right sizes and digests, the OCI manifest follows as
`modelpack.json`, and only then a tag. Fetching is over our own session: resumed, compared with the manifest.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from fluxkiln.artifacts.modelpack import CARD, Document, Layer
from fluxkiln.artifacts.registry.oci import fetch
from fluxkiln.artifacts.registry.place import HubReference, check_departure
from fluxkiln.artifacts.registry.session import AuthorizationError, Session
from fluxkiln.artifacts.registry.transfer import Arrival, Departure, Patience, Stop
from fluxkiln.digests import digest_bytes
from fluxkiln.errors import IntegrityError, RegistryError, UsageError

MANIFEST_PATH, CONFIG_PATH = "modelpack.json", "modelpack-config.json"
BRANCH = "fluxkiln-"


class HubPlace:
    """One repository. `api` is a huggingface_hub.HfApi."""

    def __init__(self, reference: HubReference, api: Any, session: Session) -> None:
        self._repository = reference.repository
        self._api = api
        self._session = session
        self._lock = threading.Lock()
        self._queued: dict[str, tuple[Layer, Path | bytes]] = {}
        self._commit = ""

    @property
    def name(self) -> str:
        return f"hf://{self._repository}"

    def close(self) -> None:
        from huggingface_hub import close_session

        self._session.close()
        close_session()  # its client has our deadline

    def manifest(self, reference: str) -> bytes:
        with _translated(self.name, reference, self._session.stop):
            self._commit = str(self._api.repo_info(self._repository, revision=reference).sha)
        answer = self._session.ask(
            "GET", self._url(MANIFEST_PATH), accept=(200, 404), what=f"{MANIFEST_PATH} of {self.name}"
        )
        if answer.status != 200:
            raise UsageError(
                f"{self.name}@{reference} has no {MANIFEST_PATH}, so it is no bundle of fluxkiln; give another"
            )
        return answer.body

    def has(self, layer: Layer) -> bool:
        # The Hub compares by digest itself when files are committed.
        return False

    def send(self, layer: Layer, departure: Departure) -> int:
        check_departure(departure, layer)
        with self._lock:
            self._queued[layer.path or CONFIG_PATH] = (layer, departure.source)
        return layer.size

    def receive(self, layer: Layer, arrival: Arrival) -> None:
        path = layer.path or CONFIG_PATH
        fetch(self._session, self._url(path), arrival, f"fetching {path} from {self.name}")

    def publish(self, document: Document, tag: str) -> None:
        branch = BRANCH + document.digest.removeprefix("sha256:")[:16]
        api, repository = self._api, self._repository
        # One of equal files was queued; a repository needs them all.
        sources = {layer.digest: source for layer, source in self._queued.values()}
        queued = {**self._queued, **{one.path: (one, sources[one.digest]) for one in document.layers}}
        with _translated(self.name, tag, self._session.stop):
            # For its owner alone until they say otherwise.
            api.create_repo(repository, private=True, exist_ok=True)
            refs = api.list_repo_refs(repository)
            if tag in [ref.name for ref in refs.branches]:
                raise UsageError(
                    f"{self.name} has a branch {tag!r}; a bundle gets a tag: publish to hf://{repository}@v1"
                )
            api.create_branch(repository, branch=branch, exist_ok=True)
            self._commit_files({path: source for path, (_, source) in queued.items()}, branch, "files of")
            self._check_tree(queued, branch)
            manifest = Layer(MANIFEST_PATH, digest_bytes(document.data), len(document.data))
            self._commit = self._commit_files({MANIFEST_PATH: document.data}, branch, "manifest of")
            self._check_tree({MANIFEST_PATH: (manifest, document.data)}, self._commit)
            self._move_tag(tag, [ref.name for ref in refs.tags])
            api.delete_branch(repository, branch=branch)
            if CARD in queued:
                # The page of a repository shows the card of its main branch.
                self._commit_files({CARD: queued[CARD][1]}, "main", "model card of")

    def retag(self, document: Document, tag: str) -> None:
        with _translated(self.name, tag, self._session.stop):
            self._move_tag(tag, self.tags())

    def tags(self) -> list[str]:
        with _translated(self.name, "", self._session.stop):
            return [str(ref.name) for ref in self._api.list_repo_refs(self._repository).tags]

    def _url(self, path: str) -> str:
        from huggingface_hub import hf_hub_url

        endpoint = str(self._session.origin).rstrip("/")
        return hf_hub_url(self._repository, path, revision=self._commit, endpoint=endpoint)

    def _commit_files(self, files: Mapping[str, Path | bytes], branch: str, what: str) -> str:
        from huggingface_hub import CommitOperationAdd

        operations = [
            CommitOperationAdd(path, source if isinstance(source, bytes) else str(source))
            for path, source in sorted(files.items())
        ]
        message = f"{what} a bundle, by fluxkiln"
        return str(self._api.create_commit(self._repository, operations, commit_message=message, revision=branch).oid)

    def _check_tree(self, wanted: Mapping[str, tuple[Layer, Path | bytes]], revision: str) -> None:
        """IntegrityError when the Hub does not show every file with its size and digest."""
        from huggingface_hub.utils.sha import git_hash

        shown = {
            entry.path: entry
            for entry in self._api.list_repo_tree(self._repository, recursive=True, revision=revision)
            if hasattr(entry, "size")
        }
        for path, (layer, source) in wanted.items():
            entry = shown.get(path)
            if entry is None or entry.size != layer.size:
                found = "is missing" if entry is None else f"has {entry.size} bytes instead of {layer.size}"
                raise IntegrityError(
                    f"{path} {found} in {self.name} after it was sent; nothing was tagged, publish again"
                )
            if entry.lfs:
                same = f"sha256:{entry.lfs.sha256}" == layer.digest
            else:  # small, and in git itself
                same = entry.blob_id == git_hash(source if isinstance(source, bytes) else source.read_bytes())
            if not same:
                raise IntegrityError(
                    f"{path} has another digest in {self.name} than what was sent; nothing was tagged, publish again"
                )

    def _move_tag(self, tag: str, existing: Iterable[str]) -> None:
        # The Hub knows no move; between the two there is no tag, never a wrong one.
        if tag in existing:
            self._api.delete_tag(self._repository, tag=tag)
        self._api.create_tag(self._repository, tag=tag, revision=self._commit)


def open_hub(reference: HubReference, *, patience: Patience | None, stop: Stop) -> HubPlace:
    """The repository that `reference` names; the token comes from HF_TOKEN or `hf auth login`.

    The Hub's own client, one of the whole process, gets our time limits until the place is closed.
    """
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    token = huggingface_hub.get_token()
    session = Session(
        huggingface_hub.constants.ENDPOINT,
        patience=patience,
        stop=stop,
        authorization=f"Bearer {token}" if token else None,
        login="set HF_TOKEN or run: hf auth login",
    )
    client = huggingface_hub.get_session()
    client.event_hooks["request"].append(session.watch.follow)
    client.timeout = httpx2.Timeout(None, connect=session.patience.connect)
    return HubPlace(reference, huggingface_hub.HfApi(token=token), session)


@contextmanager
def _translated(name: str, revision: str, stop: Stop) -> Iterator[None]:
    """huggingface_hub's errors in our words."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError:
        raise UsageError(
            f"{name} has no tag, branch or commit {revision!r}; `fluxkiln ls {name}` shows its tags"
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403) or isinstance(error, errors.GatedRepoError):
            raise AuthorizationError(
                f"{name} does not exist, or the token may not do that (the Hub answers {status}); check the name, and "
                "HF_TOKEN or `hf auth login`"
            ) from None
        if status == 404:
            raise UsageError(f"there is no repository {name}; check its name") from None
        raise RegistryError(f"{name}: the Hub answers {status}; try again later") from None
    except (errors.OfflineModeIsEnabled, ConnectionError, httpx2.TransportError) as error:
        stop.check()
        raise RegistryError(f"{name}: the Hub cannot be reached ({type(error).__name__}); check the network and "
                            "HF_HUB_OFFLINE") from None  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RegistryError(
            f"{name}: the Hub's answer is none that its client knows ({type(error).__name__}: {error}); check "
            "HF_ENDPOINT, or try again later"
        ) from error
