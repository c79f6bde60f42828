import pytest

from pipeline.console import InputError
from pipeline.generation.request import orders_of, read_captions


def test_every_picture_has_a_seed_and_a_file_of_its_own():
    orders = orders_of(["a cat", "a dog", "a cat"], 1200, 5)
    assert [order.index for order in orders] == list(range(3600))
    assert [order.seed for order in orders] == list(range(5, 3605))
    assert len({order.file for order in orders}) == 3600
    last = orders[-1]
    assert (last.caption, last.caption_index, last.image_index) == ("a cat", 2, 1199)
    assert (orders[0].file, last.file) == ("00000-000.png", "00002-1199.png")
    # a part of the request is the same pictures
    assert orders_of(["a cat"], 7, 5) == orders[:7]


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ("a cat\na dog", ["a cat", "a dog"]),
        ("\ufeffa cat\r\n a dog \r\n\r\n", ["a cat", "a dog"]),
        # separators of other kinds stand inside captions
        ("a\u2028cat\x0b!\na\x85dog\n", ["a\u2028cat\x0b!", "a\x85dog"]),
    ],
    ids=["plain", "windows", "separators"],
)
def test_captions_are_lines(tmp_path, content, captions):
    file = tmp_path / "captions.txt"
    file.write_bytes(content.encode())
    assert read_captions(file) == captions


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; write one caption a line"),
        (b" \n\n", "is empty"),
        (b"a cat\n\t\na dog", "no caption in line 2; delete the line"),
        (b"caf\xe9", "is not UTF-8 text: .*; convert it"),
    ],
    ids=["empty", "blank", "a blank line", "latin-1"],
)
def test_files_that_are_no_captions_are_sentences(tmp_path, content, words):
    file = tmp_path / "captions.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_captions(file)


def test_a_file_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"none.txt cannot be read \(No such file"):
        read_captions(tmp_path / "none.txt")
