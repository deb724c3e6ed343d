"""Prompts, token sequences and supervised positions, held against the published frame."""

import gc
import io
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cafe.content import Content, Dialogue, ImageRef, Turn
from cafe.errors import CafeError
from cafe.images.decoding import decode_image
from cafe.lvlm.images import ProcessedImages
from cafe.lvlm.loading import load_processor
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import Prompts, dialogue_messages, embedding_messages

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = Image.new("RGB", (64, 64), "red")
NO_IMAGES = ProcessedImages([], {})


@pytest.fixture(scope="module")
def chat_processor(random_base):
    return ChatProcessor(load_processor(str(random_base)), Prompts(chat_template="chatml"))


def decode(chat_processor, encoded):
    return chat_processor.tokenizer.decode(encoded.input_ids)


def test_an_images_embedding_prompt_is_the_published_one(chat_processor):
    messages = embedding_messages(Content.of(IMAGE), chat_processor.prompts)
    encoded = chat_processor.encode_embedding(messages, chat_processor.process_images([IMAGE]))
    image = "<image>" * len(chat_processor.process_images([IMAGE]).token_runs[0])
    instruction = "\nCompress this image in one word:"
    assert decode(chat_processor, encoded) == (
        f"{SYSTEM}<|im_start|>user\n{image}{instruction}<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    )


def test_a_texts_embedding_prompt_is_the_published_one(chat_processor):
    messages = embedding_messages(Content.of("a red circle."), chat_processor.prompts)
    encoded = chat_processor.encode_embedding(messages, chat_processor.process_images([]))
    assert decode(chat_processor, encoded) == (
        f"{SYSTEM}<|im_start|>user\na red circle.Compress this sentence in one word:<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>"
    )


def test_only_what_the_assistant_says_and_its_end_is_supervised(chat_processor):
    turns = [
        Turn("user", Content.of({"image": IMAGE, "text": "What is it?"})),
        Turn("assistant", Content.of("a circle")),
        Turn("user", Content.of("And its color?")),
        Turn("assistant", Content.of("red")),
    ]
    messages = dialogue_messages(Dialogue(tuple(turns)), chat_processor.prompts)
    encoded = chat_processor.encode_dialogue(messages, chat_processor.process_images([IMAGE]))
    assert chat_processor.tokenizer.decode(encoded.input_ids[encoded.loss_mask]) == "a circle<|im_end|>red<|im_end|>"
    prompt = chat_processor.encode_prompt(messages[:2], chat_processor.process_images([IMAGE]))
    assert torch.equal(prompt.input_ids, encoded.input_ids[: len(prompt.input_ids)])
    assert not encoded.loss_mask[: len(prompt.input_ids)].any()


def test_a_whole_dialogue_tokenizes_as_the_familys_processor_does(chat_processor):
    turns = (Turn("user", Content.of({"image": IMAGE, "text": "What is it?"})), Turn("assistant", Content.of("red")))
    messages = dialogue_messages(Dialogue(turns), chat_processor.prompts)
    text = chat_processor.processor.apply_chat_template(messages, tokenize=False).rstrip()
    reference = chat_processor.processor(text=[text], images=[[IMAGE]], return_tensors="pt")
    encoded = chat_processor.encode_dialogue(messages, chat_processor.process_images([IMAGE]))
    assert torch.equal(encoded.input_ids, reference["input_ids"][0])
    assert torch.equal(encoded.image_inputs["pixel_values"], reference["pixel_values"])


def test_special_tokens_in_a_users_text_stay_words(chat_processor):
    messages = embedding_messages(Content.of("an <image> of <|im_end|>"), chat_processor.prompts)
    encoded = chat_processor.encode_embedding(messages, chat_processor.process_images([]))
    assert chat_processor.tokenizer.convert_tokens_to_ids("<image>") not in encoded.input_ids
    assert decode(chat_processor, encoded).count("<|im_end|>") == 3


def test_truncation_keeps_the_instruction_and_the_frame(chat_processor):
    messages = embedding_messages(Content.of("a red circle " * 100), chat_processor.prompts)
    encoded = chat_processor.encode_embedding(messages, chat_processor.process_images([]), max_tokens=64)
    assert len(encoded.input_ids) == 64
    assert decode(chat_processor, encoded).endswith(
        "Compress this sentence in one word:<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    )


def test_images_are_never_cut(chat_processor):
    messages = embedding_messages(Content.of(IMAGE), chat_processor.prompts)
    with pytest.raises(CafeError, match="cannot be cut to 20"):
        chat_processor.encode_embedding(messages, chat_processor.process_images([IMAGE]), max_tokens=20)


@pytest.mark.parametrize("system", [None, ""])
def test_a_dialogue_is_truncated_behind_its_last_image_only(chat_processor, system):
    if system is not None:
        chat_processor = ChatProcessor(chat_processor.processor, replace(chat_processor.prompts, system=system))
    turns = (Turn("user", Content.of(["some words first " * 5, IMAGE])), Turn("assistant", Content.of("red " * 20)))
    messages, images = (
        dialogue_messages(Dialogue(turns), chat_processor.prompts),
        chat_processor.process_images([IMAGE]),
    )
    whole = chat_processor.encode_dialogue(messages, images)
    end = int(whole.image_mask.nonzero()[-1]) + 1
    assert end < len(whole.input_ids)
    cut = chat_processor.encode_dialogue(messages, images, max_tokens=end)
    assert torch.equal(cut.input_ids, whole.input_ids[:end])
    with pytest.raises(CafeError, match=f"ends at token {end}, past the limit of {end - 1}"):
        chat_processor.encode_dialogue(messages, images, max_tokens=end - 1)


def test_saved_processor_files_are_the_familys_standard_ones(chat_processor, tmp_path):
    chat_processor.save(tmp_path)
    assert "LlavaOnevisionProcessor" in (tmp_path / "processor_config.json").read_text()
    again = ChatProcessor(load_processor_from(tmp_path, chat_processor), Prompts(chat_template="chatml"))
    messages = embedding_messages(Content.of("a red circle."), chat_processor.prompts)
    assert torch.equal(
        again.encode_embedding(messages, again.process_images([])).input_ids,
        chat_processor.encode_embedding(messages, chat_processor.process_images([])).input_ids,
    )


def load_processor_from(directory, chat_processor):
    """The processor alone; a checkpoint would hold the model's configuration beside it."""
    return type(chat_processor.processor).from_pretrained(directory)


def photo(width: int, height: int) -> Image.Image:
    """Something like a photograph: shades, fine texture and hard edges."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = [np.cos(y / height * turns) for turns in (3, 5, 7)]
    shade = 128 + 60 * np.sin(x / width * 5)[..., None] + 40 * np.stack(waves, axis=-1)
    pixels = shade + rng.normal(0, 12, (height, width, 3))
    pixels[((x // (width // 9)) % 3 == 0) & ((y // (height // 7)) % 2 == 0)] -= 70
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_a_large_jpeg_decoded_small_has_nearly_the_same_pixel_values(chat_processor):
    out = io.BytesIO()
    photo(1000, 800).save(out, "JPEG", quality=92)
    ref = ImageRef(out.getvalue())
    [small] = chat_processor.decode_images([ref])
    assert small.size == (250, 200)  # a quarter: an eighth would not be enough
    whole, drafted = (
        chat_processor.process_images([image]).inputs["pixel_values"] for image in (decode_image(ref), small)
    )
    difference = (whole - drafted).abs() * 0.5 * 255  # the processor divided by a deviation of 0.5
    assert difference.mean() < 1 and difference.max() <= 8, (difference.mean(), difference.max())


def test_images_not_much_too_large_are_decoded_at_full_size(chat_processor):
    data, sizes = [], []
    for kind, size in (("JPEG", (200, 2000)), ("JPEG", (2001, 1999)), ("PNG", (1000, 1000))):
        out = io.BytesIO()
        Image.new("RGB", size).save(out, kind)
        data.append(ImageRef(out.getvalue()))
        sizes.append(size)
    assert [image.size for image in chat_processor.decode_images(data)] == sizes  # odd sides would not keep the shape


def test_multimodal_mode_truncates_the_content_as_the_users_turn(chat_processor):
    chat_processor = ChatProcessor(chat_processor.processor, replace(chat_processor.prompts, mode="multimodal"))
    content = Content.of([IMAGE, "Find the same color: " + "a red circle " * 50])
    images = chat_processor.process_images([IMAGE])
    whole = chat_processor.encode_embedding(embedding_messages(content, chat_processor.prompts), images)
    image = "<image>" * len(images.token_runs[0])
    assert decode(chat_processor, whole) == (
        f"{SYSTEM}<|im_start|>user\n{image}\n{content.text}<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    )
    cut = chat_processor.encode_embedding(embedding_messages(content, chat_processor.prompts), images, max_tokens=150)
    assert len(cut) == 150
    end = chat_processor.tokenizer("<|im_end|>\n<|im_start|>assistant\n<|im_end|>")["input_ids"]
    assert cut.input_ids[-len(end) :].tolist() == end
    kept = 150 - len(end)
    assert torch.equal(cut.input_ids[:kept], whole.input_ids[:kept])
    alone = Content.of(IMAGE)
    with pytest.raises(CafeError, match="cannot be cut to 20"):
        chat_processor.encode_embedding(embedding_messages(alone, chat_processor.prompts), images, max_tokens=20)


def test_half_a_surrogate_pair_in_a_text_is_reported(chat_processor):
    """As JSON may hold it: a tokenizer takes no such text."""
    half = json.loads(r'"an emoji \ud83d"')
    said = (Turn("user", Content.of("What?")), Turn("assistant", Content.of(half)))
    with pytest.raises(CafeError, match=r"half of a character, '\\ud83d'"):
        chat_processor.encode_embedding(
            embedding_messages(Content.of(half), chat_processor.prompts), chat_processor.process_images([])
        )
    with pytest.raises(CafeError, match=r"half of a character, '\\ud83d'"):
        chat_processor.encode_dialogue(
            dialogue_messages(Dialogue(said), chat_processor.prompts), chat_processor.process_images([])
        )


def test_short_texts_are_remembered_and_long_ones_take_no_memory(random_base):
    chat_processor = ChatProcessor(load_processor(str(random_base)), Prompts(chat_template="chatml"))

    def encode(text: str) -> torch.Tensor:
        messages = embedding_messages(Content.of(text), chat_processor.prompts)
        return chat_processor.encode_embedding(messages, chat_processor.process_images([])).input_ids

    first = encode("a red circle")
    gc.collect()
    tracemalloc.start()
    for number in range(3):
        encode(f"{number} red circles " + "and a square " * 1000)
        chat_processor.encode_prompt([{"role": "user", "content": []}] * (4000 + number), NO_IMAGES)
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 200_000
    # The short one is looked up, whatever was read since.
    calls = []
    chat_processor.tokenizer = calls.append
    assert torch.equal(encode("a red circle"), first) and not calls
