"""Templates of the tiny model and graphs linked to its weights, made once a session."""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import pytest

from fluxkiln.compile.ort_graph import link_weights
from fluxkiln.components import Shapes, find_part, list_parts
from fluxkiln.export.bindings import bind_part, binding_refs, weight_reader
from fluxkiln.export.trace import export_template
from fluxkiln.quantize.schemes import parse_scheme

SHAPES = Shapes(height=64, width=64, tokens=32)


@pytest.fixture(scope="session")
def tiny_template(tiny_checkpoint, tmp_path_factory):
    """(kind, format) -> template of tiny-dev."""

    @functools.cache
    def make(kind, graph_format):
        folder = tmp_path_factory.mktemp(f"{kind}-{graph_format}")
        return export_template(kind, tiny_checkpoint().configs, SHAPES, graph_format, folder)

    return make


@pytest.fixture(scope="session")
def tiny_parts(tiny_checkpoint):
    """The parts of tiny-dev by name, with both decoders."""
    configs = tiny_checkpoint().configs
    parts = {part.name: part for vae in ("kl", "tiny") for part in list_parts(configs, vae)}
    return lambda name: find_part(tuple(parts.values()), name)


@pytest.fixture
def link(tiny_checkpoint, tiny_template, tiny_parts, tmp_path):
    """(part, scheme, the part whose weights it gets) -> linked graph in `tmp_path`, with hard links to the shards."""

    def make(name, scheme="F32", weights_of=None, folder=tmp_path):
        checkpoint, part = tiny_checkpoint(), tiny_parts(weights_of or name)
        template = tiny_template(part.kind, "onnx23")
        binding = bind_part(part, template.slots, checkpoint)
        refs = {}
        for ref in binding_refs(binding, checkpoint):
            beside = folder / binding.component / ref.file.name
            beside.parent.mkdir(parents=True, exist_ok=True)
            if not beside.exists():
                os.link(ref.file, beside)
            refs[ref.name] = replace(ref, file=beside)
        reader = weight_reader(binding, checkpoint)
        return link_weights(template, binding, refs, reader, parse_scheme(scheme), folder / f"{name}.onnx")

    return make
