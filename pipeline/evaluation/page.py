"""Pages of HTML that hold all they show: no network, no file beside them."""

import base64
import html

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#222}
h1{margin-bottom:0}h2{margin-top:2.2rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.25rem .9rem;text-align:right;
border-bottom:1px solid #eee}td:first-child,th:first-child{text-align:left}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:14px}
figure{margin:0}figcaption{font-size:12px;line-height:1.3;color:#444}
.pixel{image-rendering:pixelated;width:100%;max-width:150px}.wide{max-width:100%}
.sheet{image-rendering:pixelated;width:100%;max-width:900px}
"""


def page(title: str, *parts: str) -> str:
    """A page of these parts, one below the other."""
    head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
    return "\n".join([f"{head}<style>{STYLE}</style>", *parts])


def img(png: bytes, alt: str, css: str = "") -> str:
    """A picture inside the page."""
    data = base64.b64encode(png).decode()
    return f'<img class="{css}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of plain text."""
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{cells}</tr>{body}</table>"
