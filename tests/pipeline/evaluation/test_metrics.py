import pytest

from pipeline.console import InputError
from pipeline.evaluation.metrics import last, names, read_metrics, series

TRAIN = '{"kind": "train", "step": 1, "loss": 2.0, "time_s": 0.5}\n'


def read(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    return read_metrics(tmp_path)


def test_a_figure_is_read_by_kind(tmp_path):
    lines = ['{"kind": "val", "step": 1, "loss": 4}\n', '{"kind": "train", "step": 2, "lr": NaN}\n']
    events = read(tmp_path, TRAIN + "".join(lines))
    steps, values = series(events, "loss", "train", "val")
    assert steps.tolist() == [1, 1]
    assert values.tolist() == [2, 4]
    assert series(events, "loss", "speed")[0].shape == (0,)
    assert names(events, "train") == ["loss", "lr"]
    assert last(events, "val") == {"step": 1, "loss": 4}


@pytest.mark.parametrize(
    "line",
    ["[3]", "7", '{"kind": "val"}', '{"step": 3}', '{"kind": "val", "step": 3, "loss": "low"}'],
)
def test_a_line_that_is_no_event_is_named(tmp_path, line):
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is no event"):
        read(tmp_path, TRAIN + line + "\n")


def test_half_a_line_is_named_with_the_way_out(tmp_path):
    with pytest.raises(InputError, match=r"line 2 is no JSON .* was the run killed"):
        read(tmp_path, TRAIN + '{"kind": "tr')
    with pytest.raises(InputError, match=r"line 1 is no JSON .*; delete the line"):
        read(tmp_path, '{"kind": "tr\n' + TRAIN)


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no text"):
        read_metrics(tmp_path)
