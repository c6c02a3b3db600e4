"""Pieces of a self-contained HTML page: figures as embedded PNGs, tables, notes, the page around them."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from isomorph.engine.foreign import printable


def escaped(text: object) -> str:
    """``text`` as HTML that shows it: tags, quotes, control characters and marks of direction are written out."""
    return html.escape(printable(str(text)))


class Album:
    """Saves figures as PNG files and returns them as HTML with the image embedded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, figure: Figure, caption: str) -> str:
        """HTML with the figure, which is also written to ``name``.png."""
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)  # draws once; savefig draws twice
        (self.folder / f"{name}.png").write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        alt = escaped(caption)
        return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{alt}</figcaption></figure>\n'


def note(text: str) -> str:
    """A paragraph in small grey letters."""
    return f'<p class="note">{escaped(text)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, css: str = "numbers") -> str:
    """An HTML table; without titles where all of ``head`` are empty. ``css``: numbers or facts."""
    titles = "".join(f"<th>{escaped(cell)}</th>" for cell in head)
    # browsers break lines inside "->"
    lines = ["".join(f"<td>{escaped(cell.replace('->', '→'))}</td>" for cell in row) for row in rows]
    top = f"<thead><tr>{titles}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table class="{css}">{top}<tbody>{body}</tbody></table></div>\n'


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 2px solid #ddd; }
h3 { font-size: 1.1rem; margin-top: 1.8rem; } h4 { font-size: 1rem; margin-bottom: .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top; }
table.numbers th, table.numbers td { text-align: right; white-space: nowrap; }
table.numbers th:first-child, table.numbers td:first-child { text-align: left; white-space: normal; min-width: 7rem; }
table.facts td:first-child { color: #666; white-space: nowrap; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption, .note { color: #666; font-size: .85rem; }
.warning { background: #fff3cd; padding: .6rem .8rem; border-left: 4px solid #e0a800; }
pre { background: #f6f6f6; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem;
  margin: .3rem 0; }
pre.prompt { background: #eef4fb; } summary { cursor: pointer; font-size: .9rem; }
"""


def page(title: str, body: str) -> str:
    """The whole page; ``title`` is escaped, ``body`` is HTML."""
    shown = escaped(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>isomorph: {shown}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>isomorph: {shown}</h1>\n{body}\n</body>\n</html>\n"
    )
