import json
import sys
from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from kernels import bench
from kernels.patterns import Pattern, mask_on

SMALL = ["--n-text", "3", "--grid", "4", "--batch", "2", "--heads", "3", "--width", "4"]
SMALL += ["--device", "cpu", "--repeats", "2"]
CPU = torch.device("cpu")
PATTERNS = [
    Pattern("row", 5, 6),
    Pattern("column", 7, 5),
    Pattern("conv", 6, 7, kernel=3),
    Pattern("conv", 2, 5, kernel=11),
    Pattern("conv", 6, 7, kernel=5, edge="clamp"),
    Pattern("conv", 0, 4, kernel=11, edge="clamp"),
    Pattern("dense", 4, 3),
]


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(bench, "ceilings", lambda *_: {"copy_gb_s": 10.0, "matmul_tflop_s": 0.1})


def transposed(pattern):
    """Token of each place, from the definition: text, then column by column."""
    T, W = pattern.n_text, pattern.grid
    image = [T + row * W + column for column in range(W) for row in range(W)]
    return torch.tensor([*range(T), *image])


def expected_mask(pattern):
    mask = pattern.mask()
    if pattern.kind == "column":
        order = transposed(pattern)
        mask = mask[order][:, order]
    return mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_flex_attends_to_the_pairs_of_the_pattern(pattern):
    N = pattern.n_tokens
    mask = create_mask(bench.flex_mask(pattern), 1, 1, N, N, device="cpu")[0, 0]
    assert torch.equal(mask, expected_mask(pattern))


@pytest.mark.parametrize("kind", ["row", "column", "conv", "dense"])
def test_flex_skips_the_empty_blocks_of_the_paper(kind):
    pattern = Pattern(kind, 256, 32)
    rule, N = bench.flex_mask(pattern), pattern.n_tokens
    blocks = create_block_mask(rule, None, None, N, N, CPU, BLOCK_SIZE=64)
    pooled = expected_mask(pattern).view(20, 64, 20, 64).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), pooled)
    assert pooled.sum() == {"row": 105, "column": 90, "conv": 132, "dense": 210}[kind]


def test_by_columns_is_its_own_inverse_and_the_order_of_the_grid():
    pattern = Pattern("column", 3, 4)
    x_BHND = torch.arange(19.0).view(1, 1, 19, 1)
    made = bench.by_columns(x_BHND, pattern)
    assert made.flatten().tolist() == transposed(pattern).tolist()
    assert torch.equal(bench.by_columns(made, pattern), x_BHND)


@pytest.mark.parametrize("form", ["packed", "apart", "columns"])
def test_every_form_gives_the_same_outputs(form):
    pattern = Pattern("column", 3, 4)
    args = bench.parse([*SMALL, "--dtype", "float32"])
    mask = expected_mask(pattern) if form == "columns" else mask_on(pattern, CPU)
    attend = partial(bench.sdpa, attn_mask=mask)
    if form == "packed":
        attend = bench.rivals(pattern, CPU)["windowed"].attend
    inputs = bench.Inputs(args, pattern)
    outputs = inputs.outputs(bench.Rival(attend, form, pattern))
    errors = bench.distances(outputs, inputs.truth(pattern))
    assert list(errors) == ["o", "dq", "dk", "dv"]
    assert all(0 < error < 1e-6 for error in errors.values())
    # the last sample, the last two heads
    assert outputs["dq"].shape == (1, 19, 2, 4)


def test_a_result_that_is_not_written_has_a_large_error():
    pattern = Pattern("row", 3, 4)
    inputs = bench.Inputs(bench.parse(SMALL), pattern)
    lazy = bench.Rival(lambda q, k, v: 0 * (q + k + v), "apart", pattern)
    errors = bench.distances(inputs.outputs(lazy), inputs.truth(pattern))
    assert errors == pytest.approx({"o": 1, "dq": 1, "dk": 1, "dv": 1})


def test_measures_every_path_and_saves_it(tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    bench.main([*SMALL, "--commit", "abc", "--out", str(out)])
    saved = json.loads(out.read_text())
    assert list(saved["patterns"]) == ["row", "column", "conv", "dense"]
    said = capsys.readouterr().out
    assert "figures of a CPU" in said
    for kind, pattern in saved["patterns"].items():
        assert pattern["pairs"] == Pattern(kind, 3, 4).pairs()
        assert {"windowed", "naive", "sdpa mask", "sdpa causal"} <= set(pattern["rivals"])
        # a head of width 4 has no Triton kernel
        assert pattern["left_out"]["triton"].startswith("ValueError: backend 'triton'")
        for name, row in pattern["rivals"].items():
            assert row["runs"] == 2
            assert 0 < row["forward"]["min_ms"] <= row["forward"]["median_ms"]
            # another mask has no error under this one
            assert (row["error"] is None) == (name == "sdpa causal" and kind != "dense")
            assert f"{kind:<7} {name:<18} {row['forward']['median_ms']:9.3f}" in said
    assert saved["shape"]["dtype"] == "float32"
    assert saved["machine"]["commit"] == "abc"
    assert all(ratio["value"] is None for ratio in saved["ratios"])


def test_a_rival_that_fails_is_named_and_stops_nobody(monkeypatch):
    pattern, real = Pattern("row", 3, 4), bench.rivals

    def refuse(*_):
        raise RuntimeError("no engine\nfor this")

    def with_failures(pattern, device):
        calls = iter(range(5))

        def tire(qkv):
            # the comparison and four warm-up calls pass
            if next(calls, None) is None:
                raise RuntimeError("tired")
            return found["naive"].attend(qkv)

        found = real(pattern, device)
        found["refuses"] = bench.Rival(refuse, "apart", pattern)
        found["tires"] = bench.Rival(tire, "packed", pattern)
        return found

    monkeypatch.setattr(bench, "rivals", with_failures)
    args = bench.parse(SMALL)
    limits = {"copy_gb_s": 10.0, "matmul_tflop_s": 0.1}
    measured = bench.measure(pattern, args, limits, until_s=float("inf"))
    assert measured["left_out"]["refuses"] == "RuntimeError: no engine"
    assert measured["left_out"]["tires"] == "RuntimeError: tired"
    assert set(measured["rivals"]) == {"windowed", "naive", "sdpa mask", "sdpa causal"}


def test_turns_end_with_the_time_but_not_before_the_least():
    args = bench.parse([*SMALL, "--repeats", "9"])
    limits = {"copy_gb_s": 10.0, "matmul_tflop_s": 0.1}
    measured = bench.measure(Pattern("row", 3, 4), args, limits, until_s=0.0)
    assert measured["rivals"]["naive"]["runs"] == bench.LEAST_TURNS["cpu"]


def test_naive_is_left_out_where_its_scores_do_not_fit():
    paper = Pattern("row", 256, 32)
    large = bench.parse(["--device", "cpu", "--batch", "8", "--heads", "62"])
    assert "16 GB" in bench.too_large("naive", large, paper)
    assert bench.too_large("windowed", large, paper) is None
    assert bench.too_large("naive", bench.parse(["--device", "cpu"]), paper) is None


def test_a_colon_says_nothing_alone():
    error = RuntimeError("backend='inductor' raised:\n\n NoValidChoices: none\n more")
    assert (
        bench.first_line(error) == "RuntimeError: backend='inductor' raised: NoValidChoices: none"
    )
    assert bench.first_line(RuntimeError()) == "RuntimeError: "


def test_backward_is_the_difference(monkeypatch):
    shape = bench.shape_of(bench.parse(SMALL))
    limits = {"copy_gb_s": 10.0, "matmul_tflop_s": 0.1}
    rows = bench.summary([1e-3, 2e-3, 9e-3], [5e-3, 4e-3, 6e-3], shape, 100, limits)
    assert rows["forward"]["median_ms"] == pytest.approx(2)
    assert rows["both"]["min_ms"] == pytest.approx(4)
    assert rows["backward"]["median_ms"] == pytest.approx(3)


@pytest.mark.parametrize("flag", ["--repeats", "--batch"])
def test_less_than_one_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        bench.main([*SMALL, flag, "0"])
    assert f"{flag} is 0; it must be at least 1" in capsys.readouterr().err


def test_defaults_follow_the_device():
    args = bench.parse(["--device", "cpu"])
    assert (args.batch, args.heads, args.dtype) == (1, 2, "float32")
    args = bench.parse(["--device", "cuda:0"])
    assert (args.batch, args.heads, args.width, args.dtype) == (8, 62, 64, "bfloat16")
    assert bench.parse(["--device", "cuda", "--batch", "3"]).batch == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is no saved run"),
        ('{"attention": {"patterns": {"row": {}}}}', "is no saved run"),
        ("[]", "is no saved run"),
        ("{}", "holds no attention times"),
    ],
)
def test_a_file_without_times_is_a_sentence(text, says, tmp_path, capsys):
    file = tmp_path / "run.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as end:
        bench.main(["--table", str(file)])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_the_table_of_a_saved_run_needs_no_measurement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "table", lambda saved: f"| {saved['x']} |")
    monkeypatch.setattr(bench, "measure", None)
    file = tmp_path / "run.json"
    file.write_text('{"x": 7}')
    bench.main(["--table", str(file)])
    assert capsys.readouterr().out == "| 7 |\n"


def test_what_is_not_installed_is_unknown():
    assert bench.said_by(["no-such-command-here"]) == "unknown"
    assert bench.said_by([sys.executable, "-c", "raise SystemExit(3)"]) == "unknown"
    assert bench.said_by([sys.executable, "-c", "print('580.1')"]) == "580.1"
