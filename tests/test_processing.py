"""Prompts, token sequences and supervised positions, held against the published frame."""

import pytest
import torch
from PIL import Image

from cafe.content import Content, Dialogue, Turn
from cafe.errors import CafeError
from cafe.instructions import Prompts, dialogue_messages, embedding_messages
from cafe.processing import Processing, load_processor

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PICTURE = Image.new("RGB", (64, 64), "red")


@pytest.fixture(scope="module")
def processing(random_base):
    return Processing(load_processor(str(random_base)), Prompts(chat_template="chatml"))


def decode(processing, encoded):
    return processing.tokenizer.decode(encoded.input_ids)


def test_an_images_embedding_prompt_is_the_published_one(processing):
    messages = embedding_messages(Content.of(PICTURE), processing.prompts)
    encoded = processing.encode_embedding(messages, processing.pictures([PICTURE]))
    image = "<image>" * (
        16 + 16 + 4
    )  # a thumbnail of 4 x 4 tokens, a crop of as many, a newline after each of its rows
    instruction = "\nCompress this image in one word:"
    assert decode(processing, encoded) == (
        f"{SYSTEM}<|im_start|>user\n{image}{instruction}<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    )


def test_a_texts_embedding_prompt_is_the_published_one(processing):
    messages = embedding_messages(Content.of("a red circle."), processing.prompts)
    encoded = processing.encode_embedding(messages, processing.pictures([]))
    assert decode(processing, encoded) == (
        f"{SYSTEM}<|im_start|>user\na red circle.Compress this sentence in one word:<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>"
    )


def test_only_what_the_assistant_says_and_its_end_is_supervised(processing):
    turns = [
        Turn("user", Content.of({"image": PICTURE, "text": "What is it?"})),
        Turn("assistant", Content.of("a circle")),
        Turn("user", Content.of("And its color?")),
        Turn("assistant", Content.of("red")),
    ]
    messages = dialogue_messages(Dialogue(tuple(turns)), processing.prompts)
    encoded = processing.encode_dialogue(messages, processing.pictures([PICTURE]))
    assert processing.tokenizer.decode(encoded.input_ids[encoded.supervised]) == "a circle<|im_end|>red<|im_end|>"
    prompt = processing.encode_prompt(messages[:2], processing.pictures([PICTURE]))
    assert torch.equal(prompt.input_ids, encoded.input_ids[: len(prompt.input_ids)])
    assert not encoded.supervised[: len(prompt.input_ids)].any()


def test_a_whole_dialogue_tokenizes_as_the_familys_processor_does(processing):
    turns = (Turn("user", Content.of({"image": PICTURE, "text": "What is it?"})), Turn("assistant", Content.of("red")))
    messages = dialogue_messages(Dialogue(turns), processing.prompts)
    text = processing.processor.apply_chat_template(messages, tokenize=False).rstrip()
    reference = processing.processor(text=[text], images=[[PICTURE]], return_tensors="pt")
    encoded = processing.encode_dialogue(messages, processing.pictures([PICTURE]))
    assert torch.equal(encoded.input_ids, reference["input_ids"][0])
    assert torch.equal(encoded.vision["pixel_values"], reference["pixel_values"])


def test_special_tokens_in_a_users_text_stay_words(processing):
    messages = embedding_messages(Content.of("an <image> of <|im_end|>"), processing.prompts)
    encoded = processing.encode_embedding(messages, processing.pictures([]))
    assert processing.tokenizer.convert_tokens_to_ids("<image>") not in encoded.input_ids
    assert decode(processing, encoded).count("<|im_end|>") == 3


def test_truncation_keeps_the_instruction_and_the_frame(processing):
    messages = embedding_messages(Content.of("a red circle " * 100), processing.prompts)
    encoded = processing.encode_embedding(messages, processing.pictures([]), max_tokens=64)
    assert len(encoded.input_ids) == 64
    assert decode(processing, encoded).endswith(
        "Compress this sentence in one word:<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    )


def test_images_are_never_cut(processing):
    messages = embedding_messages(Content.of(PICTURE), processing.prompts)
    with pytest.raises(CafeError, match="cannot be cut to 20"):
        processing.encode_embedding(messages, processing.pictures([PICTURE]), max_tokens=20)


def test_saved_processor_files_are_the_familys_standard_ones(processing, tmp_path):
    processing.save(tmp_path)
    assert "LlavaOnevisionProcessor" in (tmp_path / "processor_config.json").read_text()
    again = Processing(load_processor_from(tmp_path, processing), Prompts(chat_template="chatml"))
    messages = embedding_messages(Content.of("a red circle."), processing.prompts)
    assert torch.equal(
        again.encode_embedding(messages, again.pictures([])).input_ids,
        processing.encode_embedding(messages, processing.pictures([])).input_ids,
    )


def load_processor_from(directory, processing):
    """The processor alone; a checkpoint would hold the model's configuration beside it."""
    return type(processing.processor).from_pretrained(directory)
