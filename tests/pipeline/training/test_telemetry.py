import json

import pytest

from pipeline.training.telemetry import Telemetry
from tests import tiny


def record(out, steps, done=0):
    telemetry = Telemetry(out, "dalle", 100, done, speaks=True)
    for step in steps:
        telemetry.update(step, {"loss": 1 / step})
        if step % 5 == 0:
            telemetry.figures("val", step, {"loss": 2.0})
    telemetry.close()


def test_a_line_an_event(tmp_path):
    record(tmp_path, range(1, 7))
    assert tiny.curve(tmp_path, "val") == [{"kind": "val", "step": 5, "loss": 2.0}]
    assert [line["step"] for line in tiny.curve(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert tiny.curve(tmp_path)[2] == {"kind": "train", "step": 3, "loss": 0.33333333}
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["time_s"] >= 0


def test_lines_past_the_resumed_update_are_taken_back(tmp_path):
    record(tmp_path, range(1, 9))
    record(tmp_path, range(6, 8), done=5)
    assert [line["step"] for line in tiny.curve(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    # it was written before the checkpoint of the same update
    assert [line["step"] for line in tiny.curve(tmp_path, "val")] == [5]


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train"}', "", "7"])
def test_a_half_written_last_line_is_dropped(tmp_path, torn):
    record(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    record(tmp_path, range(4, 5), done=3)
    assert [line["step"] for line in tiny.curve(tmp_path)] == [1, 2, 3, 4]


def test_updates_without_figures_leave_no_line(tmp_path):
    telemetry = Telemetry(tmp_path, "dalle", 100, 0, speaks=True)
    telemetry.update(1, None)
    telemetry.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert telemetry.bar.done == 1


def test_other_ranks_write_nothing(tmp_path):
    telemetry = Telemetry(tmp_path, "dalle", 100, 0, speaks=False)
    telemetry.update(1, {"loss": 1.0})
    telemetry.figures("val", 1, {"loss": 1.0})
    telemetry.close()
    assert list(tmp_path.iterdir()) == []
