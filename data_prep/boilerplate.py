"""Captions that tell of the file and not of the picture: dates, camera file names, credits.

The paper leaves out captions that are "mostly boilerplate" such as "photographed on <date>"; its
rules are not published. Here: what is boilerplate is taken out of the caption, and when no word of
its own is left, the caption is boilerplate. One such word saves it: "Photographed in Paris on
12 May 2008" stays. Written for English.
"""

import re
import unicodedata

MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
YEAR = r"(?:(?:1[5-9]|20)\d\d|['\u2019]\d\d)\b"
DAY = r"\b(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?\b"
SEPARATOR = r"[\s.,/_-]{0,3}"
# forms of digits alone (2008-05-12, 12/05/08, 14:30) need no pattern: they hold no word
DATE = "|".join(
    [
        rf"{DAY}{SEPARATOR}(?:of\s+)?\b{MONTH}(?:{SEPARATOR}(?:in\s+)?{YEAR})?",
        rf"\b{MONTH}{SEPARATOR}(?:the\s+)?{DAY}(?:{SEPARATOR}{YEAR})?",
        rf"\b(?:{MONTH}|spring|summer|autumn|fall|winter){SEPARATOR}(?:of\s+)?{YEAR}",
        r"\b(?:1[5-9]|20)\d\ds\b",
        # 2008-05-12T14:30:00Z, 2:30 pm
        r"\b\d{4}-\d\d-\d\dt\d\d:?\d\d(?::?\d\d)?(?:\.\d+)?z?\b",
        r"\b\d{1,2}(?:[:.]\d\d){0,2}\s*[ap](?:m\b|\.m\.)",
    ]
)
# what cameras, telephones, scanners and programs call their files
FILE_NAME = (
    r"(?<![^\W_])_?(?:(?:img|image|photo|picture|pic|mg|dsc[fn]?|imgp|cimg|pict|hpim|mvi|vid|pxl|sam"
    r"|gopr|dji|wp|kif|sta|scan|screenshot|untitled|unnamed|whatsapp image)[_-]?|(?:img|dsc) ?|p)"
    r"\d{3}[\w()~-]*"
)
ADDRESS = r"(?:https?://|www\.)\S+"
PHRASE = (
    r"\bno (?:title|caption|description|name)\b|\ball rights reserved\b|\bgetty images\b"
    r"|\bclick (?:here |on (?:the )?(?:image|picture|photo) )?(?:to|for)(?: a)? "
    r"(?:enlarge|larger|full size|view)(?: (?:image|picture|view|version))?\b"
)
GONE = re.compile("|".join([ADDRESS, FILE_NAME, DATE, PHRASE]))
WORD = re.compile(r"[^\W\d_]+")
_FILLER = """
    photo photos photograph photographs photographed photography picture pictures pictured pic pics
    image images img snapshot snapshots taken shot captured scanned uploaded posted untitled unnamed
    unknown date dated created modified copyright stock thumbnail placeholder default copy version
    on in at of from by the a an this was c ca circa
    monday tuesday wednesday thursday friday saturday sunday mon tue wed thu fri sat sun
    utc gmt jpg jpeg png gif bmp tif tiff webp heic nef arw
"""
FILLER = frozenset(_FILLER.split())
# "photo by Jane Doe" and its kin take names, which only their capitals tell from words
NAME = r"(?!(?:The|An?|My|Our|Night|Day)\b)[A-Z][\w.'\u2019-]*"
CREDIT = re.compile(
    r"^\W*(?:"
    r"(?i:photo(?:graph)?(?:s|ed)?|images?|pictures?|pics?|taken|shot)\s+(?i:by)"
    r"|(?i:photos?|images?|pictures?|pics?)\s+(?i:credits?|courtesy(?:\s+of)?)"
    r"|(?i:credits?|source)\s*:|(?i:courtesy\s+of)|(?i:copyright)|\([cC]\)|©"
    rf")[\s:©]*{NAME}(?:[\s,/&|]+(?:and\s+|for\s+)?{NAME}){{0,5}}[\W\d]*(?:(?:on|in|at)\b\W*)?$"
)
CREDIT_LIMIT = 200  # characters; the pattern takes the square of them


def is_boilerplate(caption: str) -> bool:
    """Whether a caption has no word of its own about the picture.

    So captions of dates ("Photographed on 12 May 2008", "taken 2008:05:12 14:30"), file names
    ("IMG_1234.JPG"), credits ("Photo by Jane Doe"), addresses, words for any picture ("untitled",
    "a photograph"), and of symbols or digits alone.
    """
    text = unicodedata.normalize("NFKC", caption)
    # lower case as long as the text, so that the places agree
    left = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    for span in reversed([match.span() for match in GONE.finditer(left)]):
        left = f"{left[: span[0]]} {left[span[1] :]}"
        text = f"{text[: span[0]]} {text[span[1] :]}"
    if all(word in FILLER for word in WORD.findall(left)):
        return True
    return len(text) <= CREDIT_LIMIT and CREDIT.search(text) is not None
