import argparse
import errno
import logging
import os
import subprocess
import sys
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


def as_rank(rank, error):
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
        capture_output=True, env=os.environ | {"RANK": str(rank)},
    )  # fmt: skip
    return done.returncode, done.stderr.splitlines()


def test_what_all_ranks_know_the_first_one_says():
    code, lines = as_rank(0, "InputError('batch is 3')")
    assert code == 2
    assert lines[0].endswith("hello")
    assert lines[1:] == ["error: batch is 3"]
    assert as_rank(1, "InputError('batch is 3')") == (2, [])


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
