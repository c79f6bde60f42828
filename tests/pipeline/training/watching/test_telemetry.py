import json

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.data.pictures import save_png
from pipeline.training.watching.pace import Pace
from pipeline.training.watching.telemetry import Telemetry
from tests import tiny


def telemetry_of(out, done=0, speaks=True):
    pace = Pace(tiny.dalle(), 1, torch.device("cpu"), torch.float32, done)
    return Telemetry(out, "dalle", 100, done, speaks, pace)


def record(out, steps, done=0):
    telemetry = telemetry_of(out, done)
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


def test_bytes_that_are_no_text_cost_a_resume_nothing(tmp_path):
    record(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe{"step"\n' + b"[" * 100_000)
    record(tmp_path, [4], done=3)
    assert [line["step"] for line in tiny.curve(tmp_path)] == [1, 2, 3, 4]


def test_lines_past_the_resumed_update_are_taken_back(tmp_path):
    record(tmp_path, range(1, 9))
    record(tmp_path, range(6, 8), done=5)
    assert [line["step"] for line in tiny.curve(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    # it was written before the checkpoint of the same update
    assert [line["step"] for line in tiny.curve(tmp_path, "val")] == [5]


def test_what_hangs_on_the_clock_has_lines_of_its_own(tmp_path):
    record(tmp_path, range(1, 9))
    record(tmp_path, range(6, 8), done=5)
    speed = tiny.curve(tmp_path, "speed")
    assert [line["step"] for line in speed] == [1, 2, 3, 4, 5, 6, 7]
    assert all(set(line) >= {"seconds_an_update", "tokens_per_s", "peak_gib"} for line in speed)
    assert all(set(line) == {"kind", "step", "loss"} for line in tiny.curve(tmp_path))


def test_the_bar_says_what_was_told_last(tmp_path):
    telemetry = telemetry_of(tmp_path)
    telemetry.update(1, {"loss": 2.0, "lr": 1e-3, "gradient_norm": 1.0})
    note, left_s = telemetry.bar.note, telemetry.bar.left_s
    assert note.startswith("loss 2.000 lr 1.0e-3 ")
    assert "tok/s" in note
    assert "GiB" in note
    assert left_s > 0
    telemetry.update(2, None)
    telemetry.close()
    assert (telemetry.bar.note, telemetry.bar.left_s) == (note, left_s)


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train"}', "", "7"])
def test_a_half_written_last_line_is_dropped(tmp_path, torn):
    record(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    record(tmp_path, range(4, 5), done=3)
    assert [line["step"] for line in tiny.curve(tmp_path)] == [1, 2, 3, 4]


def test_updates_without_figures_leave_no_line(tmp_path):
    telemetry = telemetry_of(tmp_path)
    telemetry.update(1, None)
    telemetry.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert telemetry.bar.done == 1


def test_other_ranks_write_nothing(tmp_path):
    telemetry = telemetry_of(tmp_path, speaks=False)
    telemetry.update(1, {"loss": 1.0})
    telemetry.figures("val", 1, {"loss": 1.0})
    telemetry.close()
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_a_validation_are_shown(tmp_path):
    for folder in ("samples", "reconstructions"):
        save_png(tmp_path / folder / "step-0000005.png", np.full((6, 9, 3), 200, np.uint8))
    telemetry = telemetry_of(tmp_path)
    telemetry.pictures(5)
    telemetry.pictures(6)
    telemetry.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(board.Tags()["images"]) == ["reconstructions", "samples"]
    (shown,) = board.Images("samples")
    assert (shown.step, shown.height, shown.width) == (5, 6, 9)
