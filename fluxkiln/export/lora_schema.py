"""What PEFT writes about a LoRA into its file, as far as it counts here. Source: PEFT, LoraConfig."""

from __future__ import annotations

from typing import Annotated, NotRequired, TypedDict

from msgspec import Meta

Alpha = Annotated[float, Meta(ge=0, lt=1e6)]


class PeftConfig(TypedDict):
    lora_alpha: NotRequired[Alpha]
    alpha_pattern: NotRequired[dict[str, Alpha] | None]
    use_rslora: NotRequired[bool | None]
