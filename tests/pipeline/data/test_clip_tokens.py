"""The byte pairs against open_clip 3.3.0, whose tokenizer gave the ids below."""

import gzip

import pytest

from pipeline.config import ClipConfig
from pipeline.console import InputError
from pipeline.data.clip_tokens import BYTE_PAIRS, BytePairs, open_tokens, read_vocabulary

PAIRS = [
    "t h", "th e</w>", "r e", "re d</w>", "i n", "in g</w>", "c a", "ca f", "Ã ©</w>", "caf Ã©</w>",
    "' s</w>", "d o", "do g</w>", "ð Ł", "ðŁ ĺ", "ðŁĺ Ģ</w>", "1 2", "! !</w>", "l l</w>",
    "' ll</w>",
]  # fmt: skip
CONFIG = ClipConfig(n_vocab=512 + len(PAIRS) + 2, n_text=10)


def write(path, lines=PAIRS):
    text = "\n".join(["#version: 0.2", *lines, ""]).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture(scope="module", params=["pairs.txt", "pairs.txt.gz"])
def tokens(request, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("pairs") / request.param)
    return BytePairs(read_vocabulary(path, CONFIG.n_vocab), CONFIG)


@pytest.mark.parametrize(
    ("caption", "ids"),
    [
        ("the red dog", [513, 515, 524]),
        ("The RED  dog's café", [513, 515, 524, 522, 521]),
        ("cafe\u0301", [521]),
        ("\u201cthe\u201d dog\u2019s", [257, 513, 257, 524, 522]),
        ("they'll ring 12!!", [512, 68, 344, 531, 81, 517, 272, 273]),
        ("\U0001f600 &amp;amp; &lt;the&gt;", [527, 261, 283, 513, 285]),
        ("", []),
        ("\uff32\uff25\uff24 \ufb01n", [515, 69, 72, 333]),
        ("the " * 12, [513] * 8),
    ],
)
def test_ids_are_those_of_open_clip(tokens, caption, ids):
    (row,) = tokens.encode_batch([caption]).tolist()
    assert row == [532, *ids, 533] + [0] * (8 - len(ids))


def test_the_name_of_a_special_token_is_text(tokens):
    (row,) = tokens.encode_batch(["<end_of_text>"]).tolist()
    assert row.count(533) == 1
    assert row[-1] == 533


def test_a_copy_is_the_same(tokens, tmp_path):
    tokens.copy_to(tmp_path / "copy")
    again = open_tokens(tmp_path / "copy", CONFIG)
    assert again.fingerprint == tokens.fingerprint
    captions = ["the red dog's café", "12!!"]
    assert again.encode_batch(captions).tolist() == tokens.encode_batch(captions).tolist()
    with pytest.raises(InputError, match="the vocabulary has 532 pieces, the model 600 and two"):
        open_tokens(tmp_path / "copy", ClipConfig(n_vocab=602))
    (tmp_path / "copy" / BYTE_PAIRS).write_text("{}")
    with pytest.raises(InputError, match=f"{BYTE_PAIRS} cannot be read .*copy it again"):
        open_tokens(tmp_path / "copy", CONFIG)


@pytest.mark.parametrize(
    ("lines", "n_vocab", "sentence"),
    [
        (PAIRS[:5], CONFIG.n_vocab, r"has 6 pairs, the weights have 534 tokens: .* and 20 pairs"),
        (PAIRS, 96, "have 96 tokens"),
        (["t h", "the"], 516, "line 3: 'the' is no pair of pieces that stand above it"),
        (["t h", "th er"], 516, "line 3: 'th er' is no pair"),
    ],
)
def test_a_file_that_is_no_vocabulary_of_the_weights_is_refused(tmp_path, lines, n_vocab, sentence):
    with pytest.raises(InputError, match=sentence):
        read_vocabulary(write(tmp_path / "pairs.txt", lines), n_vocab)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"a b\n" * 99)[:-9])
    for name in ("nowhere", "broken.gz"):
        with pytest.raises(InputError, match=f"{name} cannot be read .*bpe_simple_vocab_16e6"):
            read_vocabulary(tmp_path / name, 600)
