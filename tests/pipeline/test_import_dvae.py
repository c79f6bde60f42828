import sys

import pytest
import torch
from safetensors.torch import load_file

from pipeline import import_dvae
from pipeline.console import InputError
from pipeline.models.dvae import load_dvae
from pipeline.weights import load_weights
from tests.pipeline.models.test_released import DECODER, ENCODER, GOLDEN


def run(monkeypatch, *flags):
    words = ["import_dvae", "--encoder", ENCODER, "--decoder", DECODER, *flags]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    import_dvae.main()


def test_the_folder_encodes_as_the_released_code_does(tmp_path, monkeypatch):
    run(monkeypatch, "--image-size", 64, "--out", tmp_path / "dvae")
    dvae, _ = load_dvae(tmp_path / "dvae")
    expected = load_file(GOLDEN / "expected.safetensors")
    assert torch.equal(dvae.encode(expected["image"]), expected["codes"])
    made_of = load_weights(tmp_path / "dvae", "dvae").made_of
    assert made_of["encoder_sha256"] == import_dvae.sha256(ENCODER)
    with pytest.raises(InputError, match="holds a model; name a new folder"):
        run(monkeypatch, "--image-size", 64, "--out", tmp_path / "dvae")


@pytest.mark.parametrize("size", [0, 4, 100])
def test_a_size_that_no_grid_fits_is_refused(tmp_path, monkeypatch, size):
    with pytest.raises(InputError, match=f"is {size}; "):
        run(monkeypatch, "--image-size", size, "--out", tmp_path / "dvae")
    assert not (tmp_path / "dvae").exists()
