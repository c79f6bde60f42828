import io
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from data_prep.train_tokenizer import NORMALIZER, train
from pipeline.console import InputError
from pipeline.data.tokenizer import NO_TOKEN, Tokenizer, save_tokenizer

ODD = [
    "a\x00b",
    "line\r\nbreak\ttab \x07bell \x1b[31m",
    "😀 👩‍👩‍👧",
    "\uff21\uff22\uff23 ½ ﬁ ß É",
    "<unk> <0x41> <mask>",
    "▅ ▁x",
    "漢字 \u0440\u0443\u0301 \u202eright\u202c",
    " \u200b\ufeff ",
]


def captions(n, seed=0):
    rng = random.Random(seed)
    nouns = ["circle", "square", "triangle", "star", "dog", "cat", "house", "bridge"]
    colours = ["red", "green", "blue", "yellow", "purple", "orange"]
    return [
        f"A {rng.choice(colours)} {rng.choice(nouns)} beside {rng.randint(1, 99)} "
        f"{rng.choice(colours)} {rng.choice(nouns)}s."
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    model = train(iter(captions(400)), 400)
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), model, 400, NORMALIZER, {})


def test_captions_survive_but_for_their_case(tokenizer):
    for caption in captions(50, seed=1):
        ids = tokenizer.encode(caption)
        assert tokenizer.decode(ids) == caption.lower()
        assert 0 <= min(ids) <= max(ids) < tokenizer.n_vocab
        assert "".join(tokenizer.pieces(ids)).replace("▁", " ").strip() == caption.lower()
    assert tokenizer.encode("A RED star") == tokenizer.encode("a red STAR")
    # a whole word is one piece and digits stand alone
    assert tokenizer.pieces(tokenizer.encode("circle 47")) == ["▁circle", "▁", "4", "7"]
    assert tokenizer.encode("") == []


def test_no_text_is_unknown(tokenizer):
    for caption in ODD:
        for dropout in (0.0, 0.5):
            ids = tokenizer.encode(caption, dropout=dropout, seed=0)
            # 0 is <unk>
            assert 0 not in ids
            assert max(ids, default=1) < tokenizer.n_vocab
    # control characters and the byte order mark vanish, line breaks are spaces
    assert tokenizer.decode(tokenizer.encode(ODD[1])) == "line break tab bell [31m"
    assert tokenizer.decode(tokenizer.encode(ODD[2])) == ODD[2]
    assert tokenizer.decode(tokenizer.encode(ODD[3])) == "abc 1\u20442 fi ß é"
    assert tokenizer.decode(tokenizer.encode(ODD[4])) == ODD[4]
    for dropout in (0.0, 0.5):
        with pytest.raises(InputError, match=r"'a.ud800' is not Unicode text.*at character 1"):
            tokenizer.encode_batch(["b", "a\ud800"], dropout, [0, 0])


def test_dropout_depends_on_its_seed_alone(tokenizer):
    texts = captions(60, seed=2)
    first = [tokenizer.encode(text, dropout=0.3, seed=i) for i, text in enumerate(texts)]
    # in another order, with other calls between
    for i in reversed(range(60)):
        tokenizer.encode("another caption", dropout=0.9, seed=i + 7)
        assert tokenizer.encode(texts[i], dropout=0.3, seed=i) == first[i]
    assert [tokenizer.decode(ids) for ids in first] == [text.lower() for text in texts]
    plain = [tokenizer.encode(text) for text in texts]
    assert sum(a != b for a, b in zip(first, plain, strict=True)) > 30
    assert len({tuple(tokenizer.encode(texts[0], dropout=0.3, seed=i)) for i in range(20)}) > 5
    # every merge left out: characters
    assert tokenizer.pieces(tokenizer.encode("dog", dropout=1.0, seed=0)) == ["▁", "d", "o", "g"]


def test_sampling_makes_the_merges_of_sentencepiece(tokenizer):
    # with a dropout that never strikes: the merges of the library, one by one
    texts = captions(200, seed=3) + ODD
    plain = [tokenizer._processor.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == plain
    assert tokenizer.encode_batch(texts, 1e-15, range(len(texts))) == plain
    for text, ids in zip(texts, plain, strict=True):
        assert tokenizer.encode(text, dropout=1e-15, seed=0) == tokenizer.encode(text) == ids
    # with one that does: the library's sampler in the mean
    processor = tokenizer._processor
    texts = captions(2000, seed=4)
    for dropout in (0.1, 0.5):
        ours = [len(ids) for ids in tokenizer.encode_batch(texts, dropout, range(len(texts)))]
        theirs = [
            len(processor.encode(text, enable_sampling=True, alpha=dropout, nbest_size=-1))
            for text in texts
        ]
        error = np.sqrt((np.var(ours) + np.var(theirs)) / len(texts))
        assert np.mean(ours) > 1.1 * np.mean([len(tokenizer.encode(text)) for text in texts])
        assert abs(np.mean(ours) - np.mean(theirs)) < 5 * error


def test_a_batch_is_its_captions(tokenizer):
    texts = captions(30, seed=5)
    for n in (0, 1, 7, 8, 30):
        found = tokenizer.encode_batch(texts[:n], 0.3, range(n))
        assert found == [tokenizer.encode(texts[i], dropout=0.3, seed=i) for i in range(n)]
        assert tokenizer.encode_batch(texts[:n]) == [tokenizer.encode(text) for text in texts[:n]]
    # the company makes no difference, nor does the place
    assert tokenizer.encode_batch(texts[::-1], 0.3, range(29, -1, -1)) == found[::-1]


def test_dropout_needs_a_seed_and_a_share(tokenizer):
    with pytest.raises(InputError, match="1 captions, 0 seeds"):
        tokenizer.encode("a", dropout=0.1)
    with pytest.raises(InputError, match="2 captions, 3 seeds"):
        tokenizer.encode_batch(["a", "b"], 0.1, [1, 2, 3])
    for dropout in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match=f"dropout {dropout} is outside"):
            tokenizer.encode("a", dropout=dropout, seed=0)
    for seed in (-1, 2**64):
        with pytest.raises(InputError, match=f"seed {seed} is outside 0..2.64-1"):
            tokenizer.encode("a", dropout=0.1, seed=seed)


def test_pad_keeps_one_position_for_the_start(tokenizer):
    lengths, rows = [0, 1, 3, 4, 9], [list(range(100, 100 + n)) for n in (0, 1, 3, 4, 9)]
    for n_text in (1, 4, 12):
        tokens, is_cut = tokenizer.pad_batch(rows, n_text)
        assert (tokens.dtype, tokens.shape) == (np.int64, (5, n_text))
        assert is_cut.tolist() == [length > n_text - 1 for length in lengths]
        for ids, length, found, cut in zip(rows, lengths, tokens, is_cut, strict=True):
            kept = min(length, n_text - 1)
            assert found.tolist() == ids[:kept] + [NO_TOKEN] * (n_text - kept)
            alone, is_alone_cut = tokenizer.pad(ids, n_text)
            assert alone.tolist() == found.tolist()
            assert is_alone_cut is bool(cut)
    tokens, is_cut = tokenizer.pad_batch([], 4)
    assert (tokens.shape, is_cut.shape) == ((0, 4), (0,))
    tokens, _ = tokenizer.pad(tokenizer.encode("a red dog"), 16)
    assert tokenizer.decode(tokens) == "a red dog"


def test_fingerprint_is_of_the_pieces_and_not_of_the_file(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(train.__globals__["TRAINER"], "num_threads", 1)
    one_thread = train(iter(captions(400)), 400)
    assert one_thread != (tokenizer.folder / "spm.model").read_bytes()
    other_file = save_tokenizer(tmp_path / "a", one_thread, 400, NORMALIZER, {})
    assert other_file.fingerprint == tokenizer.fingerprint
    other_normalizer = save_tokenizer(tmp_path / "b", one_thread, 400, "identity", {})
    assert other_normalizer.fingerprint != tokenizer.fingerprint
    fewer = save_tokenizer(tmp_path / "c", train(iter(captions(400)), 390), 390, NORMALIZER, {})
    assert fewer.fingerprint != tokenizer.fingerprint


def test_a_copy_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.copy_to(tmp_path / "new" / "copy")
    copy = Tokenizer(tmp_path / "new" / "copy")
    assert copy.facts == tokenizer.facts
    assert copy.encode("a red dog") == tokenizer.encode("a red dog")
    for name in ("spm.model", "tokenizer.json"):
        assert (copy.folder / name).read_bytes() == (tokenizer.folder / name).read_bytes()


def test_damaged_folders_are_named(tokenizer, tmp_path):
    tokenizer.copy_to(tmp_path)
    model, facts = tmp_path / "spm.model", tmp_path / "tokenizer.json"
    whole, text = model.read_bytes(), facts.read_text()
    for bad, words in [
        (b"", "is empty"),
        (whole[:-50], "no sentencepiece model"),
        (b"xx" * 50, "no sentencepiece model"),
        # one letter of one piece
        (whole.replace(b"circle", b"cyrcle"), "fingerprint"),
        (train(iter(captions(400)), 390), "has n_vocab 390, tokenizer.json says 400"),
    ]:
        model.write_bytes(bad)
        with pytest.raises(InputError, match=words):
            Tokenizer(tmp_path)
    spm = {"vocab_size": 60, "minloglevel": 2, "hard_vocab_limit": False, "model_type": "bpe"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions(9)), model_writer=(other := io.BytesIO()), **spm
    )
    with pytest.raises(InputError, match="no bytes to fall back to"):
        save_tokenizer(tmp_path / "other", other.getvalue(), 60, NORMALIZER, {})
    model.unlink()
    with pytest.raises(InputError, match=r"spm\.model cannot be read"):
        Tokenizer(tmp_path)
    model.write_bytes(whole)
    facts.write_text(json.dumps(json.loads(text) | {"schema_version": 9}))
    with pytest.raises(InputError, match="schema version 9, this program reads 1"):
        Tokenizer(tmp_path)
    facts.write_text(text[:-20])
    with pytest.raises(InputError, match="is no JSON"):
        Tokenizer(tmp_path)
    facts.unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)
    facts.write_text(text)
    assert Tokenizer(tmp_path).n_vocab == tokenizer.n_vocab


def test_dropout_is_the_same_in_another_process(tokenizer):
    code = (
        "import sys; from pipeline.data.tokenizer import Tokenizer; "
        "texts = ['a red dog beside 4 cats', 'a blue house'] * 10; "
        "ids = Tokenizer(sys.argv[1]).encode_batch(texts, 0.5, range(11, 31)); "
        "sys.stdout.write(repr(ids))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tokenizer.folder)], capture_output=True, check=True
    )
    here = tokenizer.encode("a red dog beside 4 cats", dropout=0.5, seed=11)
    assert json.loads(out.stdout)[0] == here
    # and in every version: a resumed run repeats the tokens that it would have seen
    assert " ".join(tokenizer.pieces(here)) == "▁a ▁ r e d ▁ dog ▁ be s ide ▁ 4 ▁cat s"
