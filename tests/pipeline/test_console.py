import argparse
import contextlib
import errno
import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from pipeline import console
from pipeline.console import Bar, InputError, OwnError, command, logger, track
from tests.tiny import ROOT


def raises(error):
    def main():
        raise error

    return main


def test_a_command_that_ends_well_says_nothing(capsys):
    command(lambda: None)
    assert capsys.readouterr() == ("", "")


def test_an_input_error_is_one_sentence_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        command(raises(InputError("batch is 3; take 4")))
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: batch is 3; take 4\n")


def test_names_that_move_a_terminal_are_shown(capsys):
    with pytest.raises(SystemExit):
        command(raises(InputError("no file a\nb\x1b[2J 犬")))
    assert capsys.readouterr().err == "error: no file a\\nb\\x1b[2J 犬\n"


def test_the_keyboard_ends_a_command_with_130(capsys):
    with pytest.raises(SystemExit) as ended:
        command(raises(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped by the keyboard\n"


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command(lambda: 1 / 0)


@pytest.mark.parametrize("act", [lambda p: p.mkdir(), lambda p: (p / "x").write_text("")])
def test_a_path_that_cannot_be_used_is_a_sentence(tmp_path, capsys, act):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(SystemExit) as ended:
        command(lambda: act(path))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}")
    assert said.endswith("; name a path that can be used\n")


def test_a_full_disk_is_a_sentence_and_a_broken_connection_a_bug(capsys):
    for error, sentence in [
        (OSError(errno.ENOSPC, "Error of a library"), "No space left on device; make room"),
        (OSError(errno.EDQUOT, "quota", "set/a"), "set/a: Disk quota exceeded; make room"),
        (OSError(errno.EFBIG, "big", "set/a"), "set/a: File too large; raise ulimit -f"),
    ]:
        with pytest.raises(SystemExit) as ended:
            command(raises(error))
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said == f"error: {sentence} and start again: what is committed stays\n"
    with pytest.raises(ConnectionError):
        command(raises(ConnectionError("peer is gone")))


def as_rank(rank, error, **more):
    """(exit code, stderr) of a rank of a launcher whose command raises ``error``."""
    lines = [
        "from pipeline.console import InputError, OwnError, command, logger",
        "def main():",
        "    logger('test').info('hello')",
        f"    raise {error}",
        "command(main)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], check=False, cwd=ROOT, text=True,
        capture_output=True, env=os.environ | {"RANK": str(rank)} | more,
    )  # fmt: skip
    return done.returncode, done.stderr.splitlines()


def test_what_all_ranks_know_the_first_one_says():
    code, lines = as_rank(0, "InputError('batch is 3')")
    assert code == 2
    assert lines[0].endswith("hello")
    assert lines[1:] == ["error: batch is 3"]
    assert as_rank(1, "InputError('batch is 3')") == (2, [])
    # before they have joined, nobody knows whether it is the other nodes' mistake too
    assert as_rank(3, "InputError('batch is 3')", LOCAL_RANK="1") == (2, [])
    code, lines = as_rank(2, "InputError('batch is 3')", LOCAL_RANK="0")
    assert (code, lines[-1:]) == (2, ["error: batch is 3"])


def test_ranks_that_say_nothing_let_the_first_one_speak(monkeypatch):
    slept, ended = [], []
    monkeypatch.setattr(console.time, "sleep", slept.append)
    monkeypatch.setattr(console, "_end", ended.append)
    for rank, error in ((0, InputError("x")), (1, OwnError("x"))):
        monkeypatch.setenv("RANK", str(rank))
        command(raises(error))
    assert slept == []
    command(raises(InputError("x")))
    assert slept == [console.SECONDS_TO_SPEAK]
    assert ended == [2, 2, 2]


def test_what_one_rank_alone_knows_it_says_itself():
    assert as_rank(1, "OwnError('row 7 is damaged')") == (2, ["error: row 7 is damaged"])


def test_an_error_of_one_rank_is_an_input_error():
    assert issubclass(OwnError, InputError)
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize(("rank", "level"), [("0", logging.INFO), ("3", logging.ERROR)])
def test_only_the_first_rank_logs_what_goes_well(monkeypatch, rank, level):
    monkeypatch.setenv("RANK", rank)
    log = logger(f"test-{rank}")
    assert log.level == level
    assert logger(f"test-{rank}") is log
    assert len(log.handlers) == 1


def test_a_bar_without_a_terminal_leaves_a_line_at_its_end(capsys, monkeypatch):
    lines = []
    monkeypatch.setattr(logging.getLogger("daikon.progress"), "info", lambda *a: lines.append(a))
    assert list(track("abc", "letters", 3)) == ["a", "b", "c"]
    ((form, *values),) = lines
    assert (form % tuple(values)).startswith("letters 3/3")


def test_a_bar_says_where_it_is_now_and_then(monkeypatch):
    clock, lines = [100.0], []
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(logging.getLogger("daikon.progress"), "info", lambda *a: lines.append(a))
    with Bar("train", total=100, done=40) as bar:
        bar.advance(10, "loss=2")
        assert lines == []
        clock[0] += 20
        bar.advance(10, "loss=1")
    said = [form % tuple(values) for form, *values in lines]
    # what was done before does not count as speed: 20 in 20 s, 40 left
    assert said[0] == "train 60/100, 20 s, 40 s left  loss=1"
    assert len(said) == 2


def test_whoever_knows_better_tells_the_time_left(monkeypatch):
    lines = []
    monkeypatch.setattr(logging.getLogger("daikon.progress"), "info", lambda *a: lines.append(a))
    with Bar("train", total=100) as bar:
        bar.advance(10, "loss=2", left_s=7200)
    ((form, *values),) = lines
    assert ", 2h00m left  loss=2" in form % tuple(values)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.6, "1m00s"), (3599, "59m59s"), (3661, "1h01m"), (90000, "1d01h")],
)
def test_a_duration_has_two_units(seconds, said):
    assert console.duration(seconds) == said


def in_a_terminal(columns, script):
    """The lines that a terminal of so many columns shows, those too that others came over."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "RANK")}
    started = subprocess.Popen(
        [sys.executable, "-c", script], stderr=writer, env=environment | {"TERM": "xterm"}
    )
    os.close(writer)
    shown = b""
    # the other side of a terminal that nobody holds any more cannot be read
    with contextlib.suppress(OSError):
        while some := os.read(reader, 65536):
            shown += some
    os.close(reader)
    assert started.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


TALK = """
from pipeline.console import Bar, logger
with Bar("dalle", 430000, says_much=True) as bar:
    bar.advance(123456, "loss 6.412 " + 5 * "words and " + "an end", left_s=46740.0)
    logger("dalle").info("step=5 validation")
"""


def test_on_a_narrow_terminal_the_words_take_the_place_of_the_bar():
    narrow, wide = in_a_terminal(100, TALK), in_a_terminal(200, TALK)
    assert "━" not in narrow[-1]
    assert "━" in wide[-1]
    for shown in (narrow, wide):
        # not into the bar, but above it
        assert any(re.fullmatch(r".dalle. [\d:]+ step=5 validation", line) for line in shown)
        assert shown[-1].startswith("dalle 123456/430000 ")
        assert " 12h59m loss 6.412 words and" in shown[-1]
        assert shown[-1].endswith("and an end")


def test_an_empty_path_is_not_the_working_directory(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=console.a_path)
    assert parser.parse_args(["--out", "."]).out == Path()
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--out", ""])
    assert ended.value.code == 2
    assert "the path is empty; is a variable of the shell not set?" in capsys.readouterr().err


def test_an_input_error_may_have_a_code_of_its_own(capsys):
    class OtherError(InputError):
        code = 69

    with pytest.raises(SystemExit) as ended:
        command(raises(OtherError("a rank is gone; start again")))
    assert ended.value.code == 69
