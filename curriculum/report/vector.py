"""Figures as SVG text that follows the reader's choice of a light or a dark page."""

import colorsys
import io
import re

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

LIGHT_PAGE, DARK_PAGE = "#ffffff", "#15181c"  # background of a page
DARK_INK = 0.92  # lightness (HLS) that black becomes on a dark page
MIN_COLOUR_LIGHTNESS = 0.62  # of a colour there, so that the darkest line stays visible
MAX_SATURATION = 0.75  # of a colour there
MIN_SATURATION = 0.15  # below it a colour is a grey: it is inverted
COLOUR = re.compile(r"#[0-9a-f]{6}\b")
FAMILIES = re.compile(r"font-family: [^;\"]*; ")
PLACES = re.compile(r' (?:d|x|y|transform)="[^"]*"')  # attributes that hold points
DECIMALS = re.compile(r"(\.\d)\d+")  # of a point: a tenth of it is less than a pixel
USELESS = re.compile(r' transform="rotate\(-0 [^"]*"|(?<=<g) id="[^"]*"')


def dark(colour: str) -> str:
    """What ``colour`` ("#rrggbb") becomes on a dark page: greys are inverted, colours keep their hue."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    if saturation < MIN_SATURATION or lightness > 0.97:
        if lightness > 0.995:
            return DARK_PAGE
        lowest = colorsys.rgb_to_hls(*(int(DARK_PAGE[i : i + 2], 16) / 255 for i in (1, 3, 5)))[1]
        lightness, saturation = lowest + (1 - lightness) * (DARK_INK - lowest), 0.0
    else:
        lightness, saturation = max(lightness, MIN_COLOUR_LIGHTNESS), min(saturation, MAX_SATURATION)
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, saturation))


def themed_svg(figure: Figure) -> str:
    """``figure`` as an SVG element without addresses, whose colours are those of the reader's theme."""
    buffer = io.StringIO()
    # text stays text; equal figures have equal bytes
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "isomorph"}):
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg ") :]  # without the document type
    found = sorted({"#000000", *COLOUR.findall(text)})
    text = re.sub(r'style="[^"]*"', _themed_style, USELESS.sub("", text))
    text = re.sub(r"\n\s*", " ", PLACES.sub(lambda match: DECIMALS.sub(r"\1", match[0]), text))
    light = "".join(f"{_name(colour)}:{colour};" for colour in found)
    by_night = "".join(f"{_name(colour)}:{dark(colour)};" for colour in found)
    style = (
        f"<style>svg{{{light}fill:var({_name('#000000')});font-family:system-ui,sans-serif}}"
        f"@media (prefers-color-scheme: dark){{svg{{{by_night}}}}}</style>"
    )
    end = text.index(">") + 1
    return text[:end] + style + text[end:]


def _name(colour: str) -> str:
    return f"--c{colour[1:]}"


def _themed_style(match: re.Match[str]) -> str:
    return COLOUR.sub(_variable, FAMILIES.sub("", match[0]))


def _variable(match: re.Match[str]) -> str:
    return f"var({_name(match[0])})"
