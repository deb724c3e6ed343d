"""Generation: what streaming does around the text. A thread that is in PyTorch when Python exits aborts the process."""

import time

import pytest
import torch

from cafe import Cafe
from cafe.lvlm.generation import stream_text


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
