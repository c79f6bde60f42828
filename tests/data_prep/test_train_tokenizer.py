import re
import subprocess
import sys

import pytest

from data_prep import train_tokenizer as job
from pipeline.console import InputError
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizer import Tokenizer
from tests.pipeline.data.helpers import pair_row, write

WORDS = ["red", "green", "blue", "circle", "square", "star", "above", "below", "beside", "the", "7"]


def pairs(folder, captions):
    rows = (pair_row(str(i), b"x", caption=caption) for i, caption in enumerate(captions))
    write(folder, "pairs", rows, 64)
    return folder


def text(n):
    return [" ".join(WORDS[(i * k) % len(WORDS)] for k in (1, 3, 5, 8)) for i in range(n)]


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", "data_prep.train_tokenizer", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_trains_and_records_what_the_text_supports(tmp_path):
    data = pairs(tmp_path / "pairs", text(200))
    done = command("--data", data, "--out", tmp_path / "t", "--preset", "dalle_demo")
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer(tmp_path / "t")
    assert tokenizer.facts["requested_vocab"] == 512
    assert 257 < tokenizer.n_vocab < 512
    said = f"the text supports {tokenizer.n_vocab} pieces, 512 were asked for"
    assert said in done.stderr
    # nothing of sentencepiece's own
    assert all(line.startswith("[") for line in done.stderr.splitlines()), done.stderr
    assert done.stdout == ""
    assert tokenizer.decode(tokenizer.encode("the red Star")) == "the red star"
    assert tokenizer.facts["trainer"]["captions"] == 200
    assert tokenizer.facts["trainer"]["pairs"] == ShardReader(data).fingerprint


def test_mistakes_end_in_one_sentence_and_exit_code_2(tmp_path):
    data = pairs(tmp_path / "pairs", text(50))
    least = len(set("".join(text(50)))) + 257
    done = command("--data", data, "--out", tmp_path / "t", "--vocab", "258")
    assert done.returncode == 2
    assert re.fullmatch(rf"error: .*258 is too small.*--vocab {least}\n", last_line(done.stderr))
    done = command("--data", tmp_path / "nowhere", "--out", tmp_path / "t")
    assert done.returncode == 2
    assert last_line(done.stderr).startswith("error: ")
    assert "nowhere" in last_line(done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "t").exists()


def last_line(text):
    return text.splitlines(keepends=True)[-1]


def test_the_least_vocabulary_of_the_message_is_enough(tmp_path):
    reader = ShardReader(pairs(tmp_path / "pairs", text(50)))
    with pytest.raises(InputError) as error:
        job.train_tokenizer(reader, tmp_path / "t", 10)
    least = int(str(error.value).split()[-1])
    with pytest.raises(InputError, match=f"--vocab {least}"):
        job.train_tokenizer(reader, tmp_path / "t", least - 1)
    assert job.train_tokenizer(reader, tmp_path / "t", least).n_vocab == least


def test_training_is_deterministic_and_independent_of_sharding(tmp_path):
    lines = text(200)
    model = job.train(iter(lines), 320)
    assert job.train(iter(lines), 320) == model
    reader = ShardReader(pairs(tmp_path / "pairs", lines))
    job.train_tokenizer(reader, tmp_path / "t", 320)
    assert (tmp_path / "t" / "spm.model").read_bytes() == model


def test_no_caption_is_left_out_of_training(tmp_path):
    # the trainer alone would leave out all of these, and say so nowhere
    odd = [f"zebra ▅ {i}" for i in range(9)] + ["word " * 3000 + "quagga quagga"]
    # these it takes, today
    odd += [f"okapi{mark}gnu {i}" for mark in "\t\0\n\r▁" for i in range(9)]
    reader = ShardReader(pairs(tmp_path / "pairs", odd))
    tokenizer = job.train_tokenizer(reader, tmp_path / "t", 320)
    for word in ("zebra", "quagga", "okapi", "gnu"):
        assert tokenizer.pieces(tokenizer.encode(word)) == [f"▁{word}"]


def test_a_large_set_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "MAX_CAPTIONS", 60)
    monkeypatch.setattr(job, "CHUNK", 7)
    seen = []
    train = job.train

    def spy(captions, vocab):
        seen.append(list(captions))
        return train(iter(seen[-1]), vocab)

    monkeypatch.setattr(job, "train", spy)
    lines = [f"{line} {i}" for i, line in enumerate(text(200))]
    reader = ShardReader(pairs(tmp_path / "pairs", lines))
    for _ in range(2):
        job.train_tokenizer(reader, tmp_path / "t", 300)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 60
    assert set(seen[0]) <= set(lines)
    # from all over the set
    assert len({lines.index(line) // 50 for line in seen[0]}) == 4


@pytest.mark.parametrize("lines", [[], [""], ["  ", "\t"]], ids=["none", "empty", "blank"])
def test_no_text_is_an_error(tmp_path, lines):
    reader = ShardReader(pairs(tmp_path / "pairs", lines))
    with pytest.raises(InputError, match="is --data the right set"):
        job.train_tokenizer(reader, tmp_path / "t", 300)


def test_vocabulary_of_a_preset():
    assert job.vocab_of("dalle_12b") == job.PAPER_VOCAB
    assert job.vocab_of("clip_demo") == job.vocab_of("dalle_demo")
    with pytest.raises(InputError, match="reads no text: name one of the transformer's or CLIP's"):
        job.vocab_of("dvae_demo")
    with pytest.raises(InputError, match="no preset is called"):
        job.vocab_of("dalle_13b")


@pytest.mark.parametrize("error", [InputError("shard 3 is damaged"), KeyboardInterrupt()])
def test_what_the_captions_raise_is_raised(error):
    def captions():
        yield from ["a cat", "a dog"] * 50
        raise error

    with pytest.raises(type(error)) as caught:
        job.train(captions(), 300)
    assert caught.value is error
