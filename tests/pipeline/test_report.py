"""The report: what it counts, and that the page stands alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.scenes import write_scenes
from pipeline import report
from pipeline.config import DvaeConfig
from pipeline.console import InputError
from pipeline.data.pictures import save_png
from pipeline.evaluation import scenes
from pipeline.evaluation.metrics import read_metrics
from pipeline.models.dvae import DiscreteVAE, save_dvae
from tests import tiny

KINDS = ("train", "val", "machine")
CAPTION = "a large red circle in the middle on a white background"


def picture(caption: str) -> np.ndarray:
    return scenes.draw(scenes.parse(caption), 64)


def test_accuracy_counts_word_by_word() -> None:
    wrong = CAPTION.replace("red", "blue")
    rows = [(CAPTION, picture(CAPTION)), (CAPTION, picture(wrong))]
    accuracy = report.caption_accuracy(rows)
    assert accuracy == {
        "n": 2, "colour": 0.5, "shape": 1.0, "size": 1.0, "place": 1.0, "background": 1.0
    }  # fmt: skip


def test_captions_that_are_no_scenes_are_not_counted() -> None:
    two = "a small red circle above a small blue square on a grey background"
    rows = [("a cat", picture(CAPTION)), (two, picture(two))]
    assert report.caption_accuracy(rows) is None
    counted = report.caption_accuracy([*rows, (CAPTION, picture(CAPTION))])
    assert counted is not None
    assert counted["n"] == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a small run leaves behind, with a dVAE of random weights."""
    root = tmp_path_factory.mktemp("run")
    write_scenes(root / "scenes", 40, 64, seed=0, hold_out=False, two_objects=0.0)
    tiny.ingest([root / "scenes"], root / "pairs", 64)
    torch.manual_seed(0)
    config = DvaeConfig(image_size=64, n_vocab=16, n_hid=4, n_init=4, n_blk_per_group=1)
    save_dvae(root / "dvae", DiscreteVAE(config))
    save_png(root / "dvae" / "reconstructions" / "final.png", picture(CAPTION))
    (root / "dalle").mkdir()
    figures = {"loss": 1.0, "text": 2.0, "image": 0.5, "peak_gib": 0.25, "codes_used": 7.0}
    for stage in ("dvae", "dalle"):
        events = [{"kind": kind, "step": s, **figures} for s in (1, 2) for kind in KINDS]
        lines = "".join(json.dumps(event) + "\n" for event in events)
        (root / stage / "metrics.jsonl").write_text(lines)
    save_png(root / "samples" / "0.png", picture(CAPTION))
    (root / "samples" / "samples.jsonl").write_text(
        json.dumps({"file": "0.png", "caption": CAPTION}) + "\n"
    )
    return root


def tell(run: Path) -> report.Story:
    return report.read_story(
        run / "dvae", run / "dalle", run / "pairs", {"held_out": run / "samples"}, {"encode": 3.0}
    )


def test_figures_are_those_of_the_run(run: Path) -> None:
    figures = tell(run).figures()
    assert figures["caption_accuracy"] == {"colour": 1.0, "shape": 1.0, "place": 1.0}
    assert figures["render_accuracy"]["colour"] == 1.0
    assert figures["render_accuracy"]["n"] == 40
    # random weights draw nothing that the checker would read right
    assert figures["reconstruction_accuracy"]["shape"] < 0.6
    assert figures["seconds"] == {"encode": 3.0}
    assert figures["peak_gib"] == 0.25
    assert figures["losses"]["dalle"]["val"]["image"] == 0.5


def test_the_page_stands_alone(run: Path) -> None:
    page = tell(run).page()
    # a sample, the reconstructions, the curves
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert CAPTION in page
    assert "7 of 16 codes used" in page


def test_the_curves_of_the_model_that_ranks_are_shown(run: Path, tmp_path: Path) -> None:
    events = [{"kind": kind, "step": 1, "loss": 0.75, "top_1": 0.5} for kind in KINDS]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    story = report.read_story(
        run / "dvae", run / "dalle", run / "pairs", {"held_out": run / "samples"}, {}, tmp_path
    )
    assert story.figures()["losses"]["clip"]["val"]["top_1"] == 0.5
    assert story.page() != tell(run).page()


def test_markup_in_a_caption_is_shown_not_obeyed(run: Path) -> None:
    row = {"file": "0.png", "caption": "<script>x</script>", "image": picture(CAPTION)}
    assert "<script>" not in report._samples_section("set", [row])


def test_what_is_missing_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"samples\.jsonl cannot be read .*run pipeline\.sample"):
        report.read_samples(tmp_path)
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read .*was .* trained"):
        read_metrics(tmp_path)


def test_captions_with_other_line_ends_are_read(run: Path, tmp_path: Path) -> None:
    save_png(tmp_path / "0.png", picture(CAPTION))
    row = {"file": "0.png", "caption": "one\u2028two\x85three"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert [row["caption"] for row in report.read_samples(tmp_path)] == ["one\u2028two\x85three"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "is empty; run pipeline.sample to its end"),
        ('{"file": "0.pn', "describes no picture: Unterminated string"),
        ("{}", "describes no picture: 'file'"),
        ("[3]", "describes no picture: list indices"),
        ('{"file": "gone.png"}', r"cannot be read .*gone\.png"),
        ('{"file": "samples.jsonl"}', "cannot be read .*cannot identify image"),
    ],
)
def test_damaged_samples_are_a_sentence(tmp_path: Path, line: str, sentence: str) -> None:
    (tmp_path / "samples.jsonl").write_text(line)
    with pytest.raises(InputError, match=sentence):
        report.read_samples(tmp_path)


def test_seconds_are_added_up_or_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "seconds.txt"
    with pytest.raises(InputError, match=r"--seconds .* cannot be read"):
        report.read_seconds(path)
    path.write_text("encode 3\ntrain 2\nencode 4\n")
    assert report.read_seconds(path) == {"encode": 7.0, "train": 2.0}
    path.write_text("encode three\n")
    with pytest.raises(InputError, match=r"--seconds .*three.*a line is a stage and its seconds"):
        report.read_seconds(path)


@pytest.mark.parametrize(
    "samples", [["one=a", "one=b"], ["true renders=a"], ["no sign"], ["=a"], ["one="]]
)
def test_sets_of_samples_have_names_of_their_own(
    samples: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["report", "--dvae", "d", "--dalle", "d", "--pairs", "p", "--out", "o", "--samples"]
    monkeypatch.setattr("sys.argv", words + samples)
    with pytest.raises(InputError, match="--samples"):
        report.main()
