"""What routes do with requests alike: check the model's name, and encode inputs away from the event loop."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

from cafe.content import ImageRef
from cafe.errors import RecordError
from cafe.serving.encoding import ContextLengthError
from cafe.serving.errors import ApiError
from cafe.serving.services import Services

Result = TypeVar("Result")

LONG_TEXT = 10_000  # characters; what is longer is tokenized in a thread, because it takes milliseconds


def check_model_id(model: str | None, services: Services) -> None:
    """Make sure that a request means the model that is served. The owner before a Hub id's slash may be left out.

    Raises:
        ApiError: it means another.
    """
    # Some clients send what follows the slash alone.
    names = (None, services.model_id, services.model_id.rpartition("/")[2])
    if model not in names:
        raise ApiError(404, "model_not_found", f"There is no such model here: this is {services.model_id}.", "model")


def encode(work: Callable[[], Result], refs: Sequence[ImageRef], where: str) -> Result:
    """Encode an input, and say which of its images cannot be read.

    Args:
        work: encodes it.
        refs: its images.
        where: what the input is called.

    Raises:
        ApiError: it cannot be encoded.
    """
    try:
        return work()
    except ContextLengthError as error:
        raise ApiError(400, "context_length_exceeded", f"{where}: {error}", where) from None
    except RecordError as error:
        # Its text quotes the decoder, so it is searched for the name of the image, and not repeated.
        if not refs:
            message = f"{where}: the model's chat template refuses these turns or words."
            raise ApiError(400, "invalid_value", message, where) from None
        # The longest first, because image 1 is in image 12.
        names = sorted((ref.name for ref in refs), key=len, reverse=True)
        name = next((name for name in names if name in str(error)), "image")
        pixels = refs[0].limits.max_pixels
        message = f"{where}: the {name} cannot be read: it should be a PNG, JPEG, WebP or similar file of at most "
        raise ApiError(400, "image_decode_failed", f"{message}{pixels:,} pixels.", where) from None


async def run_encoding(work: Callable[[], Result], has_images: bool, num_characters: int = 0) -> Result:
    """Run work that encodes inputs: at once if it is for few words, which take less time than a thread.

    Args:
        work: encodes inputs.
        has_images: whether it waits for images.
        num_characters: of the texts that it tokenizes.
    """
    return await run_in_threadpool(work) if has_images or num_characters > LONG_TEXT else work()
