"""One HTML page that opens with no network: tables and figures inside it, all text escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, one colour per modality: distinct under every common colour blindness.
MODALITY_COLOURS = {"grid": "#009E73", "series": "#0072B2", "trace": "#D55E00"}
_DPI = 110
_STYLE = """
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #1a1a1a;
  margin: 0 auto; max-width: 80rem; padding: 2rem 1.5rem 5rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; }
p, li { max-width: 52rem; } .quiet { color: #555; } figure { margin: 1.2rem 0; }
figcaption { color: #444; font-size: .92rem; max-width: 52rem; } img { max-width: 100%; height: auto; }
.wide { overflow: auto; max-height: 40rem; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .22rem .6rem; white-space: nowrap; border-bottom: 1px solid #e3e3e3; }
th { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #1a1a1a; } td.number { text-align: right; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The page; `parts` are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, of no window."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure's image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI, format="png")
    return buffer.getvalue()


def figure(drawn: Figure, caption: str) -> str:
    """The figure as HTML, its image inside."""
    image, words = base64.b64encode(png(drawn)).decode(), text(caption)
    return f'<figure><img alt="{words}" src="data:image/png;base64,{image}"><figcaption>{words}</figcaption></figure>'


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, numbers: tuple[str, ...]) -> str:
    """A table as HTML; the columns `numbers` are set to the right."""
    top = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=number' if name in numbers else ''}>{text(cell)}</td>"
            for name, cell in zip(head, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f"<div class='wide'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def text(value: object) -> str:
    """Escaped for HTML."""
    return html.escape(str(value))
