"""What is derived from times, on made-up times whose figures are worked out by hand."""

import math

import pytest

from kernels.patterns import Pattern
from kernels.speed import figures

SHAPE = {"n_text": 256, "grid": 32, "batch": 8, "heads": 62, "width": 64, "dtype": "bfloat16"}
SHAPE |= {"itemsize": 2}
CEILINGS = {"copy_gb_s": 4300.0, "matmul_tflop_s": 790.0}
PAIRS = Pattern("row", 256, 32).pairs()
ERROR = {"o": 1e-3, "dq": 2e-3, "dk": 3e-3, "dv": 4e-3}


def rival(forward_ms, both_ms, error=None):
    times = {"forward": forward_ms, "backward": both_ms - forward_ms, "both": both_ms}
    rows = {k: figures.rates(ms, ms, SHAPE, PAIRS, k, CEILINGS) for k, ms in times.items()}
    return {"runs": 50, "error": error, **rows}


def made_up(device="NVIDIA H200", **shape):
    row = {
        "triton": rival(0.125, 0.750, {**ERROR, "dv": 6e-3}),
        "windowed": rival(10.0, 30.0),
        "sdpa mask": rival(1.0, 4.0, ERROR),
        "sdpa causal": rival(0.500, 2.0),
        "sdpa causal cudnn": rival(0.300, 1.200),
        "flex 64": rival(0.150, 1.0),
        "flex 128": rival(0.160, 0.900),
    }
    result = {
        "machine": {"device": device, "torch": "2", "triton": "3", "commit": "abc"},
        "shape": {**SHAPE, **shape},
        "ceilings": CEILINGS,
        "patterns": {
            # as a file with sorted keys has them
            "conv": {"rivals": {"windowed": rival(9.0, 20.0)}, "left_out": {}},
            "row": {"rivals": row, "left_out": {}},
        },
    }
    return {**result, "ratios": figures.ratios(result)}


def test_the_floors_are_those_of_the_paper_layer():
    # batch 8, 62 heads, bfloat16 at 4.3 TB/s and 790 TFLOP/s: 76 and 53 us forward (row, exact
    # pairs), 152 and 132 us backward
    forward = figures.floor_ms(SHAPE, PAIRS, "forward", CEILINGS)
    assert forward["memory_ms"] == pytest.approx(0.0762, abs=1e-4)
    assert forward["tensor_ms"] == pytest.approx(0.0528, abs=1e-4)
    backward = figures.floor_ms(SHAPE, PAIRS, "backward", CEILINGS)
    assert backward["memory_ms"] == pytest.approx(0.1519, abs=2e-4)
    assert backward["tensor_ms"] == pytest.approx(0.1319, abs=1e-4)
    both = figures.floor_ms(SHAPE, PAIRS, "both", CEILINGS)
    assert both["memory_ms"] == pytest.approx(forward["memory_ms"] + backward["memory_ms"])


def test_rates_are_counts_over_time():
    row = figures.rates(0.152, 0.150, SHAPE, PAIRS, "forward", CEILINGS)
    assert row["tflop_s"] == pytest.approx(4 * PAIRS * 64 * 496 / 0.152e-3 / 1e12)
    assert row["gb_s"] == pytest.approx((4 * 81_264_640 + 4 * 496 * 1280) / 0.152e-3 / 1e9)
    assert row["roofline"] == pytest.approx(0.501, abs=1e-3)
    assert row["min_ms"] == 0.150


@pytest.mark.parametrize("ms", [0.0, -0.1])
def test_a_difference_that_is_not_positive_has_no_rates(ms):
    assert set(figures.rates(ms, ms, SHAPE, PAIRS, "backward", CEILINGS)) == {
        "median_ms",
        "min_ms",
    }


def test_ratios_take_the_fastest_rival_of_each_pass():
    found = {ratio["name"]: ratio for ratio in made_up()["ratios"]}
    expected = {
        "row forward: sdpa causal cudnn / triton": (2.4, 2.0, True),
        "row forward + backward: sdpa causal cudnn / triton": (1.6, 1.7, False),
        "row forward: flex 64 / triton": (1.2, 1.15, True),
        "row forward + backward: flex 128 / triton": (1.2, 1.15, True),
        "row forward, ms": (0.125, 0.140, True),
        "row error: triton / sdpa mask": (1.5, 2.0, True),
    }
    for name, (value, target, met) in expected.items():
        assert found[name]["value"] == pytest.approx(value), name
        assert (found[name]["target"], found[name]["met"]) == (target, met), name
    # conv was measured without triton: its targets stay, without a value
    missing = {name for name in found if name.startswith("conv")}
    assert len(missing) == 5
    assert all(found[name]["value"] is None and not found[name]["met"] for name in missing)
    assert len(found) == len(expected) + len(missing)


@pytest.mark.parametrize(
    "elsewhere",
    [{"device": "NVIDIA A100-SXM4-80GB"}, {"batch": 1}, {"grid": 64}, {"dtype": "float16"}],
    ids=str,
)
def test_elsewhere_a_ratio_of_times_has_no_verdict_but_the_error_has(elsewhere):
    here, found = made_up(), made_up(**elsewhere)
    assert [r["value"] for r in found["ratios"]] == [r["value"] for r in here["ratios"]]
    for ratio in found["ratios"]:
        is_error = " error: " in ratio["name"]
        assert (ratio["target"] is None) == (ratio["met"] is None) == (not is_error)
    lines = figures.ratio_lines(found)
    assert " " * 15 + "2.400" + " " * 17 + "row forward: sdpa causal cudnn / triton" in lines
    assert "met            1.500  at most 2      row error: triton / sdpa mask" in lines


def test_the_targets_of_time_are_within_what_the_pairs_allow():
    dense = Pattern("dense", figures.AIM["n_text"], figures.AIM["grid"]).pairs()
    most = {kind: dense / Pattern(kind, 256, 32).pairs() for kind in ("row", "column", "conv")}
    assert most == pytest.approx({"row": 2.50, "column": 2.63, "conv": 2.30}, abs=5e-3)
    assert all(target < most[kind] for (kind, _), target in figures.FASTER["sdpa causal"].items())


def test_backward_is_the_difference():
    rows = figures.summary([1e-3, 2e-3, 9e-3], [5e-3, 4e-3, 6e-3], SHAPE, 100, CEILINGS)
    assert rows["forward"]["median_ms"] == pytest.approx(2)
    assert rows["both"]["min_ms"] == pytest.approx(4)
    assert rows["backward"]["median_ms"] == pytest.approx(3)


def test_an_error_that_is_nan_is_missed():
    result = made_up()
    result["patterns"]["row"]["rivals"]["triton"]["error"]["dk"] = math.nan
    held = {ratio["name"]: ratio for ratio in figures.ratios(result)}
    assert held["row error: triton / sdpa mask"]["value"] == math.inf
    assert not held["row error: triton / sdpa mask"]["met"]


def test_a_time_above_its_bound_is_missed():
    result = made_up()
    result["patterns"]["row"]["rivals"]["triton"] = rival(0.141, 0.7)
    held = {ratio["name"]: ratio for ratio in figures.ratios(result)}
    assert not held["row forward, ms"]["met"]


def test_ratio_lines_say_what_is_met_missed_and_open():
    lines = figures.ratio_lines(made_up())
    assert "met            2.400  at least 2     row forward: sdpa causal cudnn / triton" in lines
    assert any(line.startswith("MISSED         1.600  at least 1.7 ") for line in lines)
    assert any(line.startswith("open    not measured  at most 2 ") for line in lines)
    assert "met            0.125  at most 0.14   row forward, ms" in lines


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"chip": "h", "attention": x}])
def test_markdown_is_of_the_saved_figures(wrap):
    lines = figures.markdown(wrap(made_up())).splitlines()
    assert all(line.count("|") == 11 for line in lines[:6])
    tflops = 4 * PAIRS * 64 * 496 / 0.125e-3 / 1e12
    assert lines[2] == (
        f"| row | forward | 125 µs | {tflops:.0f} | 61% | 300 µs (cudnn) | **2.40 x** | "
        "150 µs (64) | **1.20 x** | 1.50 |"
    )
    assert lines[3].startswith("| row | forward + backward | 750 µs | ")
    assert "| 1200 µs (cudnn) | **1.60 x** | 900 µs (128) | **1.20 x** |" in lines[3]
    assert lines[4] == "| conv | forward | - | - | - | - | - | - | - | - |"
    assert lines[-1] == (
        "NVIDIA H200, torch 2, triton 3, commit abc: batch 8, 62 heads of 64, 256 text tokens "
        "and a 32 x 32 image, bfloat16; medians. Ceilings measured in the same run: 4300 GB/s, "
        "790 TFLOP/s."
    )


def test_a_file_without_attention_is_refused():
    with pytest.raises(ValueError, match="holds no attention times; name one"):
        figures.markdown({"chip": "cpu"})
