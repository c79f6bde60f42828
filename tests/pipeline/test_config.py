import dataclasses
import json

import pytest

from pipeline import config
from pipeline.config import DalleConfig, DvaeConfig, FsqConfig, Ramp, as_dict, fingerprint
from pipeline.console import InputError
from tests import tiny as runs


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_size": 60}, "image_size is 60; it must be a positive multiple of 8"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": -8}, "image_size is -8"),
        ({"n_vocab": 1}, "n_vocab is 1; codes are stored as uint16, so take 2 to 65,536"),
        ({"n_vocab": 65537}, "n_vocab is 65537"),
        ({"n_hid": 6}, "n_hid is 6; .* take a multiple of 4"),
        ({"n_hid": 0}, "n_hid is 0"),
        ({"n_init": 0}, "n_init is 0; take at least 1"),
        ({"n_blk_per_group": 0}, "n_blk_per_group is 0; take at least 1"),
    ],
)
def test_a_wrong_dvae_is_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        DvaeConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_size": 60}, "image_size is 60; it must be a positive multiple of 8"),
        ({"n_hid": 6}, "n_hid is 6; .* take a multiple of 4"),
        ({"n_init": 0}, "n_init is 0; take at least 1"),
        ({"levels": ()}, r"levels are \[\], which make 1 codes; take whole numbers from 2 on"),
        ({"levels": (8, 1)}, r"levels are \[8, 1\], which make 8 codes"),
        ({"levels": (8, 2.5)}, r"levels are \[8, 2.5\]"),
        ({"levels": (16, 16, 16, 17)}, "which make 69632 codes; .* at most 65,536"),
    ],
)
def test_a_wrong_fsq_is_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        FsqConfig(**changes)


def test_fsq_comes_back_from_json():
    config = FsqConfig(levels=(4, 3))
    assert FsqConfig(**json.loads(json.dumps(as_dict(config)))) == config
    assert (config.n_vocab, config.grid) == (12, 32)
    assert FsqConfig(levels=(16, 16, 16, 16)).n_vocab == 65536


@pytest.mark.parametrize(
    "changes",
    [
        {"model": FsqConfig()},
        {"model": FsqConfig(), "beta": None},
        {"beta": None},
        {"tau": None},
        {"beta": None, "tau": None},
    ],
)
def test_ramps_of_a_relaxation_go_with_the_dvae_alone(changes):
    with pytest.raises(InputError, match="beta and tau are ramps in the preset of a dVAE, and"):
        dataclasses.replace(runs.dvae(), **changes)
    dataclasses.replace(runs.dvae(), model=FsqConfig(), beta=None, tau=None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_layer": 0}, "n_layer is 0; take at least 1"),
        ({"n_text": 0}, "n_text is 0"),
        ({"grid": 0}, "grid is 0"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_text_vocab": 1}, "n_text_vocab is 1; take 2 to 65,536"),
        ({"n_image_vocab": 65537}, "n_image_vocab is 65537"),
        ({"n_head": 61}, "d_model 3968 does not divide into 61 heads; take d_model = 64"),
        ({"conv_kernel": 4}, "conv_kernel is 4; it must be odd"),
    ],
)
def test_a_wrong_transformer_is_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        DalleConfig(**changes)


def test_the_largest_vocabularies_fit_uint16():
    DvaeConfig(n_vocab=65536)
    DalleConfig(n_text_vocab=65536, n_image_vocab=65536)


def test_a_ramp_over_no_steps_is_refused():
    with pytest.raises(InputError, match="a ramp over 0 steps; take at least 1"):
        Ramp(1.0, 0.0, 0)


def test_positions_of_the_paper_are_256_and_1024():
    model = DalleConfig()
    assert (model.n_text, model.n_image, model.n_ctx) == (256, 1024, 1280)
    assert model.image_size == 256
    assert DvaeConfig().grid == model.grid == 32


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DvaeConfig().n_vocab = 3


@pytest.mark.parametrize("run", [runs.dalle(), runs.dvae()], ids=["dalle", "dvae"])
def test_a_config_survives_json(run):
    assert json.loads(json.dumps(as_dict(run))) == as_dict(run)
    assert type(run.model)(**as_dict(run)["model"]) == run.model


def test_a_fingerprint_stands_for_the_value_and_not_for_the_order_of_its_keys():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint(None)) == 16


def test_a_requirement_that_holds_is_silent():
    config.require(True, "never")
    with pytest.raises(InputError, match="never"):
        config.require(False, "never")


@pytest.mark.parametrize(
    "name", ["batch", "steps", "val_images", "val_every", "save_every", "log_every"]
)
@pytest.mark.parametrize("run", [runs.dalle, runs.dvae])
def test_counts_of_a_run_are_counts(run, name):
    for value in (0, -1, 2.5):
        with pytest.raises(InputError, match=f"{name} is {value} in the preset; take a whole"):
            dataclasses.replace(run(), **{name: value})


def test_other_bounds_of_a_run():
    with pytest.raises(InputError, match="ema_every is 0; take at least 1"):
        dataclasses.replace(runs.dalle().optimizer, ema_every=0)
    with pytest.raises(InputError, match=r"bpe_dropout is 2.0; it lies in \[0, 1\]"):
        dataclasses.replace(runs.dalle(), bpe_dropout=2.0)
