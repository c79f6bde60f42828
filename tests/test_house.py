"""The rules of the house that no single room can hold: who imports whom, and what is a package."""

import ast
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).parent.parent
OURS = {"kernels", "pipeline", "data_prep", "tests"}
ALLOWED = {
    "kernels": {"kernels"},
    "pipeline": {"pipeline", "kernels"},
    "data_prep": {"data_prep", "pipeline"},
}
# inside pipeline, from the ground up; entry points stand on all of them
FLOORS = [
    "console environment files machine plugin",
    "config",
    "presets slices weights",
    "data models",
    "generation evaluation",
    "training",
]


def imported(source: str) -> set[str]:
    """Dotted names that ``source`` imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports are written in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder}/ has no Python file, so nothing was checked"
    return files


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_is_below_it(folder):
    for file in sources(folder):
        top = {name.split(".")[0] for name in imported(file.read_text())}
        wrong = (top & OURS) - ALLOWED[folder]
        assert not wrong, f"{file.relative_to(ROOT)} must not import {sorted(wrong)}"


def floor(room: str) -> int:
    """How high a file or folder of pipeline stands; entry points above all."""
    for height, rooms in enumerate(FLOORS):
        if room in rooms.split():
            return height
    return len(FLOORS)


def test_inside_pipeline_imports_point_down():
    for file in sources("pipeline"):
        room = file.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")
        for name in imported(file.read_text()):
            parts = name.split(".")
            if parts[0] == "pipeline" and len(parts) > 1 and parts[1] != room:
                assert floor(parts[1]) <= floor(room), f"{file.name} must not import {name}"


def entry_points(folder: str) -> list[Path]:
    found = [f for f in sources(folder) if "\nif __name__ ==" in f.read_text()]
    assert len(found) >= 2, f"{folder}/ has several commands"
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_nobody_imports_an_entry_point(folder):
    modules = {
        ".".join(f.relative_to(ROOT).with_suffix("").parts)
        for folder in ALLOWED
        for f in entry_points(folder)
    }
    for file in sources(folder):
        wrong = {
            n
            for n in imported(file.read_text())
            if any((n + ".").startswith(m + ".") for m in modules)
        }
        assert not wrong, f"{file.relative_to(ROOT)} must not import {sorted(wrong)}"


def test_what_commands_share_is_no_command():
    assert not [f for f in entry_points("kernels") if f.parent != ROOT / "kernels"]


def test_every_test_folder_is_a_package():
    folders = {file.parent for file in (ROOT / "tests").rglob("test_*.py")}
    bare = {str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()}
    assert not bare, "without __init__.py, tests/kernels hides kernels/ from the tests"


def test_kernels_is_ours_and_carries_no_version():
    assert Path(kernels.__file__).parent == ROOT / "kernels"
    # transformers takes any `kernels` with a fitting __version__ for the Hugging Face package
    assert not hasattr(kernels, "__version__")
