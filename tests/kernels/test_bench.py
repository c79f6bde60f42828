import json

import pytest

from kernels import bench

SMALL = ["--n-text", "3", "--grid", "4", "--batch", "1", "--heads", "2", "--width", "4"]
SMALL += ["--device", "cpu", "--repeats", "1"]


def test_measures_every_path_and_saves_it(tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    bench.main([*SMALL, "--out", str(out)])
    saved = json.loads(out.read_text())
    assert list(saved["times"]) == ["row", "column", "conv", "dense"]
    table = capsys.readouterr().out
    for kind, paths in saved["times"].items():
        assert list(paths) == ["windowed", "naive", "sdpa mask", "sdpa causal"]
        for name, row in paths.items():
            assert row["forward_ms"] > 0
            assert row["forward_backward_ms"] > 0
            assert f"{kind:<8} {name:<12} {row['forward_ms']:11.2f}" in table
    assert saved["shape"]["dtype"] == "float32"
    assert saved["machine"]["torch"]


def test_no_repeats_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main([*SMALL[:-1], "0"])
    assert "--repeats is 0; it must be at least 1" in capsys.readouterr().err
