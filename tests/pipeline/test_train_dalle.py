import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from pipeline import presets, train_dalle
from pipeline.config import DalleConfig
from pipeline.console import InputError
from pipeline.data.shards import ShardReader, ShardWriter, image_sha, split_of
from pipeline.data.tokenizer import Tokenizer
from pipeline.models.dalle import NO_TOKEN, load_dalle
from pipeline.models.dvae import load_dvae
from pipeline.train_dalle import DalleStage
from pipeline.training.engines.engine import PlainEngine
from tests import tiny as runs
from tests.tiny import arguments, losses, plain, train, whole

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

CPU_CONFIG = runs.ROOT / "ds_configs/zero3_cpu.json"


def random_tokens(folder, grid, n_vocab, rows=40, val=None, dvae="random"):
    """A token set of random codes whose captions have one to seven words."""
    rng = np.random.default_rng(0)
    if val is None:
        val = [i for i in range(rows) if split_of(f"k{i}", 0.2) == "val"]
    made_of = {"grid": grid, "n_vocab": n_vocab, "crops": 1, "dvae": dvae}
    with ShardWriter(folder, "tokens", made_of) as writer:
        for i in range(rows):
            caption = " ".join(rng.choice(["a", "small", "green", "circle"], 1 + i * 5 % 7))
            codes = rng.integers(0, n_vocab, grid * grid).astype(np.uint16)
            row = {"key": f"k{i}", "caption": caption, "image_sha": image_sha(b"")}
            row |= {"image_tokens": codes, "crops": np.zeros(4, np.float32)}
            writer.add(row, val=i in val)
    return folder


def test_the_first_loss_is_that_of_guessing_among_the_papers_vocabularies(tiny, tmp_path):
    model = DalleConfig(n_layer=3, d_model=32, n_head=2)
    assert (model.n_text_vocab, model.n_image_vocab, model.n_ctx) == (16384, 8192, 256 + 1024)
    run = dataclasses.replace(
        runs.dalle(), model=model, batch=2, steps=1, val_every=10, val_images=1
    )
    tokens = random_tokens(tmp_path / "tokens", model.grid, model.n_image_vocab)
    train(DalleStage(run, str(tokens), str(tiny.tokenizer)), tmp_path / "out")
    # 1/8 ln 16384 + 7/8 ln 8192
    assert losses(tmp_path / "out") == [pytest.approx(9.0976, abs=5e-4)]


def uneven_stage(tiny, tmp_path_factory):
    run = dataclasses.replace(runs.dalle(), bpe_dropout=0.0, text_weight=1 / 8)
    tokens = random_tokens(tmp_path_factory.mktemp("uneven") / "tokens", runs.GRID, runs.N_CODES)
    return DalleStage(run, str(tokens), str(tiny.tokenizer))


@pytest.fixture(scope="module")
def uneven(tiny, tmp_path_factory):
    """A stage over captions of very uneven length, and an engine with random heads."""
    stage = uneven_stage(tiny, tmp_path_factory)
    engine = PlainEngine(stage.build, stage.run)
    for name in ("text_head", "image_head"):
        torch.nn.init.normal_(getattr(engine.module, name).weight, std=0.5)
    engine.module.double()
    return stage, engine


def shares(stage, engine, world, micro):
    """Loss and gradient as ``world`` ranks with micro-batches of ``micro`` add them up."""
    per_rank = []
    for rank in range(world):
        engine.rank, engine.world, engine.micro_batch = rank, world, micro
        stage.prepare(engine)
        per_rank.append(stage.micro_batches(8))
    engine.rank, engine.world = 0, 1
    batches = [batch for one_rank in per_rank for batch in one_rank]
    totals = sum(stage.counts(batch) for batch in batches)
    engine.model.zero_grad()
    loss, means = 0.0, []
    for batch in batches:
        share, _ = stage.loss(engine, batch, totals, 0)
        engine.backward(share)
        loss += share.item()
        means.append(stage.loss(engine, batch, stage.counts(batch), 0)[0].item())
    gradient = torch.cat([p.grad.flatten() for p in engine.model.parameters()])
    return loss, gradient, np.mean(means)


def brute_force(stage, engine):
    """1/8 of the mean over all captions' tokens, 7/8 of that over all codes, one by one."""
    batch = stage._train.batch_at(8)
    with torch.no_grad():
        logits = engine.model(batch.text_tokens, batch.image_tokens)
    nll = {"text": [], "image": []}
    for kind, scores, tokens in zip(
        nll, logits, (batch.text_tokens, batch.image_tokens), strict=True
    ):
        scores = scores.double().numpy()
        for b, n in np.ndindex(*tokens.shape):
            if (token := tokens[b, n].item()) != NO_TOKEN:
                row = scores[b, n] - scores[b, n].max()
                nll[kind].append(np.log(np.exp(row).sum()) - row[token])
    lengths = (batch.text_tokens != NO_TOKEN).sum(1)
    assert len(nll["text"]) == lengths.sum()
    assert lengths.max() > 3 * lengths.min()
    return np.mean(nll["text"]) / 8 + np.mean(nll["image"]) * 7 / 8


@pytest.mark.parametrize(
    ("world", "micro"), [(1, 8), (1, 4), (1, 3), (1, 1), (2, 4), (2, 1), (4, 2)]
)
def test_the_loss_is_normalised_by_kind_over_the_whole_batch_however_it_is_cut(
    uneven, world, micro
):
    stage, engine = uneven
    whole, gradient, _ = shares(stage, engine, 1, 8)
    loss, summed, mean_of_means = shares(stage, engine, world, micro)
    assert loss == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(summed, gradient, rtol=1e-4, atol=1e-7)
    if world * micro < 8:
        # averaging the means of the parts would be something else
        assert abs(mean_of_means - whole) > 1e-4


def test_the_loss_is_what_brute_force_says(uneven):
    stage, engine = uneven
    whole, _, _ = shares(stage, engine, 1, 8)
    assert whole == pytest.approx(brute_force(stage, engine), rel=1e-6)


@pytest.mark.parametrize("micro", [8, 3])
def test_captions_that_are_cut_are_counted_once(uneven, micro):
    stage, engine = uneven
    engine.micro_batch = micro
    stage.prepare(engine)
    batches = stage.micro_batches(8)
    # one sample, in the first part
    for batch in batches:
        batch.is_cut[:] = False
    batches[0].is_cut[-1] = True
    totals = sum(stage.counts(batch) for batch in batches)
    cut = sum(stage.loss(engine, batch, totals, 0)[1]["captions_cut"] for batch in batches)
    assert cut.item() == pytest.approx(1 / 8)


def test_training_exports_the_averaged_weights_and_what_they_were_made_of(tiny, tmp_path):
    run = dataclasses.replace(runs.dalle(), steps=5)
    stage = DalleStage(run, str(tiny.tokens), str(tiny.tokenizer))
    engine = train(stage, tmp_path)
    model, made_of, _ = load_dalle(tmp_path)
    for name, value in whole(engine, "ema").items():
        assert torch.equal(model.state_dict()[name], value)
    assert not torch.equal(whole(engine, "ema")["norm.gain"], whole(engine, "weight")["norm.gain"])
    assert made_of == {
        "tokens": [ShardReader(tiny.tokens).fingerprint],
        "weights": None,
        "block": 0,
        "dvae": load_dvae(tiny.dvae)[1],
        "tokenizer": Tokenizer(tiny.tokenizer).fingerprint,
        "updates": 5,
        "caption_dropout": runs.dalle().caption_dropout,
    }
    assert Tokenizer(tmp_path / "tokenizer").fingerprint == made_of["tokenizer"]


def call(monkeypatch, *words):
    """``main()`` in this process, with this command line."""
    monkeypatch.setattr(sys, "argv", ["train_dalle", *map(str, words)])
    train_dalle.main()


def test_the_command_trains(tiny, tmp_path, monkeypatch):
    call(monkeypatch, *arguments("dalle", tiny, tmp_path / "out", "dalle", dvae=tiny.dvae))
    assert len(losses(tmp_path / "out")) == runs.STEPS
    load_dalle(tmp_path / "out")


@pytest.fixture
def second(tmp_path):
    """A set of random codes of the same vocabulary, said to be of no dVAE."""
    return random_tokens(tmp_path / "second", runs.GRID, runs.N_CODES)


def test_the_command_trains_on_several_sets(tiny, second, tmp_path, monkeypatch):
    dvae = load_dvae(tiny.dvae)[1]
    third = random_tokens(tmp_path / "third", runs.GRID, runs.N_CODES, dvae=dvae)
    words = arguments("dalle", tiny, tmp_path / "out", "dalle", dvae=tiny.dvae)
    call(monkeypatch, *words, "--data", tiny.tokens, third, "--mix", 3, 1, "--block-order")
    assert len(losses(tmp_path / "out")) == runs.STEPS
    _, made_of, _ = load_dalle(tmp_path / "out")
    assert made_of["tokens"] == [ShardReader(f).fingerprint for f in (tiny.tokens, third)]
    assert made_of["weights"] == [3, 1]
    assert made_of["block"] == 2048
    # another mix is another run
    with pytest.raises(InputError, match="weights"):
        call(monkeypatch, *words, "--data", tiny.tokens, third, "--mix", 1, 1, "--block-order")
    with pytest.raises(InputError, match=r"was made by dVAE .*, .*second by random: their codes"):
        call(monkeypatch, *words, "--data", tiny.tokens, second)


def test_a_mix_that_does_not_fit_is_refused(tiny, second, tmp_path, monkeypatch):
    words = arguments("dalle", tiny, tmp_path / "out", "dalle")
    with pytest.raises(InputError, match=r"the weights \[1, 2\] of 1 sets"):
        call(monkeypatch, *words, "--mix", 1, 2)
    with pytest.raises(InputError, match=r"the weights \[0, 2\] of 2 sets"):
        call(monkeypatch, *words, "--data", second, second, "--mix", 0, 2)
    assert not (tmp_path / "out").exists()


def other_run(tmp_path, **model):
    """A preset file for ``dalle`` with another model."""
    path = tmp_path / "other.py"
    path.write_text(
        "import dataclasses\nfrom tests import tiny\n"
        "def other():\n"
        "    run = tiny.dalle()\n"
        f"    model = dataclasses.replace(run.model, **{model})\n"
        "    return dataclasses.replace(run, model=model)\n"
    )
    return f"{path}:other"


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"grid": 8}, "has a code grid of side 4, the preset's model 8; encode with the dVAE that"),
        ({"n_image_vocab": 25}, "has an image vocabulary of 24, the preset's model 25"),
        ({"n_text_vocab": 319},
         "the tokenizer has 320 pieces, the preset's model 319; .* --vocab 319"),
    ],
)  # fmt: skip
def test_tokens_and_tokenizer_of_another_model_are_refused(
    tiny, tmp_path, monkeypatch, model, sentence
):
    changes = {"preset": other_run(tmp_path, **model)}
    with pytest.raises(InputError, match=sentence):
        call(monkeypatch, *arguments("dalle", tiny, tmp_path / "out", "dalle", **changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"preset": "dalle_huge"}, "no preset is called 'dalle_huge'; there are .*dalle_demo"),
        ({"preset": "dvae_demo"}, "dvae_demo trains the dVAE; take a dalle preset"),
        ({"data": "nowhere"}, "nowhere/manifest.json cannot be read"),
        ({"tokenizer": "nowhere"}, "nowhere/tokenizer.json cannot be read"),
        ({"dvae": "nowhere"}, "nowhere holds no trained dvae"),
        ({"deepspeed_config": "nowhere.json"}, "no ds_config at nowhere.json"),
        ({"deepspeed_config": CPU_CONFIG}, "is for the deepspeed launcher"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(tiny, tmp_path, monkeypatch, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        call(monkeypatch, *arguments("dalle", tiny, tmp_path / "out", "dalle", **changes))
    assert not (tmp_path / "out").exists()


def test_pair_shards_are_no_tokens(tiny, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is a set of pairs, a set of tokens is needed"):
        call(monkeypatch, *arguments("dalle", tiny, tmp_path, "dalle", data=tiny.pairs))


def test_a_dvae_that_did_not_make_the_tokens_is_refused(tiny, tmp_path, monkeypatch):
    made, other = load_dvae(tiny.dvae)[1], load_dvae(tiny.other_dvae)[1]
    with pytest.raises(InputError, match=f"was made by dVAE {made}, and .* is {other}: encode"):
        call(monkeypatch, *arguments("dalle", tiny, tmp_path, "dalle", dvae=tiny.other_dvae))


def test_an_out_that_is_a_file_is_refused(tiny, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match=r"out cannot be made a folder .*name another"):
        call(monkeypatch, *arguments("dalle", tiny, tmp_path / "out", "dalle"))


@pytest.mark.parametrize("val", [(), range(40)], ids=["none", "all"])
def test_a_set_that_leaves_nothing_to_train_on_or_validate_with_is_refused(tiny, tmp_path, val):
    tokens = random_tokens(tmp_path / "tokens", runs.GRID, runs.N_CODES, val=val)
    counts = f"of 40 rows, {40 - len(val)} are to train on and {len(val)} to validate with"
    with pytest.raises(InputError, match=rf"{counts}, .* another --val-fraction"):
        DalleStage(runs.dalle(), str(tokens), str(tiny.tokenizer))


def damaged_dvae(tiny, tmp_path):
    """A copy of the dVAE with one byte changed."""
    folder = tmp_path / "dvae"
    folder.mkdir()
    (folder / "model.json").write_bytes((tiny.dvae / "model.json").read_bytes())
    data = bytearray((tiny.dvae / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    return folder


@pytest.mark.parametrize("mistake", ["preset", "launcher", "dvae"])
def test_a_mistake_is_one_sentence_exit_code_2_and_no_traceback(tiny, tmp_path, mistake):
    changes, sentence = {
        "preset": ({"preset": f"{runs.__file__}:huge"}, f"{runs.__file__} has no function huge"),
        "launcher": ({"deepspeed_config": CPU_CONFIG}, "is for the deepspeed launcher"),
        "dvae": ({"dvae": damaged_dvae(tiny, tmp_path)}, "(sha256 differs): the copy is broken"),
    }[mistake]
    done = plain("dalle", *arguments("dalle", tiny, tmp_path / "out", "dalle", **changes))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert sentence in line


def test_the_demo_presets_fit_together():
    dvae, dalle = presets.dvae_demo(), presets.dalle_demo()
    assert dvae.model.grid == dalle.model.grid
    assert dvae.model.n_vocab == dalle.model.n_image_vocab
    assert json.dumps(dataclasses.asdict(dalle))


def test_an_attention_path_that_cannot_run_is_refused_before_the_first_batch(tiny, tmp_path):
    stage = DalleStage(runs.dalle(), str(tiny.tokens), str(tiny.tokenizer), attention="triton")
    sentence = "--attention triton: .* the head width is 16 and Triton kernels take 32, 64, 128"
    with pytest.raises(InputError, match=sentence):
        train(stage, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
