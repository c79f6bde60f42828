# ruff: noqa: RUF001
import argparse
import dataclasses
import json
import re

import numpy as np
import pytest

from data_prep import filters
from data_prep.filters import (
    Filters,
    add_flags,
    count_words,
    filters_of,
    judge_aspect,
    judge_boilerplate,
    judge_caption,
    judge_language,
    judge_length,
    judge_side,
    judge_size,
    judge_words,
    load_score,
    load_words,
)
from pipeline.console import InputError

ENGLISH = """
A brown dog runs through the shallow water of a lake.
Two children play football on a muddy field
a plate of pasta with tomato sauce and basil
The old town hall at night, lit by street lamps
Woman wearing a green raincoat waits for the bus
Aerial view of the harbour with many small fishing boats
An elderly man reads his newspaper on a park bench.
Close-up of a honey bee on a purple lavender flower
Snow covered mountains behind a frozen lake at sunrise
a black and white photo of a steam locomotive leaving the station
The bride and groom cut their three-tier wedding cake
Red double-decker bus crossing Westminster Bridge, London
My cat asleep on top of the laptop again
Vintage poster for a travelling circus, circa 1910
Hand drawn map of an imaginary island with dragons
Interior of the cathedral of Santiago de Compostela, Spain
View of Mount Fuji from Lake Kawaguchi in autumn
A group of tourists in front of the Brandenburg Gate in Berlin
Sushi and sashimi served on a wooden boat
Portrait of Johann Sebastian Bach playing the organ
an isometric pixel art drawing of a medieval blacksmith
Lionel Messi celebrates after scoring against Real Madrid
Homemade croissants cooling on a wire rack
logo of a coffee shop with a steaming cup
The kitchen has white cabinets and a marble counter top.
3d render of a robot holding a sunflower, studio lighting
Firefighters try to put out the blaze in the warehouse
a stop sign covered in stickers
Students protest outside the parliament building in Athens
Handmade silver ring with blue opal stone, size 7
Wooden bridge over a small stream in the forest
Abstract background with golden circles and dark blue gradient
the inside of a clock with its brass gears
Surfer riding a big wave at Nazare
Cherry blossoms along the river in Kyoto
Crowds gather for the opening of the Tour de France
a very small hedgehog in somebody's hands
Rusty anchor on the beach at low tide
Toddler blowing soap bubbles in the garden
How to tie a bow tie in six steps
red sports car
Golden retriever puppy
a horse
Eiffel Tower, Paris
sunset over sea
Chocolate cake
grinning face
man playing guitar
blue door
Tiger
Wedding in Tuscany
kids at school
Barack Obama
snowy owl
vintage camera
a fat pigeon
Beyoncé on stage
a café in Montréal
Jalapeño peppers in a bowl
Crème brûlée with berries
View over São Paulo at night
Antonín Dvořák portrait
The naïve painter's house in Málaga
El Niño rains flood the valley
Pokémon cards on a table
Smörgåsbord
Björk in concert
the Pantheon 🏛 in Rome
A Day at the Musée d’Orsay
“Hello” written in 日本語 on a wall
Old sign with the Greek letter Ω in the middle
""".strip().split("\n")
FOREIGN = """
Ein brauner Hund läuft durch das flache Wasser
Zwei Kinder spielen auf einer Wiese Fußball
Blick auf den Hafen mit vielen kleinen Booten
Eine alte Frau sitzt auf einer Bank und liest die Zeitung
Un chien brun court dans l'eau peu profonde
Deux enfants jouent au ballon dans la cour de l'école
Vue aérienne du vieux port avec ses bateaux de pêche
La mariée et le marié coupent le gâteau
Un perro marrón corre por el agua
Dos niños juegan al fútbol en un campo de tierra
Vista del puerto viejo con muchos barcos pequeños
Una taza de café sobre la mesa de madera
Um cachorro marrom corre na água rasa
Duas crianças brincam na praia ao pôr do sol
Un cane marrone corre nell'acqua bassa
Due bambini giocano a calcio nel cortile della scuola
Een bruine hond rent door het ondiepe water
Twee kinderen spelen voetbal op een modderig veld
En brun hund løper gjennom det grunne vannet
Två barn spelar fotboll på en lerig plan
Ruskea koira juoksee matalassa vedessä
Brązowy pies biegnie przez płytką wodę
Dwoje dzieci gra w piłkę na podwórku
Hnědý pes běží mělkou vodou
Barna kutya fut a sekély vízben
Sığ suda koşan kahverengi bir köpek
Коричневая собака бежит по мелкой воде
Двоє дітей грають у футбол на полі
Ένας καφέ σκύλος τρέχει μέσα στο νερό
茶色い犬が浅い水の中を走っている
一只棕色的狗在浅水中奔跑
갈색 개가 얕은 물을 달린다
كلب بني يركض في الماء الضحل
כלב חום רץ במים הרדודים
Con chó nâu chạy qua vùng nước nông
Seekor anjing cokelat berlari di air dangkal
भूरा कुत्ता उथले पानी में दौड़ रहा है
สุนัขสีน้ำตาลวิ่งในน้ำตื้น
""".strip().split("\n")
FOREIGN_PHRASES = """
un perro grande
der rote Ball
le chat noir
ein Haus am See
la maison bleue
una chica con flores
das alte Rathaus
zwei kleine Katzen
il gatto nero
een rode fiets
czerwony samochód
красная машина
赤い車
vista do mar
coucher de soleil
""".strip().split("\n")
PICTURE = np.zeros((4, 6, 3), np.uint8)


def refused(captions):
    return [caption for caption in captions if judge_language(caption) is not None]


def test_english_is_kept_and_other_languages_are_not():
    assert len(ENGLISH) == 71
    assert refused(ENGLISH) == ["Antonín Dvořák portrait"]
    assert refused(FOREIGN) == FOREIGN
    assert len(refused(FOREIGN_PHRASES)) >= 6


def test_the_language_and_its_probability_are_told():
    reason, detail = judge_language("Zwei Kinder spielen auf einer Wiese")
    assert reason == "not English (--any-language keeps it)"
    assert re.fullmatch(r"de, probability [01]\.\d\d: 'Zwei Kinder spielen auf .*'", detail)


@pytest.mark.parametrize(
    ("caption", "n"),
    [
        ("", 0),
        ("... -- !", 0),
        ("dog", 1),
        ("a dog, running.", 3),
        ("Boeing 747", 2),
        ("rock & roll", 2),
        ("red-brick house", 2),
        ("子犬", 2),
        ("강아지 사진", 2),
        ("หมา", 3),
        ("Tokyo 東京 tower", 4),
        ("an ice-cream 🍦", 2),
    ],
)
def test_words_are_counted(caption, n):
    assert count_words(caption) == n
    assert judge_length(caption, n) is None
    assert (
        judge_length(caption, n + 1)[0] == f"caption under {n + 1} words (--min-words lowers that)"
    )


def test_a_listed_word_is_found_whole_and_in_any_case(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\ufeff# not for us\ncat\n\nStraße # street\nhot dog\ncat\nT-shirt\n", "utf-8")
    words = load_words(path)
    assert words == ("cat", "Straße", "hot dog", "T-shirt")
    for caption in (
        "a CAT.",
        "the cat's tail",
        "a cat-like robot",
        "in der STRASSE",
        "a hot   dog!",
        "Hot-dog stand",
        "his t-shirt",
        "a ｃａｔ",
    ):
        reason, detail = judge_words(caption, words)
        assert reason == "a word of the --words list"
        assert detail.strip("'") in ("cat", "strasse", "hot dog", "t shirt")
    for caption in ("cats", "scatter", "hot summer, dog days", "dog hot", "", "shirt t"):
        assert judge_words(caption, words) is None


def test_a_word_list_that_would_do_nothing_is_refused(tmp_path):
    path = tmp_path / "words.txt"
    for content, match in [
        (b"", "is empty: it would keep nothing out"),
        (b"# only\n\n", "is empty"),
        (b"cat\n***\n", r"line 2: '\*\*\*' holds no letter or digit"),
        (b"caf\xe9\n", "is not UTF-8"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=match):
            load_words(path)
    with pytest.raises(InputError, match=r"gone cannot be read \(No such file"):
        load_words(tmp_path / "gone")


def test_sides_and_aspect_at_their_bounds():
    assert judge_side(256, 300, 256, upscale=False) is None
    assert judge_side(300, 255, 256, upscale=False) == (
        "side below 256 (--upscale keeps it)",
        "300x255 pixels",
    )
    assert judge_side(300, 255, 256, upscale=True) is None
    assert judge_side(8, 300, 256, upscale=True) is None
    assert judge_side(300, 7, 256, upscale=True) == ("side below 8", "300x7 pixels")
    assert judge_side(7, 7, 256, upscale=False)[0] == "side below 8"
    for width, height in ((512, 256), (256, 512), (301, 300)):
        assert judge_aspect(width, height, 2.0) is None
    for width, height in ((513, 256), (256, 513)):
        assert judge_aspect(width, height, 2.0) == (
            "aspect ratio outside [1/2, 2] (--max-aspect 0 keeps it)",
            f"{width}x{height} pixels",
        )
        assert judge_aspect(width, height, 0) is None
    assert judge_aspect(4, 3, 1.25)[0].startswith("aspect ratio outside [1/1.25, 1.25]")
    assert judge_size(600, 200, Filters())[0].startswith("side below 256")
    assert judge_size(600, 299, Filters())[0].startswith("aspect ratio")
    assert judge_size(600, 300, Filters()) is None


def test_the_cheapest_reason_comes_first_and_each_can_be_turned_off():
    settings = Filters(min_words=3, words=("katze",))
    assert judge_caption("a dog in the park", settings) is None
    steps = [
        ("Katze 1999", "caption under 3 words", {"min_words": 0}),
        ("Katze 1999", "a word of the --words list", {"words": ()}),
        ("photographed on 12 May 1999", "boilerplate caption", {"boilerplate": False}),
        ("Zwei Kinder spielen auf einer Wiese", "not English", {"english": False}),
    ]
    for caption, reason, change in steps:
        assert judge_caption(caption, settings)[0].startswith(reason)
        settings = dataclasses.replace(settings, **change)
    for caption, _, _ in steps:
        assert judge_caption(caption, settings) is None


def test_the_detector_is_not_loaded_for_nothing(monkeypatch):
    monkeypatch.setattr(filters, "_detector", None)
    assert judge_caption("ein Hund", Filters(english=False)) is None
    assert judge_caption("IMG_1234 2019", Filters())[0].startswith("boilerplate")


def test_settings_survive_json():
    settings = Filters(image_size=64, words=("a", "b c"), max_aspect=3)
    again = Filters(**json.loads(json.dumps(dataclasses.asdict(settings))))
    assert again == settings
    assert hash(again) == hash(settings)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image_size": 7}, "image size 7 is below 8 pixels: take a larger one"),
        ({"min_words": -1}, "--min-words -1 is below 0"),
        ({"max_aspect": 0.5}, "--max-aspect 0.5 is below 1, the aspect ratio of a square"),
        ({"max_aspect": float("nan")}, "--max-aspect nan"),
        ({"max_aspect": float("inf")}, "--max-aspect inf"),
    ],
)
def test_numbers_out_of_bounds_are_refused(change, match):
    with pytest.raises(InputError, match=match):
        Filters(**change)


def parsed(*flags):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return filters_of(parser.parse_args(flags), 64)


def test_flags_give_the_filters(tmp_path):
    (tmp_path / "words").write_text("cat\n")
    assert parsed() == Filters(image_size=64)
    assert parsed(
        *("--min-words", "1", "--any-language", "--keep-boilerplate", "--max-aspect", "0"),
        *("--upscale", "--words", str(tmp_path / "words")),
    ) == Filters(64, True, 1, False, False, 0.0, ("cat",))


def test_reasons_name_flags_that_exist():
    reasons = [
        judge_length("", 2),
        judge_words("cat", ("cat",)),
        judge_boilerplate("untitled"),
        judge_language(FOREIGN[0]),
        judge_side(9, 9, 10, upscale=False),
        judge_aspect(9, 1, 2.0),
    ]
    parser = argparse.ArgumentParser()
    add_flags(parser)
    for reason, detail in reasons:
        (flag,) = re.findall(r"--[\w-]+", reason)
        assert flag in parser.format_help()
        assert detail


def score(tmp_path, code, name="judge"):
    path = tmp_path / "mine.py"
    path.write_text(code)
    return load_score(f"{path}:{name}")


def test_a_user_may_bring_a_filter(tmp_path):
    judge = score(
        tmp_path,
        "def judge(pictures, captions):\n"
        "    assert all(p.dtype == 'uint8' and p.shape[2] == 3 for p in pictures)\n"
        "    return ['dull' if c == 'gray' else None for c in captions]\n",
    )
    assert judge([PICTURE, PICTURE], ["gray", "red"]) == ["dull", None]
    assert judge([], []) == []


@pytest.mark.parametrize(
    ("result", "match"),
    [
        ("[None]", r"mine.py:judge' gives a list of 1 for 2 pictures; it gives a list as long"),
        ("None", "gives None for 2 pictures"),
        ("(None, None)", r"gives \(None, None\) for 2 pictures"),
        ("[None, 0.3]", "gives 0.3; it gives None to keep a picture, else the reason"),
        ("[None, ' ']", "gives ' '; it gives None"),
        ("[None, True]", "gives True; it gives None"),
        ("1 / 0", r"fails: ZeroDivisionError: division by zero \(line 2\); correct the file"),
        ("captions[7]", r"fails: IndexError: .* \(line 2\)"),
    ],
)
def test_a_filter_that_gives_something_else_is_an_input_error(tmp_path, result, match):
    judge = score(tmp_path, f"def judge(pictures, captions):\n    return {result}\n")
    with pytest.raises(InputError, match=match):
        judge([PICTURE, PICTURE], ["a", "b"])


def test_reasons_that_could_not_be_counted_are_refused(tmp_path):
    judge = score(tmp_path, "def judge(pictures, captions):\n    return captions\n")
    for i in range(100):
        assert judge([PICTURE, PICTURE], [f"reason {i}", "reason 0"]) == [f"reason {i}", "reason 0"]
    with pytest.raises(InputError, match=r"more than 100 different reasons, such as 'reason 99'"):
        judge([PICTURE], ["reason 100"])


@pytest.mark.parametrize(
    ("code", "name", "match"),
    [
        ("", "judge", "mine.py has no function judge"),
        ("judge = 3", "judge", "has no function judge"),
        ("def judge(:", "judge", "cannot be made: SyntaxError"),
        ("import absent", "judge", r"cannot be made: ModuleNotFoundError.*absent.* \(line 1\)"),
    ],
)
def test_a_file_without_a_filter_is_an_input_error(tmp_path, code, name, match):
    with pytest.raises(InputError, match=match):
        score(tmp_path, code, name)
    with pytest.raises(InputError, match=r"there is no file nowhere\.py"):
        load_score("nowhere.py:judge")
    with pytest.raises(InputError, match="score 'nowhere': there is no file"):
        load_score("nowhere")


def test_an_input_error_of_the_filter_stays_what_it_is(tmp_path):
    judge = score(
        tmp_path,
        "from pipeline.console import InputError\n"
        "def judge(pictures, captions):\n    raise InputError('weights are missing')\n",
    )
    with pytest.raises(InputError, match=r"^weights are missing$"):
        judge([PICTURE], ["a"])
