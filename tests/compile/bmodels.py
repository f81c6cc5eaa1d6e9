"""What bmodel files of tests are held against."""

from __future__ import annotations

from pathlib import Path

from fluxkiln.compile.toolchains.tpu_mlir.bmodel import hash_span, read_bmodel
from fluxkiln.errors import IntegrityError


def check_codes(path: Path) -> None:
    """Hash every net's coefficients against the check code stored beside them.

    The runtime shares coefficients between nets by this code: a stale one makes a net run with another's weights.

    Raises:
        IntegrityError: a code does not match; names the net.
    """
    data = path.read_bytes()
    for net in read_bmodel(path).nets:
        if hash_span(path, net.coefficients) != data[net.check_code.start : net.check_code.stop]:
            raise IntegrityError(f"{path}: the weights of net {net.name} do not have their check code; cast it again")
