import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.train_tokenizer import NORMALIZER, train
from pipeline import sample
from pipeline.console import InputError
from pipeline.data.tokenizer import save_tokenizer
from pipeline.generation import artist, folder
from pipeline.generation.provenance import read_facts
from pipeline.models.dalle import load_dalle, save_dalle
from pipeline.models.dvae import load_dvae, save_dvae
from tests.pipeline.generation.helpers import random_dalle, random_dvae, tiny_config
from tests.tiny import ROOT, free_port

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


@pytest.fixture(scope="module")
def knowing(trained):
    """The same model, which has learnt empty captions."""
    folder = trained / "knowing"
    shutil.copytree(trained / "dalle", folder)
    model, made_of, _ = load_dalle(folder)
    save_dalle(folder, model.state_dict(), model.config, made_of | {"caption_dropout": 0.1})
    return folder


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
        for what, name in (("model", "dalle"), ("dvae", "dvae")):
            files = json.loads((trained / name / "model.json").read_text())["files"]
            assert image.text[what] == files["model.safetensors"][:16]
    # three columns, two rows, gaps of two pixels; the second picture is where it belongs
    grid = np.asarray(Image.open(out / "grid.png"))
    assert grid.shape == (66, 100, 3)
    assert (grid[:32, 34:66] == np.asarray(Image.open(out / lines[1]["file"]))).all()


@pytest.mark.parametrize(
    ("most", "size", "said"),
    [(5, (66, 66), True), (2, (32, 66), True), (1, (32, 32), True), (6, (66, 100), False)],
)
def test_a_grid_shows_the_first_pictures(trained, tmp_path, monkeypatch, most, size, said):
    """Whole captions, unless one has more than the grid takes."""
    file, lines = tmp_path / "captions.txt", []
    file.write_text("a red circle\ntwo green cats\n")
    monkeypatch.setattr(folder, "MOST_IN_GRID", most)
    monkeypatch.setattr(folder.log, "info", lambda text, *values: lines.append(text % values))
    sample.main(flags(trained, tmp_path, "--captions", file, "--count", 3, "--width", 6))
    assert np.asarray(Image.open(tmp_path / "grid.png")).shape == (*size, 3)
    assert len(read_lines(tmp_path)) == 6
    assert any("grid.png shows the first" in line for line in lines) is said


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
        (["--caption", "x", "--count", "4", "--rerank", "5"], "--rerank is 5; take 1 to --count"),
        (["--caption", "x", "--rerank", "0"], "--rerank is 0"),
        (["--caption", "x", "--count", "9" * 14], "at most 1,000,000, take several"),
        (["--caption", "x" * 200_001], "caption 0 has 200,001 bytes"),
        (["--caption", "x", "--scorer", "likelihood", "--clip", "c"], "leave one of them out"),
        (["--caption", "x", "--scorer", "clip"], "name a --clip DIR too"),
        (["--caption", "x", "--clip", "none"], "holds no trained clip"),
        (["--caption", "x", "--guidance", "2"], "has not: train it from a preset with caption_dro"),
        (["--caption", "x", "--rerank", "1"], "ranking by likelihood .* empty captions"),
        (["--caption", "x", "--guidance", "-1"], "guidance is -1.0"),
        (["--caption", "x", "--image", "a.png"], "give both or neither"),
        (["--caption", "x", "--keep-rows", "2"], "give both or neither"),
        (["--caption", "x", "--jacobi", "--width", "2"], "--width is 2; --jacobi draws one"),
        (["--caption", "x", "--fit"], "--fit is for an --image"),
        (["--caption", "x", "--image", "no.png", "--keep-rows", "2"], "no.png cannot be read"),
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


def test_captions_of_any_kind_become_pictures_or_a_sentence(trained, tmp_path):
    file = tmp_path / "captions.txt"
    captions = ["word " * 10_000, "\U0001f408\U0001f30d", "red\x07\x1b[31m circle", "\u202eright"]
    file.write_text("\n".join(captions), encoding="utf-8")
    sample.main(flags(trained, tmp_path / "out", "--captions", file, "--width", 2))
    lines = read_lines(tmp_path / "out")
    assert [line["caption"] for line in lines] == [caption.strip() for caption in captions]
    for line in lines:
        assert read_facts(tmp_path / "out" / line["file"]) == line


def test_a_stopped_request_goes_on_with_what_is_missing(trained, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    asked = ["--caption", "two green cats", "--count", "7", "--width", "3"]
    sample.main(flags(trained, whole, *asked))
    draw, drawn = sample.Artist.draw, []

    def once(self, folder, batch, bar):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(batch)
        draw(self, folder, batch, bar)

    monkeypatch.setattr(sample.Artist, "draw", once)
    with pytest.raises(KeyboardInterrupt):
        sample.main(flags(trained, out, *asked))
    assert len(list(out.glob("0*.png"))) == 3
    assert not (out / "samples.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    monkeypatch.setattr(sample.Artist, "draw", draw)
    sample.main(flags(trained, out, *asked))
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed", "9"], "its seed is 0 there and 9 here"),
        (["--caption", "a red circle"], "its captions is"),
        (["--top_k", "3"], "its top_k is null there and 3 here"),
        (["--mark"], "its mark is false there and true here"),
        (["--width", "5"], "its width is 4 there and 5 here"),
    ],
    ids=str,
)
def test_a_folder_takes_one_request(trained, tmp_path, more, words):
    asked = ["--caption", "two green cats", "--width", "4"]
    sample.main(flags(trained, tmp_path, *asked))
    there = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=f"another request: {words}.*name another --out"):
        sample.main(flags(trained, tmp_path, *asked, *more))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == there
    # without --width the folder's
    sample.main(flags(trained, tmp_path, "--caption", "two green cats"))


def test_what_is_in_the_folder_is_what_was_asked_for(trained, tmp_path):
    asked = flags(trained, tmp_path, "--caption", "two green cats", "--count", 3, "--width", 2)
    sample.main(asked)
    names = ["00000-000.png", "00000-001.png", "00000-002.png", "grid.png"]
    there = {name: (tmp_path / name).read_bytes() for name in names}
    way_out = "delete it, and the same command draws it again"
    for content, words in (
        (there["00000-001.png"], "another picture than was asked for, its file is"),
        (there["00000-002.png"][:300], "cut off or damaged"),
        (b"", "is no PNG"),
    ):
        (tmp_path / "00000-002.png").write_bytes(content)
        with pytest.raises(InputError, match=f"00000-002.png.*{words}.*: {way_out}"):
            sample.main(asked)
        (tmp_path / "00000-002.png").unlink()
        sample.main(asked)
        assert {name: (tmp_path / name).read_bytes() for name in names} == there
    # the request forgotten, and another one
    (tmp_path / "provenance.json").unlink()
    with pytest.raises(InputError, match="its caption is 'two green cats' and not 'a red circle'"):
        sample.main(flags(trained, tmp_path, "--caption", "a red circle", "--width", 2))


def test_a_picture_is_gone_on_with_below_its_top_rows(trained, tmp_path, monkeypatch):
    draw, made = artist.Sampler.draw, []

    def keep(self, *given, **options):
        made.append(draw(self, *given, **options))
        return made[-1]

    first, second = tmp_path / "first", tmp_path / "second"
    sample.main(flags(trained, first, "--caption", "two green cats", "--width", 2))
    image = first / "00000-000.png"
    monkeypatch.setattr(artist.Sampler, "draw", keep)
    sample.main(
        flags(trained, second, "--caption", "two green cats", "--count", 4, "--width", 2,
              "--image", image, "--keep-rows", 2)
    )  # fmt: skip
    lines = read_lines(second)
    assert {line["kept_tokens"] for line in lines} == {8}
    assert len({line["image_prompt"] for line in lines}) == 1
    dvae, _ = load_dvae(trained / "dvae")
    pixels = torch.tensor(np.asarray(Image.open(image).convert("RGB"))).permute(2, 0, 1)[None]
    codes = dvae.encode(pixels.float() / 255).flatten(1)
    assert torch.equal(made[0][:, :8], codes[:, :8].expand(2, -1))
    assert not torch.equal(made[0][0], made[0][1])
    files = {(second / line["file"]).read_bytes() for line in lines}
    assert len(files) == 4


@pytest.mark.parametrize("best", [1, 3])
def test_the_best_are_those_with_the_highest_scores(trained, knowing, tmp_path, best):
    file = tmp_path / "captions.txt"
    file.write_text("a red circle\ntwo green cats\n")
    out = tmp_path / "out"
    argv = flags(trained, out, "--captions", file, "--count", 5, "--rerank", best, "--width", 4)
    argv[1] = str(knowing)
    sample.main(argv)
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [score["rank"] for score in scores] == [0, 1, 2, 3, 4] * 2
    assert len({score["file"] for score in scores}) == 10
    for part in (scores[:5], scores[5:]):
        values = [score["likelihood_score"] for score in part]
        assert values == sorted(values, reverse=True)
        assert len(set(values)) > 1
    chosen = [line["file"] for line in read_lines(out)]
    assert chosen == [score["file"] for score in scores if score["rank"] < best]
    # the score of a picture does not hang on the others
    alone = tmp_path / "alone"
    argv = flags(trained, alone, "--caption", "two green cats", "--seed", 7, "--width", 4,
                 "--scorer", "likelihood")  # fmt: skip
    argv[1] = str(knowing)
    sample.main(argv)
    want = next(score for score in scores if score["seed"] == 7)
    assert read_lines(alone)[0]["likelihood_score"] == want["likelihood_score"]


def test_guidance_changes_the_picture_and_is_on_record(trained, knowing, tmp_path):
    made = []
    for guidance in ("1", "4"):
        argv = flags(trained, tmp_path / guidance, "--caption", "two green cats", "--width", 2,
                     "--guidance", guidance)  # fmt: skip
        argv[1] = str(knowing)
        sample.main(argv)
        line = read_lines(tmp_path / guidance)[0]
        assert line["guidance"] == float(guidance)
        made.append(np.asarray(Image.open(tmp_path / guidance / line["file"])))
    assert not (made[0] == made[1]).all()


def test_jacobi_decoding_draws_the_same_pictures(trained, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    asked = ["--caption", "two green cats", "--count", 3]
    sample.main(flags(trained, one, *asked, "--width", 1))
    sample.main(flags(trained, other, *asked, "--jacobi"))
    for line in read_lines(one):
        pixels = [np.asarray(Image.open(out / line["file"])) for out in (one, other)]
        assert (pixels[0] == pixels[1]).all()
    assert {(line["width"], line["jacobi"]) for line in read_lines(other)} == {(1, True)}


def test_rows_are_shown_as_they_come(trained, tmp_path, monkeypatch):
    sheets = []
    save = artist.save_png

    def keep(path, image):
        save(path, image)
        sheets.append(np.asarray(Image.open(path)))

    monkeypatch.setattr(artist, "save_png", keep)
    sample.main(
        flags(trained, tmp_path, "--caption", "two green cats", "--count", 3, "--width", 4,
              "--stream")
    )  # fmt: skip
    assert [sheet.shape[0] for sheet in sheets] == [8 * n + 2 + 8 * n for n in (1, 2, 3, 4)]
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert (sheets[-1] == grid).all()
    assert not (tmp_path / "partial.png").exists()


def test_marks_are_there_when_asked_for(trained, tmp_path, capsys):
    sample.main(
        flags(trained, tmp_path, "--caption", "two green cats", "--width", 1, "--mark",
              "--signature")
    )  # fmt: skip
    line = read_lines(tmp_path)[0]
    assert line["mark"] is True
    assert line["signature"] is True
    with pytest.raises(SystemExit) as end:
        sample.main(["verify", str(tmp_path / line["file"])])
    assert end.value.code == 0
    assert "mark found" in capsys.readouterr().out


@pytest.mark.parametrize("launch", ["deepspeed", "torchrun"])
@pytest.mark.dist
def test_ranks_draw_what_one_process_draws(trained, tmp_path, launch):
    file = tmp_path / "captions.txt"
    file.write_text("a red circle\ntwo green cats\na house under a yellow moon\n")
    asked = ["--captions", file, "--count", 5, "--width", 4]
    one, two = tmp_path / "one", tmp_path / "two"
    sample.main(flags(trained, one, *asked))
    # some of it is there from before
    two.mkdir()
    shutil.copy(one / "provenance.json", two)
    shutil.copy(one / "00001-002.png", two)
    port = str(free_port())
    line = {
        "deepspeed": ["--num_accelerators", "2", "--master_port", port, "--module"],
        "torchrun": ["--nproc-per-node", "2", "--master-port", port, "--module"],
    }[launch]
    program = str(Path(sys.executable).with_name(launch))
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [program, *line, "pipeline.sample", *flags(trained, two, *asked)],
        capture_output=True, text=True, check=False, env=env, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "1 of 15 images are there already" in run.stderr
    assert sorted(path.name for path in two.iterdir()) == sorted(p.name for p in one.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


@pytest.mark.dist
@pytest.mark.parametrize(
    ("differs", "said"),
    [
        ("captions", r"error: the ranks differ: captions is \w+ on rank 0, \w+ on rank 1"),
        ("a model", "error: rank 1: /proc/self/cwd/dalle"),
    ],
    ids=["captions", "a model"],
)
def test_ranks_that_read_other_files_draw_nothing(trained, tmp_path, differs, said):
    """As two machines with folders of their own would."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        n_cats = rank if differs == "captions" else 2
        (tmp_path / str(rank) / "captions.txt").write_text(f"{n_cats} green cats\n")
    (tmp_path / "0" / "dalle").symlink_to(trained / "dalle")
    here = "/proc/self/cwd"
    words = " ".join(flags(trained, tmp_path / "out", "--captions", f"{here}/captions.txt"))
    if differs == "a model":
        words += f" --model {here}/dalle"
    script = f"cd {tmp_path}/$RANK; exec {sys.executable} -m pipeline.sample {words}"
    env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, "--master-port", str(free_port()), "--no-python", "sh", "-c", script],
        capture_output=True, text=True, check=False, env=os.environ | env, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode != 0
    [error] = re.findall("error: .*", run.stderr)
    assert re.match(said, error), error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_a_sentence_and_loses_nothing(trained, tmp_path):
    out = tmp_path / "out"
    line = flags(trained, out, "--caption", "two green cats", "--width", "1", "--count", "2")
    # bytes in units of 1024: the PNG of the first picture does not fit
    script = f"ulimit -f 1; exec {sys.executable} -m pipeline.sample {' '.join(map(repr, line))}"
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, cwd=ROOT, env=env
    )
    assert run.returncode == 2, run.stderr
    assert "00000-000.png: File too large; raise ulimit -f" in run.stderr
    assert not list(out.glob("*.png"))
    sample.main(line)
    assert len(read_lines(out)) == 2
