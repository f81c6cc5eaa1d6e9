"""Prompts as token ids: what CLIPTokenizer and T5TokenizerFast of transformers (checked with 5.23.0) make of a folder,
by the library `tokenizers` alone.

Source: transformers' models/clip/tokenization_clip.py, and the tokenizer.json that T5's tokenizer is read from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.documents import read_object_file
from fluxkiln.errors import CheckpointError, FluxkilnError
from fluxkiln.patches.flux1.kinds import CLIP_TOKENS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

SHOWN_CUT = 160  # characters of what was cut from a prompt
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_END_OF_WORD = "</w>"


@dataclass(frozen=True, slots=True)
class PromptTokenizer:
    """A text encoder's tokenizer.

    Attributes:
        words: ids that its encoder has a row for, counted from 0. tokens: how many there are to be. pad: fills up.
    """

    name: str
    folder: Path
    tokenizer: Tokenizer
    words: int
    tokens: int
    pad: int

    def encode(self, prompt: str, padded: bool = True) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Ids [1, tokens] int64, and a sentence on what of the prompt the encoder does not see; none where it fits.

        Not `padded`, there are as many as the prompt has, and `tokens` at most.

        CheckpointError: the tokenizer fails, or gives ids that its encoder does not know.
        """
        import numpy as np

        tokens = self.tokens
        with held_by(self.folder, f"tokenizer of {self.name} for every prompt"):
            ids = self.tokenizer.encode(prompt).ids
            if odd := [one for one in (*ids, self.pad) if one >= self.words]:
                raise ValueError(f"it gives the id {odd[0]}, and its encoder has {self.words}")
            if len(ids) <= tokens:
                return np.array([ids + [self.pad] * ((tokens - len(ids)) * padded)], np.int64), ()
            # the last token is the end mark, which the cut prompt has as well
            kept, lost = [*ids[: tokens - 1], ids[-1]], ids[tokens - 1 : -1]
            text = self.tokenizer.decode(lost).replace(_END_OF_WORD, " ").strip()
        shown = text if len(text) <= SHOWN_CUT else f"{text[:SHOWN_CUT]}…"
        note = f"{self.name} takes {tokens} tokens and the prompt has {len(ids)}: the last {len(lost)} were cut"
        return np.array([kept], np.int64), (f"{note}: {shown!r}",)


@contextmanager
def held_by(folder: Path, what: str) -> Iterator[None]:
    """Raise CheckpointError where a folder turns out not to hold `what` in this block."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, FluxkilnError):
        raise
    except BaseException as error:  # tokenizers panic, which is no Exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise CheckpointError(f"{folder} does not hold a {what} ({reason}); copy or fetch it again") from error


def read_clip_tokenizer(folder: Path, words: int) -> PromptTokenizer:
    """CLIP's, from `vocab.json` and `merges.txt`, or from a `tokenizer.json`; CheckpointError for a broken one."""
    import tokenizers

    with held_by(folder, "CLIPTokenizer"):
        config = read_object_file(folder / "tokenizer_config.json")
        start, end, pad = (
            _content(config.get(key) or default)
            for key, default in (
                ("bos_token", "<|startoftext|>"), ("eos_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>"),
            )
        )  # fmt: skip
        if (folder / "tokenizer.json").is_file():
            tokenizer = _from_file(folder)
        else:
            files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
            tokenizer = tokenizers.Tokenizer(
                tokenizers.models.BPE.from_file(*files, unk_token=end, end_of_word_suffix=_END_OF_WORD)
            )
            space = tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
            tokenizer.normalizer = tokenizers.normalizers.Sequence(
                [tokenizers.normalizers.NFC(), space, tokenizers.normalizers.Lowercase()]
            )
            split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), "removed", invert=True)
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
                [split, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
            tokenizer.decoder = tokenizers.decoders.ByteLevel()
            added = config.get("added_tokens_decoder") or {str(i): one for i, one in enumerate((start, end, pad))}
            tokenizer.add_special_tokens([_added(one) for one in added.values()])
            last, first = ((one, _id_of(tokenizer, one)) for one in (end, start))
            tokenizer.post_processor = tokenizers.processors.RobertaProcessing(
                last, first, trim_offsets=False, add_prefix_space=False
            )
        return PromptTokenizer("CLIP", folder, tokenizer, words, CLIP_TOKENS, _id_of(tokenizer, pad))


def read_t5_tokenizer(folder: Path, words: int, tokens: int) -> PromptTokenizer:
    """T5's, from its `tokenizer.json`; CheckpointError for a broken one, or where there is only `spiece.model`."""
    with held_by(folder, "T5TokenizerFast"):
        config = read_object_file(folder / "tokenizer_config.json")
        tokenizer = _from_file(folder)
        pad = _id_of(tokenizer, _content(config.get("pad_token") or "<pad>"))
        return PromptTokenizer("T5", folder, tokenizer, words, tokens, pad)


def _from_file(folder: Path) -> Tokenizer:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"it has no token {token}")
    return found


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _added(token: str | Mapping[str, Any]) -> Any:
    import tokenizers

    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True, normalized=False)
    flags = {key: bool(token.get(key)) for key in ("lstrip", "normalized", "rstrip", "single_word")}
    return tokenizers.AddedToken(_content(token), special=True, **flags)
