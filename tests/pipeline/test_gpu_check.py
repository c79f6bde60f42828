"""The check for machines with a GPU, run without one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import gpu_check
from pipeline.console import InputError
from pipeline.gpu_check import OutOfTime, Watch

ROOT = Path(__file__).resolve().parents[2]
# so that looking for the tests that are marked does not find this file
MARK = "@pytest.mark." + "gpu"
RATIO = {"name": "row", "value": 2.5, "target": 2.0, "least": True, "met": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_ends_with_2() -> None:
    command = [sys.executable, "-m", "pipeline.gpu_check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "no CUDA device" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_command_that_fails_is_shown() -> None:
    with pytest.raises(InputError, match=r"failed with exit code 3:\n.*the reason"):
        gpu_check.run(sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)")


def test_a_command_is_cut_with_all_that_it_started(tmp_path: Path) -> None:
    script = f"sleep 60 & echo $! > {tmp_path}/child; sleep 60"
    start = time.monotonic()
    with pytest.raises(OutOfTime, match=r"was cut after 1 s.*give more --minutes"):
        gpu_check.run("sh", "-c", script, watch=Watch(1 / 60))
    assert time.monotonic() - start < 10
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        # a killed process whose new parent has not asked for it is a zombie
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        pytest.fail("the command's child is still running")


def write_tests(folder: Path, body: str) -> Path:
    (folder / "test_it.py").write_text(f"import pytest\n{body}")
    # collecting this one would fail
    (folder / "test_other.py").write_text("import no_such_module")
    # the markers, without the settings of this repository
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    return folder


def test_only_the_marked_tests_run(tmp_path: Path) -> None:
    body = f"{MARK}\ndef test_a(): pass\n{MARK}\n@pytest.mark.skip\ndef test_b(): pass\n"
    write_tests(tmp_path, body + "def test_c(): raise AssertionError\n")
    result = gpu_check.gpu_tests(Watch(1), tmp_path)
    assert (result["passed"], result["skipped"]) == (1, 1)
    assert not list(tmp_path.glob(".pytest_cache"))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            f"{MARK}\ndef test_a(): assert 'this' == 'that'\n{MARK}\ndef test_b(): pass",
            "exit code 1 and 1 passed.*'that'",
        ),
        (f"{MARK}\n@pytest.mark.skip\ndef test_a(): pass", "exit code 0 and 0 passed"),
        (f"MARK = '{MARK}'\ndef test_a(): pass", "exit code 5 and 0 passed"),
        ("def test_a(): pass", "is marked gpu, so nothing was checked"),
    ],
    ids=["failing", "skipped", "none collected", "none marked"],
)
def test_tests_that_fail_or_do_not_run_are_an_error(body: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"(?s){says}"):
        gpu_check.gpu_tests(Watch(1), write_tests(tmp_path, body))


def checked(
    tmp_path: Path, stages: dict[str, Any], chosen: list[str] | None = None, minutes: float = 9
) -> dict[str, Any]:
    """The file after a check of made-up stages, and what it raised as "error"."""
    made = {
        name: stage if callable(stage) else lambda *_, found=stage: dict(found)
        for name, stage in stages.items()
    }
    path, error = tmp_path / "chip.json", ""
    try:
        gpu_check.check(made, chosen or list(made), {"chip": "c"}, path, Watch(minutes))
    except InputError as raised:
        error = str(raised)
    return {**json.loads(path.read_text()), "error": error}


ALL = {
    "tests": {"passed": 3},
    "attention": {"patterns": {}, "ratios": [RATIO]},
    "steps": {"train_step_s": 1},
    "decode": {"decode": {"dalle_1b": {"rows": []}}},
    "pipeline": {"engine": "plain PyTorch"},
    "encode": {"encode": {"job": {"images_per_s": 900}}},
}


def test_the_report_of_a_whole_run(tmp_path: Path) -> None:
    report = checked(tmp_path, ALL)
    assert report["complete"] is True
    assert not report["error"]
    assert (report["chip"], report["tests"]["passed"]) == ("c", 3)
    assert set(report["seconds"]) == set(ALL)
    assert report["left_out"] == report["failed"] == {}


def test_the_file_is_there_after_every_stage(tmp_path: Path) -> None:
    seen = []

    def look(*_: Any) -> dict[str, Any]:
        seen.append(json.loads((tmp_path / "chip.json").read_text()))
        return {}

    checked(tmp_path, {**ALL, "steps": look, "pipeline": look})
    assert "attention" in seen[0]
    assert "steps" not in seen[0]
    assert "steps" in seen[1]
    assert [report["complete"] for report in seen] == [False, False]


def fail(*_: Any) -> dict[str, Any]:
    raise InputError("no luck")


def test_failing_tests_end_the_check(tmp_path: Path) -> None:
    report = checked(tmp_path, {**ALL, "tests": fail})
    assert report["error"] == "no luck"
    assert report["failed"] == {"tests": "no luck"}
    assert not report["complete"]
    assert "attention" not in report


def test_another_failure_stops_nobody_and_is_said_at_the_end(tmp_path: Path) -> None:
    report = checked(tmp_path, {**ALL, "attention": fail})
    assert "pipeline" in report
    assert report["failed"] == {"attention": "no luck"}
    assert not report["complete"]
    assert "attention failed: no luck" in report["error"]


def test_a_stage_that_was_cut_keeps_what_it_measured(tmp_path: Path) -> None:
    report = checked(tmp_path, {**ALL, "attention": {**ALL["attention"], "cut": "too long"}})
    assert report["attention"] == ALL["attention"]
    assert report["failed"] == {"attention": "too long"}
    assert not report["complete"]


def test_stages_without_time_are_named(tmp_path: Path) -> None:
    report = checked(tmp_path, ALL, minutes=0.6)
    assert set(report["left_out"]) == {"attention", "decode", "pipeline", "encode"}
    assert report["left_out"]["pipeline"].endswith("s were left; it is begun with 60")
    assert report["steps"] == ALL["steps"]
    assert not report["complete"]


def test_stages_that_were_not_asked_for_are_named(tmp_path: Path) -> None:
    report = checked(tmp_path, {**ALL, "tests": fail}, chosen=["steps"])
    assert set(report["left_out"].values()) == {"not asked for"}
    assert set(report["left_out"]) == set(ALL) - {"steps"}
    assert not report["complete"]
    assert not report["error"]


def test_a_command_that_fails_half_way_leaves_its_file(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    script = f"""open({str(out)!r}, "w").write('{{"x": 1}}'); raise SystemExit("broke")"""
    found = gpu_check.saved(out, [sys.executable, "-c", script], Watch(1))
    assert found["x"] == 1
    assert "broke" in found["cut"]
    with pytest.raises(InputError, match="nothing"):
        gpu_check.saved(
            tmp_path / "no", [sys.executable, "-c", "raise SystemExit('nothing')"], Watch(1)
        )


def test_attention_hands_on_its_time_and_says_the_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def instead(out: Path, words: list[str], watch: Watch) -> dict[str, Any]:
        asked.append(words)
        left_out = {"sdpa causal cudnn": "RuntimeError: no"}
        return {"patterns": {"row": {"left_out": left_out}}, "ratios": [RATIO]}

    monkeypatch.setattr(gpu_check, "saved", instead)
    monkeypatch.setattr(gpu_check.log, "propagate", True)
    for minutes in (9, 2):
        gpu_check.attention(tmp_path, Watch(minutes), "abc")
    assert [words[words.index("--seconds") + 1] for words in asked] == ["170", "95"]
    assert asked[0][-2:] == ["--commit", "abc"]
    assert "row: sdpa causal cudnn was left out: RuntimeError: no" in caplog.text
    assert "met            2.500  at least 2" in caplog.text


@pytest.mark.usefixtures("one_cpu_thread")
def test_steps_are_those_of_the_bench_on_the_device_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--d_model", "16", "--layers", "1", "--heads", "1", "--n_text", "4", "--grid", "2"]
    monkeypatch.setattr(gpu_check, "MIDDLE", [*small, "--runs", "1", "--sample"])
    found = gpu_check.steps(tmp_path, Watch(1), "abc")
    assert found["commit"] == "abc"
    assert found["shape"]["d_model"] == 16
    assert set(found["ours"]) == {"train_step_s", "sample_one_image_s"}
    asked = []
    monkeypatch.setattr(gpu_check, "saved", lambda out, words, watch: asked.append(words))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu_check.steps(tmp_path, Watch(1), "abc")
    assert asked[0][asked[0].index("--device") + 1] == "cuda"


@pytest.mark.usefixtures("one_cpu_thread")
def test_decode_is_that_of_the_bench_on_the_device_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--d_model", "16", "--layers", "1", "--heads", "1", "--n_text", "4", "--grid", "2"]
    words = [*gpu_check.DECODE, *small, "--batches", "1", "3"]
    monkeypatch.setattr(gpu_check, "DECODE", words)
    found = gpu_check.decode(tmp_path, Watch(1), "abc")
    assert (found["commit"], found["dtype"]) == ("abc", "bfloat16")
    assert [row["batch"] for row in found["decode"]["flags"]["rows"]] == [1, 3, 1, 3]
    asked = []
    monkeypatch.setattr(gpu_check, "saved", lambda out, words, watch: asked.append(words))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu_check.decode(tmp_path, Watch(1), "abc")
    assert asked[0][asked[0].index("--device") + 1] == "cuda"


def test_encode_is_that_of_its_bench_on_the_device_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def instead(*words: str, watch: Watch) -> float:
        asked[:] = words
        Path(words[words.index("--out") + 1]).write_text('{"encode": {"dtype": "float16"}}')
        return 1.0

    monkeypatch.setattr(gpu_check, "run", instead)
    for is_there, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=is_there: found)
        found = gpu_check.encode(tmp_path, Watch(1), "abc")
        assert found == {"encode": {"dtype": "float16"}}
        assert asked[1:5] == ["-m", "data_prep.bench", "--device", device]
        assert asked[-4:] == ["--commit", "abc", "--only", "encode"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_cpu_thread")
def test_encode_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ["--image-size", "16", "--n-vocab", "24", "--n-hid", "8", "--runs", "1"]
    monkeypatch.setattr(gpu_check, "ENCODER", [*gpu_check.ENCODER, *tiny])
    found = gpu_check.encode(tmp_path, Watch(10), "abc")
    assert found["commit"] == "abc"
    assert found["encode"]["image_size"] == 16
    assert found["encode"]["job"]["images_per_s"] > 0
    assert "ingest" not in found


def test_an_encoder_that_fails_half_way_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "ENCODER", [*gpu_check.ENCODER, "--image-size", "12"])
    with pytest.raises(InputError, match="image_size is 12"):
        gpu_check.encode(tmp_path, Watch(5), "abc")


def test_nothing_run_is_no_success(tmp_path: Path) -> None:
    report = checked(tmp_path, ALL, minutes=0.001)
    assert report["error"] == "nothing ran in the time that was given; give more --minutes"


@pytest.mark.parametrize("minutes", ["0", "inf", "nan", "61"])
def test_minutes_without_a_meaning_are_refused(
    minutes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--cpu", "--minutes", minutes])
    with pytest.raises(InputError, match="; take more than 0, at most 60"):
        gpu_check.main()


def test_the_file_has_the_name_of_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert gpu_check.file_name() == "nvidia-a100-sxm4-80gb.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.file_name() == "cpu.json"


@pytest.mark.slow
def test_the_pipeline_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # four steps: a CPU without bfloat16 takes seconds for each of the hundred of a GPU
    short = gpu_check.PRESETS.replace('"steps": 100', '"steps": 4').replace("50", "2")
    assert short.count(": 2,") == 2
    monkeypatch.setattr(gpu_check, "PRESETS", short)
    command = ["gpu_check", "--cpu", "--stages", "pipeline", "--minutes", "30"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
    gpu_check.main()
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert report["pipeline"]["dalle"]["image"] > 0
    assert report["pipeline"]["seconds"]["sample"] > 0
