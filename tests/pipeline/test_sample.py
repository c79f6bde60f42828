import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.train_tokenizer import NORMALIZER, train
from pipeline import sample
from pipeline.console import InputError
from pipeline.data.tokenizer import save_tokenizer
from pipeline.models.dalle import save_dalle
from pipeline.models.dvae import save_dvae
from tests.pipeline.generation.helpers import random_dalle, random_dvae, tiny_config

CAPTIONS = ["a red circle beside a blue star", "two green cats", "a house under a yellow moon"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A random model, dVAE and tokenizer that belong together, and a dVAE that does not."""
    root = tmp_path_factory.mktemp("trained")
    tokenizer = save_tokenizer(
        root / "dalle" / "tokenizer", train(iter(CAPTIONS), 300), 300, NORMALIZER, {}
    )
    config = tiny_config(n_text=8, n_text_vocab=tokenizer.n_vocab)
    dvae = save_dvae(root / "dvae", random_dvae(config))
    save_dvae(root / "other", random_dvae(config, seed=1))
    made_of = {"dvae": dvae, "tokenizer": tokenizer.fingerprint}
    save_dalle(root / "dalle", random_dalle(config).state_dict(), config, made_of)
    return root


def flags(trained, out, *more):
    paths = ["--model", trained / "dalle", "--dvae", trained / "dvae", "--out", out]
    return [str(flag) for flag in [*paths, *more]]


def read_lines(out):
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_captions_become_described_pictures(trained, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_bytes("\ufeffa red circle\r\ndeux étoiles 星\n\n".encode())
    out = tmp_path / "new" / "out"
    sample.main(
        flags(
            trained, out, "--captions", file, "--count", 3, "--seed", 40, "--width", 4, "--top_k", 9
        )
    )
    lines = read_lines(out)
    assert [line["seed"] for line in lines] == [40, 41, 42, 43, 44, 45]
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["caption"] for line in lines] == ["a red circle"] * 3 + ["deux étoiles 星"] * 3
    assert lines[4]["file"] == "00001-001.png"
    for line in lines:
        image = Image.open(out / line["file"])
        assert (image.size, image.mode) == ((32, 32), "RGB")
        assert image.text["caption"] == line["caption"]
        assert image.text["seed"] == str(line["seed"])
        assert image.text["top_k"] == "9"
        assert "top_p" not in image.text
        for what, folder in (("model", "dalle"), ("dvae", "dvae")):
            files = json.loads((trained / folder / "model.json").read_text())["files"]
            assert image.text[what] == files["model.safetensors"][:16]
    # three columns, two rows, gaps of two pixels; the second picture is where it belongs
    grid = np.asarray(Image.open(out / "grid.png"))
    assert grid.shape == (66, 100, 3)
    assert (grid[:32, 34:66] == np.asarray(Image.open(out / lines[1]["file"]))).all()


def test_a_seed_alone_gives_the_same_file(trained, tmp_path):
    many, one = tmp_path / "many", tmp_path / "one"
    sample.main(flags(trained, many, "--caption", "two green cats", "--count", 5, "--width", 3))
    sample.main(flags(trained, one, "--caption", "two green cats", "--seed", 4, "--width", 3))
    pictures = [np.asarray(Image.open(many / line["file"])) for line in read_lines(many)]
    assert (np.asarray(Image.open(one / "00000-000.png")) == pictures[4]).all()
    assert not (pictures[3] == pictures[4]).all()


def test_a_caption_too_long_is_cut_and_said(trained, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(sample.log, "warning", lambda text, *values: said.append(text % values))
    long = "a red circle beside a blue star " * 3
    sample.main(flags(trained, tmp_path, "--caption", long, "--width", 1, "--temperature", 0))
    assert len(said) == 1
    assert "caption 0 has" in said[0]
    assert "the model reads 7" in said[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--caption", "x", "--count", "0"], "--count is 0; take at least 1"),
        (["--caption", " \t"], "the caption is empty"),
        (["--caption", "\u200b"], "nothing to read in it"),
        (["--caption", "x", "--width", "0"], "--width is 0"),
        (["--caption", "x", "--width", "100000000"], "take 1 to 4096"),
        (["--caption", "x", "--seed", "-1"], "--seed is -1"),
        (["--caption", "x", "--temperature", "nan"], "temperature is nan"),
        (["--caption", "x", "--top_k", "99"], "top_k is 99; take 1 to 24"),
        (["--captions", "missing.txt"], "missing.txt cannot be read"),
        (["--captions", "empty.txt"], "empty.txt is empty"),
        (["--captions", "latin.txt"], "latin.txt is not UTF-8"),
        (["--captions", "gap.txt"], "gap.txt has no caption in line 2"),
    ],
    ids=str,
)
def test_bad_requests_are_sentences(trained, tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("étoile".encode("latin-1"))
    (tmp_path / "gap.txt").write_text("one\n\ntwo\n")
    with pytest.raises(InputError, match=words):
        sample.main(flags(trained, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def refuses(words, *argv):
    with pytest.raises(InputError, match=words):
        sample.main([str(flag) for flag in [*argv, "--caption", "x"]])


def test_models_that_do_not_belong_together_are_refused(trained, tmp_path):
    dalle, dvae, out = trained / "dalle", trained / "dvae", tmp_path / "out"
    refuses(
        "was trained on tokens of dVAE", "--model", dalle, "--dvae", trained / "other", "--out", out
    )
    refuses("holds a dvae, a dalle is needed", "--model", dvae, "--dvae", dvae, "--out", out)
    refuses("holds no trained dalle", "--model", tmp_path / "none", "--dvae", dvae, "--out", out)
    copy = tmp_path / "copy"
    shutil.copytree(dalle, copy)
    shutil.rmtree(copy / "tokenizer")
    refuses("tokenizer", "--model", copy, "--dvae", dvae, "--out", out)
    save_tokenizer(copy / "tokenizer", train(iter(["something else"]), 290), 290, NORMALIZER, {})
    refuses("was trained with tokenizer", "--model", copy, "--dvae", dvae, "--out", out)
    assert not out.exists()
    (tmp_path / "file").write_text("")
    refuses("file cannot be written", "--model", dalle, "--dvae", dvae, "--out", tmp_path / "file")


def test_the_command_ends_with_a_sentence_and_code_2(trained, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "pipeline.sample", "--model", trained / "none", "--dvae",
         trained / "dvae", "--caption", "x", "--out", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert "holds no trained dalle" in run.stderr
    assert "Traceback" not in run.stderr
