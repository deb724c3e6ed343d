"""Ranking and comparing by HTTP."""

import base64

import families
import numpy as np
import pytest
from http_samples import BLUE, RED, data_uri, error_of, image_part

from cafe.content import Content
from cafe.lvlm.forward import compute_logits, forward_packed
from cafe.lvlm.images import ProcessedImages
from cafe.lvlm.prompts import system_messages
from cafe.packing import pack
from cafe.serving.config import RequestLimits
from cafe.serving.contents import chat_turn
from cafe.serving.encoding import JobEncoder
from cafe.serving.routes.ranking import answer_words, match_question, relevance

DOCUMENTS = ["a red circle", {"text": "a blue square"}, {"image": data_uri(BLUE)}, {"content": [image_part(RED)]}]
CONTENTS = [Content.of(value) for value in ("a red circle", "a blue square", {"image": BLUE}, {"image": RED})]


def expected_relevances(model, query):
    """The probability of yes for each document, by the model's own forward pass."""
    words = answer_words(model.chat_processor)
    scores = []
    for document in CONTENTS:
        branch = model.encode_prompt(match_question(Content.of(query), document))
        hidden, _ = forward_packed(model.lvlm, pack([[branch]], [[]], model.packing))
        probabilities = compute_logits(model.lvlm, hidden)[0].double().softmax(-1)
        likely, unlikely = (float(probabilities[list(tokens)].sum().detach()) for tokens in (words.yes, words.no))
        scores.append(likely / (likely + unlikely))
    return scores


def test_documents_are_ranked_by_how_likely_the_model_says_yes(http, served_model):
    answer = http.post("/v1/rerank", {"query": "a red circle", "documents": DOCUMENTS}).json()
    expected = expected_relevances(served_model, "a red circle")
    scores = {each["index"]: each["relevance_score"] for each in answer["results"]}
    np.testing.assert_allclose([scores[index] for index in range(4)], expected, atol=1e-5)
    ranked = [each["relevance_score"] for each in answer["results"]]
    assert ranked == sorted(ranked, reverse=True) and all(0 < value < 1 for value in ranked)
    assert all("document" not in each for each in answer["results"])
    assert answer["usage"]["total_tokens"] > 0 and answer["id"] and answer["model"]


def test_the_query_may_be_an_image_and_the_best_come_back_with_their_documents(http, served_model):
    query = {"image": base64.b64encode(RED).decode()}
    body = {"query": query, "documents": DOCUMENTS, "top_n": 2, "return_documents": True}
    answer = http.post("/v1/rerank", body).json()
    expected = expected_relevances(served_model, {"image": RED})
    best = np.argsort(-np.array(expected), kind="stable")[:2].tolist()
    assert [each["index"] for each in answer["results"]] == best
    for each in answer["results"]:
        sent = DOCUMENTS[each["index"]]
        assert each["document"] == ({"text": sent} if isinstance(sent, str) else sent)


def test_yes_and_no_are_the_first_tokens_of_answers(served_model):
    words = answer_words(served_model.chat_processor)
    decode = served_model.chat_processor.tokenizer.decode
    assert all("yes".startswith(decode([token]).strip().lower()) for token in words.yes)
    assert all("no".startswith(decode([token]).strip().lower()) for token in words.no)
    assert not set(words.yes) & set(words.no) and words.beginning == ()


def test_answers_that_begin_with_an_empty_thought_are_compared_behind_it():
    chat_processor = families.qwen3_5().chat_processor
    words = answer_words(chat_processor)
    turns = [chat_turn("user", Content(("a",)))]
    encoder = JobEncoder(chat_processor, RequestLimits())
    job = encoder.score(turns, [], (*words.yes, *words.no), words.beginning)
    for answer, tokens in (("yes", words.yes), ("No", words.no)):
        dialogue = [*system_messages(chat_processor.prompts), *turns, chat_turn("assistant", Content((answer,)))]
        whole = chat_processor.encode_dialogue(dialogue, ProcessedImages([], {}))
        assert whole.input_ids[: len(job.branch)].tolist() == job.branch.input_ids.tolist()
        assert whole.loss_mask[: len(job.branch)].tolist() == job.branch.loss_mask.tolist()
        assert int(whole.input_ids[len(job.branch)]) in tokens
    assert len(words.beginning) > 0


def test_relevance_is_the_odds_of_yes_and_no():
    logits = np.array([1, 2, 0.5], np.float32)
    odds = np.exp(logits.astype(float))
    assert relevance(logits, 2) == pytest.approx((odds[0] + odds[1]) / odds.sum())
    assert relevance(np.array([1000, -1000], np.float32), 1) == 1
    assert relevance(np.array([-1000, 1000], np.float32), 1) == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a red circle", "a blue square"),
        ("a red circle", ["a blue square", {"image": data_uri(RED)}]),
        (["a", {"content": [image_part(RED)]}], ["b", "c"]),
    ],
)
def test_pairs_are_compared_by_the_cosine_of_their_embeddings(http, served_model, first, second):
    def embed(values):
        """Embed one side by the library."""
        values = values if isinstance(values, list) else [values]
        return served_model.embed([value if isinstance(value, str) else {"image": RED} for value in values])

    answer = http.post("/v1/score", {"text_1": first, "text_2": second}).json()
    expected = (embed(first) * embed(second)).sum(1)
    assert [each["index"] for each in answer["data"]] == list(range(len(expected)))
    np.testing.assert_allclose([each["score"] for each in answer["data"]], expected, atol=1e-5)
    assert answer["object"] == "list" and {each["object"] for each in answer["data"]} == {"score"}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("rerank", {"query": "a", "documents": []}, 422, "invalid_value"),
        ("rerank", {"query": "a"}, 422, "missing_field"),
        ("rerank", {"query": "a", "documents": ["b"], "top_n": 0}, 422, "invalid_value"),
        ("rerank", {"query": "a", "documents": ["b"] * 257}, 400, "invalid_value"),
        ("rerank", {"query": "a", "documents": ["b"], "model": "other"}, 404, "model_not_found"),
        ("rerank", {"query": "a", "documents": [{}]}, 400, "invalid_value"),
        ("rerank", {"query": "a", "documents": ["b", "word " * 9000]}, 400, "context_length_exceeded"),
        ("score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 400, "invalid_value"),
        ("score", {"text_1": ["a", "b"], "text_2": "c"}, 400, "invalid_value"),
        ("score", {"text_1": "a", "text_2": []}, 422, "invalid_value"),
    ],
)
def test_what_cannot_be_ranked(http, path, body, status, code):
    assert error_of(http.post(f"/v1/{path}", body)) == (status, code)
