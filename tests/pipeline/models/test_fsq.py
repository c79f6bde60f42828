import itertools
import json
import math

import pytest
import torch

from pipeline import weights
from pipeline.config import DvaeConfig, FsqConfig
from pipeline.console import InputError
from pipeline.models.dvae import (
    Conv2d,
    DiscreteVAE,
    load_dvae,
    logit_laplace_nll,
    save_dvae,
)
from pipeline.models.fsq import Fsq

PAPER = (8, 8, 8, 6, 5)
TINY = FsqConfig(image_size=16, levels=(4, 3, 5), n_hid=8, n_init=5, n_blk_per_group=1)
LEVELS = [PAPER, (5, 3), (2, 2, 2), (4,), (7, 8, 2)]


def papers_quantize(z, n_levels):
    """One number by the listing of appendix A.1 (arXiv 2309.15505), in Python's floats."""
    half_l = (n_levels - 1) * (1 - 1e-3) / 2
    offset = 0.0 if n_levels % 2 == 1 else 0.5
    shift = math.tan(offset / half_l)
    return round(math.tanh(z + shift) * half_l - offset) / (n_levels // 2)


def papers_index(values, levels):
    """The same listing's number of a code."""
    index, place = 0, 1
    for value, n_levels in zip(values, levels, strict=True):
        index += round(value * (n_levels // 2) + n_levels // 2) * place
        place *= n_levels
    return index


def positions(levels, n=4, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, len(levels), n, n, generator=generator)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_values_and_codes_are_the_papers(levels):
    fsq, z = Fsq(levels), positions(levels)
    values, codes = fsq(z), fsq.codes(z)
    assert codes.dtype == torch.int64
    for b, y, x in itertools.product(range(2), range(4), range(4)):
        wanted = [
            papers_quantize(v, n) for v, n in zip(z[b, :, y, x].tolist(), levels, strict=True)
        ]
        assert values[b, :, y, x].tolist() == pytest.approx(wanted, abs=1e-6)
        assert codes[b, y, x] == papers_index(wanted, levels)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_every_code_comes_back(levels):
    fsq = Fsq(levels)
    codes = torch.arange(fsq.n_vocab).view(1, -1, 1)
    values = fsq.values(codes)
    assert values.shape == (1, len(levels), fsq.n_vocab, 1)
    assert (values.min(), values.max() <= 1) == (-1, True)
    # all combinations of levels, each once
    assert len({tuple(v) for v in values[0, :, :, 0].t().tolist()}) == math.prod(levels)
    assert [
        papers_index(v, levels) for v in values[0, :, :, 0].t().tolist()
    ] == codes.flatten().tolist()
    # numbers that are bounded to these values have these codes
    half_l = (fsq.levels - 1) * (1 - 1e-3) / 2
    offset = (fsq.levels % 2 == 0) / 2
    inside = ((values * (fsq.levels // 2) + offset) / half_l).double().clamp(-1 + 1e-7, 1 - 1e-7)
    z = torch.atanh(inside) - torch.tan(offset / half_l)
    assert torch.equal(fsq.codes(z), codes)
    torch.testing.assert_close(fsq(z), values)


def test_the_papers_levels_are_15360_codes():
    assert Fsq(PAPER).n_vocab == 15_360
    assert Fsq(PAPER).n_channels == 5


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_numbers_of_any_size_have_codes(levels):
    fsq = Fsq(levels)
    low, high = (fsq.codes(torch.full((1, len(levels), 1, 1), z)).item() for z in (-1e4, 1e4))
    assert (low, high) == (0, fsq.n_vocab - 1)


@pytest.mark.parametrize("n_levels", [3, 5, 8, 6])
def test_the_gradient_is_that_of_the_bound_alone(n_levels):
    fsq = Fsq([n_levels])
    z = torch.linspace(-3, 3, 101).view(1, 1, 1, -1).requires_grad_()
    fsq(z).sum().backward()
    half_l = (n_levels - 1) * (1 - 1e-3) / 2
    shift = math.tan((0.5 if n_levels % 2 == 0 else 0.0) / half_l)
    wanted = (1 - torch.tanh(z.detach() + shift) ** 2) * half_l / (n_levels // 2)
    torch.testing.assert_close(z.grad, wanted, rtol=1e-4, atol=1e-6)


def test_sixteen_bits_do_not_round_the_levels():
    fsq, z = Fsq(PAPER), positions(PAPER)
    wanted = fsq.codes(z)
    assert torch.equal(fsq.bfloat16().codes(z), wanted)
    assert fsq(z.bfloat16()).dtype == torch.float32
    assert not fsq.state_dict()


# ---- the tokenizer


def pictures(batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, TINY.image_size, TINY.image_size, generator=generator)


def tiny_fsq():
    """A model whose codes differ from place to place."""
    torch.manual_seed(0)
    model = DiscreteVAE(TINY)
    with torch.no_grad():
        output = model.encoder.blocks.output.conv
        output.w.mul_(20)
        output.b.sub_(model.logits(pictures(8, seed=9)).mean(dim=(0, 2, 3)))
    return model


def test_the_layers_are_the_dvaes_but_for_the_channels_between_them():
    with torch.device("meta"):
        fsq, dvae = (DiscreteVAE(config()).state_dict() for config in (FsqConfig, DvaeConfig))
    assert fsq.keys() == dvae.keys()
    other = {name: tuple(fsq[name].shape) for name in fsq if fsq[name].shape != dvae[name].shape}
    assert other == {
        "encoder.blocks.output.conv.w": (5, 2048, 1, 1),
        "encoder.blocks.output.conv.b": (5,),
        "decoder.blocks.input.w": (128, 5, 1, 1),
    }


@torch.no_grad()
def test_forward_is_encoder_rounding_decoder_and_likelihood():
    model = tiny_fsq()
    out = model(pictures())
    x = 0.1 + 0.8 * pictures()
    z = model.encoder(x)
    values, codes = torch.empty_like(z), torch.empty(3, 2, 2, dtype=torch.int64)
    for b, i, j in itertools.product(range(3), range(2), range(2)):
        column = [
            papers_quantize(v, n) for v, n in zip(z[b, :, i, j].tolist(), TINY.levels, strict=True)
        ]
        values[b, :, i, j] = torch.tensor(column)
        codes[b, i, j] = papers_index(column, TINY.levels)
    assert len(codes.unique()) > 5
    assert torch.equal(out["codes_BYX"], codes)
    stats = model.decoder(values)
    nll = torch.stack([one.sum() for one in logit_laplace_nll(x, stats)])
    torch.testing.assert_close(out["nll_B"], nll)
    picture = ((torch.sigmoid(stats[:, :3]) - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(out["picture_BCYX"], picture)
    error = torch.stack([(a - b).pow(2).mean() for a, b in zip(picture, pictures(), strict=True)])
    torch.testing.assert_close(out["error_B"], error)
    assert out["kl_B"].tolist() == [0, 0, 0]
    # nothing is relaxed
    noisy = model(pictures(), torch.randn(3, 60, 2, 2), 0.5)
    assert all(torch.equal(noisy[name], out[name]) for name in out)


@torch.no_grad()
def test_codes_and_pictures_are_those_of_the_forward_pass():
    model = tiny_fsq()
    out, codes = model(pictures()), model.encode(pictures())
    assert codes.dtype == torch.int64
    assert torch.equal(codes, out["codes_BYX"])
    torch.testing.assert_close(model.decode(codes), out["picture_BCYX"])
    with pytest.raises(InputError, match=r"this dVAE takes \[B, 3, 16, 16\]"):
        model.encode(torch.zeros(1, 3, 24, 24))


def test_nll_reaches_every_parameter_of_both_halves():
    model = tiny_fsq()
    model(pictures())["nll_B"].sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_sixteen_bits_leave_the_convolutions_at_the_codes_in_float32():
    model = tiny_fsq()
    model.set_compute_dtype(torch.bfloat16)
    dtypes = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv2d):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: dtypes.update({name: output.dtype})
            )
    out = model(pictures())
    full = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert full == {"encoder.blocks.output.conv", "decoder.blocks.input"}
    assert {out[name].dtype for name in ("nll_B", "kl_B", "picture_BCYX")} == {torch.float32}


def test_a_folder_tells_which_kind_it_holds(tmp_path):
    dvae = DiscreteVAE(DvaeConfig(image_size=16, n_vocab=60, n_hid=8, n_init=5, n_blk_per_group=1))
    fingerprints = set()
    for name, model in (("fsq", tiny_fsq()), ("dvae", dvae)):
        fingerprint = save_dvae(tmp_path / name, model)
        loaded, found = load_dvae(tmp_path / name)
        assert found == fingerprint
        assert loaded.config == model.config
        assert not any(p.requires_grad for p in loaded.parameters())
        assert torch.equal(loaded.encode(pictures()), model.encode(pictures()))
        fingerprints.add(found)
    assert len(fingerprints) == 2


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("4,\n", "1,\n", r"levels are \[1, 3, 5\], which make"),
        ("4,\n", "", r"weights do not fit their config: (de|en)coder\.blocks\.\S+ is"),
        ('"levels"', '"level"', "has a config that this code cannot read"),
    ],
)
def test_a_folder_with_other_levels_is_refused(tmp_path, old, new, sentence):
    save_dvae(tmp_path, tiny_fsq())
    path = tmp_path / "model.json"
    text = path.read_text()
    assert old in text
    description = json.loads(text.replace(old, new, 1))
    del description["crc32"]
    path.write_text(json.dumps(description | {"crc32": weights._crc(description)}))
    with pytest.raises(InputError, match=sentence):
        load_dvae(tmp_path)
