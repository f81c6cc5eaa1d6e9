"""Patches are listed, gated by the source they replace, put in place and taken back to the very same objects."""

from __future__ import annotations

import re
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fluxkiln.errors import PatchError
from fluxkiln.patches.flux1.kinds import KINDS
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.flux1.transformer import explicit_rms_norm
from fluxkiln.patches.patch import (
    Patch,
    _locate,
    apply_patches,
    check_patches,
    examine_patches,
    patches_for,
    source_digest,
)

FORMATS = ("onnx17", "onnx23", "pt2", "torchscript")
PATCHES = {patch.name: patch for patch in MODEL.patches()}
GATES = [(patch.name, dotted) for patch in MODEL.patches() for dotted in patch.replaces]


def something_else(*args, **kwargs):
    """What upstream would never write."""


@pytest.fixture
def upstream(monkeypatch):
    """A module that stands for a dependency: a function, a method, a static and a class method, one inherited."""
    module = types.ModuleType("upstream_for_test")

    class Base:
        def inherited(self):
            return "base"

    class Layer(Base):
        def forward(self):
            return "upstream"

        @staticmethod
        def ids():
            return "static"

        @classmethod
        def build(cls):
            return cls

    def compute():
        return "computed"

    module.Layer, module.compute = Layer, compute
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def patch_of(*names, replacement=True):
    dotted = [f"upstream_for_test.{name}" for name in names]
    return Patch(
        name="for_test",
        replaces={name: {source_digest(name): "upstream 1.0"} for name in dotted},
        reason="test",
        until="test",
        kinds=("tail",),
        replacement=dict.fromkeys(dotted, something_else) if replacement else None,
    )


def test_installed_versions_are_the_ones_checked():
    check_patches(MODEL.patches())
    assert [status.changed for status in map(examine_patches, MODEL.patches())] == [()] * len(MODEL.patches())


def test_list_is_complete_and_explains_itself():
    patches = MODEL.patches()
    assert len({patch.name for patch in patches}) == len(patches)
    parallel = {f"parallel_{kind}" for kind in ("t5", "head", "double", "single", "tail")}
    assert {kind for patch in patches for kind in patch.kinds} == set(KINDS) | parallel
    for patch in patches:
        assert patch.replaces
        assert patch.reason
        assert patch.until
        assert set(patch.formats) <= set(FORMATS)
        for known in patch.replaces.values():
            assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in known)
            assert all(re.fullmatch(r"(torch|diffusers|transformers) \d+\.\d+\.\d+", on) for on in known.values())
        assert set(patch.replacement or {}) <= set(patch.replaces), "what is replaced must be gated"


def test_installed_version_is_reported():
    status = examine_patches(PATCHES["double_block"])
    assert set(status.installed) == {"diffusers"}
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", status.installed["diffusers"])


@pytest.mark.parametrize(("name", "dotted"), GATES, ids=[f"{name}-{dotted.split('.')[-2]}" for name, dotted in GATES])
def test_changed_upstream_source_is_refused(monkeypatch, name, dotted):
    owner, attribute = _locate(dotted)
    monkeypatch.setattr(owner, attribute, something_else)
    patch = PATCHES[name]
    with pytest.raises(PatchError) as error:
        check_patches([patch])
    assert f"patch {name}: {dotted} of {dotted.split('.')[0]}" in str(error.value)
    assert "install the versions pinned in constraints.txt" in str(error.value)
    assert examine_patches(patch).changed == (dotted,)
    with pytest.raises(PatchError), apply_patches([patch]):
        pytest.fail("the patch was applied")


def test_refused_for_every_kind_it_is_used_for(monkeypatch):
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    monkeypatch.setattr(FluxTransformer2DModel, "forward", something_else)
    refused = []
    for kind in KINDS:
        try:
            check_patches(patches_for(MODEL.patches(), kind, "onnx17"))
        except PatchError:
            refused.append(kind)
    hoisted = {kind for kind in KINDS if kind.endswith(("_modulation", "_modulated", "_embed"))} - {"t5_embed"}
    assert set(refused) == {"head", "tail"} | hoisted


def test_vanished_upstream_function_is_refused(upstream):
    patch = patch_of("Layer.forward")
    del upstream.Layer.forward
    assert examine_patches(patch).changed == ("upstream_for_test.Layer.forward",)
    with pytest.raises(PatchError, match=r"patch for_test: upstream_for_test.Layer.forward"):
        check_patches([patch])
    with pytest.raises(PatchError, match="does not exist in upstream_for_test"):
        source_digest("upstream_for_test.Layer.forward")


def test_vanished_module_is_refused():
    with pytest.raises(PatchError, match=r"no_such_package\.module\.f does not exist in no_such_package"):
        source_digest("no_such_package.module.f")


def test_replacement_is_in_place_inside_only(upstream):
    original = upstream.compute
    with apply_patches([patch_of("compute")]):
        assert upstream.compute is something_else
    assert upstream.compute is original


@pytest.mark.parametrize("name", ["forward", "ids", "build"])
def test_methods_come_back_as_the_same_object(upstream, name):
    """Also static and class methods, whose attribute is not what the class holds."""
    before = dict(vars(upstream.Layer))
    with apply_patches([patch_of(f"Layer.{name}")]):
        assert vars(upstream.Layer)[name] is something_else
    after = dict(vars(upstream.Layer))
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)


def test_restored_after_an_exception(upstream):
    before = vars(upstream.Layer)["ids"]
    with pytest.raises(RuntimeError, match="while tracing"), apply_patches([patch_of("Layer.ids", "compute")]):
        raise RuntimeError("while tracing")
    assert vars(upstream.Layer)["ids"] is before
    assert upstream.compute() == "computed"


def test_inherited_function_is_refused_and_nothing_left_changed(upstream):
    """Setting it on the subclass and 'restoring' it there would leave an attribute behind."""
    original = upstream.compute
    patches = [patch_of("compute"), patch_of("Layer.inherited")]
    with pytest.raises(PatchError, match=r"Layer.inherited is inherited"), apply_patches(patches):
        pytest.fail("the patch was applied")
    assert upstream.compute is original
    assert "inherited" not in vars(upstream.Layer)


def test_one_bad_patch_applies_none(upstream):
    good, bad = patch_of("compute"), patch_of("Layer.forward")
    original = upstream.compute
    upstream.Layer.forward = something_else
    with pytest.raises(PatchError), apply_patches([good, bad]):
        pytest.fail("the patch was applied")
    assert upstream.compute is original


def test_wrapper_patches_replace_nothing(upstream):
    before = dict(vars(upstream.Layer))
    with apply_patches([patch_of("Layer.forward", replacement=False)]):
        assert dict(vars(upstream.Layer)) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graph_format", FORMATS)
def test_upstream_is_bit_exactly_restored(kind, graph_format):
    """Everything any patch names, before and after a kind's patches were in place, with an exception in between."""
    places = [(_locate(dotted), dotted) for _, dotted in GATES]
    before = {dotted: vars(owner).get(name) for (owner, name), dotted in places}
    inside = []

    def fail():
        inside.append(torch.nn.functional.rms_norm)
        raise RuntimeError

    with pytest.raises(RuntimeError), apply_patches(patches_for(MODEL.patches(), kind, graph_format)):
        fail()
    normed = ("double", "single", "double_modulated", "single_modulated")
    explicit = kind in normed and graph_format in ("onnx17", "torchscript")
    assert (inside == [explicit_rms_norm]) == explicit
    after = {dotted: vars(owner).get(name) for (owner, name), dotted in places}
    assert all(after[dotted] is before[dotted] for dotted in before)


def test_nested_use_restores_in_turn():
    original = torch.nn.functional.rms_norm
    patch = PATCHES["explicit_rms_norm"]
    with apply_patches([patch]):
        # inside, upstream's function is the replacement, which is not what the patch was written for
        with pytest.raises(PatchError), apply_patches([patch]):
            pytest.fail("the patch was applied twice")
        assert torch.nn.functional.rms_norm is explicit_rms_norm
    assert torch.nn.functional.rms_norm is original


def test_threads_take_turns():
    """Otherwise one thread finds the other's replacement and refuses it, or puts it back for good."""
    original = torch.nn.functional.rms_norm
    patch, inside = PATCHES["explicit_rms_norm"], []
    together = threading.Barrier(4)

    def work(number):
        together.wait(timeout=30)
        for _ in range(5):
            with apply_patches([patch]):
                inside.append(number)
                time.sleep(0.001)
                assert inside.pop() == number
                assert inside == []
                assert torch.nn.functional.rms_norm is explicit_rms_norm
        return number

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [0, 1, 2, 3]
    assert torch.nn.functional.rms_norm is original


@pytest.mark.parametrize(
    ("shape", "axes", "weighted", "eps"),
    [((1, 5, 2, 128), (128,), True, 1e-6), ((3, 7), (7,), False, None), ((2, 3, 4), (3, 4), True, 1e-5)],
)
def test_explicit_rms_norm_equals_torch(shape, axes, weighted, eps):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * 3
    weight = torch.randn(axes, generator=generator) if weighted else None
    expected = torch.nn.functional.rms_norm(x, list(axes), weight, eps)
    actual = explicit_rms_norm(x, list(axes), weight, eps)
    assert torch.linalg.norm(actual - expected) <= 3e-7 * torch.linalg.norm(expected)
    wrong = explicit_rms_norm(x, list(axes), weight, 1e-1)
    assert torch.linalg.norm(wrong - expected) > 1e-3 * torch.linalg.norm(expected)
