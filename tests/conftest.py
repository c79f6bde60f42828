import os

import pytest
import torch

# before anything imports the kernels: without a GPU they run in Triton's interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.tiny import Inputs, make_inputs


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Inputs:
    """64 scenes, their tokenizer, two random dVAEs and the tokens of the first; never changed."""
    return make_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def one_cpu_thread(monkeypatch):
    """What the commands of ``tests.tiny.start`` compute with, so that all bits agree."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
