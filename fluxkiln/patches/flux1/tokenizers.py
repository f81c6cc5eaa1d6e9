"""Small working tokenizers for synthetic checkpoints: a byte-level BPE for CLIP and a SentencePiece unigram for T5.

Both learn from the sentences below, so they are made offline; any text can be tokenized, most words into pieces.
Folders hold the slow tokenizers' files beside `tokenizer.json`, as FLUX.1's do: transformers 5 builds a T5 tokenizer
from `spiece.model` alone with four tokens and no warning.
"""

from __future__ import annotations

import io
import itertools
import json
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fluxkiln.errors import UsageError

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))
_CLIP_MERGES = 256
_T5_PIECES = 256

_SUBJECTS = (
    "a red fox", "an old potter", "the glass kiln", "two sailing boats", "a cat holding a sign", "the astronaut",
    "a small wooden house", "three copper bowls", "the city at night", "a portrait of a young woman",
)  # fmt: skip
_PLACES = (
    "in the forest", "on a stone table", "under a bright blue sky", "near the sea", "in front of a white wall",
    "beside an open window", "among green hills", "in soft morning light",
)  # fmt: skip
_STYLES = (
    "photograph, sharp focus, high detail", "oil painting with thick strokes", "watercolour on paper", "pencil drawing",
    "digital art, vivid colours", "black and white film, 35mm",
)  # fmt: skip


def corpus() -> list[str]:
    """Prompt-like sentences, the same in the same order every time."""
    sentences = []
    for i, subject in enumerate(_SUBJECTS):
        for j, place in enumerate(_PLACES):
            style = _STYLES[(i + j) % len(_STYLES)]
            sentences.append(f"{subject} {place}, {style}")
            sentences.append(f"{style.capitalize()} of {subject} {place}.")
    return sentences


def write_clip_tokenizer(folder: Path, vocab_size: int, sentences: Sequence[str] = ()) -> None:
    """Write `vocab.json`, `merges.txt` and the configs of a CLIPTokenizer; its end token has the highest id.

    It learns from `sentences`; without any from `corpus`.

    Raises:
        UsageError: `vocab_size` is smaller than the vocabulary.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    merges = _learn_merges(sentences or corpus(), _CLIP_MERGES)
    tokens = [*alphabet, *(f"{char}</w>" for char in alphabet), *(a + b for a, b in merges), CLIP_START, CLIP_END]
    _check_size("text_encoder", len(tokens), vocab_size)
    _write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": CLIP_START, "eos_token": CLIP_END, "pad_token": CLIP_END, "unk_token": CLIP_END}
    _write_json(folder / "special_tokens_map.json", special)
    added = {str(tokens.index(token)): _added_token(token, normalized=True) for token in (CLIP_START, CLIP_END)}
    _write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": 77,
            "tokenizer_class": "CLIPTokenizer",
        },
    )


def write_t5_tokenizer(folder: Path, vocab_size: int, max_length: int, sentences: Sequence[str] = ()) -> None:
    """Write `spiece.model`, `tokenizer.json` and the configs of a T5 tokenizer with its 100 sentinels.

    It learns from `sentences`, each of whose words is one token; without any from `corpus`.

    Raises:
        UsageError: `vocab_size` is smaller than the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    words = [f"▁{word}" for word in sorted({word.strip(".,") for sentence in sentences for word in sentence.split()})]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences or corpus()),
        model_writer=model,
        model_type="unigram",
        vocab_size=_T5_PIECES + len(words),
        user_defined_symbols=words,
        hard_vocab_limit=False,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        normalization_rule_name="identity",
        num_threads=1,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in range(processor.get_piece_size())}
    # SentencePiece takes such a word whole whatever its score; tokenizer.json has no other means but the score.
    pieces = [*(scores | {word: float(len(word)) for word in words if word in scores}).items()]
    # T5 numbers its sentinels backwards from the end.
    pieces += [(sentinel, 0.0) for sentinel in reversed(T5_SENTINELS)]
    _check_size("text_encoder_2", len(pieces), vocab_size)
    _write_json(folder / "tokenizer.json", _t5_tokenizer_json(pieces))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    sentinels = {"additional_special_tokens": list(T5_SENTINELS)}
    _write_json(folder / "special_tokens_map.json", special | sentinels)
    ids = {token: i for i, (token, _) in enumerate(pieces)}
    added = {str(ids[token]): _added_token(token) for token in ("<pad>", "</s>", "<unk>", *reversed(T5_SENTINELS))}
    _write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            **sentinels,
            "added_tokens_decoder": added,
            "clean_up_tokenization_spaces": True,
            "extra_ids": len(T5_SENTINELS),
            "legacy": True,
            "model_max_length": max_length,
            "sp_model_kwargs": {},
            "tokenizer_class": "T5Tokenizer",
        },
    )


def _t5_tokenizer_json(pieces: list[tuple[str, float]]) -> dict[str, Any]:
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    ids = {token: i for i, (token, _) in enumerate(pieces)}
    special = ("<pad>", "</s>", "<unk>", *reversed(T5_SENTINELS))
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    pair_end = {"SpecialToken": {"id": "</s>", "type_id": 1}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], **_added_token(token)} for token in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, pair_end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [ids["</s>"]], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [list(piece) for piece in pieces], "byte_fallback": False},
    }


def _learn_merges(sentences: Iterable[str], count: int) -> list[tuple[str, str]]:
    """The `count` most frequent pairs, merged one after another; ties go to the alphabetically first pair."""
    words = Counter(word.strip(",.") for sentence in sentences for word in sentence.lower().split())
    split = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words if word.isalpha()}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in split.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in split.values():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def _added_token(content: str, normalized: bool = False) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def _check_size(component: str, tokens: int, vocab_size: int) -> None:
    if tokens > vocab_size:
        raise UsageError(
            f"{component} has a vocabulary of {vocab_size}, its tokenizer has {tokens} tokens; enlarge vocab_size"
        )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
