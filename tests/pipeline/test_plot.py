import json
import subprocess
import sys

import pytest
from PIL import Image

from pipeline import plot
from pipeline.console import InputError
from pipeline.evaluation.curves import HeatMap
from tests.tiny import ROOT

DALLE = {"loss": 5.0, "text": 6.0, "image": 4.5, "gradient_norm": 1.0}
DVAE = {"loss": 0.5, "nll": 0.4}


def event(kind, step, **figures):
    return {"kind": kind, "step": step, **figures, "time_s": 1.0}


def write(folder, *events):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


@pytest.fixture
def dalle(tmp_path):
    blocks = {f"blocks.{i}/scale_log2": 13.0 + i for i in range(3)}
    return write(
        tmp_path / "dalle",
        event("train", 1, **DALLE),
        event("speed", 1, tokens_per_s=10.0, peak_gib=1.0),
        event("train", 2, **DALLE | {"loss": 4.25}),
        event("val", 2, loss=4.75),
        event("machine", 2, peak_gib=2.0),
        event("blocks", 2, **blocks),
    )


@pytest.fixture
def dvae(tmp_path):
    return write(tmp_path / "dvae", event("train", 1, **DVAE), event("val", 1, psnr_db=20.0))


def titles(*words):
    return [panel.title for panel in plot.panels(plot.read_runs([str(word) for word in words]))]


def test_a_panel_a_figure_in_the_order_in_which_one_asks(dalle):
    assert titles(dalle) == [
        "loss", "text", "image", "gradient_norm", "tokens_per_s", "peak_gib",
        "peak_gib, all ranks", "dalle: log2 of the scale",
    ]  # fmt: skip


def test_runs_of_both_stages_have_panels_of_their_own(dalle, dvae):
    mixed = titles(dvae, dalle)
    assert mixed[:4] == ["loss, stage 1", "loss, stage 2", "text, stage 2", "image, stage 2"]
    assert "psnr_db, stage 1" in mixed
    # seconds and bytes mean the same in both
    assert {"peak_gib", "peak_gib, all ranks"} <= set(mixed)


def test_clip_has_panels_of_its_own(tmp_path, dvae):
    clip = write(tmp_path / "clip", event("train", 1, loss=2.0, top_1=0.25, scale=14.0))
    assert titles(dvae, clip)[:3] == ["loss, CLIP", "loss, stage 1", "top_1, CLIP"]
    assert titles(clip) == ["loss", "top_1", "scale"]


def test_two_runs_share_panels_and_have_colours(dalle):
    panel = plot.panels(plot.read_runs([str(dalle), f"other={dalle}"]))[0]
    assert [(line.label, line.colour) for line in panel.lines] == [("dalle", 0), ("other", 1)]
    assert panel.lines[0].train[1].tolist() == [5.0, 4.25]
    assert panel.lines[0].val[1].tolist() == [4.75]


def test_only_the_gradient_norm_is_logarithmic(dalle):
    drawn = plot.panels(plot.read_runs([str(dalle)]))
    assert [p.title for p in drawn if getattr(p, "log", False)] == ["gradient_norm"]


def test_scales_of_blocks_are_a_map(dalle):
    heat = plot.panels(plot.read_runs([str(dalle)]))[-1]
    assert isinstance(heat, HeatMap)
    assert heat.blocks == ["blocks.0", "blocks.1", "blocks.2"]
    assert heat.values.tolist() == [[13.0], [14.0], [15.0]]


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.plot", *map(str, words)],
        check=False, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_command_writes_a_picture_and_a_page_that_stands_alone(tmp_path, dalle, dvae):
    done = run(dvae, dalle, "--out", tmp_path / "a" / "b")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "a" / "b" / "curves.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "http" not in page.replace("data:image", "")
    assert "<td>loss, held out</td><td></td><td>4.75</td>" in page
    assert "<td>peak_gib</td><td></td><td>1</td>" in page
    with Image.open(tmp_path / "a" / "b" / "curves.png") as image:
        assert image.size[0] > 1500


def test_markup_in_a_name_is_shown_not_obeyed(dalle):
    assert "<b>" not in plot.last_values(plot.read_runs([f"<b>x</b>={dalle}"]))


def test_figures_that_have_run_away_and_blocks_that_come_late_are_drawn(tmp_path):
    first = {"a/scale_log2": 13.0, "gone/scale_log2": 12.0}
    run = write(
        tmp_path / "wild",
        event("train", 1, **DALLE | {"loss": 1e308}),
        event("train", 2, **DALLE | {"loss": -1e308}),
        event("train", 3, **DALLE),
        event("blocks", 1, **first),
        event("blocks", 3, **{"a/scale_log2": 13.5, "b/scale_log2": 13.0}),
    )
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.plot", run, "--out", tmp_path / "out"],
        check=False, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out" / "curves.png").width > 500


def test_what_cannot_be_drawn_is_a_sentence(tmp_path, dalle):
    broken = write(tmp_path / "broken")
    (broken / "metrics.jsonl").write_text('{"kind": "train", "st')
    empty = write(tmp_path / "empty", event("machine", 1, peak_gib=1.0))
    (tmp_path / "bare").mkdir()
    for words, sentence in (
        ([tmp_path / "gone"], "gone is no folder"),
        ([tmp_path / "bare"], r"metrics\.jsonl cannot be read .*was .* trained"),
        ([broken], "line 1 is no JSON .*killed"),
        ([empty], "has no update yet"),
        ([dalle, dalle], "two runs are called 'dalle'.*write NAME="),
        ([f"={dalle}"], "a run is FOLDER or NAME=FOLDER"),
        (["a="], "a run is FOLDER or NAME=FOLDER"),
    ):
        with pytest.raises(InputError, match=sentence):
            plot.read_runs([str(word) for word in words])


@pytest.mark.parametrize("out", ["dalle/metrics.jsonl", "dalle/metrics.jsonl/x", "/proc/x"])
def test_an_out_that_cannot_be_written_is_a_sentence(tmp_path, dalle, out):
    done = run(dalle, "--out", tmp_path / out)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "name a path that can be used" in done.stderr
