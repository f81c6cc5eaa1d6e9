"""Little distributions of somebody else's, as `pip install` leaves them: modules, and what they add."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(folder: Path, name: str, group: str, entries: Mapping[str, str], modules: Mapping[str, str]) -> None:
    """Write a distribution `name` 1.0 into a folder of `sys.path`.

    Args:
        entries: of the entry-point group: what each is called -> `module:object`.
        modules: module -> its source.
    """
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)
    about = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = (f"{entry} = {value}\n" for entry, value in entries.items())
    (about / "entry_points.txt").write_text(f"[{group}]\n{''.join(lines)}")
