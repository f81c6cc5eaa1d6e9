"""A process that answers requests: one JSON object a line each way, arrays in files of a folder that both know."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fluxkiln.compile.process import stop


class Worker:
    """Starts the process; as a context manager it ends it as well.

    Args:
        argv, environ: of the process. It runs in a scratch folder, `folder`, which goes with it.
        name: what the scratch folder is called after.
        log: what the process prints on stderr is appended there; a file in the scratch folder if left out.
    """

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str], name: str, log: Path | None = None) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix=f"fluxkiln-{name}-")
        self.folder = Path(self._scratch.name)
        self.log = log or self.folder / "log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = self.log.open("ab")
        self._process = subprocess.Popen(
            list(argv), cwd=self.folder, env=dict(environ), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log_file, start_new_session=True,
        )  # fmt: skip

    def request(self, request: Mapping[str, Any]) -> dict[str, Any] | int:
        """The answer to a request, or the exit code of a process that ended instead of answering."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            return self._process.wait()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process; its scratch folder and what it kept go with it."""
        stop(self._process)
        for stream in (self._process.stdin, self._process.stdout, self._log_file):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # a request that the process did not live to read
                    stream.close()
        self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
