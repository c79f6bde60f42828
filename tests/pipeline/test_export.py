import json
import shutil

import pytest
import torch

from pipeline.console import InputError
from pipeline.export import chosen
from pipeline.models.dalle import load_dalle
from pipeline.train_dalle import DalleStage
from pipeline.weights import export, load_weights
from tests import tiny as runs
from tests.tiny import start, train, whole

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A finished run and its engine."""
    out = tmp_path_factory.mktemp("run")
    engine = train(DalleStage(runs.dalle(), str(tiny.tokens), str(tiny.tokenizer)), out)
    return out, engine


def command(*words):
    return start([runs.sys.executable, "-m", "pipeline.export", *words])


@pytest.mark.parametrize(("key", "flags"), [("ema", []), ("weight", ["--raw"])])
def test_an_export_is_the_checkpoint_whole(trained, tmp_path, key, flags):
    run, engine = trained
    done = command("--run", run, "--out", tmp_path / "out", "--file-gib", 1e-5, *flags)
    assert done.returncode == 0, done.stderr
    assert "peak memory" in done.stderr
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    model, made_of, _ = load_dalle(tmp_path / "out")
    for name, value in whole(engine, key).items():
        assert torch.equal(model.state_dict()[name], value)
    assert made_of["updates"] == runs.STEPS
    # what it takes to sample
    assert (tmp_path / "out" / "tokenizer" / "spm.model").exists()


def test_16_bit_weights_are_those_of_32_rounded(trained, tmp_path):
    run, engine = trained
    export(*chosen(run, None), tmp_path, dtype=torch.bfloat16)
    for name, value in load_weights(tmp_path, "dalle").tensors.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, whole(engine, "ema")[name].bfloat16())


def test_a_run_that_goes_on_can_be_read_as_it_is(trained, tmp_path):
    run, engine = trained
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "model.json").unlink()
    model, made_of, fingerprint = load_dalle(tmp_path / "run")
    for name, value in whole(engine, "ema").items():
        assert torch.equal(model.state_dict()[name], value)
    assert made_of == load_dalle(run)[1]
    assert len(fingerprint) == 16
    with pytest.raises(InputError, match="holds a dalle, a dvae is needed"):
        load_weights(tmp_path / "run", "dvae")


def test_a_damaged_checkpoint_is_never_exported(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    newest = run / f"checkpoints/step-{runs.STEPS:07d}/rank-00000.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 4
    newest.write_bytes(data)
    folder, meta = chosen(run, None)
    assert meta["updates"] == runs.STEPS - runs.SAVE_EVERY
    with pytest.raises(InputError, match=r"rank-00000.safetensors is damaged \(sha256 differs\)"):
        chosen(run, runs.STEPS)
    with pytest.raises(InputError, match="no checkpoint of update 3: there are those of 15, 20"):
        chosen(run, 3)
    done = command("--run", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "holds no checkpoint that is whole: name the --out of a run" in done.stderr
    assert not (tmp_path / "out").exists()
    assert json.loads((folder / "meta.json").read_text()) == meta
