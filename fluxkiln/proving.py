"""The proof of a cast: one part of each cast kind is compiled as well, and must come out identical."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from fluxkiln.artifacts.actions import Action, stage_code_version
from fluxkiln.components import Part
from fluxkiln.errors import CompileError
from fluxkiln.stages import CAST_CODE, BinaryPart, Kiln, Mould


def proof_part(parts: list[Part], seed: int) -> Part:
    """The part of a kind that is compiled as well as cast: any of them, but the same for the same seed."""
    key = hashlib.sha256(f"{seed}/{parts[0].kind}".encode()).digest()
    return parts[int.from_bytes(key[:4], "little") % len(parts)]


def proof_action(mould: Mould) -> Action:
    """The key of a mould's proof: its bytes, their map, and the code that casts. No checkpoint is in it."""
    return Action(
        stage="proof",
        what=f"casts of {mould.kind}",
        code_version=stage_code_version(*CAST_CODE),
        inputs={name: mould.result.outputs[name].digest for name in ("bmodel", "map")},
    )


def needs_proof(kiln: Kiln, mould: Mould | None) -> bool:
    """Whether casts of this kind have yet to be proven: the mould is still to be made, or no proof was recorded."""
    if mould is None:
        return True
    return mould.castable and kiln.cache.lookup(proof_action(mould).key) is None


def prove_cast(cast: BinaryPart, direct: BinaryPart, kiln: Kiln, mould: Mould) -> BinaryPart:
    """The cast part, marked as proven; later builds find the proof recorded for `mould`.

    Raises:
        CompileError: the cast differs from what the compiler itself makes of the same weights.
    """
    if cast.bmodel.digest == direct.bmodel.digest:
        kiln.cache.record(proof_action(mould), {}, {"part": cast.part.name, "bmodel": cast.bmodel.digest})
        return replace(cast, made="cast, compiled: identical")
    one, other = (kiln.path(part.bmodel).read_bytes() for part in (cast, direct))
    differing = sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))
    raise CompileError(
        f"{cast.part.name}: the cast differs in {differing} bytes from what the compiler makes of the same weights, "
        "and they must be equal; the mould's map is wrong: this is a bug of fluxkiln, and the bundle was not written"
    )
