"""What ``make demo`` promises, read from the report that it left: run after it, as .ci/run does."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.stats import Stats
from pipeline.data.shards import ShardReader
from pipeline.generation.provenance import read_facts

OUT = Path(__file__).resolve().parents[2] / "runs" / "demo"

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """report.json of the last demo; its absence is a failure, not a skip."""
    content: dict[str, Any] = json.loads((OUT / "report.json").read_text())
    return content


@pytest.mark.parametrize("words", ["held_out", "seen"])
def test_samples_show_what_their_captions_say(report: dict[str, Any], words: str) -> None:
    accuracy = report["accuracy_by_set"][words]
    assert accuracy["n"] >= 128
    # chance is 17, 25 and 20 %
    assert accuracy["colour"] >= 0.90
    assert accuracy["shape"] >= 0.70
    assert accuracy["place"] >= 0.70


def test_the_best_of_eight_are_better_than_the_first(report: dict[str, Any]) -> None:
    first, best, guided = (
        report["accuracy_by_set"][name]
        for name in ("held_out", "held_out_best_of_8", "held_out_guided")
    )
    assert best["n"] == guided["n"] == first["n"]
    for word in ("colour", "shape"):
        assert best[word] > first[word]
    assert min(guided[word] for word in ("colour", "shape", "place")) >= 0.70


def test_every_picture_says_how_it_was_made() -> None:
    pictures = sorted((OUT / "samples" / "held_out_best_of_8").glob("0*.png"))
    assert len(pictures) >= 8 * 128
    for path in pictures[::64]:
        facts = read_facts(path)
        assert facts["file"] == path.name
        assert 0.0 < facts["clip_score"] <= 1.0


def test_the_model_has_a_card() -> None:
    card = (OUT / "MODEL_CARD.md").read_text()
    assert "## Intended use" in card
    assert "held_out_best_of_8" in card


def test_the_checker_reads_renders_and_reconstructions(report: dict[str, Any]) -> None:
    for word in ("colour", "shape", "place"):
        assert report["render_accuracy"][word] >= 0.99
        assert report["reconstruction_accuracy"][word] >= 0.95


def test_most_of_the_codebook_is_in_use() -> None:
    tokens = ShardReader(OUT / "tokens", kind="tokens")
    assert tokens.made_of["n_vocab"] >= 128
    codes = Stats(tokens).codes
    assert codes is not None
    assert codes.n_used >= tokens.made_of["n_vocab"] / 2


def test_the_page_and_its_pictures_are_there() -> None:
    assert (OUT / "report.html").stat().st_size > 100_000
    sheet = Image.open(OUT / "samples" / "held_out" / "grid.png")
    assert min(sheet.size) > 500
