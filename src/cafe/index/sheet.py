"""Contact sheets: what a search found, as one PNG image or one self-contained HTML page."""

import io
import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, ImageDraw, ImageFont

from cafe.errors import CafeError
from cafe.images.thumbnails import PIXEL_ART_SIDE, thumbnail
from cafe.index.searching import Hit
from cafe.utils.atomic import atomic_write_bytes
from cafe.utils.text import escape_controls, shorten

SUFFIXES = (".png", ".html")
MAX_SHOWN = 400  # images on a sheet
MAX_CAPTION = 300  # characters of a caption, or of the text on a page
UNREADABLE = "cannot be read"

LoadImage = Callable[[Hit], Image.Image]

# The PNG sheet, in pixels: of twice the usual density, so that it is sharp on any screen.
_MARGIN, _GAP, _PADDING = 64, 28, 20
_IMAGE_WIDTH, _IMAGE_HEIGHT = 400, 320
_TITLE_SIZE, _TEXT_SIZE, _SMALL_SIZE = 52, 26, 22
_TITLE_HEIGHT, _TEXT_HEIGHT = 136, 96
_BAR_HEIGHT, _RADIUS, _LINE_WIDTH = 6, 18, 2
_CARD_WIDTH, _CARD_HEIGHT = _IMAGE_WIDTH, _IMAGE_HEIGHT + _TEXT_HEIGHT
_PAGE, _CARD, _LINE, _WELL = "#f6f5f2", "#ffffff", "#e4e2dd", "#ecebe7"
_INK, _SOFT, _ACCENT = "#1c1d20", "#64676e", "#2a78d6"


def check_suffix(file: Path) -> None:
    """Make sure that a contact sheet can be written to a file of this name.

    Raises:
        CafeError: its name ends neither in .png nor in .html.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise CafeError(f"The contact sheet {file} is of no kind that can be written: end its name in .png or .html.")


def write_sheet(file: Path, title: str, hits: Sequence[Hit], load_image: LoadImage) -> None:
    """Write a contact sheet: the images of some hits, with score, date and file name.

    Args:
        file: where to write it; its suffix says whether it is an image or a page.
        title: stands above the images.
        hits: what was found, of which the first 400 are shown.
        load_image: loads the image of a hit; one that it raises `CafeError` for is shown as a gap.

    Raises:
        CafeError: the file's name ends neither in .png nor in .html.
    """
    check_suffix(file)
    shown = hits[:MAX_SHOWN]
    summary = f"{len(hits):,} image{'' if len(hits) == 1 else 's'}"
    if len(shown) < len(hits):
        summary = f"The first {len(shown):,} of {summary}"
    render = _render_png if file.suffix.lower() == ".png" else _render_html
    data = render(escape_controls(title), summary, shown, load_image)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(file, data)


def file_name(hit: Hit) -> str:
    """Return the last part of a hit's id, with the number of its page or record, on one line."""
    return escape_controls(hit.path.rsplit("/", 1)[-1] + hit.id.removeprefix(hit.path))


def _load(hit: Hit, load_image: LoadImage) -> Image.Image | None:
    """Return the image of a hit; None if it cannot be read any more."""
    try:
        return load_image(hit)
    except CafeError:
        return None


def _render_html(title: str, summary: str, hits: Sequence[Hit], load_image: LoadImage) -> bytes:
    """Return a contact sheet as an HTML page."""
    template = files("cafe.index").joinpath("sheet.html.jinja").read_text(encoding="utf-8")
    # File names and captions are escaped: anyone may have written them.
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    cards = [_card(hit, _load(hit, load_image)) for hit in hits]
    html = page.from_string(template).render(title=title, summary=summary, cards=cards, unreadable=UNREADABLE)
    return html.encode(errors="replace")


def _card(hit: Hit, image: Image.Image | None) -> dict[str, Any]:
    """Lay out a hit for the page."""
    # The images within records are in no file that a link could open.
    has_file = (hit.id == hit.path or hit.page is not None) and Path(hit.path).is_absolute()
    page = "" if hit.page is None else f"#page={hit.page}"
    return {
        "name": file_name(hit),
        "path": escape_controls(hit.id),
        "link": Path(hit.path).as_uri() + page if has_file else None,
        "image": thumbnail(image) if image else None,
        "is_pixel_art": image is not None and max(image.size) <= PIXEL_ART_SIDE,
        "score": f"{hit.score:.3f}",
        "percent": round(100 * _fraction(hit.score)),
        "date": f"{hit.taken_at:%Y-%m-%d}",
        "size": f"{hit.width} × {hit.height}",
        "caption": shorten(hit.caption or hit.text, MAX_CAPTION),
    }


def _render_png(title: str, summary: str, hits: Sequence[Hit], load_image: LoadImage) -> bytes:
    """Return a contact sheet as a PNG image."""
    # Wider than high, as screens are.
    num_columns = max(3, math.ceil(math.sqrt(1.5 * len(hits))))
    num_rows = math.ceil(len(hits) / num_columns)
    width = 2 * _MARGIN + num_columns * (_CARD_WIDTH + _GAP) - _GAP
    height = 2 * _MARGIN + _TITLE_HEIGHT + num_rows * (_CARD_HEIGHT + _GAP) - (_GAP if num_rows else 0)
    # The title and the number of images, then a card for each.
    sheet = Image.new("RGB", (width, height), _PAGE)
    draw = ImageDraw.Draw(sheet)
    title_font = _font(_TITLE_SIZE, title)
    draw.text((_MARGIN, _MARGIN), _fit(title, title_font, width - 2 * _MARGIN), _INK, title_font)
    draw.text((_MARGIN, _MARGIN + _TITLE_SIZE + 16), summary, _SOFT, _font(_TEXT_SIZE, summary))
    for number, hit in enumerate(hits):
        row, column = divmod(number, num_columns)
        left = _MARGIN + column * (_CARD_WIDTH + _GAP)
        top = _MARGIN + _TITLE_HEIGHT + row * (_CARD_HEIGHT + _GAP)
        _draw_card(sheet, left, top, hit, _load(hit, load_image))
    out = io.BytesIO()
    sheet.save(out, "png")
    return out.getvalue()


def _draw_card(sheet: Image.Image, left: int, top: int, hit: Hit, image: Image.Image | None) -> None:
    """Draw a hit at a place of the sheet."""
    card = Image.new("RGB", (_CARD_WIDTH, _CARD_HEIGHT), _CARD)
    draw = ImageDraw.Draw(card)
    name = file_name(hit)
    font, small, name_font = _font(_TEXT_SIZE), _font(_SMALL_SIZE), _font(_SMALL_SIZE, name)
    # The image in the middle of its space, whatever its shape.
    draw.rectangle((0, 0, _IMAGE_WIDTH, _IMAGE_HEIGHT - 1), _WELL)
    if image is None:
        draw.text((_IMAGE_WIDTH // 2, _IMAGE_HEIGHT // 2), UNREADABLE, _SOFT, small, anchor="mm")
    else:
        scaled = _scale(image)
        card.paste(scaled, ((_IMAGE_WIDTH - scaled.width) // 2, (_IMAGE_HEIGHT - scaled.height) // 2))
    # The bar shows the score.
    bar = round(_fraction(hit.score) * _IMAGE_WIDTH)
    if bar:
        draw.rectangle((0, _IMAGE_HEIGHT, bar - 1, _IMAGE_HEIGHT + _BAR_HEIGHT - 1), _ACCENT)
    # Score and date on one line, the name of the file on the next.
    first_line, second_line = _IMAGE_HEIGHT + 38, _IMAGE_HEIGHT + 72
    date = f"{hit.taken_at:%Y-%m-%d}"
    draw.text((_PADDING, first_line), f"{hit.score:.3f}", _INK, font, anchor="ls")
    draw.text((_CARD_WIDTH - _PADDING, first_line), date, _SOFT, small, anchor="rs")
    shown_name = _fit(name, name_font, _CARD_WIDTH - 2 * _PADDING)
    draw.text((_PADDING, second_line), shown_name, _SOFT, name_font, anchor="ls")
    # A card in the color of lines, and the card itself on it, smaller by the width of a line.
    for layer, inset in ((Image.new("RGB", card.size, _LINE), 0), (card, _LINE_WIDTH)):
        box = (inset, inset, _CARD_WIDTH - inset, _CARD_HEIGHT - inset)
        cropped = layer.crop(box)
        sheet.paste(cropped, (left + inset, top + inset), _round(cropped.size))


def _round(size: tuple[int, int]) -> Image.Image:
    """Return the mask of a card with round corners, smoothed by drawing it four times as large."""
    mask = Image.new("L", (4 * size[0], 4 * size[1]))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), 4 * _RADIUS, 255)
    return mask.resize(size, Image.Resampling.BOX)


def _scale(image: Image.Image) -> Image.Image:
    """Scale an image to its space on a card; a very small one by a whole number, without smoothing."""
    fitting = min(_IMAGE_WIDTH / image.width, _IMAGE_HEIGHT / image.height)
    if max(image.size) <= PIXEL_ART_SIDE:
        factor = max(1, int(fitting))
        return image.convert("RGB").resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    size = (max(1, round(fitting * image.width)), max(1, round(fitting * image.height)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


@cache
def _load_font(size: int, is_ascii: bool) -> Any:
    """Load Pillow's own font, or for other letters than English ones that of matplotlib, which has more."""
    if is_ascii:
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _font(size: int, text: str = "") -> Any:
    """Return a font that has the letters of a text, so far as there is one without installing fonts."""
    return _load_font(size, text.isascii())


def _fit(text: str, font: Any, width: int) -> str:
    """Shorten a text in its middle until it fits a width: names often differ in their ends."""
    if font.getlength(text) <= width:
        return text
    # Bisection: a longer text is never narrower.
    fitting, too_long = 0, len(text)
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if font.getlength(_cut(text, middle)) <= width:
            fitting = middle
        else:
            too_long = middle
    return _cut(text, fitting)


def _cut(text: str, length: int) -> str:
    """Return so many characters of a text, from its beginning and its end."""
    end = length // 3
    return f"{text[: length - end]}…{text[len(text) - end :]}"


def _fraction(score: float) -> float:
    """Return a score as a fraction: without calibration it is a cosine similarity, which may be negative."""
    return min(max(score, 0.0), 1.0)
