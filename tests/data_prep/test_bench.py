import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import bench
from data_prep.filters import Filters, judge_caption
from data_prep.speed import clock, encode, ingest, inputs, loader
from data_prep.speed.clock import Times
from pipeline.config import DvaeConfig
from pipeline.console import InputError
from pipeline.data.images import decode_image
from pipeline.models.dvae import Conv2d, DiscreteVAE
from tests.test_house import OURS, imported

DVAE = DvaeConfig(image_size=16, n_vocab=24, n_hid=8, n_init=8, n_blk_per_group=1)
BUSY = "encode 5/5, 1 s  9.0 images/s, dVAE busy 50%\nencode 5/5, 2 s  9.0 images/s, dVAE busy 75%"


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def commands(monkeypatch):
    """Commands run in this process, and are said to take 5 s and a tenth for every row."""
    seen = []

    def run(words, times=None):
        seen.append(words)
        monkeypatch.setattr(sys, "argv", words)
        importlib.import_module(words[0]).main()
        if times is not None:
            folder = Path(words[words.index("--out") + 1])
            took_s = 5 + json.loads((folder / "manifest.json").read_text())["rows"] / 10
            times.add(took_s, took_s / 2)
        return BUSY

    for module in (ingest, loader, encode):
        monkeypatch.setattr(module, "timed_command", run)
    return seen


def check_times(measured, n, what="images"):
    assert measured[what] == n
    for name in ("cpu_s", "wall_s"):
        times = measured[name]
        assert times["min"] == min(times["runs"]) <= times["median"] <= max(times["runs"])
    assert measured[f"{what}_per_s"] is None or measured[f"{what}_per_s"] > 0


# ---- what is measured


def test_ingest_whole_by_pass_and_in_parts(tmp_path, commands):
    found = ingest.measure(tmp_path, 9, 256, runs=2)
    assert {name: found["pictures"][name] for name in ("n", "taken", "side")} == {
        "n": 9, "taken": 9, "side": 256
    }  # fmt: skip
    for name in ("job", "inspect", "write"):
        check_times(found[name], 7)
        assert len(found[name]["cpu_s"]["runs"]) == 2
    # what the commands are said to take, without that of a quarter of the pictures
    for name in ("job", "write"):
        assert found[name]["images_per_cpu_s"] == 20
        assert found[name]["images_per_s"] == 10
    assert found["quarter"]["cpu_s"]["min"] == 2.6
    check_times(found["merge"], 9)
    parts = {"read", "caption", "sha256", "jpeg decoder", "decode to luma", "phash"}
    assert set(found["parts"]) == parts
    for part in found["parts"].values():
        check_times(part, 9)
    # one process, and no filter off
    flags = {word for words in commands for word in words if word.startswith("--")}
    assert flags == {"--out", "--workers"}
    assert {words[words.index("--workers") + 1] for words in commands} == {"1"}
    # what is written is taken up where the first pass ended
    assert len(commands) == 8
    assert not (tmp_path / "set").exists()


@pytest.fixture
def samples(tmp_path):
    return loader.Samples(tmp_path, 200, 4)


def test_samples_are_those_that_were_written(samples):
    ids = np.array([199, 0, 100, 7])
    tokens, captions = samples.read(ids)
    assert np.array_equal(tokens, samples.tokens[ids])
    assert captions == [samples.captions[i] for i in ids]
    assert [shard["rows"] for shard in samples.reader.manifest["shards"]] == [100, 100]


def test_the_loader_reads_everything_once_at_random_places(samples, monkeypatch, commands):
    monkeypatch.setattr(loader, "BATCH", 20)
    seen = {"read": [], "batch_at": []}
    read, batch_at = samples.read, loader.TokenLoader.batch_at

    def watched(rows):
        seen["read"].append(rows)
        return read(rows)

    def watched_batch(self, position):
        seen["batch_at"].append((self.dropout, batch := batch_at(self, position)))
        return batch

    monkeypatch.setattr(samples, "read", watched)
    monkeypatch.setattr(loader.TokenLoader, "batch_at", watched_batch)
    found = loader.measure(samples, runs=4)
    for name in ("reading", "bpe", "bpe_dropout"):
        check_times(found[name], 40, "samples")
        assert len(found[name]["wall_s"]["runs"]) == 4
    rows = np.concatenate(seen["read"])
    assert rows.tolist() != list(range(200))
    assert sorted(rows.tolist()) == list(range(200))
    for dropout in (0.0, 0.1):
        batches = [batch for with_dropout, batch in seen["batch_at"] if with_dropout == dropout]
        assert sorted(np.concatenate([b.ids for b in batches]).tolist()) == list(range(200))
        assert all(batch.text_tokens.shape == (20, 256) for batch in batches)
    check_times(found["resume"], 1, "resumes")
    assert found["set"] == {"samples": 200, "shards": 2}
    assert 11 < found["text"]["words"] < 13
    assert found["text"]["tokens"] >= found["text"]["words"]


def test_the_encoder_in_its_job_and_alone(tmp_path, commands):
    found = encode.measure(tmp_path, encode.Setting(DVAE, 3, 2, "cpu", 2))
    assert found["job"]["images"] == 15
    assert found["job"]["images_per_s"] > 0
    assert found["job"]["dvae_busy"] == 0.75  # of the last shard
    assert found["job"]["command_cpu_s"] == 3.25
    check_times(found["dvae"], 2)
    flop = found["gflop_per_image"]
    assert found["dvae"]["gflop_s"] == pytest.approx(found["dvae"]["images_per_s"] * flop, rel=1e-2)
    bound = found["bound"]
    assert bound["images_per_s"] == pytest.approx(bound["matmul_gflop_s"] / flop, rel=1e-2)
    assert found["float32_gflop_per_image"] < flop
    [words] = commands
    assert words[words.index("--batch") + 1] == "2"
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [3] * 5


def test_a_job_that_does_not_say_how_busy_it_was(tmp_path, monkeypatch, commands):
    monkeypatch.setattr(sys.modules[__name__], "BUSY", "done")
    with pytest.raises(InputError, match="does not say how busy the dVAE was: 'done'"):
        encode.measure(tmp_path, encode.Setting(DVAE, 1, 1, "cpu", 1))


def test_operations_are_those_of_the_paper():
    assert round(encode.flop_of(DvaeConfig()) / 1e9) == 272


def test_operations_are_products_and_sums_of_every_convolution():
    dvae, found = DiscreteVAE(DVAE), []

    def count(conv, _, out):
        n_in, kernel = conv.w.shape[1], conv.w.shape[2] ** 2
        found.append((conv.full_precision, 2 * n_in * kernel * out.numel()))

    for module in dvae.encoder.modules():
        if isinstance(module, Conv2d):
            module.register_forward_hook(count)
    dvae.encode(torch.rand(1, 3, 16, 16))
    assert encode.flop_of(DVAE) == sum(n for _, n in found)
    assert encode._float32_flop(dvae) == sum(n for is_float32, n in found if is_float32) > 0


# ---- beside another library


STREAMING = """
import json, sys
import numpy as np
__version__ = "0.0"
class MDSWriter:
    rows = []
    def __init__(self, out, columns, compression, hashes):
        assert columns == {"tokens": "ndarray:uint16:16", "caption": "str"}
        assert compression is None and hashes is None
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def write(self, row): self.rows.append(row)
class StreamingDataset:
    def __init__(self, local, shuffle, batch_size): assert not shuffle
    def __getitem__(self, at):
        return [self[i] for i in at] if isinstance(at, list) else MDSWriter.rows[at + SHIFT]
"""


def stand_in(folder, monkeypatch, shift=0):
    """A library of that name for the peer's script, which reads ``shift`` samples too far."""
    (folder / "streaming" / "base").mkdir(parents=True)
    (folder / "streaming" / "__init__.py").write_text(STREAMING.replace("SHIFT", str(shift)))
    (folder / "streaming" / "base" / "__init__.py").touch()
    cleaned = "def clean_stale_shared_memory(): print('cleaned')\n"
    (folder / "streaming" / "base" / "util.py").write_text(cleaned)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_the_peer_reads_the_same_samples_in_two_ways(samples, tmp_path, monkeypatch):
    stand_in(tmp_path / "library", monkeypatch)
    monkeypatch.setattr(loader, "RACED", 90)
    found = loader.race(samples, sys.executable, runs=2)
    assert (found["peer"]["library"], found["peer"]["version"]) == ("mosaicml-streaming", "0.0")
    for side in (found["ours"], found["peer"]["ways"]):
        assert set(side) == {"batches", "one_by_one"}
        for times in side.values():
            check_times(times, 90, "samples")
            assert len(times["cpu_s"]["runs"]) == 2
    fastest = max(way["samples_per_cpu_s"] for way in found["peer"]["ways"].values())
    for name, ratio in found["ratio"].items():
        assert ratio == pytest.approx(found["ours"][name]["samples_per_cpu_s"] / fastest, rel=1e-2)


def test_a_peer_that_reads_other_samples_is_no_comparison(samples, tmp_path, monkeypatch):
    stand_in(tmp_path / "library", monkeypatch, shift=-1)
    with pytest.raises(InputError, match="read other samples than were written"):
        loader.race(samples, sys.executable, runs=1)


def test_the_peers_script_needs_nothing_of_this_project():
    names = {name.split(".")[0] for name in imported(loader.PEER.read_text())}
    assert "streaming" in names
    assert not names & OURS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise SystemExit('no such thing')", "ended with code 1: no such thing"),
        ("import sys; sys.exit(3)", "ended with code 3: it says nothing"),
        ("print('hello')", "printed no JSON line of times"),
        ("print('{}')", "printed no JSON line of times: 'ways'"),
        ("pass", "printed no JSON line of times"),
    ],
    ids=["fails", "fails silently", "no json", "no times", "silent"],
)
def test_a_peer_that_fails_is_told(text, words, samples, tmp_path, monkeypatch):
    script = tmp_path / "peer.py"
    script.write_text(text)
    monkeypatch.setattr(loader, "PEER", script)
    with pytest.raises(InputError, match=f"--peer: peer.py {words}"):
        loader.race(samples, sys.executable, runs=1)


def test_a_peer_without_its_python_is_told(samples, tmp_path):
    with pytest.raises(InputError, match=r"--peer: .*none does not run"):
        loader.race(samples, str(tmp_path / "none"), runs=1)


# ---- made-up data


def test_captions_pass_every_filter_and_have_twelve_words():
    made = inputs.captions(400)
    assert made == inputs.captions(400)
    assert [text for text in made if judge_caption(text, Filters())] == []
    assert 11 < np.mean([len(text.split()) for text in made]) < 13
    assert len(set(made)) > 390
    words = {word for text in made for word in text.split()}
    assert 20 < sum(word[0].isupper() for word in words) < 65  # names


def test_pictures_are_as_large_as_photographs_and_differ():
    files = list(inputs.pictures(4, 512))
    assert all(38_000 < len(file) < 80_000 for file in files)
    assert len(set(files)) == 4
    assert all(decode_image(file).shape == (512, 512, 3) for file in files)
    # smooth, so that the hash has something to hold, and not flat
    rows = decode_image(files[0]).astype(float).std(axis=(0, 1))
    assert (rows > 15).all()


def test_some_codes_are_a_hundred_times_as_frequent_as_others():
    codes = inputs.codes(400, 256, 64)
    assert (codes.dtype, codes.shape, codes.max()) == (np.uint16, (400, 256), 63)
    counts = np.sort(np.bincount(codes.ravel(), minlength=64))
    assert counts[0] > 0
    assert 60 < counts[-1] / counts[0] < 200


# ---- time


def test_both_kinds_of_seconds_and_the_least_of_them():
    times = Times([4.0, 2.0, 3.0], [1.0, 0.5, 0.75])
    found = times.of(6, "images")
    assert (found["images_per_s"], found["images_per_cpu_s"]) == (3, 12)
    assert found["images_per_cpu_s_median"] == 8
    assert found["wall_s"] == {"min": 2, "median": 3, "runs": [4, 2, 3]}
    less = times.without(Times([1.0, 1.5], [0.5, 0.9])).of(6, "images")
    assert (less["images_per_s"], less["images_per_cpu_s"]) == (6, None)


def test_a_command_is_timed_with_what_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "ROOT", tmp_path)
    work = "t = time.process_time()\nwhile time.process_time() < t + 0.3: pass"
    (tmp_path / "child.py").write_text(f"import time\n{work}")
    start = "import subprocess, sys\nsys.stderr.write('said')\n"
    (tmp_path / "parent.py").write_text(start + "subprocess.run([sys.executable, 'child.py'])")
    times = Times()
    assert clock.timed_command(["parent"], times) == "said"
    assert times.cpu_s[0] >= 0.3
    assert times.wall_s[0] >= 0.3


def test_a_command_that_fails_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "ROOT", tmp_path)
    (tmp_path / "bad.py").write_text("raise SystemExit('one\\ntwo\\nthree\\nfour')")
    with pytest.raises(InputError, match="`bad` ended with code 1: two three four"):
        clock.timed_command(["bad"])


# ---- the command


def made_up(monkeypatch, **parts):
    """The bench with parts that take no time."""
    asked = []

    def part(name, found):
        def run(args, folder):
            assert folder.is_dir()
            asked.append(name)
            if isinstance(found, Exception):
                raise found
            return found

        return run

    monkeypatch.setattr(bench, "PARTS", {name: part(name, found) for name, found in parts.items()})
    return asked


def test_numbers_are_saved_with_what_they_depend_on(tmp_path, monkeypatch, capsys):
    asked = made_up(
        monkeypatch,
        ingest={"ingest": {"job": {"images_per_cpu_s": 200.0}}},
        loader={"loader": {"reading": {"samples_per_cpu_s": 100_000.0}}},
        encode={"encode": {"job": {"gpu_busy": 0.9}}},
    )
    out = tmp_path / "new" / "bench.json"
    bench.main(["--commit", "abc", "--out", str(out)])
    assert asked == ["ingest", "loader"]
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert (result["commit"], result["threads"]) == ("abc", 1)
    assert torch.get_num_threads() == 1
    assert result["chip"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["numpy"] == np.__version__
    assert {target["name"]: target["met"] for target in result["targets"]} == {
        "ingest, images/s": False,
        "reading, samples/s": True,
    }
    assert str(tmp_path) not in out.read_text()
    assert sys.prefix not in out.read_text()


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch):
    made_up(
        monkeypatch, ingest={"ingest": {"a": 1}}, loader={}, encode=InputError("the encoder broke")
    )
    out = tmp_path / "bench.json"
    with pytest.raises(InputError, match="the encoder broke"):
        bench.main(["--only", "encode", "ingest", "--out", str(out)])
    assert json.loads(out.read_text())["ingest"] == {"a": 1}


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    asked = made_up(monkeypatch, ingest={}, loader={}, encode={})
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out .*bench.json cannot be written \(.*\)"):
        bench.main(["--out", str(tmp_path / "file" / "bench.json")])
    assert not asked


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--runs", "0"], "--runs is 0; take at least 1"),
        (["--images", "3"], "--images is 3; take at least 4"),
        (["--side", "255"], "--side is 255; take at least 256"),
        (["--samples", "0"], "--samples is 0"),
        (["--grid", "0"], "--grid is 0"),
        (["--per-shard", "0"], "--per-shard is 0"),
        (["--batch", "0"], "--batch is 0"),
        (["--only", "ingest", "--peer", "python"], "add --only loader"),
        (["--only", "encode", "--image-size", "12"], "must be a positive multiple of 8"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_measured_are_sentences(flags, words):
    with pytest.raises(InputError, match=words):
        bench.main(flags)


def test_a_gpu_is_asked_for_where_it_can_work(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda: torch sees no CUDA device here"):
            bench.main(["--only", "encode", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="only the encoder uses one; add --only encode"):
        bench.main(["--device", "cuda"])


def test_flags_reach_the_parts(tmp_path, monkeypatch):
    asked = {}

    def keep(name):
        return lambda *given: asked.setdefault(name, given) and {}

    monkeypatch.setattr(bench.ingest, "measure", keep("ingest"))
    monkeypatch.setattr(bench.loader, "Samples", lambda *given: given)
    monkeypatch.setattr(bench.loader, "measure", keep("loader"))
    monkeypatch.setattr(bench.loader, "race", keep("race"))
    monkeypatch.setattr(bench.encode, "measure", keep("encode"))
    flags = ["--only", "ingest", "loader", "encode", "--runs", "3", "--peer", "python"]
    bench.main([*flags, "--images", "40", "--samples", "9", "--grid", "4", "--n-hid", "8"])
    assert asked["ingest"][1:] == (40, 512, 3)
    assert asked["loader"][0][1:] == (9, 4)
    assert asked["race"][1:] == ("python", 3)
    setting = asked["encode"][1]
    assert setting == encode.Setting(DvaeConfig(n_hid=8), *bench.SIZES["cpu"], "cpu", 3)


@pytest.mark.slow
def test_the_whole_bench_runs_as_a_command(tmp_path, monkeypatch):
    stand_in(tmp_path / "library", monkeypatch)
    tiny = ["--runs", "1", "--images", "40", "--side", "256", "--samples", "200", "--grid", "4"]
    tiny += ["--image-size", "16", "--n-vocab", "24", "--n-hid", "8", "--peer", sys.executable]
    out = tmp_path / "bench.json"
    words = ["data_prep.bench", "--only", "ingest", "loader", "encode", *tiny, "--out", str(out)]
    times = Times()
    clock.timed_command(words, times)
    result = json.loads(out.read_text())
    assert result["ingest"]["pictures"]["taken"] == 40
    assert result["encode"]["job"]["dvae_busy"] > 0
    assert result["race"]["peer"]["crc32"] > 0
    names = {target["name"] for target in result["targets"]}
    unknown = {"share of time that the dVAE keeps a GPU busy"}
    if result["ingest"]["job"]["images_per_cpu_s"] is None:  # on a busy machine 40 take no longer
        unknown.add("ingest, images/s")  # than 10
    assert names == set(bench.TARGETS) - unknown
    # the processes that it starts count for it too
    started = result["ingest"]["quarter"]["cpu_s"]["min"] + result["encode"]["job"]["command_cpu_s"]
    assert times.cpu_s[0] > started
