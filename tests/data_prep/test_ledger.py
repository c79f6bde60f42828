import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from data_prep.ledger import BINS, Bins, Ledger, merge, table, thumbnail

ROW = {"width": 300, "height": 200, "n_bytes": 5_000}


def filled(name, good=2, bad=1, thumbnails=True):
    ledger = Ledger()
    for i in range(good):
        ledger.rows_in += 1
        shown = f"{name}-{i}-jpeg" if thumbnails else ""
        ledger.accept(
            f"{name}/{i}", "a red dog", **ROW, is_val=i == 0, notes=["cmyk"], thumbnail=shown
        )
    for i in range(bad):
        ledger.rows_in += 1
        ledger.reject(f"{name}/bad{i}", "empty file", "0 bytes", caption="x", thumbnail="jpeg")
    return ledger


def on_disk(ledger):
    return json.loads(json.dumps(ledger.as_dict(), sort_keys=True))


def test_a_row_is_accepted_or_rejected_and_counted():
    ledger = filled("a", good=3, bad=2)
    ledger.rows_in += 1
    ledger.reject("late", "duplicate key", "the same as 'a/0'")
    assert on_disk(ledger) == {
        "rows_in": 6,
        "rows_out": 3,
        "val_rows": 1,
        "rejects": {"duplicate key": 1, "empty file": 2},
        "notes": {"cmyk": 3},
        "histograms": {
            "caption words": {"3": 3},
            "caption characters": {"9-16": 3},
            "shorter side, pixels": {"128-255": 3},
            "width to height": {"from 3:2": 3},
            "picture bytes": {"from 4 KiB": 3},
        },
        "examples": {
            "duplicate key": [
                {"key": "late", "detail": "the same as 'a/0'", "caption": "", "thumbnail": ""}
            ],
            "empty file": [
                {"key": f"a/bad{i}", "detail": "0 bytes", "caption": "x", "thumbnail": "jpeg"}
                for i in range(2)
            ],
        },
        "accepted": [
            {"key": f"a/{i}", "caption": "a red dog", "thumbnail": f"a-{i}-jpeg"} for i in range(3)
        ],
    }


@pytest.mark.parametrize("extra", [1, -1])
def test_a_row_that_gets_lost_is_noticed(extra):
    ledger = filled("a")
    ledger.rows_in += extra
    with pytest.raises(AssertionError, match=f"^{extra} rows are neither accepted nor rejected"):
        ledger.as_dict()


def test_examples_are_few_and_short():
    ledger = Ledger(rows_in=1)
    ledger.accept("no picture to show", "a", **ROW)
    assert ledger.as_dict()["accepted"] == []
    ledger = filled("a", good=30, bad=5)
    ledger.rows_in += 1
    ledger.reject("k" * 1000, "long", "d" * 1000, caption="c" * 1000)
    content = on_disk(ledger)
    assert [example["key"] for example in content["accepted"]] == [f"a/{i}" for i in range(24)]
    assert [e["key"] for e in content["examples"]["empty file"]] == ["a/bad0", "a/bad1", "a/bad2"]
    for text in content["examples"]["long"][0].values():
        assert text == "" or (len(text) == 240 and text.endswith("…"))


def test_shards_merge_into_the_ledger_of_all_their_rows():
    ledgers = [filled("a", 3, 2), filled("b", 0, 0), filled("c", 1, 4, thumbnails=False)]
    together = filled("a", 3, 2)
    other = filled("c", 1, 4, thumbnails=False)
    merged = merge(map(on_disk, ledgers))
    assert merged["rows_in"] == together.rows_in + other.rows_in == 10
    assert (merged["rows_out"], merged["val_rows"]) == (4, 2)
    assert merged["rejects"] == {"empty file": 6}
    assert merged["notes"] == {"cmyk": 4}
    assert merged["histograms"]["caption words"] == {"3": 4}
    # one merge of merges more gives the same counts: the summary is a ledger too
    again = merge([merged])
    assert again == merged
    assert merge([]) == on_disk(Ledger())


def test_examples_come_from_many_shards_and_in_one_order():
    ledgers = [on_disk(filled(f"s{k:02d}", good=2 + 30 * (k == 0), bad=k)) for k in range(16)]
    merged = merge(iter(ledgers))
    keys = [example["key"] for example in merged["accepted"]]
    assert keys == [f"s{k:02d}/0" for k in range(16)] + [f"s{k:02d}/1" for k in range(8)]
    assert [e["key"] for e in merged["examples"]["empty file"]] == [
        "s01/bad0",
        "s02/bad0",
        "s03/bad0",
    ]
    few = merge(ledgers[:1])
    assert [example["key"] for example in few["accepted"]] == [f"s00/{i}" for i in range(24)]


def test_every_value_falls_into_one_bin_and_arrays_count_the_same():
    rng = np.random.default_rng(0)
    for bins in BINS.values():
        values = np.concatenate(
            [rng.lognormal(3, 3, 500), bins.edges, np.nextafter(bins.edges, 0), [0, 1, 2, 1e12]]
        )
        slow = dict.fromkeys(bins.labels, 0)
        for value in values:
            below = [i for i, edge in enumerate(bins.edges) if edge <= value]
            assert bins.label(value) == bins.labels[below[-1] if below else 0]
            slow[bins.label(value)] += 1
        assert bins.count(values) == {label: n for label, n in slow.items() if n}
        assert bins.count([]) == {}


def test_bins_are_called_what_they_hold():
    assert Bins([1, 2, 5, 1000]).labels == ("1", "2-4", "5-999", "1,000+")
    aspect = BINS["width to height"]
    for width, height, label in [
        (100, 201, "below 1:2"),
        (100, 200, "from 1:2"),
        (99, 100, "from 4:5"),
        (100, 100, "1:1"),
        (101, 100, "over 1:1"),
        (300, 200, "from 3:2"),
        (200, 100, "2:1"),
        (201, 100, "over 2:1"),
    ]:
        assert aspect.label(width / height) == label


@pytest.mark.parametrize(("height", "width", "size"), [(300, 400, (96, 72)), (9, 20, (20, 9))])
def test_a_thumbnail_is_a_small_jpeg_of_the_picture(height, width, size):
    image = np.zeros((height, width, 3), np.uint8)
    image[:, width // 2 :] = (250, 20, 20)
    with Image.open(io.BytesIO(base64.b64decode(thumbnail(image), validate=True))) as small:
        assert (small.format, small.size) == ("JPEG", size)
        pixels = np.asarray(small.convert("RGB")).astype(int)
    assert np.abs(pixels[:, : size[0] // 4]).max() < 30
    assert np.abs(pixels[:, -size[0] // 4 :] - (250, 20, 20)).max() < 40


def test_thumbnails_of_strips_have_pixels():
    for shape in ((8, 30_000, 3), (30_000, 1, 3)):
        with Image.open(
            io.BytesIO(base64.b64decode(thumbnail(np.zeros(shape, np.uint8))))
        ) as small:
            assert max(small.size) == 96
            assert min(small.size) == 1


def test_the_table_has_a_line_for_each_count():
    ledger = filled("a", 1200, 3)
    ledger.rows_in += 9
    for _ in range(9):
        ledger.reject("x", "not English", "de")
    assert table(on_disk(ledger)) == (
        "rows in                        1,212\n"
        "rows out                       1,200\n"
        "of these for validation            1\n"
        "rejected: not English              9\n"
        "rejected: empty file               3\n"
        "noted: cmyk                    1,200\n"
    )
