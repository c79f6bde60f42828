"""What is known of a row, and why it is left out."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.check import Reject, check_row, clean_caption
from data_prep.filters import Filters
from data_prep.hashes import HashList, phash
from data_prep.sources import RawPair
from pipeline.data.images import inspect_image
from pipeline.data.schema import image_sha

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PNG = encoded(PIXELS)
HASH = phash(inspect_image(PNG).luma)


def check(pair, excluded=None, val_fraction=0.0, **filters):
    return check_row(pair, 3, Filters(image_size=32, **filters), val_fraction, excluded)


def test_an_accepted_row_tells_all_that_a_set_keeps():
    pair = RawPair("k", PNG, b"a  small\tpicture of noise\x00", file="a.tar", offset=512)
    fact, picture = check(pair, val_fraction=1.0)
    assert (fact.reason, fact.key, fact.caption) == ("", "k", "a small picture of noise")
    assert (fact.width, fact.height, fact.phash) == (80, 60, HASH)
    assert (fact.image_sha, fact.is_val) == (image_sha(PNG), True)
    assert (fact.source, fact.file, fact.offset, fact.size) == (3, "a.tar", 512, len(PNG))
    assert fact.notes == ("control characters stripped",)
    assert np.array_equal(picture.pixels, PIXELS)


def test_rows_of_a_group_share_their_side():
    rows = [RawPair(f"k{i}", PNG, b"a small picture", group=f"g{i // 5}") for i in range(200)]
    sides = [check(row, val_fraction=0.5)[0].is_val for row in rows]
    assert all(len(set(sides[i : i + 5])) == 1 for i in range(0, 200, 5))
    assert 10 < sum(sides[::5]) < 30


def test_the_cheapest_reason_comes_first():
    assert check(RawPair("k", None, None, "broken link", "nowhere"))[0].reason == "broken link"
    fact, picture = check(RawPair("k", b"junk", b"untitled"))
    assert fact.reason.startswith("caption under 2 words")
    assert picture is None
    fact, picture = check(RawPair("k", b"junk", b"a good caption"))
    assert (fact.reason, picture) == ("not an image", None)
    fact, picture = check(RawPair("k", encoded(PIXELS[:20]), b"a good caption"))
    assert fact.reason == "side below 32 (--upscale keeps it)"
    assert picture is not None
    assert fact.phash == 0


def test_what_is_too_long_to_be_enlarged():
    pair = RawPair("k", encoded(np.zeros((8, 30_000, 3), np.uint8)), b"a long thin thread")
    filters = Filters(image_size=300, upscale=True, max_aspect=0)
    fact, _ = check_row(pair, 0, filters, 0.0, None)
    assert fact.reason == "too long to be enlarged"
    assert "1125000x300" in fact.detail


def test_pictures_of_an_evaluation_set_are_named(tmp_path):
    (tmp_path / "list").write_text(f"{HASH ^ 0b101:016x}\n")
    fact, _ = check(RawPair("k", PNG, b"a good caption"), HashList.from_file(tmp_path / "list"))
    assert fact.reason == "in the list of excluded pictures"
    assert "2" in fact.detail


@pytest.mark.parametrize(
    ("data", "caption", "notes"),
    [
        (b"a\tb\r\nc", "a b c", ()),
        (b"  a  b ", "a b", ()),
        (b"\xef\xbb\xbfa", "a", ()),
        (b"a\x00\x1bb\xc2\x9b", "ab", ("control characters stripped",)),
        ("naïve 👩‍🚀".encode(), "naïve 👩‍🚀", ()),
        (b"x" * 10_000, "x" * 10_000, ()),
    ],
)
def test_captions_are_one_line_without_control_characters(data, caption, notes):
    assert clean_caption(data) == (caption, notes)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "caption empty"),
        (b"\xef\xbb\xbf", "caption blank"),
        (b"\x00\x01", "caption blank"),
        # the tokenizer reads none of these: a silent sample without a caption
        ("\u200b \ufeff\u200e\u061c".encode(), "caption blank"),
        ("\u2581\ufffd".encode(), "caption blank"),
        (b"\xff\xfea\x00", "caption not UTF-8"),
        (b"x" * 10_001, "caption too long"),
    ],
)
def test_captions_that_say_nothing_are_rejected(data, reason):
    with pytest.raises(Reject) as caught:
        clean_caption(data)
    assert caught.value.reason == reason


def test_a_picture_in_a_table_is_refused_where_only_references_are_kept():
    rows = [RawPair("k", PNG, b"a good caption", file=file) for file in ("", "a.tar")]
    filters = Filters(image_size=32)
    reasons = [check_row(row, 0, filters, 0.0, None, must_refer=True)[0].reason for row in rows]
    assert reasons == ["cannot be referred to (without --reference it is kept)", ""]
