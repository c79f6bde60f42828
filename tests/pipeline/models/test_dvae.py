import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config import DvaeConfig
from pipeline.console import InputError
from pipeline.models.dvae import (
    Conv2d,
    DiscreteVAE,
    kl_to_uniform,
    load_dvae,
    logit_laplace_nll,
    map_pixels,
    save_dvae,
    unmap_pixels,
)

# weights and outputs of the released code, its vocabulary cut to 32; the file's header says how
GOLDEN = Path(__file__).parent / "golden" / "openai_dvae_tiny.safetensors"
TINY = DvaeConfig(image_size=16, n_vocab=6, n_hid=8, n_init=5, n_blk_per_group=1)


def pictures(batch=3, side=TINY.image_size, seed=0):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def gumbel(batch=3, seed=1):
    shape = (batch, TINY.n_vocab, TINY.grid, TINY.grid)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -torch.log(-torch.log(noise)).float()


def tiny_dvae(seed=0):
    """A model whose codes differ from place to place: logits far apart."""
    torch.manual_seed(seed)
    dvae = DiscreteVAE(TINY)
    with torch.no_grad():
        output = dvae.encoder.blocks.output.conv
        output.w.mul_(20)
        output.b.sub_(dvae.logits(pictures(8, seed=9)).mean(dim=(0, 2, 3)))
    return dvae


def dvae_at_paper_size():
    with torch.device("meta"):
        return DiscreteVAE(DvaeConfig())


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---- the released architecture


def test_paper_size_has_the_released_parameter_counts():
    dvae = dvae_at_paper_size()
    assert count(dvae.encoder) == 53_786_240
    assert count(dvae.decoder) == 43_829_766


def test_every_layer_has_the_released_name_and_shape():
    wanted = {}

    def conv(name, n_in, n_out, kw):
        wanted[f"{name}.w"], wanted[f"{name}.b"] = (n_out, n_in, kw, kw), (n_out,)

    conv("encoder.blocks.input", 3, 256, 7)
    conv("encoder.blocks.output.conv", 2048, 8192, 1)
    conv("decoder.blocks.input", 8192, 128, 1)
    conv("decoder.blocks.output.conv", 256, 6, 1)
    kernels = {"encoder": (3, 3, 3, 1), "decoder": (1, 3, 3, 3)}
    widths = {"encoder": (256, 256, 512, 1024, 2048), "decoder": (128, 2048, 1024, 512, 256)}
    for part in ("encoder", "decoder"):
        for group in (1, 2, 3, 4):
            n_in, n_out = widths[part][group - 1 : group + 1]
            for block, width in ((1, n_in), (2, n_out)):
                name = f"{part}.blocks.group_{group}.block_{block}"
                if width != n_out:
                    conv(f"{name}.id_path", width, n_out, 1)
                through = (width, n_out // 4, n_out // 4, n_out // 4, n_out)
                for i, kw in enumerate(kernels[part]):
                    conv(f"{name}.res_path.conv_{i + 1}", through[i], through[i + 1], kw)
    found = {name: tuple(p.shape) for name, p in dvae_at_paper_size().state_dict().items()}
    assert found == wanted


def test_each_residual_path_is_scaled_by_a_64th_at_paper_size():
    dvae = dvae_at_paper_size()
    gains = [m.post_gain for m in dvae.modules() if hasattr(m, "post_gain")]
    assert gains == [1 / 64] * 16


def test_weights_start_without_gain_and_biases_at_zero():
    torch.manual_seed(0)
    dvae = DiscreteVAE(DvaeConfig(n_vocab=512, n_hid=64, n_init=64))
    for name, module in dvae.named_modules():
        if isinstance(module, Conv2d):
            std = 1 / math.sqrt(module.w[0].numel())
            # four standard errors of a measured standard deviation
            assert module.w.std().item() == pytest.approx(
                std, rel=4 / math.sqrt(2 * module.w.numel())
            ), name
            assert not module.b.any(), name


def test_outputs_are_those_of_the_released_code():
    golden = load_file(GOLDEN)
    expected = {name: golden.pop(name) for name in list(golden) if name.startswith("expected.")}
    dvae = DiscreteVAE(DvaeConfig(image_size=64, n_vocab=32, n_hid=16, n_init=16))
    dvae.load_state_dict(golden)
    image = expected["expected.image"]
    with torch.no_grad():
        logits, codes = dvae.logits(image), dvae.encode(image)
        stats = [
            dvae.decoder(F.one_hot(expected[f"expected.{name}"], 32).permute(0, 3, 1, 2).float())
            for name in ("codes", "random_codes")
        ]
        out = dvae(image)
    torch.testing.assert_close(logits, expected["expected.logits"], rtol=0, atol=5e-6)
    assert torch.equal(codes, expected["expected.codes"])
    assert torch.equal(out["codes_BYX"], codes)
    wanted = expected["expected.stats"], expected["expected.stats_of_random_codes"]
    for ours, theirs in zip(stats, wanted, strict=True):
        torch.testing.assert_close(ours[..., ::2, ::2], theirs, rtol=0, atol=1e-6)
    for picture in (dvae.decode(codes), out["picture_BCYX"]):
        torch.testing.assert_close(
            picture[..., ::2, ::2], expected["expected.reconstruction"], rtol=0, atol=1e-6
        )


# ---- the likelihood


def test_nll_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 4, 4, generator=generator) * 0.8 + 0.1
    stats = torch.randn(2, 6, 4, 4, generator=generator)
    got = logit_laplace_nll(x, stats)
    assert got.dtype == torch.float32
    for b, c, i, j in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        p, mu = x[b, c, i, j].item(), stats[b, c, i, j].item()
        scale = math.exp(stats[b, c + 3, i, j].item())
        spread = abs(math.log(p / (1 - p)) - mu) / scale
        density = math.exp(-spread) / (2 * scale * p * (1 - p))
        assert got[b, c, i, j].item() == pytest.approx(-math.log(density), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("x", "nll"), [(0.1, 0.482), (0.5, -0.693), (0.9, 0.482)])
def test_nll_of_the_standard_distribution(x, nll):
    got = logit_laplace_nll(torch.full((1, 3, 1, 1), x), torch.zeros(1, 6, 1, 1))
    assert got.flatten().tolist() == pytest.approx([nll] * 3, abs=5e-4)


@pytest.mark.parametrize(("mu", "ln_b"), [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.5)])
def test_density_integrates_to_one(mu, ln_b):
    # steps even in the logit, where the density is smooth on either side of mu
    step = 1e-3
    t = mu + torch.arange(-25, 25, step, dtype=torch.float64) + step / 2
    x = torch.sigmoid(t).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    stats = torch.tensor([mu] * 3 + [ln_b] * 3).view(1, 6, 1, 1).expand(1, 6, 1, len(t))
    density = torch.exp(-logit_laplace_nll(x, stats))
    mass = (density * x * (1 - x) * step).sum(-1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5)


def test_pixels_are_kept_a_tenth_from_the_ends():
    image = torch.tensor([0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(map_pixels(image), torch.tensor([0.1, 0.3, 0.5, 0.9]))
    levels = torch.arange(256) / 255
    torch.testing.assert_close(unmap_pixels(map_pixels(levels)), levels)
    assert unmap_pixels(torch.tensor([0.0, 0.05, 0.95, 1.0])).tolist() == [0, 0, 1, 1]


# ---- the divergence


def random_logits(batch, n_vocab=7):
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.randn(batch, n_vocab, 3, 3, generator=generator)


def test_kl_is_the_sum_of_its_definition():
    logits = random_logits(2)
    got = kl_to_uniform(logits)
    for b in range(2):
        total = 0.0
        for y in range(3):
            for x in range(3):
                weights = [math.exp(v) for v in logits[b, :, y, x].tolist()]
                q = [w / sum(weights) for w in weights]
                total += sum(p * math.log(p * 7) for p in q)
        assert got[b].item() == pytest.approx(total, rel=1e-5)


def test_kl_is_zero_for_equal_logits_and_ln_v_for_one_code():
    equal = torch.full((1, 8, 2, 2), 3.0)
    assert kl_to_uniform(equal).tolist() == pytest.approx([0.0], abs=1e-5)
    one = torch.zeros(1, 8, 2, 2)
    one[:, 5] = 1e4
    assert kl_to_uniform(one).tolist() == pytest.approx([4 * math.log(8)], rel=1e-6)


def test_kl_of_a_picture_does_not_know_its_batch():
    def kl_in_common_reproductions(logits):
        """``batchmean`` of a tensor of shape [1] divides by one, whatever the batch."""
        log_q = F.log_softmax(logits.permute(0, 2, 3, 1).flatten(1, 2), dim=-1)
        log_uniform = torch.log(torch.tensor([1 / logits.shape[1]]))
        return F.kl_div(log_uniform, log_q, None, None, "batchmean", log_target=True)

    logits = random_logits(4)
    alone = torch.cat([kl_to_uniform(one) for one in logits.split(1)])
    torch.testing.assert_close(kl_to_uniform(logits), alone, rtol=1e-6, atol=0)
    wrong = kl_in_common_reproductions(logits)
    torch.testing.assert_close(wrong, alone.sum(), rtol=1e-5, atol=0)
    assert wrong > 3 * kl_in_common_reproductions(logits[:1])

    dvae = tiny_dvae()
    with torch.no_grad():
        together = dvae(pictures(4))["kl_B"]
        apart = torch.cat([dvae(one)["kl_B"] for one in pictures(4).split(1)])
    assert together.shape == (4,)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)


def test_kl_does_not_feel_the_temperature():
    dvae = tiny_dvae()
    with torch.no_grad():
        kl = [
            dvae(pictures(), noise, tau)["kl_B"] for noise in (None, gumbel()) for tau in (1, 0.1)
        ]
        logits = dvae.logits(pictures())
    for value in kl:
        assert torch.equal(value, kl_to_uniform(logits))


# ---- the relaxation


def decoder_input(dvae, *arguments):
    seen = []
    hook = dvae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    out = dvae(*arguments)
    hook.remove()
    return seen[0], out


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_decoder_reads_the_soft_sample(tau):
    dvae, noise = tiny_dvae(), gumbel()
    with torch.no_grad():
        z, _ = decoder_input(dvae, pictures(), noise, tau)
        logits = dvae.logits(pictures())
    weights = torch.exp((logits.double() + noise.double()) / tau)
    torch.testing.assert_close(
        z.double(), weights / weights.sum(1, keepdim=True), rtol=0, atol=1e-5
    )
    # straight-through would hand on zeros and ones
    assert (z.amax(1) < 0.99).float().mean() > 0.3


def test_decoder_reads_the_codes_without_noise():
    dvae = tiny_dvae()
    with torch.no_grad():
        z, out = decoder_input(dvae, pictures())
    assert torch.equal(z, F.one_hot(out["codes_BYX"], TINY.n_vocab).permute(0, 3, 1, 2).float())


def test_nll_reaches_every_parameter_of_both_halves():
    dvae = tiny_dvae()
    dvae(pictures(), gumbel(), 0.5)["nll_B"].sum().backward()
    for name, parameter in dvae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_is_that_of_the_soft_sample(monkeypatch):
    dvae = tiny_dvae().double()
    dvae.set_compute_dtype(torch.float64)
    for module in dvae.modules():
        if isinstance(module, Conv2d):
            module.full_precision = False
    # the same code with every cast to float32 a cast to float64: differences need the digits
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    image, noise = pictures().double(), gumbel().double()

    def objective():
        out = dvae(image, noise, tau=0.5)
        return (out["nll_B"] + 6.6 * out["kl_B"]).sum()

    objective().backward()
    step = 1e-8  # so small that no ReLU or maximum changes sides
    generator = torch.Generator().manual_seed(5)
    for name in (
        "encoder.blocks.output.conv.w",
        "encoder.blocks.input.w",
        "decoder.blocks.input.w",
    ):
        parameter = dvae.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = (parameter.grad * direction).sum().item()
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(sign * step * direction)
                values.append(objective().item())
                parameter.sub_(sign * step * direction)
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5), name


def test_at_temperature_0_codes_are_a_sample_of_q():
    dvae, noise = tiny_dvae(), gumbel()
    with torch.no_grad():
        z, out = decoder_input(dvae, pictures(), noise, 0.0)
        soft, _ = decoder_input(dvae, pictures(), noise, 1e-3)
        logits = dvae.logits(pictures())
    assert torch.equal(z, F.one_hot((logits + noise).argmax(1), TINY.n_vocab).permute(0, 3, 1, 2))
    torch.testing.assert_close(soft, z)
    # what stage 2 reads knows no noise
    assert torch.equal(out["codes_BYX"], logits.argmax(1))
    assert not torch.equal(z.argmax(1), out["codes_BYX"])


def test_nll_at_temperature_0_is_on_average_that_over_all_grids_of_codes():
    """Every grid of codes by its probability under q: 3 codes at 2 x 2 positions."""
    torch.manual_seed(0)
    dvae = DiscreteVAE(DvaeConfig(image_size=16, n_vocab=3, n_hid=8, n_init=5, n_blk_per_group=1))
    with torch.no_grad():
        dvae.decoder.blocks.input.w.mul_(30)  # codes that matter
        dvae.encoder.blocks.output.conv.w.mul_(2)
        image = pictures(1)
        q = F.softmax(dvae.logits(image).double(), dim=1)[0].flatten(1)
        grids = torch.cartesian_prod(*[torch.arange(3)] * 4)
        weights = torch.stack([q[grids[:, i], i] for i in range(4)], dim=1).prod(dim=1)
        assert weights.sum().item() == pytest.approx(1)
        z = F.one_hot(grids.view(-1, 2, 2), 3).permute(0, 3, 1, 2).float()
        x = (0.1 + 0.8 * image).expand(len(grids), -1, -1, -1)
        nll = logit_laplace_nll(x, dvae.decoder(z)).double().sum(dim=(1, 2, 3))
        wanted, spread = (weights * nll).sum(), (weights * nll**2).sum()
        n = 4096
        noise = torch.rand(n, 3, 2, 2, generator=torch.Generator().manual_seed(7))
        got = dvae(image.repeat(n, 1, 1, 1), -(-noise.log()).log(), 0.0)["nll_B"].double()
    error = math.sqrt((spread - wanted**2).item() / n)
    assert abs(got.mean() - wanted) < 4 * error
    # the most likely codes are no sample: their nll is another number
    assert abs(dvae(image)["nll_B"].item() - wanted) > 20 * error


# ---- the tokenizer


def test_codes_are_the_argmax_of_the_logits():
    dvae = tiny_dvae()
    with torch.no_grad():
        codes, logits = dvae.encode(pictures()), dvae.logits(pictures())
    assert codes.dtype == torch.int64
    assert codes.shape == (3, TINY.grid, TINY.grid)
    assert len(codes.unique()) > 1
    for b, y, x in torch.cartesian_prod(*map(torch.arange, codes.shape)).tolist():
        column = logits[b, :, y, x].tolist()
        assert column[codes[b, y, x]] == max(column)


def test_a_decoded_picture_is_between_black_and_white():
    dvae = tiny_dvae()
    with torch.no_grad():
        # far beyond [0, 1] before it is clamped
        dvae.decoder.blocks.output.conv.w.mul_(50)
        picture = dvae.decode(dvae.encode(pictures()))
    assert picture.shape == (3, 3, TINY.image_size, TINY.image_size)
    assert picture.dtype == torch.float32
    assert (picture.min(), picture.max()) == (0, 1)


def test_forward_gives_one_value_a_picture():
    dvae = tiny_dvae()
    with torch.no_grad():
        out = dvae(pictures())
        apart = [dvae(one) for one in pictures().split(1)]
    for name in ("nll_B", "kl_B", "error_B"):
        assert out[name].shape == (3,)
        torch.testing.assert_close(out[name], torch.cat([a[name] for a in apart]))
    # against the whole path by hand: sum over pixel values, mean over pixel values
    with torch.no_grad():
        stats = dvae.decoder(F.one_hot(out["codes_BYX"], TINY.n_vocab).permute(0, 3, 1, 2).float())
    nll = logit_laplace_nll(0.1 + 0.8 * pictures(), stats)
    torch.testing.assert_close(out["nll_B"], torch.stack([one.sum() for one in nll]))
    picture = ((torch.sigmoid(stats[:, :3]) - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(out["picture_BCYX"], picture)
    error = torch.stack([(a - b).pow(2).mean() for a, b in zip(picture, pictures(), strict=True)])
    torch.testing.assert_close(out["error_B"], error)


@pytest.mark.parametrize("shape", [(1, 3, 24, 24), (1, 3, 16, 24), (1, 1, 16, 16), (3, 16, 16)])
def test_pictures_of_another_size_are_refused(shape):
    dvae = tiny_dvae()
    for encode in (dvae.encode, dvae.logits):
        with pytest.raises(InputError, match=r"this dVAE takes \[B, 3, 16, 16\]"):
            encode(torch.zeros(shape))


# ---- precision, memory, disk


def test_bfloat16_leaves_the_convolutions_at_the_relaxation_in_float32():
    dvae = tiny_dvae()
    with torch.no_grad():
        expected = dvae(pictures(), gumbel())
    dvae.set_compute_dtype(torch.bfloat16)
    computed: dict[str, torch.dtype] = {}
    for name, module in dvae.named_modules():
        if isinstance(module, Conv2d):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: computed.update({name: output.dtype})
            )
    stats = []
    dvae.decoder.register_forward_hook(lambda *io: stats.append(io[-1]))
    with torch.no_grad():
        out = dvae(pictures(), gumbel())
    assert stats[0].dtype == torch.float32
    full = {name for name, dtype in computed.items() if dtype == torch.float32}
    assert full == {"encoder.blocks.output.conv", "decoder.blocks.input"}
    assert set(computed.values()) == {torch.float32, torch.bfloat16}
    assert len(computed) == sum(isinstance(m, Conv2d) for m in dvae.modules())
    assert {p.dtype for p in dvae.parameters()} == {torch.float32}
    for name in ("nll_B", "kl_B", "picture_BCYX"):
        assert out[name].dtype == torch.float32
        assert not torch.equal(out[name], expected[name])
        torch.testing.assert_close(out[name], expected[name], rtol=0.05, atol=0.02)


def test_channels_last_changes_rounding_only():
    dvae = tiny_dvae()
    with torch.no_grad():
        plain = dvae(pictures(), gumbel())
        dvae.to(memory_format=torch.channels_last)
        last = dvae(pictures().contiguous(memory_format=torch.channels_last), gumbel())
    for name in plain:
        torch.testing.assert_close(last[name], plain[name], rtol=1e-5, atol=1e-5)


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    dvae = tiny_dvae()
    fingerprint = save_dvae(tmp_path / "dvae", dvae, {"images": "abc"})
    loaded, found = load_dvae(tmp_path / "dvae")
    assert found == fingerprint
    assert loaded.config == TINY
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    state = loaded.state_dict()
    assert state.keys() == dvae.state_dict().keys()
    for name, value in dvae.state_dict().items():
        assert torch.equal(state[name], value), name
    with torch.no_grad():
        assert torch.equal(loaded.logits(pictures()), dvae.logits(pictures()))


def test_a_model_in_bfloat16_is_saved_in_float32(tmp_path):
    save_dvae(tmp_path / "dvae", tiny_dvae().bfloat16())
    loaded, _ = load_dvae(tmp_path / "dvae")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for got, kept in zip(loaded.parameters(), tiny_dvae().parameters(), strict=True):
        assert torch.equal(got, kept.bfloat16().float())


def test_pools_and_upsamplings_are_the_released_kinds():
    dvae = dvae_at_paper_size()
    pools = {n: m for n, m in dvae.named_modules() if isinstance(m, nn.MaxPool2d)}
    assert list(pools) == [f"encoder.blocks.group_{g}.pool" for g in (1, 2, 3)]
    assert {m.kernel_size for m in pools.values()} == {2}
    ups = {n: m for n, m in dvae.named_modules() if isinstance(m, nn.Upsample)}
    assert list(ups) == [f"decoder.blocks.group_{g}.upsample" for g in (1, 2, 3)]
    assert {(m.scale_factor, m.mode) for m in ups.values()} == {(2, "nearest")}
