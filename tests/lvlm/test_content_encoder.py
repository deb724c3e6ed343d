"""The encoder of contents: which images are the same, and what is kept of them."""

import gc
import io

import pytest
from model_samples import SMALL, WIDE, make, noise_image

from cafe.content import Content, ImageLimits, ImageRef
from cafe.errors import RecordError
from cafe.lvlm.content_encoder import ContentEncoder


@pytest.fixture(scope="module")
def chat_processor():
    return make("llava").chat_processor


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The images that were decoded, by what messages call them."""
    names = []
    decode = ContentEncoder.__init__.__globals__["ChatProcessor"].load_images
    monkeypatch.setattr(
        "cafe.lvlm.processing.ChatProcessor.load_images",
        lambda self, refs: names.extend(map(str, refs)) or decode(self, refs),
    )
    return names


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["path", "bytes", "Pillow"])
def test_an_image_is_loaded_once_for_all_contents_that_name_it(kind, chat_processor, decoded, tmp_path):
    path = tmp_path / "wide.png"
    WIDE.save(path)
    # Each time another object, except of a Pillow image.
    image = {"path": lambda: str(path), "bytes": lambda: png(WIDE), "Pillow": lambda: WIDE}[kind]
    encoder = ContentEncoder(chat_processor)
    branches = [encoder.encode_embedding(Content.of({"image": image(), "text": text})) for text in ("what?", "where?")]
    branches.append(encoder.encode_prompt(Content.of({"image": image()})))
    branches += encoder.encode_answers(Content.of([{"image": image()}, "what?"]), ["a circle", "a square"])
    branches += encoder.encode_described({"path": str(path), "bytes": png(WIDE), "Pillow": WIDE}[kind], "What?")
    assert len({id(branch.image_inputs) for branch in branches}) == 1
    assert len(decoded) == 1
    ContentEncoder(chat_processor).encode_embedding(Content.of({"image": image()}))
    assert len(decoded) == 2  # another encoder knows nothing of it


def test_sets_of_images_in_another_order_or_number_are_not_the_same(chat_processor, decoded):
    encoder = ContentEncoder(chat_processor)
    contents = [[SMALL, WIDE], [WIDE, SMALL], [WIDE], [SMALL, " and ", WIDE]]
    branches = [encoder.encode_embedding(Content.of(content)) for content in contents]
    assert len({id(branch.image_inputs) for branch in branches}) == 3 and len(decoded) == 5
    assert branches[0].image_inputs is branches[3].image_inputs


def test_images_that_are_gone_are_not_taken_for_new_ones(chat_processor):
    """The memory of an image that nobody holds is given to the next, which has the same identity then."""
    encoder = ContentEncoder(chat_processor)
    seen = []
    for seed in range(8):
        branch = encoder.encode_embedding(Content.of(noise_image(seed)))
        seen.append(branch.image_inputs["pixel_values"].double().sum().item())
        del branch
        gc.collect()
    assert len(set(seen)) == 8


def test_other_limits_are_checked_of_the_same_image(chat_processor, tmp_path):
    encoder = ContentEncoder(chat_processor)
    path = tmp_path / "wide.png"
    WIDE.save(path)
    encoder.encode_embedding(Content((ImageRef(path),)))
    with pytest.raises(RecordError, match="over the limit of 100"):
        encoder.encode_embedding(Content((ImageRef(path, ImageLimits(max_pixels=100)),)))


def test_an_image_that_cannot_be_read_is_an_error_each_time(chat_processor, tmp_path):
    encoder = ContentEncoder(chat_processor)
    for _ in range(2):
        with pytest.raises(RecordError, match="does not exist"):
            encoder.encode_embedding(Content.of(tmp_path / "gone.png"))
