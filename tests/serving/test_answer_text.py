"""The pieces of an answer against its tokens decoded at once, for tokens and stop sequences of any kind."""

from typing import Any

import pytest
from families import tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cafe.serving.answer_text import AnswerText

END = "<end>"
BYTES = tokenizer([END, "<image>"], pad="<pad>", eos=END)
SPECIAL = BYTES.convert_tokens_to_ids([END, "<image>", "<pad>"])


def token_of_byte() -> list[int]:
    """Return the token of each byte, by the alphabet of byte-level BPE: visible bytes stand for themselves."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters, others = {}, 0
    for byte in range(256):
        characters[byte] = chr(byte) if byte in visible else chr(256 + others)
        others += byte not in visible
    return [BYTES.convert_tokens_to_ids(characters[byte]) for byte in range(256)]


TOKEN_OF_BYTE = token_of_byte()


def tokens_of(text: str | bytes) -> list[int]:
    """Return a token for each byte, so that each character but the plainest ends tokens after it began."""
    return [TOKEN_OF_BYTE[byte] for byte in (text if isinstance(text, bytes) else text.encode())]


def pieces_of(tokens: list[int], stop: tuple[str, ...] = (), reader: Any = BYTES) -> tuple[list[str], bool]:
    """Return the pieces of an answer, and whether a stop sequence ended it."""
    answer, pieces = AnswerText(reader, stop), list[str]()
    for token in tokens:
        pieces.append(answer.push(token))
        if answer.stopped:
            break
    return [*pieces, answer.finish()], answer.stopped


def expected_answer(tokens: list[int], stop: tuple[str, ...]) -> tuple[str, bool]:
    """Return the text before the first stop sequence, looked for in all that is decoded after each token."""
    text = ""
    for number in range(len(tokens)):
        text = BYTES.decode(tokens[: number + 1], skip_special_tokens=True).lstrip()
        places = [text.find(each) for each in stop if each in text]
        if places:
            return text[: min(places)].rstrip(), True
    return text.strip(), False


ANY_TOKENS = st.lists(st.sampled_from([*TOKEN_OF_BYTE, *SPECIAL]), max_size=80)
SNIPPETS = [" ", "  ", "\n", "a", "b", "ab", "é", "語", "👍🏽", "\u200d", "e\u0301"]
WORDS = st.lists(st.sampled_from(SNIPPETS), max_size=20)


@given(ANY_TOKENS)
@example(tokens_of(b"\xf0\x9f\x91"))
@example(tokens_of(b"a\xe2\x82" * 40))
@example(tokens_of(b"\x80" * 70 + "é".encode()))
@example(tokens_of("\ufffd \ufffd"))
@example([*tokens_of("a"), *SPECIAL * 30, *tokens_of(" b ")])
def test_pieces_of_any_tokens_are_what_decoding_them_at_once_gives(tokens):
    pieces, _ = pieces_of(tokens)
    assert "".join(pieces) == BYTES.decode(tokens, skip_special_tokens=True).strip()


@given(WORDS)
def test_each_character_is_shown_once_it_and_the_white_space_behind_it_are_known(words):
    text = "".join(words)
    pieces, _ = pieces_of(tokens_of(text))
    shown = "".join(pieces[:-1])
    assert shown == text.strip()


@given(WORDS, st.lists(st.text("ab é\n語", min_size=1, max_size=4), max_size=4))
@example(["a", "b", "a"], ["ba"])
@example(["ab", "\n", "ab"], ["\nab", "ab"])
@example([" ", " ", "ab"], ["ab"])
@example(["a", " ", "ab"], ["ab"])
@example(["a", "b"], ["ab", "abc"])
def test_a_stop_sequence_ends_the_text_wherever_tokens_cut_it(words, stop):
    tokens = tokens_of("".join(words))
    pieces, stopped = pieces_of(tokens, tuple(stop))
    assert ("".join(pieces), stopped) == expected_answer(tokens, tuple(stop))


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("", ("x",), ""),
        ("  \n ", (), ""),
        ("STOP and more", ("STOP",), ""),
        ("one STOP", ("STOP",), "one"),
        ("one \n STOP", ("STOP",), "one"),
        ("one STO", ("STOP",), "one STO"),
        ("one SSTOP", ("STOP",), "one S"),
        ("abcd", ("abd", "bcd"), "a"),
        ("abcd", ("bc", "abcd"), "a"),
        ("one\n\ntwo", ("\n\n",), "one"),
        ("aaab", ("aab",), "a"),
        ("größer", ("ß",), "grö"),
        ("👍👎", ("👎",), "👍"),
        ("a ", ("  ",), "a"),
    ],
)
def test_where_answers_end(text, stop, expected):
    pieces, stopped = pieces_of(tokens_of(text), stop)
    assert "".join(pieces) == expected
    assert stopped == any(each in text for each in stop)


def test_text_that_may_begin_a_stop_sequence_is_held_back_until_it_does_not():
    pieces, _ = pieces_of(tokens_of("an EN EN."), ("END",))
    assert pieces == ["a", "n", "", "", "", " EN", "", "", " EN.", ""]


def test_an_answer_that_was_stopped_says_no_more():
    answer = AnswerText(BYTES, ("b",))
    shown = [answer.push(token) for token in tokens_of("ab")]
    assert (shown, answer.stopped, answer.finish()) == (["a", ""], True, "")


def sentence_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer whose words begin with a space that a text's first loses, and that falls back to bytes."""
    words = ["<unk>", "</s>", "▁the", "▁cat", "s", "▁", "."]
    vocabulary = {token: number for number, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


PIECES = sentence_pieces()
PIECE_TOKENS = [
    *([PIECES.convert_tokens_to_ids(token)] for token in ("</s>", "▁the", "▁cat", "s", "▁", ".")),
    *([PIECES.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()] for text in ("é", "語", "👍")),
]


@given(st.lists(st.sampled_from(PIECE_TOKENS), max_size=20))
def test_words_keep_their_spaces_where_a_text_loses_its_first(words):
    tokens = [token for word in words for token in word]
    pieces, _ = pieces_of(tokens, reader=PIECES)
    assert "".join(pieces) == PIECES.decode(tokens, skip_special_tokens=True).strip()
