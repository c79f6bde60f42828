import pytest

from pipeline.console import InputError
from pipeline.plugin import blame, load_function


def test_a_function_is_loaded_from_its_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            "from __future__ import annotations\n"
            "import dataclasses\n"
            "@dataclasses.dataclass\n"
            "class Own:\n"
            "    x: int = 3\n"
            f"def name():\n    return {name!r}, Own().x\n"
        )
    one = load_function(f"{tmp_path}/one.py:name", "thing")
    two = load_function(f"{tmp_path}/two.py:name", "thing")
    assert (one(), two()) == (("one", 3), ("two", 3))
    assert one.__module__ != two.__module__


def test_a_colon_may_stand_in_the_path(tmp_path):
    (tmp_path / "a:b.py").write_text("def f(x):\n    return 1 / x\n")
    function = load_function(f"{tmp_path}/a:b.py:f", "thing")
    assert function(1) == 1
    with pytest.raises(ZeroDivisionError) as caught:
        function(0)
    assert "(line 2)" in blame(caught.value, f"{tmp_path}/a:b.py:f")


def test_what_the_file_raises_is_told_with_its_line(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def f():\n    return {}['gone']\n\ndef g():\n    return int('x')\n")
    for name, told in (("f", "KeyError: 'gone' (line 2)"), ("g", "ValueError: invalid literal")):
        with pytest.raises((KeyError, ValueError)) as caught:
            load_function(f"{path}:{name}", "thing")()
        assert blame(caught.value, f"{path}:{name}").startswith(told)
    path.write_text("x = 1\nraise OSError('no disk')\n")
    with pytest.raises(
        InputError, match=r"thing '.*own.py:f' cannot be made: OSError: no disk .*2"
    ):
        load_function(f"{path}:f", "thing")


def test_a_text_file_is_no_code(tmp_path):
    (tmp_path / "own.txt").write_text("def f(): pass")
    with pytest.raises(InputError, match=r"own\.txt is not a Python file"):
        load_function(f"{tmp_path}/own.txt:f", "thing")
