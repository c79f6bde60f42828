import time

import pytest
import torch

from kernels.speed import clock

CPU = torch.device("cpu")


def test_a_call_is_timed_once():
    calls = []
    took_s = clock.Clock(CPU)(lambda: calls.append(time.sleep(0.01)))
    assert 0.01 <= took_s < 1
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ceilings_are_measured(dtype, monkeypatch):
    side, copied_bytes, runs = 64, 2**16, 3
    monkeypatch.setitem(clock.CEILINGS_OF, "cpu", (side, copied_bytes, runs))
    found = clock.ceilings(CPU, clock.DTYPES[dtype])
    assert set(found) == {"copy_gb_s", "matmul_tflop_s"}
    # a call takes between 0.1 us and 1 s
    assert 2 * copied_bytes / 1e9 < found["copy_gb_s"] < 2 * copied_bytes / 1e2
    assert 2 * side**3 / 1e12 < found["matmul_tflop_s"] < 2 * side**3 / 1e5


def test_a_colon_says_nothing_alone():
    error = RuntimeError("backend='inductor' raised:\n\n NoValidChoices: none\n more")
    assert (
        clock.first_line(error) == "RuntimeError: backend='inductor' raised: NoValidChoices: none"
    )
    assert clock.first_line(RuntimeError()) == "RuntimeError: "
