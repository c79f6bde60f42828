import json
import sys

import pytest
import torch

from pipeline import bench
from pipeline.console import InputError
from pipeline.models.dalle import Dalle

TINY = ["--d_model", "16", "--layers", "2", "--heads", "2", "--batch", "1", "--threads", "1"]
SMALL = [*TINY, "--n_text", "4", "--grid", "2"]


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_times_are_saved_with_what_they_depend_on(tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    bench.main([*SMALL, "--runs", "3", "--sample", "--out", str(out)])
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert set(result["ours"]) == {"train_step_s", "sample_one_image_s"}
    for times in result["ours"].values():
        assert len(times["runs"]) == 3
        assert 0 < times["min"] == min(times["runs"]) <= times["median"] <= max(times["runs"])
    assert result["shape"]["d_model"] == 16
    assert result["versions"]["torch"] == torch.__version__
    assert result["chip"]
    assert result["commit"]
    assert str(tmp_path) not in out.read_text()
    assert sys.prefix not in out.read_text()


def test_a_training_step_trains(monkeypatch):
    made = []

    class Kept(Dalle):
        def __init__(self, config):
            super().__init__(config)
            made.append(self)

    monkeypatch.setattr(bench, "Dalle", Kept)
    step = bench.training_step(bench.parse(SMALL))
    before = {name: value.clone() for name, value in made[0].state_dict().items()}
    for _ in range(2):
        step()
    after = made[0].state_dict()
    # the second step has a head to send gradients through
    assert not torch.equal(before["image_head.weight"], after["image_head.weight"])
    assert not torch.equal(before["blocks.0.mlp.up.weight"], after["blocks.0.mlp.up.weight"])
    assert all(parameter.grad is None for parameter in made[0].parameters())


def test_decoding_is_measured_alone(capsys):
    bench.main([*SMALL, "--decode", "--batches", "2"])
    result = json.loads(capsys.readouterr().out)
    assert "ours" not in result
    assert set(result["ceilings"]) == {"copy_gb_s", "matmul_tflop_s"}
    rows = result["decode"]["flags"]["rows"]
    assert [row["shared"] for row in rows] == [True, False]
    assert all(row["images_per_s"] > 0 for row in rows)


def peer(tmp_path, text):
    script = tmp_path / "peer.py"
    script.write_text(text)
    return [sys.executable, str(script)]


def test_the_peer_gets_the_same_shape_and_the_ratio_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "training_step", lambda args: lambda: None)
    monkeypatch.setattr(bench, "seconds", lambda *_, **__: [0.25, 0.5])
    script = "import json, sys\nprint('noise')\n" + (
        "print(json.dumps({'train_step_s': [1.0, 2.0], 'argv': sys.argv[1:]}))\n"
    )
    bench.main([*TINY, "--runs", "2", "--peer", *peer(tmp_path, script)])
    result = json.loads(capsys.readouterr().out)
    assert result["ratio"] == {"train_step": 4.0}
    wanted = "--dim 16 --depth 2 --heads 2 --batch 1 --runs 2 --threads 1"
    assert " ".join(result["peer"]["argv"]) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise SystemExit('no such thing')", "ended with code 1: no such thing"),
        ("print('hello')", "printed no JSON line"),
        ("print('{}')", "printed no JSON line"),
        ("pass", "printed no JSON line"),
    ],
    ids=["fails", "no json", "no times", "silent"],
)
def test_a_peer_that_fails_is_told(tmp_path, text, words):
    args = bench.parse([*TINY, "--peer", *peer(tmp_path, text)])
    with pytest.raises(InputError, match=words):
        bench.run_peer(args)
    args.peer[0] = str(tmp_path / "none")
    with pytest.raises(InputError, match="does not run"):
        bench.run_peer(args)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--runs", "0"], "--runs is 0; take at least 1"),
        (["--threads", "0"], "--threads is 0"),
        (["--decode", "--sample"], "--decode is measured alone; leave out --sample"),
        (["--decode", "--batches", "8", "0"], "--batches has 0; take at least 1"),
        (["--heads", "3"], "does not divide into 3 heads"),
        (["--peer", "python", "missing.py"], "there is no script missing.py"),
        (["--grid", "2", "--peer", "python", "missing.py"], "leave both flags out"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_measured_are_sentences(flags, words):
    with pytest.raises(InputError, match=words):
        bench.main([*TINY, *flags])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(InputError, match="--device cuda: torch sees no CUDA device here"):
        bench.main([*TINY, "--device", "cuda"])


def test_the_step_takes_the_attention_path_that_it_is_told(monkeypatch):
    asked = []
    monkeypatch.setattr(bench.Dalle, "set_attention_backend", lambda _, name: asked.append(name))
    monkeypatch.setattr(bench, "seconds", lambda *_, **__: [1.0])
    for flags in ([], ["--attention", "naive"]):
        bench.main([*TINY, *flags])
    assert asked == [None, "naive"]
