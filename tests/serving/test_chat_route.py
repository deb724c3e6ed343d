"""Chats by HTTP, asked by the real client."""

from http_samples import RED, user


def test_an_answer_has_the_words_and_the_usage(client, served_model):
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[user(RED, "What is in the image?")],
        max_tokens=8,
        temperature=0,
    )
    assert answer.choices[0].message.content == served_model.generate(RED, "What is in the image?", max_new_tokens=8)


def test_stream(client, served_model):
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[user(RED, "What is in the image?")],
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == served_model.generate(RED, "What is in the image?", max_new_tokens=8)
    print(chunks)
