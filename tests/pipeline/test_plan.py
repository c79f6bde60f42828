import json
import logging
import subprocess
import sys

import pytest

from pipeline import plan
from pipeline.console import InputError
from tests.tiny import ROOT

FILE_12B = str(ROOT / "ds_configs/zero3_12b.json")


@pytest.fixture(autouse=True)
def log_of_deepspeed():
    """The command silences it, for its own process."""
    log = logging.getLogger("DeepSpeed")
    before = list(log.filters)
    yield
    log.filters[:] = before


@pytest.fixture
def said(monkeypatch, capsys):
    """Options -> what the command writes."""

    def run(preset="dalle_12b", deepspeed_config=FILE_12B, gpus=64, *flags, **options):
        options = {"preset": preset, "deepspeed_config": deepspeed_config, "gpus": gpus} | options
        words = [str(w) for name, value in options.items() for w in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["plan", *words, *flags])
        plan.main()
        return capsys.readouterr().out

    return run


def test_the_plan_of_the_12b_model_on_64_gpus(said):
    lines = said().splitlines()
    assert lines[0] == (
        "12,292,816,384 parameters on 64 GPUs of 80 GiB; micro-batch 8 x accumulation 2 = "
        "batch 1024"
    )
    rows = {line[:34].strip(): line[34:].split() for line in lines}
    assert rows["memory of a GPU, GiB"] == ["loss", "mlp", "attention", "step"]
    assert rows["moments"] == ["1.43"] * 4
    assert rows["activations kept"] == ["9.99"] * 3
    assert rows["sum"][1] == max(rows["sum"], key=float) == "19.84"
    assert rows["of"] == ["80.00", "fits"]
    assert rows["sent by each GPU, GB"] == ["73.7", "147.5"]
    assert rows["sending, s"] == ["1.61", "3.23"]
    assert rows["computing, s"] == ["2.51", "5.02"]
    text = "\n".join(lines)
    for sentence in (
        "largest micro-batch that fits: 16\n",
        "memory of a node's host, GiB: 46\n",
        "bound by computing, if they overlap: 30 % of 989 TFLOP/s, what is computed again not",
        "assumed: 400 TFLOP/s sustained, 45 GB/s a GPU between nodes of 8, 370 inside\n",
        "430,000 updates of 1,024 samples: 563,609,600,000 tokens\n",
        "  599.3 hours, 38,358 GPU-hours\n",
        "  at 40 % of 989 TFLOP/s: 454.9 hours, 29,111 GPU-hours\n",
        "a checkpoint: 196.7 GB; with 2 kept, one being written and the exported weights: 639.2 GB",
    ):
        assert sentence in text
    assert "for each GPU" not in text
    assert "inside the node" not in text


def test_columns_add_up_to_the_sum(said):
    lines = said().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("memory of a GPU"))
    last = next(i for i, line in enumerate(lines) if line.startswith("  sum"))
    for column in range(4):
        cut = slice(34 + 11 * column, 45 + 11 * column)
        parts = [float(line[cut] or 0) for line in lines[first + 1 : last] if line[cut].strip()]
        assert sum(parts) == pytest.approx(float(lines[last][cut]), abs=0.1)


def test_json_has_the_same_figures(said):
    found = json.loads(said("dalle_12b", FILE_12B, 64, "--json"))
    assert found["parameters"] == 12_292_816_384
    assert found["fits"] is True
    assert found["peak_bytes"] == max(found["bytes_at"].values())
    for moment, size in found["bytes_at"].items():
        parts = found["parts"].values()
        assert size == sum(p["bytes"] for p in parts if moment in p["moments"])
    assert found["gpu_hours_at_mfu"] == pytest.approx(29_111, abs=1)
    assert found["gpu_hours"] == pytest.approx(64 * found["hours"])
    assert found["bound_by"] == "computing"
    assert found["changes"] == []


def test_offload_and_the_node_have_lines_of_their_own(said):
    offload = said(deepspeed_config=ROOT / "ds_configs/zero3_12b_offload.json", gpus=8)
    assert "  gradients of the masters               5.72 for each GPU\n" in offload
    assert "memory of a node's host, GiB: 458\n" in offload
    slow = said(deepspeed_config=ROOT / "ds_configs/zero3_slow_network.json", fabric=11)
    assert "  of that, inside the node, GB           36.9       73.7\n" in slow
    assert "bound by sending" in slow
    assert "11 GB/s a GPU between nodes" in slow


def test_what_does_not_fit_comes_with_what_to_change(said):
    text = said("dalle_12b", FILE_12B, 8, **{"gpu-gib": 24})
    assert "24.00  does not fit\nno micro-batch fits\n" in text
    changes = [line for line in text.splitlines() if " GiB, " in line]
    assert changes == [
        '  "offload_optimizer": {"device": "cpu"} in zero_optimization: 18.77 GiB, fits',
        "  32 GPUs: 23.78 GiB, fits",
        "  micro-batch 1: 41.16 GiB, does not fit",
    ]


def test_v100s_of_16_gib_hold_the_float16_file_on_64(said):
    file = ROOT / "ds_configs/zero3_12b_v100_fp16.json"
    text = said("dalle_12b", file, 64, "--attention", "windowed", **{"gpu-gib": 16})
    assert "16.00  fits" in text
    assert "largest micro-batch that fits: 4\n" in text


@pytest.mark.parametrize("preset", ["dalle_1b", "dalle_3b", "dalle_demo", "dalle_own"])
def test_any_preset_of_the_transformer_is_planned_on_one_gpu(said, preset):
    file = ROOT / "ds_configs/zero3_bf16.json"
    text = said(preset, file, 1, **{"micro-batch": 1})
    assert "sent by each GPU, GB                    0.0        0.0" in text
    assert "fits" in text


def test_a_preset_of_the_users_own_is_planned(said):
    text = said(f"{ROOT}/tests/tiny.py:dalle", ROOT / "ds_configs/zero3_cpu.json", 2)
    assert text.startswith("62,048 parameters on 2 GPUs of 80 GiB; micro-batch 4 x accumulation 1")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"preset": "dvae_paper"}, "dvae_paper trains the dVAE; take a dalle preset"),
        ({"preset": "dalle_13b"}, "no preset is called 'dalle_13b'"),
        ({"deepspeed_config": "none.json"}, "no ds_config at none.json"),
        ({"gpus": 0}, "--gpus is 0; take 1 or more"),
        ({"gpus": 48}, "a batch of 1024 cannot be shared by 48 ranks"),
        ({"gpus": 1024}, 'micro-batch 8 x .* leave one of them "auto"'),
        ({"micro-batch": 3}, "micro-batch 3 x accumulation 5 x 64 ranks is 960"),
        ({"micro-batch": 0}, "train_micro_batch_size_per_gpu is 0; write a whole number"),
        ({"gpu-gib": -1}, "--gpu-gib is -1; take a number above 0"),
        ({"gpus-per-node": 0}, "--gpus-per-node is 0; take 1 or more"),
        ({"fabric": "nan"}, "--fabric is nan; take a number above 0"),
        ({"tflops": 0}, "--tflops is 0; take a number above 0"),
    ],
)
def test_nonsense_is_refused(said, options, sentence):
    with pytest.raises(InputError, match=sentence):
        said(**options)


def test_json_is_all_that_is_written():
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.plan", "--preset", "dalle_12b", "--gpus", "64",
         "--deepspeed_config", FILE_12B, "--json"],
        check=True, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert json.loads(done.stdout)["gpus"] == 64
    assert done.stderr == ""


def test_nonsense_ends_the_command_with_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.plan", "--preset", "dalle_12b", "--gpus", "0",
         "--deepspeed_config", FILE_12B],
        check=False, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: --gpus is 0; take 1 or more\n"
