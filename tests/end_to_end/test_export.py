"""What an export of several ranks holds, and what it takes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import slices
from tests import tiny as runs
from tests.end_to_end.test_training import CPU_CONFIG
from tests.tiny import arguments, launched, start


@pytest.mark.dist
@pytest.mark.parametrize("key", ["weight", "ema"])
def test_an_export_of_two_ranks_is_what_deepspeed_gathers(tiny, tmp_path_factory, key):
    out = tmp_path_factory.getbasetemp() / "gathered"
    if not out.exists():
        done = launched("dalle", 2, CPU_CONFIG, *arguments("dalle", tiny, out, "dalle_gathered"))
        assert done.returncode == 0, done.stderr
    flags = ["--raw"] if key == "weight" else []
    to = out / key
    done = start([sys.executable, "-m", "pipeline.export", "--run", out, "--out", to, *flags])
    assert done.returncode == 0, done.stderr
    gathered, exported = load_file(out / f"{key}.safetensors"), load_file(to / "model.safetensors")
    assert gathered.keys() == exported.keys()
    assert all(torch.equal(gathered[name], exported[name]) for name in gathered)


N, MIB = 24, 32


@pytest.fixture
def large_run(tmp_path):
    """A checkpoint of two ranks, 24 tensors of 32 MiB, without what an optimizer has."""
    folder = slices.folder_of(tmp_path, 7)
    folder.mkdir(parents=True)
    n = MIB * 2**18
    files = {}
    for rank in range(2):
        path = folder / slices.rank_file(rank)
        part = {f"ema/t{i}": torch.full((n // 2,), float(i + rank / 2)) for i in range(N)}
        save_file(part, path, metadata={f"t{i}": f"{rank * n // 2} 7" for i in range(N)})
        files[path.name] = {"bytes": path.stat().st_size, "sha256": slices.sha256(path)}
    identity = {"preset": {"model": {"width": 1}}}
    meta = {"updates": 7, "applied": 7, "world": 2,
            "shapes": {f"t{i}": [n] for i in range(N)}, "kind": "toy", "identity": identity,
            "state": {}, "files": files}  # fmt: skip
    slices.write_meta(folder, meta)
    return tmp_path


def peak_of_own_memory(command) -> float:
    """MiB that a process holds for itself at most; pages of files are the system's."""
    peak = 0
    job = subprocess.Popen([str(w) for w in command], cwd=runs.ROOT, stderr=subprocess.PIPE)
    status = Path(f"/proc/{job.pid}/status")
    while job.poll() is None:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        peak = max(peak, int(lines.get("RssAnon", "0 kB").split()[0]))
        time.sleep(0.002)
    assert job.returncode == 0, job.stderr.read()
    return peak / 1024


@pytest.mark.slow
def test_an_export_holds_one_tensor_and_not_the_model(large_run):
    export = [sys.executable, "-m", "pipeline.export", "--run", large_run, "--out"]
    nothing = peak_of_own_memory([sys.executable, "-c", "import pipeline.export"])
    peak = peak_of_own_memory([*export, large_run / "out"])
    # a tensor, and the half of it that is being read
    assert MIB / 2 < peak - nothing < 1.75 * MIB
