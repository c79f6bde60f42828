"""The ledger of a set as one page: what came in, what went out, what was left out and why.

The page holds its pictures and asks nothing of the network. Captions and file names come from
anywhere, so every text is escaped, and the browser is told to run and load nothing.
"""

import base64
import binascii
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from data_prep.ledger import BINS
from pipeline.files import write_bytes

STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#5d6670;--line:#d8dde3;--page:#fff;
--card:#f5f7f9;--kept:#2f7d57;--lost:#c05a2b}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#98a2ad;--line:#333b44;--page:#14181c;
--card:#1c2127;--kept:#58b98a;--lost:#e08a5c}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2.2rem auto 4rem;padding:0 1.2rem;
color:var(--ink);background:var(--page)}
h1{font-size:1.7rem;margin:0}h2{font-size:1.2rem;margin:2.6rem 0 .8rem;padding-bottom:.3rem;
border-bottom:1px solid var(--line)}h3{font-size:1rem;margin:0 0 .5rem}
p{max-width:44rem;color:var(--soft);margin:.3rem 0}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.3rem 0}
.tile{background:var(--card);border-radius:8px;padding:.6rem 1.1rem;min-width:10rem}
.tile b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft)}
svg{display:block;max-width:100%;height:auto}
svg text{font:12.5px system-ui,sans-serif;fill:var(--ink)}
svg .n{fill:var(--soft)}svg rect{fill:var(--kept)}svg .lost{fill:var(--lost)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(310px,1fr));gap:1.6rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(120px,1fr));gap:1rem}
.grid figure,.row{min-width:0}figure{margin:0}figcaption{font-size:12px;line-height:1.35}
img{display:block;border-radius:4px;max-width:96px;max-height:96px;background:var(--card)}
.reason{background:var(--card);border-radius:8px;padding:.8rem 1.1rem;margin:.8rem 0}
.reason h3 small{font-weight:400;color:var(--soft);margin-left:.6rem}
.rows{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:.6rem 1.2rem}
.row{display:flex;gap:.9rem;align-items:flex-start;font-size:13px}.row .text{min-width:0;flex:1}
.none{width:96px;flex:none;text-align:center;color:var(--soft);border:1px dashed var(--line);
border-radius:4px;padding:.5rem 0}.row img{flex:none}.shown{width:96px;flex:none}
.key,.detail,.caption,td{overflow-wrap:anywhere}.key{color:var(--soft);font-size:12px}
.caption{font-style:italic}
table{border-collapse:collapse;font-size:14px}td,th{padding:.25rem 1.2rem .25rem 0;text-align:left;
vertical-align:top;border-bottom:1px solid var(--line);font-weight:400}th{color:var(--soft)}
td.count{text-align:right;font-variant-numeric:tabular-nums}
"""
# no script, no frame, no form and no address, whatever a caption says
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'"
CHARTS = {"labels": 128, "bars": 130, "row": 21}  # pixels


def write_page(path: Path, name: str, summary: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the page about a set.

    Args:
        path: of the .html file; it appears whole or not at all.
        name: its heading; not the folder's, for equal sets have equal pages.
        summary: as ``data_prep.ledger.merge`` gives it.
        facts: what else to tell, in its order: a heading and JSON values under it. A dictionary
            becomes a line for each entry, a list of dictionaries a table.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
        "<meta name=viewport content='width=device-width'>",
        f"<title>{escape(name)}: what came in</title><style>{STYLE}</style>",
        f"<h1>{escape(name)}: what came in, what stayed</h1>",
        _tiles(summary),
        _overview(summary),
        _left_out(summary),
        _kept(summary),
        _charts(summary["histograms"]),
        _notes(summary["notes"]),
        *(_section(heading, content) for heading, content in facts.items()),
    ]
    # file names that are no Unicode would otherwise stop here
    write_bytes(path, "\n".join(filter(None, parts)).encode("utf-8", "backslashreplace"))


def _share(n: int, total: int) -> str:
    """A percentage that is 0 and 100 only for none and all."""
    percent = 100 * n / total if total else 0.0
    digits = 0 if percent in (0, 100) else 1
    text = f"{percent:.{digits}f}"
    if digits and text in ("0.0", "100.0"):
        text = "under 0.1" if percent < 1 else "over 99.9"
    return f"{text} %"


def _by_count(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def _tiles(summary: dict[str, Any]) -> str:
    rows_in, rows_out = summary["rows_in"], summary["rows_out"]
    tiles = [
        ("rows came in", rows_in, ""),
        ("were kept", rows_out, _share(rows_out, rows_in)),
        ("were left out", rows_in - rows_out, _share(rows_in - rows_out, rows_in)),
        ("of the kept are for validation", summary["val_rows"],
         _share(summary["val_rows"], rows_out)),
    ]  # fmt: skip
    return "<div class=tiles>{}</div>".format(
        "".join(
            f"<div class=tile><b>{n:,}</b>{what}{f' <span>({share})</span>' if share else ''}</div>"
            for what, n, share in tiles
        )
    )


def _bars(rows: list[tuple[str, int]], total: int, labels: int, bars: int, css: str) -> str:
    """Horizontal bars as SVG: label, bar and count of each row; ``labels``, ``bars`` in pixels."""
    step, longest = CHARTS["row"], max((n for _, n in rows), default=1) or 1
    parts = []
    for i, (label, n) in enumerate(rows):
        y, width = i * step, bars * n / longest
        count = f"{n:,} · {_share(n, total)}" if n else "0"
        parts.append(
            f'<text x="0" y="{y + 15}">{escape(label[: labels // 7])}</text>'
            f'<rect class="{css}" x="{labels}" y="{y + 5}" width="{width:.1f}" height="12" rx="2"/>'
            f'<text class="n" x="{labels + width + 6:.1f}" y="{y + 15}">{count}</text>'
        )
    width, height = labels + bars + 130, len(rows) * step
    return (
        f'<svg role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"{''.join(parts)}</svg>"
    )


def _overview(summary: dict[str, Any]) -> str:
    """All reasons, the commonest first."""
    if not summary["rejects"]:
        return "<p>Nothing was left out.</p>" if summary["rows_in"] else ""
    bars = _bars(_by_count(summary["rejects"]), summary["rows_in"], 430, 350, "lost")
    return f"<h2>Why rows were left out</h2>{bars}"


def _image(thumbnail: str, alt: str) -> str:
    try:
        base64.b64decode(thumbnail, validate=True)
    except (binascii.Error, ValueError):
        return ""
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{thumbnail}">'


def _left_out(summary: dict[str, Any]) -> str:
    """Examples of each reason."""
    blocks = []
    for reason, n in _by_count(summary["rejects"]):
        examples = summary["examples"].get(reason, [])
        rows = "".join(map(_example, examples))
        count = f"{n:,} row{'s' * (n != 1)}"
        blocks.append(
            f"<div class=reason><h3>{escape(reason)}<small>{count}</small></h3>"
            f"<div class=rows>{rows}</div></div>"
        )
    return f"<h2>Examples of what was left out</h2>{''.join(blocks)}" if blocks else ""


def _example(example: dict[str, str]) -> str:
    shown = _image(example["thumbnail"], example["caption"]) if example["thumbnail"] else ""
    picture = f"<div class=shown>{shown}</div>" if shown else "<div class=none>no picture</div>"
    texts = "".join(
        f'<div class={name} dir="auto">{escape(example[name])}</div>'
        for name in ("caption", "detail", "key")
        if example[name]
    )
    return f"<div class=row>{picture}<div class=text>{texts}</div></div>"


def _kept(summary: dict[str, Any]) -> str:
    figures = "".join(
        f"<figure>{_image(example['thumbnail'], example['caption'])}"
        f'<figcaption dir="auto" title="{escape(example["key"])}">{escape(example["caption"])}'
        "</figcaption></figure>"
        for example in summary["accepted"]
    )
    return f"<h2>Some of what was kept</h2><div class=grid>{figures}</div>" if figures else ""


def _charts(histograms: dict[str, dict[str, int]]) -> str:
    charts = []
    for name, bins in BINS.items():
        counts = histograms.get(name, {})
        used = [i for i, label in enumerate(bins.labels) if counts.get(label)]
        if used:
            rows = [(label, counts.get(label, 0)) for label in bins.labels[used[0] : used[-1] + 1]]
            bars = _bars(rows, sum(counts.values()), CHARTS["labels"], CHARTS["bars"], "")
            charts.append(f"<div><h3>{escape(name)}</h3>{bars}</div>")
    return f"<h2>What was kept</h2><div class=charts>{''.join(charts)}</div>" if charts else ""


def _notes(notes: dict[str, int]) -> str:
    if not notes:
        return ""
    return "<h2>Noted about kept rows</h2><p>Nothing is wrong with these rows.</p>" + _table(
        ["note", "rows"], [[note, n] for note, n in _by_count(notes)]
    )


def _section(heading: str, content: Any) -> str:
    title = f"<h2>{escape(str(heading))}</h2>"
    if isinstance(content, dict):
        return title + _table([], [[name, _text(value)] for name, value in content.items()])
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        head = list(dict.fromkeys(name for entry in content for name in entry))
        return title + _table(head, [[entry.get(name, "") for name in head] for entry in content])
    return title + f"<p>{escape(_text(content))}</p>"


def _table(head: list[str], rows: Iterable[list[Any]]) -> str:
    cells = "".join(f"<th>{escape(str(name))}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table>{f'<tr>{cells}</tr>' if head else ''}{body}</table>"


def _cell(value: Any) -> str:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f'<td{" class=count" if is_count else ""} dir="auto">{escape(_text(value))}</td>'


def _text(value: Any) -> str:
    """A value for people: yes and no, 1,000, words as they are, the rest as JSON."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str):
        return value or "none"
    if isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
        return ", ".join(value) or "none"
    return json.dumps(value, ensure_ascii=False)
