"""Synthetic tokenizers, as transformers loads them."""

from __future__ import annotations

import ast

import pytest

from fluxkiln.errors import UsageError
from fluxkiln.patches.flux1.tokenizers import T5_SENTINELS, corpus, write_clip_tokenizer, write_t5_tokenizer

WORDS_OF_CLIP, WORDS_OF_T5 = 768, 384
PROMPTS = ("A red fox in the forest, oil painting.", "Zebra #9 & <b>naïve</b> 東京", "", "  two   spaces ")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip_tokenizer(folder, vocab_size=WORDS_OF_CLIP)
    return folder


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    write_t5_tokenizer(folder, vocab_size=WORDS_OF_T5, max_length=512)
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
    write_t5_tokenizer(tmp_path, vocab_size=WORDS_OF_T5, max_length=512)
    for name in ("spiece.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (t5_folder / name).read_bytes()
    write_clip_tokenizer(tmp_path, vocab_size=WORDS_OF_CLIP)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (clip_folder / name).read_bytes()


@pytest.mark.parametrize("writer", [write_clip_tokenizer, lambda *args: write_t5_tokenizer(*args, max_length=512)])
def test_vocabulary_larger_than_the_model(tmp_path, writer):
    with pytest.raises(UsageError, match="has a vocabulary of 200, its tokenizer has"):
        writer(tmp_path, 200)


WORDS = (
    *PROMPTS,
    "It's a kiln, isn't it? We'll see: they've 12 of 'em, I'd say.",
    "<|startoftext|>a<|endoftext|> b </s> <pad> <extra_id_3> <unk>",
    "tab\there\nnew line\r\n  and\u00a0no-break, \u3000wide",
    "e\u0301 ﬁ Ⅷ İ ß ẞ 😀👩‍🚀 \ufeff \u200b ⁇ ▁ ▁a",
    "x" * 300,
    "a kiln at night " * 60,
)


def own_and_theirs(clip_folder, t5_folder):
    from transformers import CLIPTokenizer, T5TokenizerFast

    from fluxkiln.patches.flux1.prompts import read_clip_tokenizer, read_t5_tokenizer

    yield read_clip_tokenizer(clip_folder, WORDS_OF_CLIP), CLIPTokenizer.from_pretrained(clip_folder)
    for tokens in (16, 512):
        yield read_t5_tokenizer(t5_folder, WORDS_OF_T5, tokens), T5TokenizerFast.from_pretrained(t5_folder)


@pytest.mark.parametrize("saved", [False, True], ids=["published", "saved"])
def test_ids_without_transformers_are_those_of_transformers(clip_folder, t5_folder, tmp_path, saved):
    """From the files of a published checkpoint, and from those that transformers writes."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    if saved:
        for one, folder in ((CLIPTokenizer, clip_folder), (T5TokenizerFast, t5_folder)):
            one.from_pretrained(folder).save_pretrained(tmp_path / folder.name)
        assert not (tmp_path / clip_folder.name / "vocab.json").exists()
        clip_folder, t5_folder = tmp_path / clip_folder.name, tmp_path / t5_folder.name
    cut = 0
    for own, theirs in own_and_theirs(clip_folder, t5_folder):
        for prompt in (*WORDS, *corpus()[::7]):
            wanted = theirs(prompt, padding="max_length", max_length=own.tokens, truncation=True).input_ids
            ids, notes = own.encode(prompt)
            assert ids.tolist() == [wanted], prompt
            whole = theirs(prompt).input_ids
            assert bool(notes) == (len(whole) > own.tokens)
            if notes:
                cut += 1
                lost = theirs.decode(whole[own.tokens - 1 : -1], skip_special_tokens=True)
                assert f"the prompt has {len(whole)}: the last {len(whole) - own.tokens} were cut: " in notes[0]
                shown = ast.literal_eval(notes[0].partition("were cut: ")[2]).rstrip("…")
                assert shown
                assert "".join(lost.split()).startswith("".join(shown.split()))
    assert cut > 4


def test_a_pad_token_of_its_own(clip_folder, tmp_path):
    import json
    import shutil

    from transformers import CLIPTokenizer

    from fluxkiln.patches.flux1.prompts import read_clip_tokenizer

    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, "pad_token": "!"}))
    wanted = CLIPTokenizer.from_pretrained(folder)("a", padding="max_length", max_length=77).input_ids
    assert read_clip_tokenizer(folder, WORDS_OF_CLIP).encode("a")[0].tolist() == [wanted]
    assert wanted[-1] != read_clip_tokenizer(clip_folder, WORDS_OF_CLIP).encode("a")[0][0, -1]


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"model": {"type": "BPE"}}', b"\xff" * 100])
def test_broken_ones_are_refused(clip_folder, t5_folder, tmp_path, data):
    import shutil

    from fluxkiln.errors import CheckpointError
    from fluxkiln.patches.flux1.prompts import read_clip_tokenizer, read_t5_tokenizer

    for folder, name, read in (
        (clip_folder, "vocab.json", lambda folder: read_clip_tokenizer(folder, WORDS_OF_CLIP)),
        (t5_folder, "tokenizer.json", lambda folder: read_t5_tokenizer(folder, WORDS_OF_T5, 8)),
    ):
        broken = shutil.copytree(folder, tmp_path / folder.name)
        (broken / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=r"does not hold a (CLIPTokenizer|T5TokenizerFast)"):
            read(broken)
        (broken / name).unlink()
        with pytest.raises(CheckpointError, match="does not hold a"):
            read(broken)


def test_ids_that_no_encoder_has(t5_folder, clip_folder):
    from fluxkiln.errors import CheckpointError
    from fluxkiln.patches.flux1.prompts import read_clip_tokenizer, read_t5_tokenizer

    for read in (
        lambda words: read_clip_tokenizer(clip_folder, words),
        lambda words: read_t5_tokenizer(t5_folder, words, 8),
    ):
        last = int(read(WORDS_OF_CLIP).encode("a kiln")[0].max())
        read(last + 1).encode("a kiln")
        with pytest.raises(CheckpointError, match=rf"it gives the id {last}, and its encoder has {last}"):
            read(last).encode("a kiln")


def test_a_tokenizer_that_fails_at_a_word(t5_folder, tmp_path):
    import json
    import shutil

    from fluxkiln.errors import CheckpointError
    from fluxkiln.patches.flux1.prompts import read_t5_tokenizer

    folder = shutil.copytree(t5_folder, tmp_path / "t5")
    written = json.loads((folder / "tokenizer.json").read_text())
    written["model"]["unk_id"] = None
    (folder / "tokenizer.json").write_text(json.dumps(written))
    tokenizer = read_t5_tokenizer(folder, WORDS_OF_T5, 8)
    tokenizer.encode("a")
    with pytest.raises(CheckpointError, match="tokenizer of T5 for every prompt"):
        tokenizer.encode("東京")
