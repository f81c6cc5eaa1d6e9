"""The proof of a cast: one part of each cast kind is compiled as well, and must come out identical."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from fluxkiln.artifacts.actions import Action, ActionCache
from fluxkiln.artifacts.code import code_version
from fluxkiln.compile.plan import Binary, Plan
from fluxkiln.compile.templates import make_template, mould_net
from fluxkiln.compile.toolchains.tpu_mlir.moulds import Mould, compile_weights, compiled_form
from fluxkiln.compile.weights import part_rounders, part_weights
from fluxkiln.errors import CompileError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.files import digest_file
from fluxkiln.quantize.pack import RounderOf
from fluxkiln.quantize.rounders import as_compiler
from fluxkiln.types import Part, Template


def proof_part(parts: list[Part], seed: int) -> Part:
    """The part of a kind that is compiled as well as cast: any of them, but the same for the same seed."""
    key = hashlib.sha256(f"{seed}/{parts[0].kind}".encode()).digest()
    return parts[int.from_bytes(key[:4], "little") % len(parts)]


def proof_action(mould: Mould) -> Action:
    """The key of a mould's proof: its bytes, their map, and the code that compiles and casts probe weights.

    No checkpoint is in it and no other method of rounding: that a cast has its weights in the right places is proven.
    """
    return Action(
        stage="proof",
        what=f"casts of {mould.kind}",
        code_version=code_version(prove_mould),
        inputs={name: mould.result.outputs[name].digest for name in ("shell", "map")},
    )


def needs_proof(cache: ActionCache, mould: Mould | None) -> bool:
    """Whether casts of this kind have yet to be proven: the mould is still to be made, or no proof was recorded."""
    if mould is None:
        return True
    return mould.castable and cache.lookup(proof_action(mould).key) is None


def prove_mould(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, template: Template, mould: Mould) -> None:
    """Compile other probe weights and cast them into the mould: both must come out identical.

    Raises:
        CompileError: they differ.
    """
    from fluxkiln.compile.toolchains.tpu_mlir.bmodel import hash_span, read_bmodel
    from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_region
    from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap, probe_reader
    from fluxkiln.compile.toolchains.tpu_mlir.shell import lay_out, make_shell

    blobs, net = mould.result.outputs, mould_net(plan, mould.kind)
    with cache.store.workdir(f"proof of {mould.kind}") as folder:
        form = compiled_form(plan, template, folder)
        reader = probe_reader(form.slots, seed=1)
        compiled = compile_weights(checkpoint, plan, form, net, reader, folder, f"proof.{mould.kind}").bmodel
        (direct,) = read_bmodel(compiled).nets
        make_shell(compiled, net, folder / "shell.bmodel")
        cast = folder / "cast.bmodel"
        region = lay_out(cache.path(blobs["shell"]), {net: direct.coefficients.size}, cast)[net]
        coefficients = CoefficientMap.from_json(json.loads(cache.path(blobs["map"]).read_text()))
        same = cast_region(cast, region, coefficients, reader) == hash_span(compiled, direct.coefficients)
        _judge(mould.kind, same, digest_file(folder / "shell.bmodel")[0] == blobs["shell"].digest)
    cache.record(proof_action(mould), {}, {"part": "", "weights": "probe weights of seed 1"})


def prove_cast(
    cast: Binary, direct: Binary, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, mould: Mould
) -> Binary:
    """The cast part, marked as proven; later builds find the proof recorded for `mould`.

    Its stored weights must have the digest of those in the direct compile, and all else of the two must be the same
    bytes but for the net's name. Where the scheme's method is not the compiler's, the part is cast once more as the
    compiler rounds, which must be identical, and once more by its own method, which must be what was shipped: so the
    shipped weights differ from the compiler's in their codes, scales and zero points, and in nothing else. By a method
    that needs more than codes both round what is left of the weights, and what stands beside the codes is the same.

    Raises:
        CompileError: the cast differs from what the compiler itself makes of the same weights.
    """
    from fluxkiln.compile.toolchains.tpu_mlir.bmodel import hash_span, read_bmodel
    from fluxkiln.compile.toolchains.tpu_mlir.shell import make_shell

    assert direct.blobs["shell"] is not None
    compiled = cache.path(direct.blobs["bmodel"])
    (net,) = read_bmodel(compiled).nets
    expected = hash_span(compiled, net.coefficients)
    with cache.store.workdir(f"proof of {cast.part.name}") as folder:
        if cast.scheme.rounds_as_compiler:
            same = "sha256:" + expected.hex() == cast.digest
        else:
            size, again = net.coefficients.size, part_rounders(checkpoint, plan, cache, cast.part)
            same = (
                _cast_again(cast, checkpoint, plan, cache, mould, size, folder / "cast.bmodel", as_compiler) == expected
                and "sha256:"
                + _cast_again(cast, checkpoint, plan, cache, mould, size, folder / "own.bmodel", again).hex()
                == cast.digest
            )
        make_shell(cache.path(cast.blobs["shell"]), cast.net, folder / "shell.bmodel")
        _judge(cast.part.name, same, digest_file(folder / "shell.bmodel")[0] == direct.blobs["shell"].digest)
    cache.record(proof_action(mould), {}, {"part": cast.part.name, "weights": cast.digest})
    return replace(cast, made="cast, compiled: identical")


def _cast_again(
    part: Binary,
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    mould: Mould,
    size: int,
    target: Path,
    rounder_of: RounderOf,
) -> bytes:
    """The digest of a part's weights when they are cast with these rounders."""
    from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_region
    from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap
    from fluxkiln.compile.toolchains.tpu_mlir.shell import lay_out

    blobs = mould.result.outputs
    region = lay_out(cache.path(blobs["shell"]), {mould_net(plan, mould.kind): size}, target)
    coefficients = CoefficientMap.from_json(json.loads(cache.path(blobs["map"]).read_text()))
    template = make_template(checkpoint, plan, cache, part.part.kind, plan.target.graph_format)
    reader = part_weights(checkpoint, plan, cache, part.part, template)
    return cast_region(target, next(iter(region.values())), coefficients, reader, rounder_of)


def _judge(what: str, same_weights: bool, same_shell: bool) -> None:
    differing = [name for name, same in (("weights", same_weights), ("instructions", same_shell)) if not same]
    if differing:
        raise CompileError(
            f"{what}: its {' and '.join(differing)} differ from what the compiler makes of the same weights, and they "
            "must be equal; the mould's map is wrong: this is a bug of fluxkiln, and nothing was written"
        )
