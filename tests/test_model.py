"""The public face, on a tiny random model of the real family."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import families
import numpy as np
import pytest
import torch
from model_samples import TALL, make
from PIL import Image
from transformers import AutoModelForImageTextToText

import cafe.lvlm.images
import cafe.model
from cafe import Cafe
from cafe.attention.registration import CAFE_TREE
from cafe.content import Content
from cafe.errors import CafeError
from cafe.lvlm.content_encoder import ContentEncoder
from cafe.lvlm.prompts import Prompts, embedding_messages
from cafe.packing import PackedBatch, count_unique_tokens
from cafe.scenes.draw import paint
from cafe.scenes.world import draw_scene


@pytest.fixture(scope="module")
def model(random_base):
    return Cafe.load(random_base, Prompts(chat_template="chatml"))


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return paint(draw_scene(0, "test", 0))


def test_embeddings_are_float32_unit_vectors_in_the_order_given(model, image):
    contents = ["a red circle", image, {"image": image, "text": "what is left of it?"}, "a much longer text " * 9]
    vectors = model.embed(contents, batch_size=2)
    assert vectors.dtype == np.float32 and vectors.shape == (4, 160)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for content, vector in zip(contents, vectors, strict=True):
        np.testing.assert_allclose(model.embed([content])[0], vector, atol=1e-5)


def test_a_single_content_is_not_iterated_over(model, image):
    """A text would be embedded letter by letter, a mapping by the names of its keys."""
    for single in ("a red circle", {"image": image}, image, Content.of("a")):
        with pytest.raises(CafeError, match="put a single one in a list"):
            model.embed(single)
    with pytest.raises(CafeError, match="Expected a list of contents, not a str"):
        model.embed_and_generate_batch("image.png")


def test_an_error_says_which_item_is_bad(model, image, tmp_path):
    gone = {"image": tmp_path / "gone.png"}
    for call in (
        lambda: model.embed(["a", image, gone]),
        lambda: model.score_batch(["a", image, gone], [["b"]] * 3, batch_size=2),
        lambda: model.generate_batch([Content.of(each) for each in ("a", image, gone)]),
        lambda: model.embed_and_generate_batch([image, image, tmp_path / "gone.png"]),
    ):
        with pytest.raises(CafeError, match=r"^(contents|prompts|images)\[2\]: The image .*gone.png does not exist"):
            call()


def test_strings_are_text_in_contents_and_paths_where_images_are_expected(model, image, tmp_path, caplog):
    image.save(tmp_path / "cat.png")
    path = str(tmp_path / "cat.png")
    as_text, as_image, expected = model.embed([path, {"image": path}, image])
    np.testing.assert_allclose(as_image, expected, atol=1e-5)
    assert as_text @ expected < 0.999
    assert [record.getMessage().startswith(f'"{path}" is taken as text') for record in caplog.records] == [True]
    for given in (path, [path], tmp_path / "cat.png"):
        assert model.generate(given, "What?", 4) == model.generate(image, "What?", 4)
        np.testing.assert_allclose(model.embed_and_generate(given, "What?", 1)[0], expected, atol=1e-5)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_pickled_model_embeds_and_generates_the_same(family):
    model = make(family)
    contents = [{"image": TALL, "text": "what?"}, "words"]
    vectors, answer = model.embed(contents), model.generate(TALL, "What?", 4)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.embed(contents), vectors)
    assert again.generate(TALL, "What?", 4) == answer
    assert again.metadata == model.metadata and again.fingerprint() == model.fingerprint()
    np.testing.assert_array_equal(model.embed(contents), vectors)  # the hooks of this one still work


UNPICKLE = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    model, contents = pickle.load(file)
with open(sys.argv[2], "wb") as file:
    vectors, answers = model.embed(contents), model.generate_batch(contents, 4)
    pickle.dump((model.lvlm.config.get_text_config()._attn_implementation, vectors, answers), file)
"""


def test_a_pickled_model_is_the_same_in_a_process_that_imports_nothing_first(model, image, tmp_path):
    contents = [Content.of("what?"), Content.of([image, "what is it, at some length?"])]
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, contents)))
    files = [str(tmp_path / name) for name in ("model.pickle", "results.pickle")]
    subprocess.run([sys.executable, "-c", UNPICKLE, *files], check=True)
    implementation, vectors, answers = pickle.loads((tmp_path / "results.pickle").read_bytes())
    assert implementation == model.lvlm.config.get_text_config()._attn_implementation == CAFE_TREE
    np.testing.assert_array_equal(vectors, model.embed(contents))
    assert answers == model.generate_batch(contents, 4)


def test_a_batch_size_below_one_is_refused(model):
    for size in (0, -1):
        for call in (lambda size: model.embed(["a"], size), lambda size: model.score_batch(["a"], [["b"]], size)):
            with pytest.raises(CafeError, match=f"batch_size should be above 0, not {size}"):
                call(size)


def test_matryoshka_prefix_has_the_first_dimensions_at_unit_length(model, image):
    whole = model.embed(["a red circle", image])[:, :24]
    expected = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose(model.embed(["a red circle", image], dim=24), expected, atol=1e-6)
    with pytest.raises(CafeError, match="between 1 and the embedding's 160, not 161"):
        model.embed(["a red circle"], dim=161)


def test_the_embedding_is_transformers_own_last_hidden_state(model, image, random_base):
    lvlm = AutoModelForImageTextToText.from_pretrained(random_base).eval()
    messages = [
        *embedding_messages(Content.of(image), model.chat_processor.prompts),
        {"role": "assistant", "content": [{"type": "text", "text": ""}]},
    ]
    text = model.chat_processor.processor.apply_chat_template(messages, tokenize=False).rstrip()
    inputs = model.chat_processor.processor(text=[text], images=[[image]], return_tensors="pt")
    with torch.inference_mode():
        hidden = lvlm.model(**inputs).last_hidden_state[0, -1]
    expected = hidden / hidden.norm()
    np.testing.assert_allclose(model.embed([image])[0], expected.numpy(), atol=1e-5)


def test_float16_embeds_generates_and_scores_nearly_as_float32(model, image, random_base):
    half = Cafe.load(random_base, model.chat_processor.prompts, dtype=torch.float16)
    contents = ["a red circle", image, {"image": image, "text": "what is left of it?"}]
    assert (half.embed(contents) * model.embed(contents)).sum(1).min() > 0.999
    vectors, answers = half.embed_and_generate_batch([image, image], max_new_tokens=4)
    assert np.isfinite(vectors).all() and answers == [half.generate(image, "Describe the image.", 4)] * 2
    assert half.score([image], "a circle") == pytest.approx(model.score([image], "a circle"), rel=1e-2)


def test_generation_is_transformers_greedy_generation_batched_streamed_and_alone(model, image):
    prompt = "What is in the image?"
    answer = model.generate(image, prompt, max_new_tokens=8)
    assert "".join(model.generate(image, prompt, max_new_tokens=8, stream=True)).strip() == answer
    other = Content.of([image, "Describe the image, at some length, please."])
    assert model.generate_batch([other, Content.of([image, prompt])], max_new_tokens=8)[1] == answer


def test_sampling_follows_the_seed(model, image):
    said = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        said.append(model.generate(image, "What?", max_new_tokens=16, temperature=5.0))
    assert said[0] == said[1] != said[2]


def test_one_prefill_gives_the_same_embedding_and_the_same_answer(model, image):
    prompt = "Describe the image."
    vector, answer = model.embed_and_generate(image, prompt, max_new_tokens=8)
    np.testing.assert_allclose(vector, model.embed([image])[0], atol=1e-5)
    assert answer == model.generate(image, prompt, max_new_tokens=8)


@pytest.mark.parametrize("end", ["<|im_end|>", ""])
def test_the_score_of_an_answer_is_its_log_likelihood(model, image, end):
    row = model.encode_prompt(Content.of([image, "What?"]))
    answer = model.chat_processor.tokenizer("a circle" + end, add_special_tokens=False)["input_ids"]
    total, ids = 0.0, row.input_ids.tolist()
    for token in answer:
        with torch.inference_mode():
            logits = model.lvlm(input_ids=torch.tensor([ids]), **row.image_inputs).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
        ids.append(token)
    [[score]] = model.score_batch([[image, "What?"]], [["a circle"]], with_end=bool(end))
    assert score == pytest.approx(total, abs=1e-3)
    assert not end or model.score([image, "What?"], "a circle") == score


def test_scores_of_a_batch_are_those_of_each_answer_alone(model, image):
    contents = [[image, "What?"], "no image", [image, "What is left of it, and what is right of it?"]]
    answers = [["a circle", "a circle left of a square", ""], ["yes", "no"], ["nothing"]]
    alone = [[model.score(content, said) for said in each] for content, each in zip(contents, answers, strict=True)]
    for batch_size in (1, 2, 16):
        scores = model.score_batch(contents, answers, batch_size)
        assert [len(each) for each in scores] == [3, 2, 1]
        for found, expected in zip(scores, alone, strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-4)


def test_equal_answers_have_exactly_equal_scores(model, image):
    [same] = model.score_batch([[image, "What?"]], [["a circle", "a square", "a circle"]])
    assert same[0] == same[2] != same[1]


def test_a_saved_checkpoint_loads_with_cafe_and_with_plain_transformers(model, image, tmp_path):
    model.save(tmp_path / "saved", temperature=0.05)
    again = Cafe.load(tmp_path / "saved")
    assert again.chat_processor.prompts == model.chat_processor.prompts and again.metadata["temperature"] == 0.05
    np.testing.assert_array_equal(again.embed([image, "words"]), model.embed([image, "words"]))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert type(plain).__name__ == "LlavaOnevisionForConditionalGeneration"
    model.save(tmp_path / "saved", temperature=0.07)  # over an older one
    assert Cafe.load(tmp_path / "saved").metadata["temperature"] == 0.07
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_save_replaces_nothing_but_a_checkpoint(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CafeError, match="holds something that is not a checkpoint"):
        model.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_on_the_hub_loads_with_its_own_prompts(model, tmp_path, monkeypatch):
    """As the Hub's client keeps it after a download."""
    home = tmp_path / "models--me--mine"
    model.with_prompts(mode="multimodal", chat_template="family").save(home / "snapshots" / "abc")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert Cafe.load("me/mine").chat_processor.prompts.mode == "multimodal"
    with pytest.raises(CafeError, match="me/other"):
        Cafe.load("me/other")


def test_with_prompts_leaves_the_model_unchanged():
    model, same = make("llava"), make("llava")
    other = model.with_prompts(chat_template="chatml")
    said, before, apart = (each.encode_prompt(Content.of("hello")).input_ids for each in (model, same, other))
    assert torch.equal(said, before) and not torch.equal(apart, before)


def test_embed_encodes_a_few_batches_ahead(model, image, monkeypatch):
    events = []
    encode, forward = ContentEncoder.encode_embedding, cafe.model.forward_packed
    monkeypatch.setattr(ContentEncoder, "encode_embedding", lambda *given: events.append("encoded") or encode(*given))
    monkeypatch.setattr("cafe.model.forward_packed", lambda *given: events.append("read") or forward(*given))
    contents = ["word " * (number % 7 + 1) for number in range(40)]
    vectors = model.embed(contents, batch_size=2)
    assert events[:17] == ["encoded"] * 16 + ["read"] and events.count("read") == 20
    np.testing.assert_allclose(vectors, np.concatenate([model.embed([content]) for content in contents]), atol=1e-5)


@pytest.fixture
def packs(monkeypatch) -> list[PackedBatch]:
    """What went through the model."""
    seen, forward = [], cafe.model.forward_packed
    monkeypatch.setattr("cafe.model.forward_packed", lambda lvlm, packed: seen.append(packed) or forward(lvlm, packed))
    return seen


def test_many_questions_about_one_image_read_it_once(model, image, packs):
    contents = [{"image": image, "text": f"Is there {words}?"} for words in ("a circle", "a red square", "nothing")]
    vectors = model.embed(contents)
    [packed] = packs
    encoder = ContentEncoder(model.chat_processor)
    branches = [encoder.encode_embedding(Content.of(content)) for content in contents]
    assert packed.num_tokens == count_unique_tokens(branches) < 0.6 * sum(map(len, branches))
    pixels = branches[0].image_inputs["pixel_values"]
    assert torch.equal(packed.inputs["pixel_values"], pixels)
    alone = model.embed_branches(branches, packing=replace(model.packing, share_prefixes=False))
    np.testing.assert_allclose(vectors, alone, atol=1e-5)


def test_many_answers_to_prompts_about_one_image_read_it_once(model, image, packs):
    answers = ["a circle", "a circle left of a square", "nothing", ""]
    model.score_batch([[image, "What is it?"], "no image", [image, "What is left?"]], [answers, ["yes"], answers])
    [packed] = packs
    encoder = ContentEncoder(model.chat_processor)
    branches = encoder.encode_answers(Content.of([image, "What is it?"]), answers)
    branches += encoder.encode_answers(Content.of([image, "What is left?"]), answers)
    assert torch.equal(packed.inputs["pixel_values"], branches[0].image_inputs["pixel_values"])
    branches += encoder.encode_answers(Content.of("no image"), ["yes"])
    assert packed.num_tokens == count_unique_tokens(branches) < sum(map(len, branches)) / 4


def test_contents_with_one_image_share_a_batch_wherever_they_stand(model, image, packs):
    other = image.rotate(180)
    contents = [{"image": each, "text": "what " * number} for number in range(1, 5) for each in (image, other)]
    contents[3:3] = ["a text " * 9, "another"]
    vectors = model.embed(contents, batch_size=4)
    # The four questions about each image are a batch, and so are the two texts.
    assert [len(packed.inputs.get("pixel_values", ())) for packed in packs] == [0, 1, 1]
    np.testing.assert_allclose(vectors, np.concatenate([model.embed([content]) for content in contents]), atol=1e-5)


def test_answers_to_prompts_about_one_image_load_it_once(model, image, tmp_path, monkeypatch):
    image.save(tmp_path / "cat.png")
    prompts = [Content.of({"image": str(tmp_path / "cat.png"), "text": text}) for text in ("What?", "Where is it?")]
    alone = [model.generate_batch([prompt], 4)[0] for prompt in prompts]
    decoded, decode = [], cafe.lvlm.images.decode_image
    monkeypatch.setattr(
        "cafe.lvlm.images.decode_image", lambda *given, **options: decoded.append(1) or decode(*given, **options)
    )
    assert model.generate_batch(prompts, 4) == alone and len(decoded) == 1
    assert model.embed_and_generate_batch([tmp_path / "cat.png"] * 2, "What?", 4)[1] == alone[:1] * 2
    assert len(decoded) == 2


def test_an_error_while_streaming_is_raised_at_the_end(model, image, monkeypatch):
    def breaks(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.lvlm, "generate", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(model.generate(image, "What is it?", stream=True))


def test_loading_from_an_empty_directory_is_reported(tmp_path):
    with pytest.raises(CafeError, match=str(tmp_path)):
        Cafe.load(tmp_path)


def test_prompts_of_another_version_are_reported(model, tmp_path):
    model.save(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "cafe.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"prompts": record["prompts"] | {"unheard": "of"}}))
    with pytest.raises(
        CafeError,
        match=r"does not know the prompts of the checkpoint's cafe\.json: the key prompts\.unheard is unknown",
    ):
        Cafe.load(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("model.safetensors", "No vision-language model can be loaded from"),
        ("cafe.json", r"The checkpoint's .*cafe\.json is not valid JSON"),
    ],
)
def test_a_truncated_checkpoint_file_is_reported(file, sentence, model, tmp_path):
    model.save(tmp_path / "checkpoint")
    part = tmp_path / "checkpoint" / file
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(CafeError, match=sentence):
        Cafe.load(tmp_path / "checkpoint")
