import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.train_tokenizer import NORMALIZER, train
from pipeline.console import InputError
from pipeline.data.images import augment_dvae, centre_crop
from pipeline.data.loader import PairLoader, TokenLoader, prefetch, sample_seed
from pipeline.data.shards import ShardReader, ShardWriter, Side, image_sha
from pipeline.data.tokenizer import save_tokenizer
from tests.pipeline.data.helpers import PAIRS, pair_row

N_ROWS = 1100
BATCH = 12
MADE_OF = {"grid": 2, "n_vocab": 1200, "crops": 1}


def caption_of(i):
    return f"a circle beside {i} red squares"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    with ShardWriter(folder, "tokens", MADE_OF, rows_per_shard=300) as writer:
        for i in range(N_ROWS):
            row = {"key": f"k{i}", "caption": caption_of(i), "image_sha": image_sha(b"")}
            tokens = np.array([i, 0, 1, i], np.uint16)
            writer.add(row | {"image_tokens": tokens, "crops": np.zeros(4, np.float32)})
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
    return TokenLoader(reader, tokenizer, side, **(options | changes))


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
        ({"indices": np.empty(0, np.int64)}, "0 samples"),
        ({"seed": None}, "dropout 0.1 without a seed"),
    ]:
        with pytest.raises(InputError, match=words):
            token_loader(reader, tokenizer, **changes)
    with pytest.raises(InputError, match="position -12"):
        token_loader(reader, tokenizer).batch_at(-12)
    with pytest.raises(InputError, match="pictures come from pairs"):
        PairLoader(reader, side_of(np.arange(3)), batch=1, rank=0, world=1, size=8, seed=0)


def test_sets_that_a_loader_cannot_read_are_named(tokenizer, tmp_path, pair_reader):
    made_of = MADE_OF | {"crops": 2}
    with ShardWriter(tmp_path, "tokens", made_of):
        pass
    with pytest.raises(InputError, match="tokens with 2 crops"):
        token_loader(ShardReader(tmp_path), tokenizer, np.arange(1))
    with pytest.raises(InputError, match="is a set of pairs"):
        token_loader(pair_reader, tokenizer, np.arange(1))


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
    return PairLoader(reader, side, **(options | changes))


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
