"""A build's LoRAs: its checkpoint with them fused in, made once, and what is said about them afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluxkiln.export.checkpoint import Checkpoint, open_checkpoint
from fluxkiln.export.fingerprint import DigestMemo
from fluxkiln.export.lora import COMPONENT, fuse_once, fused_folder, is_fused, read_record
from fluxkiln.export.lora_file import digest_lora
from fluxkiln.progress import Progress, count_bytes
from fluxkiln.settings import Settings

Read = Callable[[int, int], None] | None


def fused_root(root: Path, settings: Settings, models: Path, memo: DigestMemo, progress: Progress, read: Read) -> Path:
    """The folder that a build is made from: `root` itself, or with the settings' LoRAs fused in.

    Args:
        models: where fused checkpoints are kept. read: told of the bytes read to find out whether there is one.

    Raises: as `fuse_lora`.
    """
    if not settings.loras:
        return root
    folder = fused_folder(root, settings.loras, models, memo, read)
    return fuse_once(root, settings.loras, folder, count_bytes(progress, "fuse", "written"))


def unfused_bytes(root: Path, settings: Settings, models: Path, read: Read = None) -> int:
    """Bytes of shards that a build has to write first, at most; 0 without LoRAs or when they are fused already."""
    memo = DigestMemo(settings.store_path.absolute() / "memo" / "tensors.json")
    if not settings.loras or is_fused(fused_folder(root, settings.loras, models, memo, read)):
        return 0
    return sum(ref.nbytes for ref in open_checkpoint(root, (COMPONENT,)).tensors[COMPONENT].values())


def lora_label(settings: Settings) -> str:
    """What a build's folder is called besides: nothing without LoRAs, else a digest of them and their strengths."""
    if not settings.loras:
        return ""
    inputs = [[digest_lora(file), strength] for file, strength in settings.loras]
    return f"-lora-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:8]}"


def lora_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """`lora`: file name, sha256 and strength of each LoRA in a checkpoint, or nothing; for what tells its origin."""
    record = read_record(checkpoint.root)
    return {"lora": record["lora"]} if record else {}
