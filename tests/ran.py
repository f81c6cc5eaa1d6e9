"""What a command of fluxkiln left behind when it ended."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout as the one JSON document that it must be."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The last line on stderr, which must be the only error."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert [*errors] == self.err.splitlines()[-1:], self.err
        assert "Traceback" not in self.err
        return errors[0].removeprefix("error: ")
