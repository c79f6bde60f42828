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
    with pytest.raises(InputError, match="is not Unicode text"):
        tokenizer.encode("a\ud800")


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
    for caption in captions(200, seed=3) + ODD:
        assert tokenizer.encode(caption, dropout=1e-15, seed=0) == tokenizer.encode(caption)
    # with one that does: the library's sampler in the mean
    processor = tokenizer._processor
    texts = captions(2000, seed=4)
    for dropout in (0.1, 0.5):
        ours = [
            len(tokenizer.encode(text, dropout=dropout, seed=i)) for i, text in enumerate(texts)
        ]
        theirs = [
            len(processor.encode(text, enable_sampling=True, alpha=dropout, nbest_size=-1))
            for text in texts
        ]
        error = np.sqrt((np.var(ours) + np.var(theirs)) / len(texts))
        assert np.mean(ours) > 1.1 * np.mean([len(tokenizer.encode(text)) for text in texts])
        assert abs(np.mean(ours) - np.mean(theirs)) < 5 * error


def test_dropout_needs_a_seed_and_a_share(tokenizer):
    with pytest.raises(InputError, match="seed None"):
        tokenizer.encode("a", dropout=0.1)
    for dropout in (-0.1, 1.5):
        with pytest.raises(InputError, match=f"dropout {dropout}"):
            tokenizer.encode("a", dropout=dropout, seed=0)


def test_pad_keeps_one_position_for_the_start(tokenizer):
    for length, n_text in [(0, 4), (1, 4), (3, 4), (4, 4), (9, 4), (1, 1), (0, 1)]:
        ids = list(range(100, 100 + length))
        tokens, is_cut = tokenizer.pad(ids, n_text)
        kept = min(length, n_text - 1)
        assert tokens.dtype == np.int32
        assert tokens.tolist() == ids[:kept] + [NO_TOKEN] * (n_text - kept)
        assert is_cut == (length > n_text - 1)
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
        "ids = Tokenizer(sys.argv[1]).encode('a red dog beside 4 cats', dropout=0.5, seed=11); "
        "sys.stdout.write(repr(ids))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tokenizer.folder)], capture_output=True, check=True
    )
    here = tokenizer.encode("a red dog beside 4 cats", dropout=0.5, seed=11)
    assert json.loads(out.stdout) == here
    # and in every version: a resumed run repeats the tokens that it would have seen
    assert tokenizer.pieces(here) == [
        "▁",
        "a",
        "▁red",
        "▁",
        "d",
        "o",
        "g",
        "▁b",
        "e",
        "s",
        "ide",
        "▁",
        "4",
        "▁",
        "c",
        "at",
        "s",
    ]
