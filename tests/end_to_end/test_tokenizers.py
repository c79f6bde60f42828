"""Image tokenizers other than a trained dVAE go the same way: encode, train, sample."""

import dataclasses
import json
import sys

import pytest
import torch
from PIL import Image

from data_prep import encode
from pipeline import import_dvae, sample
from pipeline.config import FsqConfig
from pipeline.data.shards import ShardReader
from pipeline.models.dvae import DiscreteVAE, load_dvae, save_dvae
from pipeline.train_dalle import DalleStage, check_dvae
from tests import tiny as runs
from tests.pipeline.models.test_released import DECODER, ENCODER

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


def fsq(folder, monkeypatch):
    """Random layers that tell pictures apart."""
    torch.manual_seed(0)
    config = FsqConfig(
        image_size=runs.IMAGE_SIZE, levels=(5, 4, 3), n_hid=8, n_init=8, n_blk_per_group=1
    )
    model = DiscreteVAE(config)
    with torch.no_grad():
        model.encoder.blocks.output.conv.w.mul_(10)
    save_dvae(folder, model)


def released(folder, monkeypatch):
    """The golden file in OpenAI's format, as the command imports it."""
    words = ["import_dvae", "--encoder", ENCODER, "--decoder", DECODER, "--out", folder]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--image-size", str(runs.IMAGE_SIZE)])
    import_dvae.main()


@pytest.mark.parametrize(("make", "n_vocab"), [(fsq, 60), (released, 512)])
def test_its_folder_is_all_that_the_next_stages_need(tiny, tmp_path, monkeypatch, make, n_vocab):
    dvae, tokens, out = (tmp_path / name for name in ("dvae", "tokens", "dalle"))
    make(dvae, monkeypatch)
    model, fingerprint = load_dvae(dvae)

    words = ["--data", tiny.pairs, "--dvae", dvae, "--out", tokens, "--batch", 16]
    monkeypatch.setattr(sys, "argv", ["encode", *map(str, words)])
    encode.main()
    reader = ShardReader(tokens, "tokens")
    made_of = reader.made_of
    assert (made_of["dvae"], made_of["grid"], made_of["n_vocab"]) == (fingerprint, 4, n_vocab)
    assert len(reader) == len(ShardReader(tiny.pairs))
    codes = torch.tensor([reader[i]["image_tokens"].tolist() for i in range(len(reader))])
    assert len(codes.unique()) > 2
    assert codes.max() < n_vocab
    check_dvae(reader, str(dvae))

    run = runs.dalle()
    shape = dataclasses.replace(run.model, n_image_vocab=n_vocab)
    run = dataclasses.replace(run, model=shape, steps=2, val_every=2, save_every=2)
    runs.train(DalleStage(run, str(tokens), str(tiny.tokenizer)), out)

    pictures = tmp_path / "pictures"
    flags = ["--model", out, "--dvae", dvae, "--out", pictures, "--caption", "a red circle"]
    sample.main([*map(str, flags), "--count", "2"])
    lines = (pictures / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line in map(json.loads, lines):
        with Image.open(pictures / line["file"]) as picture:
            assert picture.size == (runs.IMAGE_SIZE, runs.IMAGE_SIZE)
            assert picture.text["dvae"] == fingerprint
    assert model.config.n_vocab == n_vocab
