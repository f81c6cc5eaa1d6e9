"""What lies beside FLUX.1's weights and runs on the host, as diffusers and transformers read it: the scheduler and two
tokenizers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from fluxkiln.patches.flux1.prompts import held_by
from fluxkiln.patches.pipeline import quiet


def load_sidecars(root: Path, components: Collection[str]) -> dict[str, Any]:
    """The scheduler and the tokenizers of these components by their folder; CheckpointError for a broken one."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTokenizer, T5TokenizerFast

    classes: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler}
    classes |= {"tokenizer": CLIPTokenizer} if "text_encoder" in components else {}
    classes |= {"tokenizer_2": T5TokenizerFast} if "text_encoder_2" in components else {}
    loaded = {}
    for folder, one in classes.items():
        with held_by(root / folder, one.__name__), quiet():
            loaded[folder] = one.from_pretrained(root / folder, local_files_only=True)
            if folder != "scheduler":
                ids = loaded[folder]("a", max_length=4, padding="max_length", truncation=True)["input_ids"]
                if loaded[folder].unk_token_id in ids[: ids.index(loaded[folder].eos_token_id)]:
                    raise ValueError("it does not know the letter a")
    return loaded
