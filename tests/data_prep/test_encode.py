import dataclasses
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import encode as job
from data_prep.engines import Launch
from pipeline.config import DvaeConfig
from pipeline.console import InputError, OwnError, command
from pipeline.data.images import augment_dalle, resize_area
from pipeline.data.shards import ShardReader, ShardWriter
from pipeline.models.dvae import DiscreteVAE, load_dvae, save_dvae
from tests.pipeline.data.helpers import PAIRS, pair_row

SIZE = 16
CONFIG = DvaeConfig(image_size=SIZE, n_vocab=32, n_hid=8, n_init=8, n_blk_per_group=1)
PER_SHARD = 7
VAL = {5, 6, 13, 23}  # for validation: the last of their shards
N = 24  # shards of 7, 7, 7 and 3 rows


def picture(i):
    rng = np.random.default_rng(i)
    height, width = rng.integers(SIZE, 3 * SIZE, 2)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return resize_area(coarse, int(height), int(width))


def crop_of(i):
    """What is to be encoded, float32 [3, SIZE, SIZE]."""
    crop = augment_dalle(picture(i), SIZE, job.crop_rng(0, f"p{i}", 0))
    return torch.from_numpy(crop).permute(2, 0, 1).float() / 255


def write_pairs(folder, pictures):
    with ShardWriter(folder, "pairs", PAIRS, rows_per_shard=PER_SHARD) as writer:
        for i, pixels in enumerate(pictures):
            Image.fromarray(pixels).save(file := io.BytesIO(), format="PNG")
            data, (height, width) = file.getvalue(), pixels.shape[:2]
            row = pair_row(f"p{i}", data, caption=f"caption {i}", width=width, height=height)
            writer.add(row, val=i in VAL)
    return folder


def write_dvae(folder, seed):
    torch.manual_seed(seed)
    dvae = DiscreteVAE(CONFIG)
    with torch.no_grad():
        # an untrained encoder gives nearly the same codes to all pictures: centre each code's logit
        logits_BVYX = dvae.logits(torch.stack([crop_of(i) for i in range(N)]))
        dvae.encoder.blocks.output.conv.b.sub_(logits_BVYX.mean(dim=(0, 2, 3)))
    save_dvae(folder, dvae)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For pictures as small as these, waiting for a second thread takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_dvae(folder / "dvae", 0)
    write_dvae(folder / "other", 1)
    write_pairs(folder / "pairs", [picture(i) for i in range(N)])
    return folder


def make_job(inputs, out, dvae="dvae", seed=0, batch=4, crops=1):
    model, fingerprint = load_dvae(inputs / dvae)
    made_of = job.describe(
        ShardReader(inputs / "pairs"), model, fingerprint,
        crops=crops, seed=seed, batch=batch, dtype="float32",
    )  # fmt: skip
    return job.Job(inputs / "pairs", inputs / dvae, out, made_of)


def encode(*args, rank=0, world=1, engine="local", workers=1, **kwargs):
    return job.encode(make_job(*args, **kwargs), Launch(rank, world), engine, workers)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The set as one process makes it."""
    out = tmp_path_factory.mktemp("whole") / "tokens"
    assert encode(inputs, out)["rows"] == N
    return out


def test_tokens_are_the_codes_of_the_papers_crops(inputs, whole):
    dvae, fingerprint = load_dvae(inputs / "dvae")
    reader = ShardReader(whole, kind="tokens")
    pairs = ShardReader(inputs / "pairs")
    assert len(reader) == N
    assert reader.made_of == {
        "dvae": fingerprint,
        "pairs": pairs.fingerprint,
        "image_size": SIZE,
        "grid": 2,
        "n_vocab": 32,
        "crops": 1,
        "crop_seed": 0,
        "batch": 4,
        "dtype": "float32",
        "val_fraction": pairs.made_of["val_fraction"],
    }
    assert [s["rows"] for s in reader.manifest["shards"]] == [7, 7, 7, 3]
    assert [s["val_rows"] for s in reader.manifest["shards"]] == [2, 1, 0, 1]
    for i in range(N):
        row, pair = reader[i], pairs[i]
        assert [row[c] for c in ("key", "caption", "image_sha")] == [
            pair[c] for c in ("key", "caption", "image_sha")
        ]
        logits_VN = dvae.logits(crop_of(i)[None])[0].flatten(1)
        codes_N = torch.from_numpy(row["image_tokens"].astype(np.int64))
        chosen_N = logits_VN.gather(0, codes_N[None])[0]
        # another batch shape may round a near tie the other way
        torch.testing.assert_close(chosen_N, logits_VN.max(0).values, rtol=0, atol=1e-5)
    assert len(np.unique(reader.image_tokens(np.arange(N)))) > 20


def test_crop_box_is_what_was_cut_out(inputs, whole):
    # Listing 2 step by step from the stored box: square near the centre, resized, cropped
    reader = ShardReader(whole)
    for i in range(N):
        pixels = picture(i)
        left, top, side, flip = reader[i]["crops"].astype(np.float64)
        height, width = pixels.shape[:2]
        assert flip == 0
        assert 0 <= left <= left + side <= width + 1e-4
        assert 0 <= top <= top + side <= height + 1e-4
        short = min(height, width)
        t = round(SIZE * short / side)
        crop = augment_dalle(pixels, SIZE, job.crop_rng(0, f"p{i}", 0))
        places = [
            (y, x)
            for y in range(height - short + 1)
            for x in range(width - short + 1)
            for resized in [resize_area(pixels[y : y + short, x : x + short], t, t)]
            for down in [round((top - y) * t / short)]
            for right in [round((left - x) * t / short)]
            if 0 <= down <= t - SIZE and 0 <= right <= t - SIZE
            if np.array_equal(resized[down : down + SIZE, right : right + SIZE], crop)
        ]
        assert places, f"picture {i}: {left} {top} {side}"


def test_crops_depend_on_key_seed_and_number_alone(inputs, whole, tmp_path):
    draws = {
        tuple(job.crop_rng(*which).integers(0, 1 << 30, 3))
        for which in [(0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0)]
    }
    assert len(draws) == 4
    encode(inputs, tmp_path, seed=1)
    crops = [ShardReader(folder).column("crops", np.arange(N)) for folder in (whole, tmp_path)]
    assert (crops[0] != crops[1]).any(axis=1).sum() > N // 2


def test_crops_of_a_picture_do_not_hang_on_each_other_nor_on_the_batch(inputs, whole, tmp_path):
    encode(inputs, tmp_path / "three", crops=3, batch=7)
    encode(inputs, tmp_path / "two", crops=2, batch=1)
    one, two, three = (ShardReader(f) for f in (whole, tmp_path / "two", tmp_path / "three"))
    assert (three.made_of["crops"], three[0]["image_tokens"].shape) == (3, (12,))
    boxes = [reader.column("crops", np.arange(N)) for reader in (one, two, three)]
    assert np.array_equal(boxes[0], boxes[1][:, :4])
    assert np.array_equal(boxes[1], boxes[2][:, :8])
    assert (boxes[2][:, :4] != boxes[2][:, 8:]).any()
    tokens = [reader.image_tokens(np.arange(N)) for reader in (one, two, three)]
    # another shape of the batch may round a near tie the other way
    assert (tokens[0] != tokens[1][:, :4]).mean() < 0.05
    assert (tokens[1] != tokens[2][:, :8]).mean() < 0.05
    dvae, _ = load_dvae(inputs / "dvae")
    crop = augment_dalle(picture(3), SIZE, job.crop_rng(0, "p3", 2))
    codes = dvae.encode(torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255)
    assert three[3]["key"] == "p3"
    assert (codes.numpy().ravel() == tokens[2][3, 8:]).mean() > 0.7


@pytest.mark.dist
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_make_the_bytes_of_one_process(inputs, whole, tmp_path, workers):
    assert encode(inputs, tmp_path, workers=workers)["rows"] == N
    assert files(tmp_path) == files(whole)


@pytest.mark.ray
def test_ray_makes_the_bytes_of_one_process(inputs, whole, tmp_path):
    assert encode(inputs, tmp_path, engine="ray")["rows"] == N
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_in_any_order_make_the_same_bytes(inputs, whole, tmp_path, world):
    for rank in reversed(range(world)):
        manifest = encode(inputs, tmp_path, rank=rank, world=world)
        # only the last one finds all shards; rank 4 of 5 has none to do
        assert (manifest is not None) == (rank == 0)
    assert files(tmp_path) == files(whole)


def test_a_stopped_run_goes_on_where_it_was(inputs, whole, tmp_path, monkeypatch):
    decoded = []
    decode = ShardReader.decode

    def stopping(*args):
        decoded.append(1)
        if len(decoded) > 17:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(ShardReader, "decode", stopping)
    with pytest.raises(KeyboardInterrupt):
        encode(inputs, tmp_path)
    assert set(files(tmp_path)) == {f"shard-0000{k}.{e}" for k in (0, 1) for e in ("arrow", "json")}
    # a shard that lost its end, and one without its record, count as not done
    os.truncate(tmp_path / "shard-00001.arrow", 100)
    decoded.clear()
    monkeypatch.setattr(ShardReader, "decode", lambda *args: decoded.append(1) or decode(*args))
    assert encode(inputs, tmp_path)["rows"] == N
    assert len(decoded) == N - PER_SHARD
    assert files(tmp_path) == files(whole)
    decoded.clear()
    assert encode(inputs, tmp_path)["rows"] == N
    assert decoded == []


def test_a_folder_of_other_tokens_is_refused(inputs, whole):
    before = files(whole)
    ours, theirs = (load_dvae(inputs / name)[1] for name in ("dvae", "other"))
    with pytest.raises(InputError, match=f"dvae {ours}, this run makes them with dvae {theirs}"):
        encode(inputs, whole, dvae="other")
    with pytest.raises(InputError, match="crop_seed 0, this run makes them with crop_seed 9"):
        encode(inputs, whole, seed=9)
    # not even when --out is the pair set itself
    pairs = files(inputs / "pairs")
    with pytest.raises(InputError, match="with dvae None"):
        encode(inputs, inputs / "pairs")
    assert files(whole) == before
    assert files(inputs / "pairs") == pairs


@pytest.mark.parametrize("what", ["dvae", "data"])
def test_a_folder_that_is_exchanged_while_the_job_runs_stops_it(inputs, tmp_path, what):
    write_pairs(tmp_path / "data", [picture(i) for i in range(3)])
    other = {"dvae": inputs / "other", "data": tmp_path / "data"}[what]
    exchanged = dataclasses.replace(make_job(inputs, tmp_path), **{what: other})
    with pytest.raises(InputError, match=r"has fingerprint \w+, this run began with \w+: put the"):
        job.process_shard(exchanged, 0)
    assert not list(tmp_path.glob("shard-*"))


def test_a_picture_that_is_too_small_is_named(inputs, tmp_path):
    write_pairs(tmp_path / "pairs", [picture(0), picture(1)[: SIZE - 1]])
    (tmp_path / "dvae").symlink_to(inputs / "dvae")
    # an OwnError: whichever rank reads it has to say it
    with pytest.raises(OwnError, match=r"picture 'p1': .*smaller than the 16x16"):
        encode(tmp_path, tmp_path / "out")
    assert files(tmp_path / "out") == {}


def start(out, inputs, launcher=(sys.executable, "-m"), **environment):
    places = ["--data", inputs / "pairs", "--dvae", inputs / "dvae", "--out", out, "--batch", "4"]
    places += ["--workers", "1"]
    return subprocess.Popen(
        [*launcher, "data_prep.encode", *map(str, places)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def test_two_ranks_at_once_make_the_same_bytes(inputs, whole, tmp_path):
    ranks = [start(tmp_path, inputs, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert files(tmp_path) == files(whole)
    # the second rank is silent
    assert errors[1] == ""
    assert "encode 14/14" in errors[0]


def test_mistakes_end_in_one_sentence_and_exit_code_2(inputs, whole, monkeypatch, capsys):
    for changes, words in [
        ({"--dvae": inputs / "other"}, "this run makes them with dvae"),
        ({"--dvae": inputs / "nowhere"}, "nowhere"),
        ({"--data": whole}, "is a set of tokens, a set of pairs is needed"),
        ({"--batch": 0}, "--batch 0"),
        ({"--batch": 2_000_000}, "take 1 to 4096"),
        ({"--crops": 0}, "--crops 0: take 1 to 64"),
        ({"--workers": 0, "--out": whole.parent / "new"}, "--workers 0 is outside 1..1024"),
    ]:
        options = {"--data": inputs / "pairs", "--dvae": inputs / "dvae", "--out": whole} | changes
        arguments = [str(word) for pair in options.items() for word in pair]
        monkeypatch.setattr(sys, "argv", ["encode", *arguments, "--local_rank=0"])
        with pytest.raises(SystemExit) as ended:
            command(job.main)
        assert ended.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("error: ")
        assert words in message


@pytest.mark.dist
def test_deepspeed_launcher_makes_the_same_bytes(inputs, whole, tmp_path):
    deepspeed = Path(sys.executable).parent / "deepspeed"
    launcher = [deepspeed, "--num_gpus", "2", "--master_port", "29577", "--module"]
    run = start(tmp_path, inputs, launcher, DS_ACCELERATOR="cpu")
    error = run.communicate()[1]
    assert run.returncode == 0, error
    assert files(tmp_path) == files(whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_gives_the_codes_of_the_cpu(inputs, whole, tmp_path):
    for name in ("a", "b"):
        run = start(tmp_path / name, inputs)
        error = run.communicate()[1]
        assert run.returncode == 0, error
    assert files(tmp_path / "a") == files(tmp_path / "b")
    tokens = [ShardReader(folder).image_tokens(np.arange(N)) for folder in (whole, tmp_path / "a")]
    # near ties may fall the other way
    assert (tokens[0] != tokens[1]).mean() < 0.05


def test_a_sidecar_that_describes_no_shard_is_a_sentence(inputs, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "tokens")
    (tmp_path / "tokens" / "shard-00000.json").write_text('{"schema_version": 2}')
    with pytest.raises(InputError, match=r"shard-00000\.json describes no shard: delete it"):
        encode(inputs, tmp_path / "tokens")
