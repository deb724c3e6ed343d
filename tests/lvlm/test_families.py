"""Every family: what is packed, shared, embedded and said, against plain transformers on the family's own inputs."""

import re
from dataclasses import replace

import families
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_samples import (
    CONTENTS,
    PREFIX_LMS,
    READ_ONE_BY_ONE,
    SMALL,
    TALL,
    WIDE,
    Listed,
    chat,
    examples,
    gradient,
    make,
    plain_losses,
)
from PIL import Image
from transformers import AutoConfig, ProcessorMixin

import cafe.model
from cafe.attention.tree import make_tree, tree_attention
from cafe.content import Content, Example, Pair
from cafe.data.batch import MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.encoding import encode_example
from cafe.errors import CafeError
from cafe.images.decoding import decode_image
from cafe.lvlm.families import FAMILIES, attention_kwargs, find_vision_tower, model_part, supports_prefix_sharing
from cafe.lvlm.forward import compute_logits, forward_packed, infer_packing, to_device
from cafe.lvlm.processing import ChatProcessor, with_fast_images
from cafe.lvlm.prompts import Message, Prompts, dialogue_messages, embedding_messages
from cafe.model import Cafe
from cafe.packing import build_layout, collate_vision, pack
from cafe.training.recipe import ObjectiveConfig
from cafe.training.step import JointStep

EMPTY = {"role": "assistant", "content": [{"type": "text", "text": ""}]}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other cost far more than these matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every_family = pytest.mark.parametrize("family", families.FAMILIES)


def own_inputs(model: Cafe, messages: list[Message], content: Content, over: bool = True) -> dict[str, torch.Tensor]:
    """What the family's processor makes of a chat that is over, or waits for an answer."""
    processor, images = model.chat_processor.processor, [decode_image(ref) for ref in content.images]
    if model.lvlm.config.model_type == "paligemma":
        return own_prefix_and_suffix(processor, messages, images)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=not over)
    shown = {"images": [images]} if images else {}
    return dict(
        processor(text=[text.rstrip() if over else text], return_tensors="pt", add_special_tokens=False, **shown)
    )


def own_prefix_and_suffix(
    processor: ProcessorMixin, messages: list[Message], images: list[Image.Image]
) -> dict[str, torch.Tensor]:
    """The same of a family without chats: its processor takes what is asked and what is to be said."""
    said = ["".join(part.get("text", "") for part in message["content"]) for message in messages]
    prompt, *answers = [words for words, message in zip(said, messages, strict=True) if message["role"] != "system"]
    suffix = "".join(words + ("\n" if index % 2 else "<eos>") for index, words in enumerate(answers))
    given = {"suffix": [suffix.removesuffix("<eos>")]} if answers else {}
    shown = images or [SMALL]  # it insists on an image
    inputs = dict(processor(text=["<image>" * len(shown) + prompt], images=[shown], return_tensors="pt", **given))
    if not images:
        del inputs["pixel_values"]
        inputs = {name: tokens[:, processor.image_seq_length :] for name, tokens in inputs.items()}
    del inputs["labels"]
    return inputs


def own_embedding_inputs(model: Cafe, content: Content) -> dict[str, torch.Tensor]:
    inputs = own_inputs(model, [*embedding_messages(content, model.chat_processor.prompts), EMPTY], content)
    if model.lvlm.config.model_type == "paligemma":
        inputs["token_type_ids"].zero_()  # all of an embedding's prompt is read both ways
    return inputs


@torch.no_grad()
def plain_hidden(model: Cafe, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.lvlm.base_model(**inputs).last_hidden_state[0]


@every_family
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_packed_hidden_state_is_the_plain_one(family, kind, caplog):
    model = make(family)
    model.lvlm.double()
    assert model.packing.share_prefixes == (family not in READ_ONE_BY_ONE)
    warned = [record for record in caplog.records if record.name == "cafe.lvlm.forward"]
    assert len(warned) == (family in READ_ONE_BY_ONE)

    content, other, text = Content.of(CONTENTS[kind]), Content.of([TALL, "it"]), Content.of("a blue square")
    dialogue = chat(Content((*content.parts, " What is it?")), "a red circle")
    examples = [Example(Pair(content, text, (other,)), dialogue), Example(Pair(text, other))]
    encoded = [encode_example(example, model.chat_processor) for example in examples]
    groups = [[one.query, one.target, *one.negatives, *([one.dialogue] if one.dialogue else [])] for one in encoded]
    expected = [own_embedding_inputs(model, one) for one in (content, text, other)]
    expected.append(
        own_inputs(model, dialogue_messages(dialogue, model.chat_processor.prompts), dialogue.turns[0].content)
    )
    expected += [own_embedding_inputs(model, one) for one in (text, other)]
    expected = [to_device(own, model.lvlm.device, torch.float64) for own in expected]

    packed, layout = pack(groups, [[], []], model.packing), build_layout(groups, model.packing)
    inputs = to_device(packed.inputs, model.lvlm.device, torch.float64)
    everything, tree = torch.cartesian_prod(*map(torch.arange, layout.valid.shape)), packed.tree
    if tree is not None:
        tree = make_tree(tree.subtree_end, everything, tree.kernel)
        assert packed.num_tokens < sum(len(branch) for group in groups for branch in group)
    with torch.no_grad(), tree_attention(model.lvlm, tree, everything) as attention:
        hidden = model.lvlm.base_model(**inputs, **attention).last_hidden_state
    for branch, place, own in zip([b for group in groups for b in group], layout.coords, expected, strict=True):
        length = own["input_ids"].shape[1]
        extra = [] if length == len(branch) else [model.chat_processor.tokenizer.eos_token_id]  # see LLAVA_TEMPLATE
        assert branch.input_ids.tolist() == [*own["input_ids"][0].tolist(), *extra]
        found = hidden[place[:length, 0], place[:length, 1]]
        torch.testing.assert_close(found, plain_hidden(model, own), atol=1e-6, rtol=1e-6)  # norms are in float32


@every_family
def test_supports_tree_attention_finds_which_families_share_prefixes(family, monkeypatch):
    model = make(family)
    monkeypatch.setattr(
        "cafe.lvlm.forward.supports_prefix_sharing", lambda lvlm: None
    )  # as of a family that nobody knows
    assert infer_packing(model.lvlm, model.chat_processor).share_prefixes == (family not in READ_ONE_BY_ONE)


@every_family
def test_a_dialogue_has_the_chat_templates_tokens_and_the_prompts_in_use(family):
    model = make(family)
    chat_processor = model.chat_processor
    dialogue = chat(Content.of([SMALL, "What is it?"]), "a circle", "What color?", "red")
    messages, images = dialogue_messages(dialogue, chat_processor.prompts), chat_processor.process_images([SMALL])
    branch = chat_processor.encode_dialogue(messages, images)
    own = own_inputs(model, messages, Content.of(SMALL))["input_ids"][0]
    # Two templates cannot say it all: LLaVA's ends no turn, and Qwen 3.5's hides past thoughts.
    found, expected = (
        re.sub("</s>|</?think>\n*", "", chat_processor.tokenizer.decode(ids)) for ids in (branch.input_ids, own)
    )
    assert found == expected
    said = chat_processor.tokenizer.decode(branch.input_ids[branch.loss_mask], skip_special_tokens=True)
    assert re.sub("</think>|<turn.>|<end_of_turn>|\\s", "", said) == "acirclered"
    prompt = chat_processor.encode_prompt(messages[:2], images).input_ids
    assert torch.equal(branch.input_ids[: len(prompt)], prompt)
    assert not branch.loss_mask[: len(prompt)].any() and branch.loss_mask[len(prompt)]


@every_family
def test_losses_and_gradients_are_the_plain_ones_in_any_micro_batches(family):
    model = make(family)
    model.lvlm.double()
    objective = ObjectiveConfig(lm_weight=0.7, contrastive_weight=1.3, temperature=0.1)
    lm, contrastive = plain_losses(model, objective)
    (0.7 * lm + 1.3 * contrastive).backward()
    expected = gradient(model)
    assert expected.norm() > 0
    for size in (MicroBatchSize(), MicroBatchSize(tokens=400)):
        model.lvlm.zero_grad()
        batch = ContrastiveBatchDataset(
            [Listed(examples())], model.chat_processor, 4, seed=0, packing=model.packing, micro_batch_size=size
        )[0]
        assert not batch.bad_records and (len(batch.micro_batches) > 1) == (size.tokens is not None)
        losses = JointStep(model.lvlm, objective).double().forward_backward(batch)
        assert losses.lm.item() == pytest.approx(lm.item(), rel=1e-5)
        assert losses.contrastive.item() == pytest.approx(contrastive.item(), rel=1e-5)
        assert (gradient(model) - expected).norm() <= 1e-5 * expected.norm()


@every_family
def test_embeddings_and_answers_are_the_plain_ones(family):
    model = make(family)
    contents = [Content.of(content) for content in CONTENTS.values()]
    expected = torch.stack([plain_hidden(model, own_embedding_inputs(model, content))[-1] for content in contents])
    vectors = model.embed(contents)
    np.testing.assert_allclose(vectors, F.normalize(expected, dim=-1).numpy(), atol=1e-5)

    prompt = "What is it?"
    messages = dialogue_messages(chat(Content.of([WIDE, prompt])), model.chat_processor.prompts)
    inputs = own_inputs(model, messages, Content.of(WIDE), over=False)
    output = model.lvlm.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = model.chat_processor.tokenizer.decode(output, skip_special_tokens=True).strip()
    assert model.generate(WIDE, prompt, max_new_tokens=6) == answer
    longer = Content.of([SMALL, TALL, "Which one of the two, at some length?"])
    batch = [longer, Content.of([WIDE, prompt]), Content.of("Hello?")]
    assert model.generate_batch(batch, max_new_tokens=6)[1] == answer

    vector, said = model.embed_and_generate(WIDE, prompt, max_new_tokens=6)
    np.testing.assert_allclose(vector, model.embed([WIDE])[0], atol=1e-5)
    assert said == answer
    looks = []
    with find_vision_tower(model.lvlm).register_forward_hook(lambda *_: looks.append(1)):
        vectors, answers = model.embed_and_generate_batch([TALL, WIDE], prompt, max_new_tokens=6)
    assert len(looks) == 1 + (family in PREFIX_LMS)  # at all images, once, or with each prompt
    np.testing.assert_allclose(vectors, model.embed([TALL, WIDE]), atol=1e-5)
    assert answers == [model.generate(image, prompt, max_new_tokens=6) for image in (TALL, WIDE)]


@every_family
def test_contents_with_the_same_images_embed_as_each_does_alone(family, monkeypatch):
    model = make(family)
    model.lvlm.double()
    contents = [
        [WIDE, "what is left of it?"],
        "a blue star",
        [TALL, "what?"],
        [WIDE, "what is left of it, and what is right of it?"],
        [SMALL, TALL, "Which one?"],
        WIDE,
        [TALL, "a question that is as long as any other here"],
        [SMALL, TALL],
    ]
    expected = np.concatenate([model.embed([content]) for content in contents])
    packs, forward = [], cafe.model.forward_packed
    monkeypatch.setattr("cafe.model.forward_packed", lambda lvlm, packed: packs.append(packed) or forward(lvlm, packed))
    loaded, load = [], ChatProcessor.load_images
    monkeypatch.setattr(ChatProcessor, "load_images", lambda self, refs: loaded.extend(refs) or load(self, refs))
    np.testing.assert_allclose(model.embed(contents), expected, atol=1e-5)
    assert len(loaded) == 4  # one, one, and two that are processed together

    # In rows that are long enough, the model reads each set of images once.
    model.packing = replace(model.packing, max_row_tokens=1024)
    np.testing.assert_allclose(model.embed(contents), expected, atol=1e-5)
    images = [model.chat_processor.process_images(each).inputs for each in ([WIDE], [TALL], [SMALL, TALL])]
    reads_once = packs[1].inputs["pixel_values"].shape == collate_vision(images)["pixel_values"].shape
    assert reads_once == model.packing.share_prefixes


@every_family
def test_scores_of_answers_are_the_likelihood_of_transformers_own_logits(family):
    model = make(family)
    asked = [Content.of([WIDE, "What is it?"]), Content.of("a question"), Content.of([SMALL, TALL, "Which one?"])]
    said = [["a red circle", "two", "a red circle and more"], ["yes", "no"], ["the first"]]
    scores = model.score_batch(asked, said, batch_size=2)
    for content, answers, found in zip(asked, said, scores, strict=True):
        for answer, score in zip(answers, found, strict=True):
            row = model.encode_dialogue(chat(content, answer))
            inputs = model.chat_processor.collate([row])
            with torch.inference_mode():
                logits = model.lvlm(**inputs).logits[0, :-1].double().log_softmax(-1)
            wanted = row.loss_mask[1:].nonzero()[:, 0]
            expected = logits[wanted, row.input_ids[1:][wanted]].sum().item()
            assert score == pytest.approx(expected, abs=1e-3, rel=1e-4)
            assert model.score(content, answer) == pytest.approx(score, abs=1e-3, rel=1e-4)
            beginning = model.chat_processor.tokenize_beginning(answer)
            assert row.input_ids[1:][wanted].tolist()[: len(beginning)] == beginning
            expected = logits[wanted, row.input_ids[1:][wanted]][: len(beginning)].sum().item()
            [[score]] = model.score_batch([content], [[answer]], with_end=False)
            assert score == pytest.approx(expected, abs=1e-3, rel=1e-4)


@every_family
def test_a_saved_checkpoint_loads_and_embeds_the_same(family, tmp_path):
    model = make(family)
    model.save(tmp_path / "saved")
    again = Cafe.load(tmp_path / "saved")
    assert type(again.lvlm) is type(model.lvlm) and again.packing.share_prefixes == model.packing.share_prefixes
    contents = list(CONTENTS.values())
    np.testing.assert_array_equal(again.embed(contents), model.embed(contents))


@pytest.mark.parametrize("family", sorted(set(families.FAMILIES) & set(FAMILIES)))
def test_a_family_of_the_table_has_every_part(family):
    model = make(family)
    parts = {model_part(name, family) for name, _ in model.lvlm.named_parameters()}
    assert parts == {"vision_tower", "projector", "language_model"}


def test_a_sliding_window_or_another_attention_keeps_branches_apart():
    lvlm = families.llava_next().lvlm
    text = lvlm.config.get_text_config()
    assert supports_prefix_sharing(lvlm)
    text.sliding_window = 64
    assert supports_prefix_sharing(lvlm) is False
    text.sliding_window = None
    text._attn_implementation = "flash_attention_2"
    assert supports_prefix_sharing(lvlm) is False


@pytest.mark.parametrize(
    ("family", "text", "sdpa", "flex"),
    [
        ("llava", "llama", "sdpa", "sdpa"),
        ("llava", "gemma2", {"text_config": "eager"}, {"text_config": "flex_attention"}),  # caps attention scores
        ("paligemma", "gemma", "sdpa", {"text_config": "flex_attention"}),
        ("qwen2_5_vl", "qwen2_5_vl_text", "sdpa", "sdpa"),
        ("aya_vision", "cohere2", "sdpa", "sdpa"),
    ],
)
def test_attention_is_loaded_as_sdpa_where_it_computes_trees(family, text, sdpa, flex):
    config = AutoConfig.for_model(family, text_config={"model_type": text})
    assert [attention_kwargs(config, name) for name in ("sdpa", "flex_attention", "eager")] == [sdpa, flex, "eager"]


@pytest.mark.parametrize("family", PREFIX_LMS)
@pytest.mark.parametrize("training", [True, False])
def test_a_prefix_lms_answers_have_transformers_own_loss(family, training):
    model = make(family)
    model.lvlm.train(training)
    for content, answer in (([WIDE, "What is it?"], "a red circle"), ([SMALL, TALL, "Which one?"], "the first")):
        [*images, prompt] = content
        own = model.chat_processor.processor(
            text=["<image>" * len(images) + prompt], images=[images], suffix=[answer], return_tensors="pt"
        )
        packed = pack([[]], [[model.encode_dialogue(chat(Content.of(content), answer))]], model.packing)
        assert torch.equal(packed.inputs["input_ids"], own["input_ids"])
        assert torch.equal(packed.labels, own["labels"][own["labels"] >= 0])
        with torch.no_grad():
            loss = F.cross_entropy(compute_logits(model.lvlm, forward_packed(model.lvlm, packed)[1]), packed.labels)
            torch.testing.assert_close(loss, model.lvlm(**own).loss, atol=1e-5, rtol=1e-5)


def test_a_prefix_lm_refuses_an_attention_without_masks():
    model = make("paligemma")
    model.lvlm.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(CafeError, match="reads prompts both ways, and flash_attention_2 takes no mask"):
        infer_packing(model.lvlm, model.chat_processor)


def test_a_chat_template_without_images_is_refused():
    processor = families.llava().chat_processor.processor
    for template in (None, "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"):
        processor.chat_template = template
        with pytest.raises(CafeError, match="LlavaProcessor has no chat template that shows images"):
            ChatProcessor(processor, Prompts())
    ChatProcessor(processor, Prompts(chat_template="chatml"))


@pytest.mark.parametrize("size", [(1, 300), (300, 1)])
def test_an_image_that_a_family_refuses_is_a_bad_record(size):
    chat_processor = make("qwen2_vl").chat_processor
    example = Example(Pair(Content.of(Image.new("RGB", size)), Content.of("a line")), None, "record 3")
    for way in (chat_processor, with_fast_images(chat_processor)[0]):
        with pytest.raises(CafeError, match=f"record 3: The .* cannot read an image of {size[0]} x {size[1]} pixels"):
            encode_example(example, way)
