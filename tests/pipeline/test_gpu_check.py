"""The check for machines with a GPU, run without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import gpu_check
from pipeline.console import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_ends_with_2() -> None:
    command = [sys.executable, "-m", "pipeline.gpu_check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "no CUDA device" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_command_that_fails_is_shown() -> None:
    with pytest.raises(InputError, match=r"failed with exit code 3:\n.*the reason"):
        gpu_check.run(sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)")


@pytest.mark.slow
def test_the_whole_check_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.gpu_check", "--cpu", "--small", "--out"]
    subprocess.run([*command, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert report["pipeline"]["dalle"]["image"] > 0
    assert report["pipeline"]["seconds"]["sample"] > 0
