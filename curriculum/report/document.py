"""Pieces of a self-contained HTML page: embedded figures, tables, notes, the page around them, its style."""

import base64
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from isomorph.curriculum.report.vector import DARK_PAGE, LIGHT_PAGE, themed_svg
from isomorph.engine.foreign import printable


def escaped(text: object) -> str:
    """``text`` as HTML that shows it: tags, quotes, control characters and marks of direction are written out."""
    return html.escape(printable(str(text)))


class Album:
    """Saves figures as PNG files and returns them as HTML with the drawing embedded, for wide and narrow screens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wide_only = False

    def add(self, name: str, draw: Callable[..., Figure], caption: str) -> str:
        """HTML with the figure that ``draw(narrow=...)`` makes, which is also written to ``name``.png.

        Its own drawing for narrow screens is left out where the album is ``wide_only``: drawing takes most of the time.
        """
        wide = draw(narrow=False)
        shown, source = _data_address(themed_svg(wide)), ""
        if not self.wide_only:
            narrow = _data_address(themed_svg(draw(narrow=True)))
            source = f'<source media="(max-width: {NARROW_PX}px)" srcset="{narrow}">'
        wide.set_layout_engine("none")  # it is laid out by now, which is most of the time that drawing takes
        with (self.folder / f"{name}.png").open("wb") as file:
            FigureCanvasAgg(wide).print_png(file)  # draws once; savefig draws twice
        alt = escaped(caption)
        return (
            f'<figure><picture>{source}<img alt="{alt}" src="{shown}"></picture>'
            f"<figcaption>{alt}</figcaption></figure>\n"
        )


def _data_address(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def note(text: str) -> str:
    """A paragraph in small grey letters."""
    return f'<p class="note">{escaped(text)}</p>'


def warning(text: str) -> str:
    """A paragraph that stands out."""
    return f'<p class="warning">{escaped(text)}</p>'


def bullets(sentences: Sequence[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{escaped(sentence)}</li>" for sentence in sentences) + "</ul>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, css: str = "numbers") -> str:
    """An HTML table; without titles where all of ``head`` are empty.

    ``css``: numbers or facts; on a narrow screen, with "cards", a row is a card of its own, each value beside its
    title; with "brief", the second and third column lose their intervals.
    """
    titles = "".join(f"<th>{escaped(cell)}</th>" for cell in head)
    labels = [f' data-label="{escaped(cell)}"' if "cards" in css else "" for cell in head]
    lines = ["".join(f"<td{label}>{_cell(cell)}</td>" for label, cell in zip(labels, row, strict=True)) for row in rows]
    top = f"<thead><tr>{titles}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table class="{css}">{top}<tbody>{body}</tbody></table></div>\n'


def _cell(text: str) -> str:
    """Escaped; an interval at its end is small, and stays on one line."""
    shown = escaped(text.replace("->", "→"))  # browsers break lines inside "->"
    return INTERVAL.sub(r' <span class="interval">\1</span>', shown)


# of a cell: what follows the last space before a bracket, such as in "41.7% [36.2%, 47.3%]" or "+3.1 (-1.0 to +7.2)"
INTERVAL = re.compile(r" (\[[^\[\]]*\]|\([-+][^()]*\))(?=[*†]?$)")
NARROW_PX = 640  # a screen up to this width is narrow
STYLE = f"""
:root {{ color-scheme: light dark; --page: {LIGHT_PAGE}; --ink: #222; --soft: #5c6168; --line: #e0e2e5; --box: #f4f5f7;
  --prompt: #eaf2fb; --warn: #fff3cd; --warn-line: #e0a800; --link: #0b57a4; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: {DARK_PAGE}; --ink: #e4e6e9; --soft: #a3a9b1; --line: #343a42;
  --box: #1f242a; --prompt: #1b2836; --warn: #3a3010; --warn-line: #c79a1b; --link: #7fb8f0; }} }}
* {{ box-sizing: border-box; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 64rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }}
h2 {{ font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 2px solid var(--line); }}
h3 {{ font-size: 1.1rem; margin: 1.8rem 0 .4rem; }} h4 {{ font-size: 1rem; margin: 1.2rem 0 .3rem; }}
a {{ color: var(--link); }} ul {{ padding-left: 1.2rem; margin: .5rem 0; }}
.scroll {{ overflow-x: auto; max-width: 100%; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; overflow-wrap: normal; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
table.numbers th, table.numbers td {{ text-align: right; }}
table.numbers th:first-child, table.numbers td:first-child {{ text-align: left; min-width: 5.5rem; }}
table.facts {{ overflow-wrap: anywhere; }}
table.facts td:first-child {{ color: var(--soft); white-space: nowrap; }}
.interval {{ color: var(--soft); font-size: .85em; white-space: nowrap; }}
figure {{ margin: 1rem 0; }} img {{ width: 100%; height: auto; display: block; }}
figcaption, .note {{ color: var(--soft); font-size: .85rem; margin: .4rem 0; }}
.warning {{ background: var(--warn); padding: .6rem .8rem; border-left: 4px solid var(--warn-line); }}
pre {{ background: var(--box); padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem;
  margin: .3rem 0; }}
pre.prompt {{ background: var(--prompt); }} summary {{ cursor: pointer; font-size: .9rem; }}
details.run > summary {{ font-size: 1.1rem; font-weight: bold; padding: .5rem 0; }}
@media (max-width: {NARROW_PX}px) {{
  body {{ padding: .7rem; }} table {{ font-size: .8rem; }} th, td {{ padding: .2rem .3rem; }}
  table.cards thead {{ display: none; }} table.cards, table.cards tbody {{ display: block; width: 100%; }}
  table.cards tr {{ display: block; border-bottom: 2px solid var(--line); padding: .3rem 0; }}
  table.cards td {{ display: block; border: 0; padding: .1rem .2rem; min-height: 1.4em; }}
  table.cards td::before {{ content: attr(data-label); color: var(--soft); float: left; padding-right: 1rem; }}
  table.cards td:first-child {{ font-weight: bold; }} table.cards td:first-child::before {{ content: none; }}
}}
@media (max-width: {NARROW_PX}px) {{
  table.brief td:nth-child(2) .interval, table.brief td:nth-child(3) .interval {{ display: none; }}
  table.numbers th:first-child, table.numbers td:first-child {{ min-width: 4rem; }}
}}
@media print {{ details {{ display: block; }} figure, tr {{ break-inside: avoid; }} }}
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
