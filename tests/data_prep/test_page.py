import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data_prep.filters import Filters
from data_prep.ledger import Ledger, merge, thumbnail
from data_prep.page import write_page

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '"><b onmouseover="alert(1)">',
    "' onload='alert(1)",
    "&lt;i&gt; &amp; <!-- ",
    "javascript:alert(1)//]]>",
    "\u202eright to left\u202c",
]
PICTURE = thumbnail(np.full((30, 60, 3), 90, np.uint8))
KNOWN = "html meta title style h1 h2 h3 p div span b small svg text rect figure figcaption img"
TAGS = {*KNOWN.split(), "table", "tr", "td", "th"}


class Page(HTMLParser):
    """Tags with their attributes, and all text outside of style."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def text(self):
        return "\n".join(self.texts)

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def make(tmp_path, ledger, facts=None, name="my set"):
    path = tmp_path / name / "report.html"
    path.parent.mkdir()
    write_page(path, name, merge([ledger.as_dict()]), facts or {})
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def small():
    ledger = Ledger(rows_in=2008)
    for i in range(2000):
        ledger.accept(
            f"in/{i}", f"a dog number {i}", width=512, height=400, n_bytes=70_000, is_val=i < 20,
            notes=["cmyk"] if i < 7 else [], thumbnail=PICTURE,
        )  # fmt: skip
    for i in range(8):
        reason = "not English (--any-language keeps it)" if i else "empty file"
        ledger.reject(f"bad/{i}", reason, f"detail {i}", caption=f"Hund {i}", thumbnail=PICTURE)
    return ledger


def test_the_page_tells_every_count(tmp_path):
    facts = {
        "Settings": dataclasses.asdict(Filters(image_size=2048)) | {"bytes": "inline"},
        "Sources": [{"name": "a.tar", "rows": 1500}, {"name": "b", "kind": "folder"}],
        "Near-duplicates": "34 rows",
    }
    text = Page(make(tmp_path, small(), facts)).text()
    for line in (
        "my set: what came in, what stayed",
        "2,008\nrows came in",
        "2,000\nwere kept \n(99.6 %)",
        "8\nwere left out \n(0.4 %)",
        "20\nof the kept are for validation \n(1.0 %)",
        "not English (--any-language keeps it)\n7 · 0.3 %",
        "empty file\n1 · under 0.1 %",
        "not English (--any-language keeps it)\n7 rows\n",
        "empty file\n1 row\n",
        "Hund 0\ndetail 0\nbad/0",
        "caption words\n4\n2,000 · 100 %",
        "shorter side, pixels\n384-511\n2,000 · 100 %",
        "picture bytes\nfrom 64 KiB\n2,000 · 100 %",
        "width to height\nfrom 5:4\n2,000 · 100 %",
        "cmyk\n7",
        "image_size\n2,048",
        "english\nyes",
        "upscale\nno",
        "words\nnone",
        "name\nrows\nkind",
        "a.tar\n1,500",
        "34 rows",
    ):
        assert line in text, line
    assert text.index("7 rows") < text.index("1 row\n")  # the commonest reason first
    assert text.count("a dog number") == 24
    assert text.count("Hund") == 4


def test_a_chart_shows_the_empty_bins_between_others(tmp_path):
    ledger = Ledger(rows_in=2)
    for words in (2, 4):
        ledger.accept("k", "dog " * words, width=9, height=9, n_bytes=9)
    text = Page(make(tmp_path, ledger)).text()
    assert "caption words\n2\n1 · 50.0 %\n3\n0\n4\n1 · 50.0 %\n" in text


def test_the_pictures_are_in_the_page(tmp_path):
    images = Page(make(tmp_path, small())).attributes("img")
    assert len(images) == 24 + 1 + 3
    for attributes in images:
        kind, _, data = attributes["src"].partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            assert image.size == (60, 30)


def test_nothing_is_fetched_or_run(tmp_path):
    html = make(tmp_path, small())
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<iframe", html.split("<h1>")[0])
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= TAGS
    (policy,) = (a["content"] for a in page.attributes("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    for tag, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on")}
        assert tag == "img" or not {"src", "href", "srcset"} & set(attributes)


def test_both_colour_schemes_are_there(tmp_path):
    html = make(tmp_path, small())
    assert "color-scheme:light dark" in html
    assert "prefers-color-scheme:dark" in html


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_stays_text_wherever_it_stands(tmp_path, hostile):
    ledger = Ledger(rows_in=2)
    ledger.accept(
        hostile, hostile, width=9, height=9, n_bytes=9, notes=[hostile], thumbnail=PICTURE
    )
    ledger.reject(hostile, hostile, hostile, caption=hostile, thumbnail=PICTURE)
    facts = {hostile: {hostile: hostile}, "list": [{hostile: hostile}], "text": [hostile, 3]}
    html = make(tmp_path, ledger, facts, name="plain")
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= TAGS
    harmless = Page(make(tmp_path, small(), {"list": [{"a": "b"}]}, name="other"))
    names = {name for _, attributes in harmless.tags for name in attributes}
    assert {name for _, attributes in page.tags for name in attributes} <= names
    # chart and heading of the reason; caption, detail, key; caption; note; heading, two cells; two
    assert page.text().count(hostile) >= 12
    assert {a["alt"] for a in page.attributes("img")} == {hostile}


def test_a_thumbnail_that_is_no_base64_is_not_shown(tmp_path):
    ledger = Ledger(rows_in=2)
    ledger.accept("a", "b", width=9, height=9, n_bytes=9, thumbnail='"><script>alert(1)</script>')
    ledger.reject("a", "b", "c", thumbnail='x" onerror="alert(1)')
    page = Page(make(tmp_path, ledger))
    assert page.attributes("img") == []
    assert "no picture" in page.text()
    assert "alert" not in page.text()


def test_a_file_name_that_is_no_unicode_does_not_stop_the_page(tmp_path):
    ledger = Ledger(rows_in=1)
    ledger.reject("dir\udcff/a", "file name not UTF-8", "\udcff")
    assert r"dir\udcff/a" in make(tmp_path, ledger)


def test_an_empty_set_has_a_page_too(tmp_path):
    text = Page(make(tmp_path, Ledger())).text()
    assert "0\nrows came in" in text
    assert "NaN" not in text
    ledger = Ledger(rows_in=1)
    ledger.accept("a", "b c", width=9, height=9, n_bytes=9)
    assert "Nothing was left out." in make(tmp_path, ledger, name="all kept")
