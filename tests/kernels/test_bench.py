import json
import time

import pytest
import torch

from kernels import bench
from kernels.patterns import Pattern
from kernels.speed import clock

SMALL = ["--n-text", "3", "--grid", "4", "--batch", "2", "--heads", "3", "--width", "4"]
SMALL += ["--device", "cpu", "--repeats", "2"]
CEILINGS = {"copy_gb_s": 10.0, "matmul_tflop_s": 0.1}
NEVER = float("inf")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setitem(clock.CEILINGS_OF, "cpu", (64, 2**16, 3))


@pytest.fixture
def nothing_measured(monkeypatch):
    for name in ("ceilings", "measure"):
        monkeypatch.setattr(bench, name, None)


def test_measures_every_path_and_saves_it(tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    bench.main([*SMALL, "--commit", "abc", "--out", str(out)])
    saved = json.loads(out.read_text())
    assert [file.name for file in out.parent.iterdir()] == ["bench.json"]
    assert list(saved["patterns"]) == ["row", "column", "conv", "dense"]
    assert all(value > 0 for value in saved["ceilings"].values())
    said = capsys.readouterr().out
    assert "figures of a CPU" in said
    for kind, pattern in saved["patterns"].items():
        assert pattern["pairs"] == Pattern(kind, 3, 4).pairs()
        assert {"windowed", "naive", "sdpa mask", "sdpa causal"} <= set(pattern["rivals"])
        # a head of width 4 has no Triton kernel
        assert pattern["left_out"]["triton"].startswith("ValueError: backend 'triton'")
        for name, row in pattern["rivals"].items():
            assert row["runs"] == 2
            assert 0 < row["forward"]["min_ms"] <= row["forward"]["median_ms"]
            # another mask has no error under this one
            assert (row["error"] is None) == (name == "sdpa causal" and kind != "dense")
            assert f"{kind:<7} {name:<18} {row['forward']['median_ms']:9.3f}" in said
    assert saved["shape"]["dtype"] == "float32"
    assert saved["machine"]["commit"] == "abc"
    assert saved["machine"]["torch"] == torch.__version__
    assert saved["machine"]["device"]
    assert all(ratio["value"] is None for ratio in saved["ratios"])


def test_one_pattern_has_times_errors_and_floors():
    pattern, args = Pattern("conv", 3, 4), bench.parse(SMALL)
    measured = bench.measure(pattern, args, CEILINGS, NEVER)
    assert measured["pairs"] == pattern.pairs()
    assert set(measured["floor"]) == {"forward", "backward", "both"}
    for name in ("windowed", "naive", "sdpa mask"):
        row = measured["rivals"][name]
        assert row["forward"]["median_ms"] > 0
        assert row["both"]["tflop_s"] > 0
        assert all(0 <= error < 1e-6 for error in row["error"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_all_families_of_rivals_run():
    flags = "--n-text 32 --grid 16 --width 64 --batch 2 --heads 4 --dtype bfloat16 --repeats 3"
    args = bench.parse([*flags.split(), "--device", "cuda"])
    device = torch.device("cuda")
    ceilings = clock.ceilings(device, torch.bfloat16)
    assert all(value > 0 for value in ceilings.values())
    # FlexAttention is compiled as long as this, and one more time
    until_s = time.monotonic() + 90
    measured = bench.measure(Pattern("row", 32, 16), args, ceilings, until_s)
    rows, left_out = measured["rivals"], measured["left_out"]
    assert {"triton", "windowed", "naive", "sdpa mask", "sdpa causal"} <= set(rows), left_out
    assert {"sdpa causal cudnn", "sdpa causal flash"} & set(rows), left_out
    flex = {name for name in rows if name.startswith("flex")}
    assert flex, left_out
    for name, row in rows.items():
        assert row["runs"] == 3, name
        assert 0 < row["forward"]["min_ms"] <= row["both"]["median_ms"], name
        assert (row["error"] is None) == name.startswith("sdpa causal"), name
    for name in ("triton", *flex):
        assert all(0 < error < 0.05 for error in rows[name]["error"].values()), name


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (["--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--grid", "0"], "grid is 0; it must be an int of at least 1"),
        (["--n-text", "-1"], "n_text is -1; it must be an int of at least 0"),
        (["--device", "gpu0"], "--device is gpu0; it must be cpu, cuda or cuda:0, cuda:1, ..."),
        (["--device", "meta"], "--device is meta; it must be cpu, cuda or cuda:0, cuda:1, ..."),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device here; use cpu"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_measured_are_a_sentence(flags, says, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused([*SMALL, *flags], capsys) == f"error: {says}\n"


def refused(flags, capsys):
    """What is said when the bench ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        bench.main(flags)
    assert end.value.code == 2
    said = capsys.readouterr()
    assert not said.out
    return said.err


@pytest.mark.usefixtures("nothing_measured")
def test_a_gpu_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    said = refused(["--device", "cuda:2"], capsys)
    assert said == "error: --device is cuda:2; the last one here is cuda:1\n"


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize(
    ("out", "reason"),
    [("a_file/x.json", "File exists"), ("a_folder", "Is a directory")],
)
def test_a_place_that_cannot_be_written_is_a_sentence(out, reason, tmp_path, capsys):
    (tmp_path / "a_file").touch()
    (tmp_path / "a_folder").mkdir()
    said = refused([*SMALL, "--out", str(tmp_path / out)], capsys)
    assert (
        said == f"error: --out {tmp_path / out} cannot be written ({reason}); name another file\n"
    )


def test_defaults_follow_the_device():
    args = bench.parse(["--device", "cpu"])
    assert (args.batch, args.heads, args.dtype) == (1, 2, "float32")
    args = bench.parse(["--device", "cuda:0"])
    assert (args.batch, args.heads, args.width, args.dtype) == (8, 62, 64, "bfloat16")
    assert bench.parse(["--device", "cuda", "--batch", "3"]).batch == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is no saved run"),
        ('{"attention": {"patterns": {"row": {}}}}', "is no saved run"),
        ("[]", "is no saved run"),
        ("{}", "holds no attention times"),
    ],
)
def test_a_file_without_times_is_a_sentence(text, says, tmp_path, capsys):
    file = tmp_path / "run.json"
    if text is not None:
        file.write_text(text)
    said = refused(["--table", str(file)], capsys)
    assert says in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("nothing_measured")
def test_the_table_of_a_saved_run_needs_no_measurement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "markdown", lambda saved: f"| {saved['x']} |")
    file = tmp_path / "run.json"
    file.write_text('{"x": 7}')
    bench.main(["--table", str(file)])
    assert capsys.readouterr().out == "| 7 |\n"
