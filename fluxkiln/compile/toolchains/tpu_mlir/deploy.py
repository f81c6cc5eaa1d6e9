"""Runs inside TPU-MLIR's Python 3.10 environment: `model_deploy` that leaves the lowered graph's weights behind.

The interpreter needs them. The tool keeps them with `--debug` only, which also puts a description of every command into
the bmodel: 25 MB in one block, and as much in every cast. Arguments are the tool's own.

Source: TPU-MLIR 1.30.2, python/tools/model_deploy.py and python/utils/auto_remove.py.
"""

import os
import runpy
import sys

sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])  # not our own folder, where another tpu_mlir lies

from tpu_mlir.python.utils import auto_remove  # noqa: E402  # the tool's own

auto_remove.file_clean = lambda: None
runpy.run_path(sys.argv[0], run_name="__main__")
