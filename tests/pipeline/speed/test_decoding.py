import statistics

import pytest
import torch

from pipeline.config import DalleConfig
from pipeline.models.dalle import layer_patterns
from pipeline.presets import dalle_12b
from pipeline.speed import decoding
from pipeline.speed.decoding import Step, kept_bytes, measure, read_bytes, roofline_s

CPU, BF16 = torch.device("cpu"), torch.bfloat16
WHOLE = dalle_12b().model
# of an H200
CEILINGS = {"copy_gb_s": 4300.0, "matmul_tflop_s": 790.0}
TINY = DalleConfig(n_layer=24, d_model=16, n_head=2, n_text=3, grid=3)


def test_the_12b_model_is_slices_and_seven_times_their_difference():
    kinds = [pattern.kind for pattern in layer_patterns(WHOLE)]
    config, slices = decoding.models()["dalle_12b"]
    assert config == WHOLE
    small, large = (
        [p.kind for p in layer_patterns(DalleConfig(n_layer=n, d_model=64, n_head=1))]
        for n in slices
    )
    for kind in ("row", "column", "conv"):
        more = large.count(kind) - small.count(kind)
        assert kinds.count(kind) == small.count(kind) + 7 * more


def test_the_roofline_of_the_12b_model():
    # weights alone; 15,872 bytes a token and layer
    weights_s = (2 * 12_092_178_432 + 4 * 8192 * 3968) / 4.3e12
    one = roofline_s(WHOLE, Step(1, True), BF16, CEILINGS)
    assert one == pytest.approx(weights_s + read_bytes(WHOLE, Step(1, True), BF16) / 4.3e12)
    assert read_bytes(WHOLE, Step(1, True), BF16) == pytest.approx(
        15_872 * (64 * 256 + 47 * 32 + 16 * 15.5 + 65), rel=0.01
    )
    per_caption = read_bytes(WHOLE, Step(9, False), BF16) - read_bytes(WHOLE, Step(9, True), BF16)
    assert per_caption == 8 * 15_872 * 64 * 256
    # from some batch on products bound it
    many = [roofline_s(WHOLE, Step(n, True), BF16, CEILINGS) for n in (1000, 2000)]
    assert many[1] == pytest.approx(2 * many[0], rel=0.01)
    assert kept_bytes(WHOLE, Step(1, True), BF16) == 539_886_080


def test_each_batch_is_measured_alone_and_with_captions_of_its_own(monkeypatch):
    monkeypatch.setattr(decoding, "STEPS", 3)
    found = measure(TINY, (24,), [1, 3], torch.float32, CPU, CEILINGS)
    rows = found["rows"]
    assert [(row["batch"], row["shared"]) for row in rows] == [
        (1, True), (3, True), (1, False), (3, False),
    ]  # fmt: skip
    for row in rows:
        assert row["images_per_s"] == pytest.approx(row["batch"] / (9 * row["step_ms"] / 1e3))
        assert row["share"] == pytest.approx(row["roofline_ms"] / row["step_ms"])
    assert found["left_out"] == []


def test_slices_are_put_together_and_what_does_not_fit_is_named(monkeypatch):
    def instead(model, step):
        if step.batch == 5 and model.config.n_layer == 16:
            raise torch.OutOfMemoryError
        return 0.5 + 0.1 * model.config.n_layer

    monkeypatch.setattr(decoding, "step_s", instead)
    found = measure(TINY, (8, 16), [1, 5], torch.float32, CPU, CEILINGS)
    assert [row["step_ms"] for row in found["rows"]] == pytest.approx([2900.0, 2900.0])
    assert found["left_out"] == [
        {"batch": 5, "shared": shared, "reason": "16 layers do not fit"} for shared in (True, False)
    ]


def test_steps_of_the_middle_are_timed():
    middle = decoding.middle_of(WHOLE)
    assert len(middle) == decoding.STEPS + decoding.WARM_UP
    assert abs(statistics.fmean(middle) - 511.5) <= 1
    assert list(decoding.middle_of(TINY)) == list(range(9))
