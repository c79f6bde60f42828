import platform
import sys

import pytest
import torch
import triton

from kernels.speed import machine


def test_what_is_not_installed_is_unknown():
    assert machine.first_line_of(["no-such-command-here"]) == "unknown"
    assert machine.first_line_of([sys.executable, "-c", "raise SystemExit(3)"]) == "unknown"
    assert machine.first_line_of([sys.executable, "-c", "pass"]) == "unknown"
    assert machine.first_line_of([sys.executable, "-c", "print('580.1')"]) == "580.1"


def test_a_folder_without_history_has_no_commit(tmp_path):
    assert machine.commit(tmp_path) == "unknown"


def test_a_processor_has_the_name_that_linux_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.device_name("cpu") == (platform.processor() or platform.machine())
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A 7: fast\nflags\t: x\n")
    assert machine.device_name(torch.device("cpu")) == "A 7: fast"


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0)], ids=str)
def test_a_gpu_has_the_name_that_torch_gives(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda asked: f"GPU of {asked}")
    assert machine.device_name(device) == f"GPU of {device}"


def test_versions_are_those_at_hand(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = machine.versions()
    assert (found["torch"], found["triton"]) == (torch.__version__, triton.__version__)
    assert found["python"] == platform.python_version()
    assert found["driver"] == "none"
