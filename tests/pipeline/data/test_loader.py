import io
import json
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.train_tokenizer import NORMALIZER, train
from pipeline.console import InputError
from pipeline.data import loader as loader_module
from pipeline.data.images import augment_dvae, centre_crop
from pipeline.data.loader import PairLoader, TokenLoader, crop_of, prefetch, sample_seed
from pipeline.data.shards import ShardReader, ShardWriter, Side, image_sha
from pipeline.data.stream import seed_of
from pipeline.data.tokenizer import save_tokenizer
from tests.pipeline.data.helpers import PAIRS, pair_row, refer, write

N_ROWS = 1100
BATCH = 12
MADE_OF = {"grid": 2, "n_vocab": 1200, "crops": 1}


def caption_of(i):
    return f"a circle beside {i} red squares"


def token_row(i, crops=1):
    """Row i: of its crops, crop c has the codes i, c, 1, i."""
    tokens = np.array([[i, c, 1, i] for c in range(crops)], np.uint16).ravel()
    row = {"key": f"k{i}", "caption": caption_of(i), "image_sha": image_sha(b"")}
    return row | {"image_tokens": tokens, "crops": np.zeros(4 * crops, np.float32)}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write(folder, "tokens", map(token_row, range(N_ROWS)), 300, MADE_OF)
    return ShardReader(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    model = train((caption_of(i) for i in range(100)), 300)
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), model, 300, NORMALIZER, {})


def side_of(rows):
    """A side of these very rows."""
    return Side(rows, np.ones(len(rows), np.int64))


def token_loader(reader, tokenizer, indices=None, **changes):
    side = side_of(np.arange(N_ROWS) if indices is None else indices)
    options = {"batch": BATCH, "rank": 0, "world": 1, "n_text": 24, "seed": 3, "dropout": 0.1}
    return TokenLoader([(reader, side)], tokenizer, **(options | changes))


def global_batch(make, position, batch, world):
    """The samples of all ranks at their positions, text and image of each beside its id."""
    parts = [make(batch=batch, rank=r, world=world).batch_at(position) for r in range(world)]
    rows = [None] * batch
    for rank, part in enumerate(parts):
        for k, sample in enumerate(part.ids.tolist()):
            text, image = part.text_tokens[k].tolist(), part.image_tokens[k].tolist()
            assert image == [sample, 0, 1, sample]
            rows[rank + k * world] = (sample, tuple(text))
    return rows


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 7, BATCH - 1, BATCH, 1007])
def test_each_epoch_shows_each_sample_once(reader, tokenizer, n, world):
    indices = np.random.default_rng(n).permutation(N_ROWS)[:n]
    loaders = [
        token_loader(reader, tokenizer, indices, rank=rank, world=world) for rank in range(world)
    ]
    stream = {}
    for position in range(0, 3 * n, BATCH):
        for rank, loader in enumerate(loaders):
            batch = loader.batch_at(position)
            assert len(batch.ids) == BATCH // world
            for k, sample in enumerate(batch.ids.tolist()):
                assert stream.setdefault(position + rank + k * world, sample) == sample
    for epoch in range(3):
        seen = [stream[p] for p in range(epoch * n, (epoch + 1) * n)]
        assert sorted(seen) == sorted(indices.tolist())


def test_text_and_image_do_not_depend_on_ranks_batches_or_where_a_run_resumed(reader, tokenizer):
    def make(**shape):
        return token_loader(reader, tokenizer, np.arange(50, 150), **shape)

    whole = [row for p in range(0, 240, 12) for row in global_batch(make, p, 12, 1)]
    # stops and goes on with other shapes; 240 samples of 100 are two epochs and a half
    plan = [(0, 12, 4), (12, 24, 3), (36, 4, 2), (40, 20, 4), (60, 60, 1), (120, 120, 24)]
    for position, batch, world in plan:
        assert global_batch(make, position, batch, world) == whole[position : position + batch]
    # a new draw of the dropout in every epoch
    texts = [dict(whole[:100]), dict(whole[100:200])]
    assert sum(texts[0][i] != texts[1][i] for i in range(50, 150)) > 50


@pytest.mark.parametrize("ahead", [1, 12, 30, 1024])
def test_batches_that_are_made_together_are_those_that_are_made_alone(
    reader, tokenizer, monkeypatch, ahead
):
    monkeypatch.setattr(loader_module, "AHEAD", ahead)
    calls = []
    read = reader.captioned_tokens
    monkeypatch.setattr(reader, "captioned_tokens", lambda *a: calls.append(len(a[0])) or read(*a))
    loader = token_loader(reader, tokenizer, np.arange(50, 150))
    # in a row over the end of an epoch, then elsewhere, then on from there
    for position in (*range(0, 180, 12), 36, 48, 60, 5, 17, 29, 17):
        alone = token_loader(reader, tokenizer, np.arange(50, 150)).batch_at(position)
        calls.pop()
        got = loader.batch_at(position)
        assert torch.equal(got.text_tokens, alone.text_tokens)
        assert torch.equal(got.image_tokens, alone.image_tokens)
        assert torch.equal(got.is_cut, alone.is_cut)
        assert got.ids.tolist() == alone.ids.tolist()
        assert got.sets.tolist() == alone.sets.tolist()
    n = max(1, ahead // 12) * 12
    assert calls[:2] == [12, n]
    assert calls[-1] == 12
    assert len(calls) == {12: 22, 24: 13, 1020: 7}[n]


K = 3


@pytest.fixture(scope="module")
def crop_reader(tmp_path_factory):
    """A second set, of three crops an image."""
    folder = tmp_path_factory.mktemp("crops")
    rows = (token_row(i, K) for i in range(90))
    write(folder, "tokens", rows, 40, MADE_OF | {"crops": K}, val=range(80, 90))
    return ShardReader(folder)


def test_as_many_epochs_as_crops_show_each_crop_of_each_image_once(crop_reader, tokenizer):
    side = crop_reader.split("train")
    n = len(side)
    assert n == 80
    shown = {}
    for rank in range(2):
        options = {"n_text": 24, "dropout": 0.0, "batch": 8, "rank": rank, "world": 2, "seed": 3}
        loader = TokenLoader([(crop_reader, side)], tokenizer, **options)
        for position in range(0, 2 * K * n, 8):
            batch = loader.batch_at(position)
            for row, codes in zip(batch.ids.tolist(), batch.image_tokens.tolist(), strict=True):
                assert [codes[0], *codes[2:]] == [row, 1, row]
                shown.setdefault((row, position // n // K), []).append(codes[1])
    assert len(shown) == 2 * n
    assert all(sorted(crops) == list(range(K)) for crops in shown.values())
    # not all of them begin with the same one
    firsts = [crops[0] for crops in shown.values()]
    assert min(firsts.count(c) for c in range(K)) > n // 5


def test_the_crop_of_a_sample_hangs_on_seed_epoch_and_row_alone():
    rows, epochs = np.arange(3000), np.arange(3000) % 4
    crops = crop_of(7, epochs, rows, 5)
    assert [int(crop_of(7, epochs[i : i + 1], rows[i : i + 1], 5)[0]) for i in range(20)] == (
        crops[:20].tolist()
    )
    assert set(crops.tolist()) == set(range(5))
    assert (crops != crop_of(8, epochs, rows, 5)).mean() > 0.7
    # a golden value: a run that resumes must not show other crops
    assert crop_of(0, np.zeros(8, int), np.arange(8), 4).tolist() == [3, 0, 2, 0, 3, 2, 2, 0]


def test_validation_shows_the_first_crop(crop_reader, tokenizer):
    sets = [(crop_reader, crop_reader.split("val"))]
    options = {"n_text": 24, "dropout": 0.0, "batch": 10, "rank": 0, "world": 1, "seed": None}
    batch = TokenLoader(sets, tokenizer, **options).batch_at(0)
    assert batch.image_tokens[:, 1].tolist() == [0] * 10


@pytest.mark.parametrize("weights", [None, [2, 1]], ids=["joined", "mixed"])
def test_several_sets_give_their_own_rows_whatever_ranks_and_batches(
    reader, crop_reader, tokenizer, weights
):
    sets = [(reader, side_of(np.arange(40))), (crop_reader, crop_reader.split("train"))]

    def rows_of(position, batch, world):
        found = [None] * batch
        for rank in range(world):
            options = {"batch": batch, "rank": rank, "world": world, "weights": weights}
            loader = TokenLoader(sets, tokenizer, n_text=24, dropout=0.1, seed=3, **options)
            part = loader.batch_at(position)
            for i, (k, row) in enumerate(zip(part.sets.tolist(), part.ids.tolist(), strict=True)):
                codes, text = part.image_tokens[i].tolist(), part.text_tokens[i].tolist()
                number = codes[0]
                assert sets[k][0].keys(np.array([row])) == [f"k{number}"]
                assert tokenizer.decode(text) == caption_of(number)
                found[rank + i * world] = (k, row, tuple(codes), tuple(text))
        return found

    whole = [row for p in range(0, 480, 24) for row in rows_of(p, 24, 1)]
    for position, batch, world in [(0, 48, 4), (48, 24, 3), (72, 72, 2), (144, 96, 16)]:
        assert rows_of(position, batch, world) == whole[position : position + batch]
    if weights is None:
        # an epoch of 120 shows each row of both sets once
        for epoch in range(4):
            rows = {(k, row) for k, row, *_ in whole[120 * epoch : 120 * epoch + 120]}
            assert len(rows) == 120
    else:
        assert sum(k == 0 for k, *_ in whole) == 320
        # eight epochs of the first set, two of the second
        shown = [(k, row) for k, row, *_ in whole]
        assert {shown.count(which) for which in shown if which[0] == 0} == {8}
        assert {shown.count(which) for which in shown if which[0] == 1} == {2}
    # each set draws for itself
    _, row, _, text = next(found for found in whole if found[0] == 1)
    seed = sample_seed(seed_of(3, 1), 0, row)
    (caption,) = crop_reader.captions(np.array([row]))
    ids = tokenizer.encode(caption, dropout=0.1, seed=seed)
    assert list(text[: len(ids)]) == ids


def test_text_is_the_caption_and_ends_in_pads(reader, tokenizer):
    batch = token_loader(reader, tokenizer).batch_at(24)
    assert batch.text_tokens.dtype == batch.image_tokens.dtype == torch.int64
    assert batch.text_tokens.shape == (BATCH, 24)
    assert batch.image_tokens.shape == (BATCH, 4)
    assert batch.ids.dtype == np.int64
    for sample, tokens in zip(batch.ids, batch.text_tokens.tolist(), strict=True):
        length = tokens.index(-1)
        assert set(tokens[length:]) == {-1}
        assert tokenizer.decode(tokens) == caption_of(sample)
        seed = sample_seed(3, 0, int(sample))
        assert tokens[:length] == tokenizer.encode(caption_of(sample), dropout=0.1, seed=seed)
    assert not batch.is_cut.any()


def test_long_captions_are_cut_and_counted(reader, tokenizer):
    batch = token_loader(reader, tokenizer, n_text=6, dropout=0.0).batch_at(0)
    assert batch.is_cut.tolist() == [True] * BATCH
    # a part counts its own
    assert len(batch[1:3].is_cut) == 2
    for sample, tokens in zip(batch.ids, batch.text_tokens.tolist(), strict=True):
        assert tokens == [*tokenizer.encode(caption_of(sample))[:5], -1]


def test_validation_comes_in_order_and_without_dropout(reader, tokenizer):
    indices = np.array([9, 4, 700, 30, 2])
    loader = token_loader(reader, tokenizer, indices, batch=4, seed=None, dropout=0.0)
    assert loader.batch_at(0).ids.tolist() == [9, 4, 700, 30]
    assert loader.batch_at(4).ids.tolist() == [2, 9, 4, 700]
    text = loader.batch_at(0).text_tokens[2].tolist()
    assert text == tokenizer.pad(tokenizer.encode(caption_of(700)), 24)[0].tolist()


def test_sample_seeds_differ():
    seeds = {sample_seed(s, e, i) for s in range(3) for e in range(12) for i in range(123)}
    assert len(seeds) == 3 * 12 * 123
    assert sample_seed(1, 2, 3) == 8384462955522581546


def test_impossible_loaders_are_named(reader, tokenizer):
    for changes, words in [
        ({"world": 5}, "a batch of 12 does not divide over 5 ranks"),
        ({"batch": 0}, "a batch of 0"),
        ({"rank": 2, "world": 2}, r"rank 2 is outside 0\.\.1"),
        ({"indices": np.empty(0, np.int64)}, r"sets of \[0\] samples"),
        ({"seed": None}, "dropout 0.1 without a seed"),
    ]:
        with pytest.raises(InputError, match=words):
            token_loader(reader, tokenizer, **changes)
    with pytest.raises(InputError, match="position -12"):
        token_loader(reader, tokenizer).batch_at(-12)
    with pytest.raises(InputError, match="pictures come from pairs"):
        pair_loader(reader, np.arange(3))


def test_sets_that_a_loader_cannot_read_are_named(reader, tokenizer, tmp_path, pair_reader):
    with pytest.raises(InputError, match="is a set of pairs"):
        token_loader(pair_reader, tokenizer, np.arange(1))
    rows = [token_row(0) | {"image_tokens": np.zeros(9, np.uint16)}]
    write(tmp_path, "tokens", rows, made_of=MADE_OF | {"grid": 3})
    other = ShardReader(tmp_path)
    sets = [(reader, reader.split("train")), (other, other.split("train"))]
    with pytest.raises(InputError, match=r"different code grids: .* has 2 a side, .* has 3 a"):
        TokenLoader(sets, tokenizer, n_text=24, dropout=0, batch=1, rank=0, world=1, seed=0)


def test_an_image_token_outside_the_vocabulary_is_named(reader, tokenizer, monkeypatch):
    monkeypatch.setitem(reader.made_of, "n_vocab", 1000)
    loader = token_loader(reader, tokenizer, np.array([3, 1000, 5]), batch=3)
    with pytest.raises(InputError, match=r"row 'k1000' holds image token 1000.*0\.\.999"):
        loader.batch_at(0)


SIZE = 16


def picture(i):
    rng = np.random.default_rng(i)
    height, width = rng.integers(SIZE, 2 * SIZE, 2)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pair_reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    with ShardWriter(folder, "pairs", PAIRS, rows_per_shard=10) as writer:
        for i in range(23):
            Image.fromarray(picture(i)).save(file := io.BytesIO(), format="PNG")
            data = file.getvalue() if i < 21 else file.getvalue()[: 60 if i == 21 else 0]
            height, width = picture(i).shape[:2]
            writer.add(pair_row(f"p{i}", data, width=width, height=height))
    return ShardReader(folder)


def pair_loader(reader, indices=None, **changes):
    side = side_of(np.arange(20) if indices is None else indices)
    options = {"batch": 6, "rank": 0, "world": 1, "size": SIZE, "seed": 5}
    return PairLoader([(reader, side)], **(options | changes))


def test_pictures_are_the_papers_crops_keyed_by_the_sample(pair_reader):
    loader = pair_loader(pair_reader)
    for position in (0, 18, 36):
        image_BCYX, ids = loader.batch_at(position)
        assert image_BCYX.dtype == torch.float32
        assert image_BCYX.shape == (6, 3, SIZE, SIZE)
        assert image_BCYX.is_contiguous()
        for k, sample in enumerate(ids.tolist()):
            rng = np.random.default_rng(sample_seed(5, (position + k) // 20, sample))
            crop = augment_dvae(picture(sample), SIZE, rng)
            expected = torch.from_numpy(crop).permute(2, 0, 1).float() / 255
            torch.testing.assert_close(image_BCYX[k], expected, rtol=0, atol=0)
    ids = np.concatenate([loader.batch_at(p)[1] for p in range(0, 60, 6)])
    assert sorted(ids.tolist()) == sorted(list(range(20)) * 3)


def test_pictures_do_not_depend_on_ranks_or_the_cache(pair_reader):
    whole, ids = pair_loader(pair_reader).batch_at(12)
    for world in (2, 3):
        for rank in range(world):
            for cache_bytes in (0, 5000, 1 << 20):
                loader = pair_loader(pair_reader, rank=rank, world=world, cache_bytes=cache_bytes)
                for _ in range(2):
                    part, part_ids = loader.batch_at(12)
                    assert torch.equal(part, whole[rank::world])
                    assert part_ids.tolist() == ids[rank::world].tolist()


def test_the_cache_keeps_its_bound_and_spares_decoding(pair_reader, monkeypatch):
    decoded = []
    decode = ShardReader.decode
    monkeypatch.setattr(ShardReader, "decode", lambda *args: decoded.append(1) or decode(*args))
    bound = 8000
    loader = pair_loader(pair_reader, cache_bytes=bound)
    for _ in range(2):
        for position in range(0, 20, 6):
            loader.batch_at(position)
    held = sum(pixels.nbytes for pixels in loader._cache.values())
    assert bound - 3 * (2 * SIZE) ** 2 < held <= bound
    assert len(loader._cache) < len(decoded) < 48
    everything = pair_loader(pair_reader)
    decoded.clear()
    for position in range(0, 60, 6):
        everything.batch_at(position)
    assert len(decoded) == 20


def test_pictures_by_reference_are_those_in_the_shards(pair_reader, tmp_path):
    images = pair_reader.images(np.arange(20))
    rows, made_of = refer(tmp_path / "in", images)
    write(tmp_path / "set", "pairs", rows, 7, made_of)
    (tmp_path / "set/sources.json").write_text(json.dumps([str(tmp_path / "in")]))
    inline, referring = pair_loader(pair_reader), pair_loader(ShardReader(tmp_path / "set"))
    for position in (0, 12, 18):
        assert torch.equal(inline.batch_at(position)[0], referring.batch_at(position)[0])
    with open(tmp_path / "in/all.bin", "r+b") as file:
        file.write(b"damaged")
    with pytest.raises(
        InputError, match=r"picture 'p0': bytes .* are not those that were ingested"
    ):
        pair_loader(ShardReader(tmp_path / "set"), np.array([0]), batch=1).batch_at(0)


def small_pictures(folder, upscale):
    """A set of one picture of 10 x 6 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), format="PNG")
    rows = [pair_row("small", file.getvalue(), width=10, height=6)]
    write(folder, "pairs", rows, made_of=PAIRS | {"upscale": upscale, "image_size": 16})
    return pixels, ShardReader(folder)


@pytest.mark.parametrize("size", [8, 16])
def test_small_pictures_are_enlarged_when_the_set_allows_it(tmp_path, size):
    pixels, reader = small_pictures(tmp_path / "a", upscale=True)
    got, _ = pair_loader(reader, np.array([0]), batch=1, size=size, seed=None).batch_at(0)
    wide = round(10 * size / 6)
    larger = Image.fromarray(pixels).resize((wide, size), Image.Resampling.BICUBIC)
    left = (wide - size) // 2
    expected = torch.from_numpy(np.array(larger))[:, left : left + size].permute(2, 0, 1) / 255
    assert torch.equal(got[0], expected)
    # and seen through the crops of training
    assert pair_loader(reader, np.array([0]), batch=1, size=size).batch_at(0)[0].shape[-1] == size


def test_small_pictures_are_not_enlarged_beyond_what_was_allowed(tmp_path):
    for name, upscale, size in (("a", True, 17), ("b", False, 8)):
        _, reader = small_pictures(tmp_path / name, upscale)
        with pytest.raises(InputError, match=f"picture 'small': .*smaller than the {size}x{size}"):
            pair_loader(reader, np.array([0]), batch=1, size=size).batch_at(0)


def test_captions_are_those_of_the_pictures(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        with ShardWriter(folder, "pairs", PAIRS, rows_per_shard=3) as writer:
            for i in range(8):
                Image.fromarray(picture(i)).save(file := io.BytesIO(), format="PNG")
                row = pair_row(f"p{i}", file.getvalue(), width=picture(i).shape[1])
                writer.add(row | {"caption": f"{folder.name}{i}", "height": len(picture(i))})
    sets = [(ShardReader(folder), side_of(np.arange(8))) for folder in folders]
    said = {}
    for rank in range(2):
        loader = PairLoader(sets, size=SIZE, batch=4, rank=rank, world=2, seed=3, weights=[3, 1])
        for position in range(0, 64, 4):
            ids, captions = loader.batch_at(position)[1], loader.captions_at(position)
            assert [caption[1:] for caption in captions] == [str(i) for i in ids]
            for k, caption in enumerate(captions):
                said[position + rank + 2 * k] = caption
    # each set in its share, and each row as often as the others of its set
    assert sorted(said) == list(range(64))
    counts = {caption: list(said.values()).count(caption) for caption in said.values()}
    assert counts == {f"a{i}": 6 for i in range(8)} | {f"b{i}": 2 for i in range(8)}


def test_pictures_of_several_sets_come_from_their_own_set(pair_reader, tmp_path):
    _, small = small_pictures(tmp_path / "a", upscale=True)
    sets = [(pair_reader, side_of(np.arange(2))), (small, small.split("train"))]
    loader = PairLoader(
        sets, size=8, seed=None, batch=6, rank=0, world=1, weights=[2, 1], cache_bytes=10**6
    )
    for _ in range(2):
        images, ids = loader.batch_at(0)
        assert ids.tolist() == [0, 0, 1, 0, 0, 1]
        alone, _ = pair_loader(small, np.array([0]), batch=1, size=8, seed=None).batch_at(0)
        first, _ = pair_loader(pair_reader, size=8, seed=None).batch_at(0)
        expected = [first[0], alone[0], first[1], first[0], alone[0], first[1]]
        assert torch.equal(images, torch.stack(expected))


@pytest.mark.parametrize("cores", [1, 3, 40])
def test_pictures_do_not_depend_on_the_threads_that_decode_them(pair_reader, monkeypatch, cores):
    wanted = pair_loader(pair_reader).batch_at(6)[0]
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    loader = pair_loader(pair_reader)
    assert loader._pool._max_workers == min(cores, 8)
    assert torch.equal(loader.batch_at(6)[0], wanted)


def test_validation_pictures_are_the_middle(pair_reader):
    image_BCYX, ids = pair_loader(pair_reader, seed=None).batch_at(18)
    assert ids.tolist() == [18, 19, 0, 1, 2, 3]
    expected = torch.from_numpy(centre_crop(picture(19), SIZE)).permute(2, 0, 1).float() / 255
    assert torch.equal(image_BCYX[1], expected)


def test_a_picture_that_fails_is_named(pair_reader):
    for sample, words in [(21, "picture 'p21': truncated"), (22, "picture 'p22': empty file")]:
        with pytest.raises(InputError, match=words):
            pair_loader(pair_reader, np.array([sample]), batch=1).batch_at(0)
    with pytest.raises(InputError, match=r"picture 'p4': .*smaller than the 64x64"):
        pair_loader(pair_reader, np.array([4]), batch=1, size=64).batch_at(0)


def test_prefetch_gives_the_same_items_a_little_ahead():
    taken = []

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    ahead = prefetch(items(), depth=2)
    got = []
    for item in ahead:
        got.append(item)
        # two waiting, one in the thread's hand
        assert len(taken) <= len(got) + 3
    assert got == list(range(50))
    assert list(prefetch(iter([]))) == []
    assert list(prefetch(iter([None, 0]))) == [None, 0]


def test_prefetch_raises_in_its_place_and_stops_its_thread():
    def broken():
        yield 1
        raise InputError("third shard")

    ahead = prefetch(broken())
    assert next(ahead) == 1
    with pytest.raises(InputError, match="third shard"):
        next(ahead)
    ahead = prefetch(iter(range(1000)))
    assert next(ahead) == 0
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_captions_are_left_out_at_the_rate_that_was_asked_for(reader, tokenizer):
    options = {"caption_dropout": 0.25, "dropout": 0.0, "batch": 50, "n_text": 8}
    dropping = token_loader(reader, tokenizer, **options)
    whole = token_loader(reader, tokenizer, **options | {"caption_dropout": 0.0})
    n, dropped = 8 * N_ROWS // 50 * 50, {}
    for position in range(0, n, 50):
        batch, other = dropping.batch_at(position), whole.batch_at(position)
        is_empty = (batch.text_tokens == -1).all(1)
        assert torch.equal(batch.text_tokens[~is_empty], other.text_tokens[~is_empty])
        # every caption here is too long for eight positions, and what is empty is not cut
        assert torch.equal(batch.is_cut, ~is_empty)
        assert not (other.text_tokens == -1).all(1).any()
        for row, empty in zip(batch.ids.tolist(), is_empty.tolist(), strict=True):
            dropped.setdefault(row, []).append(empty)
    seen = [empty for row in dropped.values() for empty in row]
    # four standard deviations
    assert abs(np.mean(seen) - 0.25) < 4 * (0.25 * 0.75 / len(seen)) ** 0.5
    # in one epoch this one, in another that one
    shares = np.array([np.mean(row) for row in dropped.values()])
    assert (shares == 0).mean() < 0.2
    assert shares.max() < 1
    share_of_rank = token_loader(reader, tokenizer, **options, world=2, rank=1).batch_at(100)
    assert torch.equal(share_of_rank.text_tokens, dropping.batch_at(100).text_tokens[1::2])


def test_captions_are_not_left_out_of_validation(reader, tokenizer):
    with pytest.raises(InputError, match=r"caption_dropout 0\.1 without a seed"):
        token_loader(reader, tokenizer, seed=None, dropout=0.0, caption_dropout=0.1)
