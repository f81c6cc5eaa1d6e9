"""Synthetic tokenizers, as transformers loads them."""

from __future__ import annotations

import pytest

from fluxkiln.errors import UsageError
from fluxkiln.patches.flux1.tokenizers import T5_SENTINELS, corpus, write_clip_tokenizer, write_t5_tokenizer

PROMPTS = ("A red fox in the forest, oil painting.", "Zebra #9 & <b>naïve</b> 東京", "", "  two   spaces ")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip_tokenizer(folder, vocab_size=768)
    return folder


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    write_t5_tokenizer(folder, vocab_size=384, max_length=512)
    return folder


def test_clip(clip_folder):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    assert tokenizer.model_max_length == 77
    # The text encoder pools at the highest id.
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == max(tokenizer.get_vocab().values())
    for prompt in PROMPTS:
        ids = tokenizer(prompt, padding="max_length", truncation=True).input_ids
        assert len(ids) == 77
        assert ids[0] == tokenizer.bos_token_id
        assert set(ids[ids.index(tokenizer.eos_token_id) :]) == {tokenizer.eos_token_id}
    assert "forest</w>" in tokenizer.tokenize("Forest")
    assert tokenizer.decode(tokenizer("zq fox!").input_ids, skip_special_tokens=True).replace(" ", "") == "zqfox!"


def test_t5_agrees_with_sentencepiece(t5_folder):
    import sentencepiece
    from transformers import T5TokenizerFast

    tokenizer = T5TokenizerFast.from_pretrained(t5_folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(t5_folder / "spiece.model"))
    for prompt in (*PROMPTS, *corpus()[::7]):
        assert tokenizer(prompt).input_ids == [*processor.encode(prompt), 1]
    # transformers 5 falls back to a vocabulary of 4 without a word.
    assert len(tokenizer) == processor.get_piece_size() + len(T5_SENTINELS) > 250
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(tokenizer) - 1
    assert tokenizer.model_max_length == 512


def test_prompts_of_different_words_differ(t5_folder, clip_folder):
    from transformers import CLIPTokenizer, T5TokenizerFast

    for tokenizer in (CLIPTokenizer.from_pretrained(clip_folder), T5TokenizerFast.from_pretrained(t5_folder)):
        assert tokenizer("a cat").input_ids != tokenizer("a hat").input_ids


def test_files_are_the_same_every_time(t5_folder, clip_folder, tmp_path):
    write_t5_tokenizer(tmp_path, vocab_size=384, max_length=512)
    for name in ("spiece.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (t5_folder / name).read_bytes()
    write_clip_tokenizer(tmp_path, vocab_size=768)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (clip_folder / name).read_bytes()


@pytest.mark.parametrize("writer", [write_clip_tokenizer, lambda *args: write_t5_tokenizer(*args, max_length=512)])
def test_vocabulary_larger_than_the_model(tmp_path, writer):
    with pytest.raises(UsageError, match="has a vocabulary of 200, its tokenizer has"):
        writer(tmp_path, 200)
