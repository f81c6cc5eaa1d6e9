"""Every reader of foreign bytes, with valid samples to spoil: what the fuzz tests and the fuzz targets are made from.

A reader returns what it likes or raises a FluxkilnError. Anything else that it raises is a bug.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fluxkiln.digests import seal
from fluxkiln.errors import FluxkilnError
from fluxkiln.patches.flux1.model import MODEL

CORPUS = Path(__file__).with_name("corpus")
MANIFESTS = Path(__file__).with_name("manifests")
HOST = "registry.example"
PROMPT = "Größe of a kiln,  at night 東"


@dataclass(frozen=True, slots=True)
class Reader:
    """`read` is given bytes and an empty folder of its own. A `document` is JSON, whose values are worth spoiling."""

    read: Callable[[bytes, Path], object]
    document: bool = False


def samples(name: str) -> list[bytes]:
    """Valid inputs of a reader."""
    folder = MANIFESTS if name == "manifest" else CORPUS / name
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def survives(name: str, data: bytes, folder: Path) -> bool:
    """Whether a reader takes these bytes; whatever it raises besides a FluxkilnError is let through."""
    try:
        READERS[name].read(data, folder)
    except FluxkilnError:
        return False
    return True


def written(data: bytes, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read_bmodel(data: bytes, folder: Path) -> None:
    from fluxkiln.compile.toolchains.tpu_mlir.bmodel import read_bmodel

    read_bmodel(written(data, folder / "part.bmodel"))


def read_header(data: bytes, folder: Path) -> None:
    from fluxkiln.export.safetensors_header import read_header

    read_header(written(data, folder / "model.safetensors"))


def read_manifest(data: bytes, folder: Path) -> None:
    """As it stands; and with its own digest put right, as who knows the format does."""
    from fluxkiln.artifacts.manifest import parse_manifest
    from fluxkiln.compile.bundle import check_own_parts

    try:
        document = json.loads(data)
        data = json.dumps(seal({key: value for key, value in document.items() if key != "digest"})).encode()
    except (ValueError, AttributeError, RecursionError, TypeError):
        pass  # no document at all: the reader's to say
    manifest = parse_manifest(data, "here")
    check_own_parts(manifest, MODEL, json.loads(samples("configs")[0]), folder)


def read_record(data: bytes, folder: Path) -> None:
    """`build.json` beside a manifest."""
    from fluxkiln.artifacts.intact import read_sealed

    written(samples("manifest")[0], folder / "manifest.json")
    written(data, folder / "build.json")
    read_sealed(folder)


def read_configs(data: bytes, folder: Path) -> None:
    """Through what a checkpoint's configs go before a weight is read."""
    from fluxkiln.documents import read_object
    from fluxkiln.export.checkpoint import expected_tensors
    from fluxkiln.types import Shapes

    configs = {name: one for name, one in read_object(data, "here").items() if isinstance(one, dict)}
    MODEL.check_configs(configs, "here")
    if set(MODEL.components) - set(configs):
        return
    MODEL.variant(configs)
    for parts in (MODEL.list_parts(configs, "kl", "hoisted"), MODEL.list_split_parts(configs, "block", "kl")):
        for kind in {part.kind for part in parts}:
            MODEL.part_inputs(kind, configs, Shapes(64, 64, 32))
    for component in MODEL.components:
        expected_tensors(MODEL, component, configs[component])


def read_lora(data: bytes, folder: Path) -> None:
    import numpy as np

    from fluxkiln.export.lora_file import read_lora
    from fluxkiln.export.synth import unwritten_checkpoint

    checkpoint, component = unwritten_checkpoint("tiny-dev", ("transformer",)), "transformer"
    # the samples' layers in their size, and as they are
    layers = ("transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.proj_out.weight")
    small = {name: replace(checkpoint.tensors[component][name], shape=(8, 8)) for name in layers}
    fitting = replace(checkpoint, tensors={component: {**checkpoint.tensors[component], **small}})
    lora = read_lora(written(data, folder / "style.safetensors"), fitting)
    for piece in lora.pieces:
        with np.errstate(all="ignore"):
            piece.apply(np.ones(piece.shape, np.float32), 0, 1.0)


def read_lora_metadata(data: bytes, folder: Path) -> None:
    from fluxkiln.export.lora_file import read_metadata

    read_metadata(data.decode(errors="surrogateescape"), "here")


def read_artifact(data: bytes, folder: Path) -> None:
    from fluxkiln.artifacts.modelpack import check_bundle, parse_document

    check_bundle(parse_document(data, "here"), tiny_manifest(), "here")


def read_artifact_config(data: bytes, folder: Path) -> None:
    from fluxkiln.artifacts.modelpack import check_config, parse_document

    check_config(parse_document(samples("oci-manifest")[0], "here"), data, "here")


def read_tags(data: bytes, folder: Path) -> None:
    """The body of every answer of a registry, token endpoint included."""
    import httpx2

    from fluxkiln.artifacts.registry.oci import OciPlace
    from fluxkiln.artifacts.registry.place import RegistryReference
    from fluxkiln.artifacts.registry.session import Session
    from fluxkiln.artifacts.registry.transfer import Patience

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/token" or "Authorization" in request.headers:
            return httpx2.Response(200, content=iter([data]))
        return httpx2.Response(401, headers={"WWW-Authenticate": f'Bearer realm="https://{HOST}/token"'})

    patience = Patience(1, 1.0, 1.0, 0.0, 0.0, 10.0)
    session = Session(f"https://{HOST}", patience=patience, transport=httpx2.MockTransport(answer))
    place = OciPlace(RegistryReference(HOST, "flux"), session)
    with environment({"DOCKER_CONFIG": str(folder)}):
        try:
            place.tags()
        except FluxkilnError:
            session._authorization = "Bearer known"
            place.tags()
        finally:
            place.close()


def read_credentials(data: bytes, folder: Path) -> None:
    from fluxkiln.artifacts.registry.credentials import find_credential

    written(data, folder / "config.json")
    with environment({"DOCKER_CONFIG": str(folder)}):
        found = find_credential(HOST)
        if found is not None:
            found.basic()


def read_moulds(data: bytes, folder: Path) -> None:
    from fluxkiln.artifacts.store import Store
    from fluxkiln.build.mould_archive import import_moulds, list_moulds

    store = Store(folder / "store")
    import_moulds(store, written(data, folder / "moulds.tar"))
    list_moulds(store)


def read_mould_map(data: bytes, folder: Path) -> None:
    """A mould's map beside a shell and a record that are true."""
    from fluxkiln.compile.toolchains.tpu_mlir.nets import check_mould

    shell = written(samples("bmodel")[0], folder / "shell")
    record = json.loads(samples("mould-record")[0])
    check_mould(record, {"shell": shell, "map": written(data, folder / "map")})


def read_mould_record(data: bytes, folder: Path) -> None:
    """A record in an archive, its key made anew from what it says."""
    import io
    import tarfile

    from fluxkiln.artifacts.actions import ACTION_SCHEMA
    from fluxkiln.digests import canonical_json, digest_json

    try:
        record = json.loads(data)
        names = ("stage", "code_version", "inputs", "settings", "tools")
        record["key"] = digest_json({"schema": ACTION_SCHEMA, **{name: record[name] for name in names}})
        index = canonical_json({"format": "fluxkiln.moulds/1", "records": [record]})
    except (ValueError, TypeError, KeyError, RecursionError):  # no record at all: the reader's to say
        index = b'{"format": "fluxkiln.moulds/1", "records": [%b]}' % data
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        blobs = [f"blobs/sha256/{path.name}" for path in sorted((CORPUS / "mould-blobs").iterdir())]
        for name in ("moulds.json", *blobs):
            member = tarfile.TarInfo(name)
            content = index if name == "moulds.json" else (CORPUS / "mould-blobs" / Path(name).name).read_bytes()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    read_moulds(file.getvalue(), folder)


def read_hlo(data: bytes, folder: Path) -> None:
    from fluxkiln.compile.toolchains.neuron.hlo_module import canonicalise, entry_parameters

    try:
        entry_parameters(data)
    finally:
        canonicalise(data)


def read_split_bundle(data: bytes, folder: Path) -> None:
    from fluxkiln.compile.toolchains.neuron.split_bundle import bundle_jobs, read_split_bundle

    for name in ("hlo", "weights"):
        (folder / name).mkdir()
    written(data, folder / "neuron.json")
    with patch.object(Path, "is_file", lambda path: True):  # what is named is looked at later, when all is known
        bundle_jobs(read_split_bundle(folder))


def read_graph(data: bytes, folder: Path) -> None:
    from fluxkiln.compile.onnx.link import external_files, read_interface

    graph = written(data, folder / "tail.onnx")
    try:
        read_interface(graph)
    finally:
        external_files(graph)


def read_mlx_graphs(data: bytes, folder: Path) -> None:
    from fluxkiln.compile.toolchains.mlx.graphs import read_graphs

    read_graphs(written(data, folder / "graphs.json"))


def read_embeddings(data: bytes, folder: Path) -> None:
    from fluxkiln.generate.embeddings import read_embeddings

    read_embeddings(written(data, folder / "prompts.safetensors"))


def read_request(data: bytes, folder: Path) -> None:
    """A request of the page, up to where the image would be begun."""
    from fluxkiln.documents import SMALL, read_object
    from fluxkiln.errors import UsageError
    from fluxkiln.generate.painter import check_request
    from fluxkiln.generate.server import parse_request

    bundle = tiny_bundle(folder)
    document = read_object(data, "the request", error=UsageError, remedy="send another", limits=SMALL)
    check_request(bundle, parse_request(bundle, document))


def read_constants(data: bytes, folder: Path) -> None:
    """Up to where the parts would be given them."""
    from fluxkiln.compile.bundle import HOST_CONSTANTS
    from fluxkiln.patches.flux1.pipeline import check_constants
    from fluxkiln.patches.pipeline import PipelineFiles

    written(data, folder / HOST_CONSTANTS)
    bundle = tiny_bundle(folder)
    files = PipelineFiles(folder, bundle.configs, bundle.constants)
    check_constants(files, bundle.parts, bundle.manifest.shapes)


def read_scheduler(data: bytes, folder: Path) -> None:
    """Up to the levels of noise of the largest and the smallest image, which are numbers."""
    import numpy as np

    from fluxkiln.documents import read_object
    from fluxkiln.patches.flux1.scheduler import noise_levels, timesteps_of

    config = read_object(data, "here")
    MODEL.check_configs({"scheduler": config}, "here")
    for steps, tokens in ((1, 1), (28, 4096), (64, 1 << 18)):
        levels = noise_levels(config, steps, tokens)
        assert np.isfinite(levels).all()
        assert np.isfinite(timesteps_of(config, levels)).all()


def read_tokenizer(data: bytes, folder: Path) -> None:
    from fluxkiln.patches.flux1.prompts import read_t5_tokenizer

    written(data, folder / "tokenizer.json")
    written(b"{}", folder / "tokenizer_config.json")
    read_t5_tokenizer(folder, 200, 16).encode(PROMPT)


def read_vocabulary(data: bytes, folder: Path) -> None:
    from fluxkiln.patches.flux1.prompts import read_clip_tokenizer

    written(data, folder / "vocab.json")
    written(b"#version: 0.2\n", folder / "merges.txt")
    written(b"{}", folder / "tokenizer_config.json")
    read_clip_tokenizer(folder, 1000).encode(PROMPT)


def tiny_bundle(folder: Path) -> Any:
    """A bundle of which nothing is in its folder."""
    from fluxkiln.compile.bundle import Bundle, own_parts
    from fluxkiln.compile.targets import find_target

    manifest, configs = tiny_manifest(), json.loads(samples("configs")[0])
    parts = own_parts(manifest, MODEL, configs)
    return Bundle(folder, manifest, manifest.digest, find_target(manifest.target), MODEL, parts, configs)


def tiny_manifest() -> Any:
    from fluxkiln.artifacts.manifest import parse_manifest

    return parse_manifest((MANIFESTS / "cpu.json").read_bytes(), "here")


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    with patch.dict(os.environ, changes):
        yield


READERS: Mapping[str, Reader] = {
    "bmodel": Reader(read_bmodel),
    "safetensors": Reader(read_header),
    "manifest": Reader(read_manifest, document=True),
    "record": Reader(read_record, document=True),
    "configs": Reader(read_configs, document=True),
    "lora": Reader(read_lora),
    "lora-metadata": Reader(read_lora_metadata, document=True),
    "oci-manifest": Reader(read_artifact, document=True),
    "oci-config": Reader(read_artifact_config, document=True),
    "oci-answer": Reader(read_tags, document=True),
    "credentials": Reader(read_credentials, document=True),
    "moulds": Reader(read_moulds),
    "mould-map": Reader(read_mould_map, document=True),
    "mould-record": Reader(read_mould_record, document=True),
    "hlo": Reader(read_hlo),
    "hlo-bundle": Reader(read_split_bundle, document=True),
    "graph": Reader(read_graph),
    "mlx-graphs": Reader(read_mlx_graphs, document=True),
    "embeddings": Reader(read_embeddings),
    "request": Reader(read_request, document=True),
    "constants": Reader(read_constants),
    "scheduler": Reader(read_scheduler, document=True),
    "tokenizer": Reader(read_tokenizer, document=True),
    "vocabulary": Reader(read_vocabulary, document=True),
}
