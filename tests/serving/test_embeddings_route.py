"""Embeddings by HTTP, asked for by the real client."""

import base64

import numpy as np
import pytest
from samples import png


def data_uri(data: bytes) -> str:
    """Write an image as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_vectors_are_those_of_the_library(client, served_model, encoding_format):
    texts = ["a red circle", "two boats in front of a house", ""]
    answer = client.embeddings.create(model=client.models.list().data[0].id, input=texts)
    vectors = np.array([each.embedding for each in answer.data])
    np.testing.assert_allclose(vectors, served_model.embed(texts), atol=1e-5)
    assert [each.index for each in answer.data] == [0, 1, 2]
