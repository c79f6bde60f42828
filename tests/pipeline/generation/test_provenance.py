import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.console import InputError
from pipeline.evaluation import scenes
from pipeline.generation.mark import find_mark
from pipeline.generation.provenance import (
    read_facts,
    write_picture,
    write_sidecar,
)
from pipeline.generation.signature import LINE
from pipeline.generation.verification import verify_main

FACTS = {"caption": "a red circle", "seed": 2**61 + 1, "temperature": 1.0, "top_k": None}


def picture(side=64):
    caption = "a small red circle in the middle on a white background"
    return scenes.draw(scenes.parse(caption), side)


def write(path, facts=FACTS, image=None, signature=False, mark=True):
    image = picture() if image is None else image
    write_picture(path, image, facts, signature=signature, mark=mark)
    return path


def chunk(path, value):
    """A PNG whose chunk of our name holds something else."""
    info = PngInfo()
    info.add_itxt("daikon", value)
    Image.fromarray(picture()).save(path, pnginfo=info)
    return path


def test_facts_come_back_with_their_types(tmp_path):
    facts = FACTS | {"list": [1, 2.5, None, True], "nested": {"a": "b"}}
    path = write(tmp_path / "a.png", facts)
    back = read_facts(path)
    assert back == facts | {"signature": False, "mark": True}
    assert {name: type(value) for name, value in back.items()} == {
        "caption": str, "seed": int, "temperature": float, "top_k": type(None), "list": list,
        "nested": dict, "signature": bool, "mark": bool,
    }  # fmt: skip
    text = Image.open(path).text
    assert (text["caption"], text["seed"], text["mark"]) == ("a red circle", str(2**61 + 1), "true")
    assert "top_k" not in text
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("signature", [False, True])
@pytest.mark.parametrize("mark", [False, True])
def test_a_picture_has_what_was_asked_for_and_says_so(tmp_path, signature, mark):
    image = picture()
    before = image.copy()
    path = write(tmp_path / "a.png", image=image, signature=signature, mark=mark)
    facts = read_facts(path)
    assert (facts["signature"], facts["mark"]) == (signature, mark)
    pixels = np.asarray(Image.open(path))
    assert find_mark(pixels).found == mark
    assert (np.abs(pixels[-11, -3:] - np.array(LINE, float)) < 12).all() == signature
    assert (image == before).all()
    if not signature and not mark:
        assert (pixels == image).all()


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467 and 星",
        "a\0b\x1b[31m\r\n\x7f\u2028\u202e",
        "\ud800 alone, and \udfff",
        "word " * 10_000,
        '"daikon": {"schema_version": 9}',
        "".join(chr(c) for c in range(0x3000)),
    ],
    ids=["empty", "emoji", "controls", "surrogates", "long", "quotes", "all"],
)
def test_any_caption_survives(tmp_path, caption):
    path = write(tmp_path / "a.png", {"caption": caption})
    assert read_facts(path)["caption"] == caption
    shown = Image.open(path).text["caption"]
    assert "\0" not in shown
    if caption.isprintable():
        assert shown == caption


def test_what_no_png_can_carry_is_refused(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(InputError, match="1,048,576 are carried; shorten the caption"):
        write(path, {"caption": "x" * (1 << 20)})
    for name in ("", "daikon", "x" * 80, "été", "a\n", " a"):
        with pytest.raises(InputError, match="cannot be the name of a fact"):
            write(path, {name: 1})
    for value in (float("nan"), tmp_path, np.int64(3)):
        with pytest.raises(InputError, match="no JSON value"):
            write(path, {"value": value})
    with pytest.raises(InputError, match="no room for the invisible mark"):
        write(path, image=picture(24))
    with pytest.raises(InputError, match="no room for the signature"):
        write(path, image=picture(8), mark=False, signature=True)
    assert not list(tmp_path.iterdir())


def test_every_cut_and_many_flips_of_a_file_are_noticed(tmp_path):
    path = write(tmp_path / "a.png")
    data = path.read_bytes()
    rng = random.Random(0)
    for n in [*range(60), *range(len(data) - 60, len(data)), *rng.sample(range(len(data)), 100)]:
        path.write_bytes(data[:n])
        with pytest.raises(InputError, match=r"cut off or damaged|is no PNG"):
            read_facts(path)
    for at in rng.sample(range(len(data)), 200):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        with pytest.raises(InputError):
            read_facts(path)


def test_files_that_say_nothing_are_sentences(tmp_path):
    with pytest.raises(InputError, match=r"none.png cannot be read \(No such file"):
        read_facts(tmp_path / "none.png")
    Image.fromarray(picture()).save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"a.jpg is no PNG"):
        read_facts(tmp_path / "a.jpg")
    Image.fromarray(picture()).save(tmp_path / "bare.png")
    with pytest.raises(InputError, match="has no chunk 'daikon'"):
        read_facts(tmp_path / "bare.png")
    for value in ("", "[1]", "[" * 100_000, '{"schema_version": 1, "facts": [], "pixels": ""}'):
        with pytest.raises(InputError, match="that is not ours"):
            read_facts(chunk(tmp_path / "b.png", value))
    with pytest.raises(InputError, match="schema version 2, this code reads 1; update"):
        read_facts(chunk(tmp_path / "b.png", '{"schema_version": 2}'))


def test_the_sidecar_holds_the_request_and_the_software(tmp_path):
    facts = {"captions": ["a \ud800", "星"], "seeds": [1, 2], "model": "abc"}
    write_sidecar(tmp_path, facts)
    content = json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))
    assert content["facts"] == facts
    assert content["software"]["torch"] == torch.__version__
    assert content["software"]["daikon"].count(".") == 2
    with pytest.raises(InputError, match="no JSON value"):
        write_sidecar(tmp_path, {"out": tmp_path})


# ---- verify


def test_verify_says_what_each_file_carries(tmp_path, capsys):
    full = write(tmp_path / "full.png", FACTS | {"model": "0123abcd", "caption": "a\x1b[2J" * 40})
    changed = tmp_path / "changed.png"
    data = full.read_bytes()
    changed.write_bytes(data)
    Image.open(full).convert("RGB").save(tmp_path / "again.jpg", quality=90)
    with Image.open(full) as image:
        info = PngInfo()
        info.add_itxt("daikon", image.text["daikon"])
        image.rotate(90).save(changed, pnginfo=info)
    files = [str(tmp_path / name) for name in ("full.png", "changed.png", "again.jpg")]
    assert verify_main(files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "a\\x1b[2J" in lines[0]
    assert (
        f"model 0123abcd, seed {2**61 + 1}; pixels as written; mark found (320 of 320" in lines[0]
    )
    assert "pixels changed since; no mark (" in lines[1]
    assert "again.jpg: no text of ours; mark found (" in lines[2]


def test_verify_ends_with_the_worst_of_its_files(tmp_path, capsys):
    write(tmp_path / "ours.png")
    Image.fromarray(picture()).save(tmp_path / "bare.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "ours.png").read_bytes()[:-30])
    (tmp_path / "text.jpg").write_text("no picture")

    def verify(*names):
        code = verify_main([str(tmp_path / name) for name in names])
        return code, capsys.readouterr().out.splitlines()

    assert verify("ours.png")[0] == 0
    code, lines = verify("bare.png", "ours.png")
    assert code == 1
    assert "bare.png: no text of ours; no mark (" in lines[0]
    code, lines = verify("cut.png", "none.png", "text.jpg", "bare.png", "ours.png")
    assert code == 2
    assert all("cannot be read (" in line for line in lines[:3])
    assert "No such file" in lines[1]
    assert "mark found" in lines[4]
