import re
from importlib.metadata import PackageNotFoundError

import torch

from pipeline import environment as module
from pipeline.environment import environment


def test_the_environment_is_versions_and_all_of_the_code(tmp_path, monkeypatch):
    here = environment()
    assert here["torch"] == torch.__version__
    assert list(here) == ["code", "python", "torch", "deepspeed", "numpy", "sentencepiece"]
    for folder in ("kernels", "pipeline/training"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    codes = {environment()["code"], here["code"]}
    for content in ("a = 1", "a = 2"):
        (tmp_path / "pipeline/training/loop.py").write_text(content)
        codes.add(environment()["code"])
    (tmp_path / "pipeline/training/loop.py").rename(tmp_path / "kernels/loop.py")
    codes.add(environment()["code"])
    assert len(codes) == 5
    assert all(re.fullmatch("[0-9a-f]{16}", code) for code in codes)


def test_a_library_that_is_not_there_is_told(monkeypatch):
    """Without DeepSpeed one process trains and samples."""

    def version(name):
        if name == "deepspeed":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(module, "version", version)
    found = environment()
    assert (found["deepspeed"], found["numpy"]) == ("not installed", "1.0")
