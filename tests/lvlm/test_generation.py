"""Generation: from padded prompts, and what streaming does around the text.

A thread that is in PyTorch when Python exits aborts the process.
"""

import time

import families
import numpy as np
import pytest
import torch
from model_samples import SMALL, TALL, WIDE, make
from transformers import AttentionMaskInterface

from cafe import Cafe
from cafe.attention.registration import CAFE_TREE
from cafe.content import Content
from cafe.lvlm.generation import collate_to_device, stream_text


@pytest.fixture(scope="module")
def tokenizer(random_base):
    return Cafe.load(random_base).chat_processor.tokenizer


def test_a_stream_ends_after_its_thread(tokenizer):
    done = []

    def generate(streamer):
        streamer.on_finalized_text("red", stream_end=True)
        time.sleep(0.2)
        done.append(True)

    assert "".join(stream_text(generate, tokenizer)) == "red"
    assert done == [True]


def test_closing_a_stream_stops_its_thread(tokenizer):
    done = []

    def generate(streamer):
        try:
            while True:  # as long as somebody reads
                streamer.put(torch.tensor([5]))
                streamer.on_finalized_text("red ")
                time.sleep(0.001)
        finally:
            done.append(True)

    stream = stream_text(generate, tokenizer)
    assert next(stream) == "red "
    stream.close()
    assert done == [True]


# Of different lengths, so that all but one are padded.
PROMPTS = [
    Content.of("Hello?"),
    Content.of([WIDE, "What is it?"]),
    Content.of([SMALL, TALL, "Which one of the two is it, at some length?"]),
]


def make_with_tree_attention(family):
    model = make(family)
    if model.lvlm.config.get_text_config()._attn_implementation != CAFE_TREE:
        pytest.skip(f"{family} computes attention in another way.")
    model.lvlm.double()
    return model


def generate_greedily(model, prompts):
    """Return the tokens that are generated from prompts, and their logits."""
    inputs = collate_to_device(model.lvlm, model.chat_processor, [model.encode_prompt(each) for each in prompts])
    assert len(prompts) == 1 or not inputs["attention_mask"].all()
    output = model.lvlm.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_padded_prompts_are_continued_as_under_plain_sdpa(family):
    model = make_with_tree_attention(family)
    tokens, logits = generate_greedily(model, PROMPTS)
    vectors, answers = model.embed_and_generate_batch([[SMALL], [WIDE, TALL]], "What is it?", max_new_tokens=6)
    model.lvlm.get_decoder().set_attn_implementation("sdpa")
    expected_tokens, expected_logits = generate_greedily(model, PROMPTS)
    expected = model.embed_and_generate_batch([[SMALL], [WIDE, TALL]], "What is it?", max_new_tokens=6)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(vectors, expected[0])
    assert answers == expected[1]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_padding_is_hidden_by_the_mask_that_is_registered(family, monkeypatch):
    model = make_with_tree_attention(family)
    _, alone = generate_greedily(model, PROMPTS[:1])

    def error():
        _, padded = generate_greedily(model, PROMPTS)
        return (padded[0, 0] - alone[0, 0]).norm() / alone[0, 0].norm()

    assert error() <= 1e-5  # some families have norms in float32
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, CAFE_TREE)
    assert error() > 1e-2
