"""Show images inline, in terminals that can."""

from collections.abc import Callable, Sequence

from PIL import Image
from rich.console import Console
from rich.text import Text
from textual_image.renderable import Image as InlineImage
from textual_image.renderable import SixelImage, TGPImage

from cafe.errors import CafeError
from cafe.index.searching import Hit
from cafe.utils.text import escape_controls

MAX_SHOWN = 8
WIDTH, MAX_HEIGHT = 24, 24  # columns and lines of the terminal


def show_images(hits: Sequence[Hit], load_image: Callable[[Hit], Image.Image], anywhere: bool) -> None:
    """Show the first images of a search, each below its path.

    Args:
        hits: what was found.
        load_image: loads the image of a hit.
        anywhere: show them in coarse blocks of color where the terminal cannot show images.
    """
    if not anywhere and InlineImage not in (SixelImage, TGPImage):
        return
    console = Console()
    for hit in hits[:MAX_SHOWN]:
        try:
            image = load_image(hit)
        except CafeError:  # gone since it was indexed
            continue
        console.print(Text(escape_controls(hit.id)))
        # Lines are about twice as high as characters are wide; a panorama has one line at least.
        height = max(1, round(WIDTH * image.height / image.width / 2))
        console.print(InlineImage(image, width=WIDTH, height=min(height, MAX_HEIGHT)))
