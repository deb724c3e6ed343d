"""Generation: what streaming does around the text."""

import time

from transformers import TextIteratorStreamer

from cafe import Cafe
from cafe.lvlm.generation import stream_text


def test_a_stream_ends_after_its_thread(random_base):
    """A thread that is still in PyTorch when Python exits aborts the process."""
    streamer = TextIteratorStreamer(Cafe.load(random_base).chat_processor.tokenizer)
    done = []

    def generate():
        streamer.on_finalized_text("red", stream_end=True)
        time.sleep(0.2)
        done.append(True)

    assert "".join(stream_text(generate, streamer)) == "red"
    assert done == [True]
