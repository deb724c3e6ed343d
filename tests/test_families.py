"""Every family: what is packed, shared, embedded and said, against plain transformers on the family's own inputs."""

import re
from dataclasses import dataclass
from random import Random

import families
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ProcessorMixin

from cafe.content import Content, Dialogue, Example, Pair, Turn, open_image
from cafe.data.formats import Source
from cafe.data.loading import Batches, MicroBatchSize, encode
from cafe.data.raw import raw
from cafe.errors import CafeError
from cafe.families import FAMILIES, may_share, part_of, vision_tower_of
from cafe.instructions import Message, Prompts, dialogue_messages, embedding_messages
from cafe.model import Cafe
from cafe.packing import Branch, lay_out, pack
from cafe.processing import Processing
from cafe.reading import attention_mask, logits_of, packing_for, read, to_device
from cafe.training.recipe import ObjectiveRecipe
from cafe.training.step import JointStep

# Sliding windows, linear attention, or both ways.
READ_ONE_BY_ONE = {"gemma3", "gemma4", "paligemma", "paligemma2", "qwen3_5", "aya_vision"}
PREFIX_LMS = ["paligemma", "paligemma2"]
EMPTY = {"role": "assistant", "content": [{"type": "text", "text": ""}]}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other cost far more than these matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every_family = pytest.mark.parametrize("family", families.FAMILIES)


def make(family: str) -> Cafe:
    try:
        return families.FAMILIES[family]()
    except ImportError as error:
        pytest.skip(str(error))


def picture(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST)


SMALL, WIDE, TALL = picture(1), picture(2, 64, 32), picture(3, 32, 64)
CONTENTS = {
    "text": "a red circle left of it",
    "image": [SMALL],
    "image and text": [WIDE, "what is left of it?"],
    "several images": [SMALL, TALL],
    "interleaved": ["first ", WIDE, " and then ", SMALL, ": which one?"],
}


def chat(*said: str | Content) -> Dialogue:
    roles = ("user", "assistant")
    return Dialogue(tuple(Turn(roles[index % 2], Content.of(words)) for index, words in enumerate(said)))


def own_inputs(model: Cafe, messages: list[Message], content: Content, over: bool = True) -> dict[str, torch.Tensor]:
    """What the family's processor makes of a chat that is over, or waits for an answer."""
    processor, images = model.processing.processor, [open_image(ref) for ref in content.images]
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
    shown = images or [SMALL]  # it insists on a picture
    inputs = dict(processor(text=["<image>" * len(shown) + prompt], images=[shown], return_tensors="pt", **given))
    if not images:
        del inputs["pixel_values"]
        inputs = {name: tokens[:, processor.image_seq_length :] for name, tokens in inputs.items()}
    del inputs["labels"]
    return inputs


def own_embedding_inputs(model: Cafe, content: Content) -> dict[str, torch.Tensor]:
    inputs = own_inputs(model, [*embedding_messages(content, model.processing.prompts), EMPTY], content)
    if model.lvlm.config.model_type == "paligemma":
        inputs["token_type_ids"].zero_()  # all of an embedding's prompt is read both ways
    return inputs


@torch.no_grad()
def plain_hidden(model: Cafe, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.lvlm.base_model(**inputs).last_hidden_state[0]


@every_family
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_hidden_state_is_the_plain_one(family, kind, caplog):
    model = make(family)
    model.lvlm.double()
    assert model.packing.share == (family not in READ_ONE_BY_ONE)
    warned = [record for record in caplog.records if record.name == "cafe.reading"]
    assert len(warned) == (family in READ_ONE_BY_ONE)

    content, other, text = Content.of(CONTENTS[kind]), Content.of([TALL, "it"]), Content.of("a blue square")
    dialogue = chat(Content((*content.parts, " What is it?")), "a red circle")
    examples = [Example(Pair(content, text, (other,)), dialogue), Example(Pair(text, other))]
    encoded = [encode(example, model.processing) for example in examples]
    groups = [[one.query, one.target, *one.negatives, *([one.dialogue] if one.dialogue else [])] for one in encoded]
    expected = [own_embedding_inputs(model, one) for one in (content, text, other)]
    expected.append(own_inputs(model, dialogue_messages(dialogue, model.processing.prompts), dialogue.turns[0].content))
    expected += [own_embedding_inputs(model, one) for one in (text, other)]
    expected = [to_device(own, model.lvlm.device, torch.float64) for own in expected]

    packed, layout = pack(groups, [[], []], model.packing), lay_out(groups, model.packing)
    inputs = to_device(packed.inputs, model.lvlm.device, torch.float64)
    if packed.end is not None:
        inputs["attention_mask"] = attention_mask(packed.end, model.lvlm.config.get_text_config(), torch.float64)
        assert packed.filled < sum(len(branch) for group in groups for branch in group)
    with torch.no_grad():
        hidden = model.lvlm.base_model(**inputs).last_hidden_state
    for branch, place, own in zip([b for group in groups for b in group], layout.places, expected, strict=True):
        length = own["input_ids"].shape[1]
        extra = [] if length == len(branch) else [model.processing.tokenizer.eos_token_id]  # see LLAVA_TEMPLATE
        assert branch.input_ids.tolist() == [*own["input_ids"][0].tolist(), *extra]
        found = hidden[place[:length, 0], place[:length, 1]]
        torch.testing.assert_close(found, plain_hidden(model, own), atol=1e-6, rtol=1e-6)  # norms are in float32


@every_family
def test_a_trial_finds_by_itself_which_families_share(family, monkeypatch):
    model = make(family)
    monkeypatch.setattr("cafe.reading.may_share", lambda lvlm: None)  # as of a family that nobody knows
    assert packing_for(model.lvlm, model.processing).share == (family not in READ_ONE_BY_ONE)


@every_family
def test_a_dialogue_has_the_templates_tokens_and_its_prompts_are_those_in_use(family):
    model = make(family)
    processing = model.processing
    dialogue = chat(Content.of([SMALL, "What is it?"]), "a circle", "What color?", "red")
    messages, pictures = dialogue_messages(dialogue, processing.prompts), processing.pictures([SMALL])
    branch = processing.encode_dialogue(messages, pictures)
    own = own_inputs(model, messages, Content.of(SMALL))["input_ids"][0]
    # Two templates cannot say it all: LLaVA's ends no turn, and Qwen 3.5's hides past thoughts.
    found, expected = (
        re.sub("</s>|</?think>\n*", "", processing.tokenizer.decode(ids)) for ids in (branch.input_ids, own)
    )
    assert found == expected
    said = processing.tokenizer.decode(branch.input_ids[branch.supervised], skip_special_tokens=True)
    assert re.sub("</think>|<turn.>|<end_of_turn>|\\s", "", said) == "acirclered"
    prompt = processing.encode_prompt(messages[:2], pictures).input_ids
    assert torch.equal(branch.input_ids[: len(prompt)], prompt)
    assert not branch.supervised[: len(prompt)].any() and branch.supervised[len(prompt)]


@dataclass
class Listed:
    """Records in memory."""

    examples: list[Example]
    source = Source(path="")

    @property
    def chunks(self) -> list[int]:
        return [len(self.examples)]

    def example(self, index: int, rng: Random) -> Example:
        return self.examples[index]


def examples() -> list[Example]:
    """Of every kind: with hard negatives, without dialogue, without target, with an exchange that goes on."""
    small, wide, both = Content.of(SMALL), Content.of([WIDE, "the left one"]), Content.of([TALL, " or ", SMALL])
    asked = Content((*small.parts, "What is it?"))
    return [
        Example(
            Pair(small, Content.of("a red circle"), (Content.of("a blue circle"), Content.of([TALL, "it"]))),
            chat(asked, "a circle", "What color?", "red"),
            "one",
        ),
        Example(Pair(Content.of("two squares"), both), None, "two"),
        Example(None, chat(wide, "a square"), "three"),
        Example(Pair(wide, Content.of("a square"), (small,)), chat("Say something.", "something"), "four"),
    ]


def plain_read(model: Cafe, branch: Branch) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden state of a branch and its logits, by plain calls."""
    ids = branch.input_ids[None]
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in branch.vision.items()}
    for name in model.processing.token_types:
        marked = ids == model.lvlm.config.image_token_id
        inputs[name] = (branch.supervised[None].cummax(1)[0] if model.processing.prefix_lm else marked).int()
    hidden = model.lvlm.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).last_hidden_state[0]
    return hidden, model.lvlm(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0]


def plain_losses(model: Cafe, objective: ObjectiveRecipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses, written from the paper."""
    encoded = [encode(example, model.processing) for example in examples()]
    pairs = [one for one in encoded if one.query]
    embed = lambda rows: F.normalize(torch.stack([plain_read(model, row)[0][-1] for row in rows]), dim=-1)  # noqa: E731
    queries, targets = embed([one.query for one in pairs]), embed([one.target for one in pairs])
    hard = embed([row for one in pairs for row in one.negatives])
    matches = torch.arange(len(pairs))
    to_target = F.cross_entropy(queries @ torch.cat([targets, hard]).T / objective.temperature, matches)
    contrastive = (to_target + F.cross_entropy(targets @ queries.T / objective.temperature, matches)) / 2
    said, labels = [], []
    for row in [one.dialogue for one in encoded if one.dialogue]:
        said.append(plain_read(model, row)[1][:-1][row.supervised[1:]])
        labels.append(row.input_ids[1:][row.supervised[1:]])
    return F.cross_entropy(torch.cat(said), torch.cat(labels)), contrastive


def gradient(model: Cafe) -> torch.Tensor:
    parameters = model.lvlm.parameters()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]).double()


@every_family
def test_losses_and_gradients_are_the_plain_ones_however_the_batch_is_cut(family):
    model = make(family)
    model.lvlm.double()
    objective = ObjectiveRecipe(lm_weight=0.7, contrastive_weight=1.3, temperature=0.1)
    lm, contrastive = plain_losses(model, objective)
    (0.7 * lm + 1.3 * contrastive).backward()
    expected = gradient(model)
    assert expected.norm() > 0
    for size in (MicroBatchSize(), MicroBatchSize(tokens=400)):
        model.lvlm.zero_grad()
        batch = Batches([Listed(examples())], model.processing, 4, seed=0, packing=model.packing, size=size)[0]
        assert not batch.bad and (len(batch.micro_batches) > 1) == (size.tokens is not None)
        losses = JointStep(model.lvlm, objective).double()(batch)
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
    messages = dialogue_messages(chat(Content.of([WIDE, prompt])), model.processing.prompts)
    inputs = own_inputs(model, messages, Content.of(WIDE), over=False)
    output = model.lvlm.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = model.processing.tokenizer.decode(output, skip_special_tokens=True).strip()
    assert model.generate(WIDE, prompt, max_new_tokens=6) == answer
    longer = Content.of([SMALL, TALL, "Which one of the two, at some length?"])
    batch = [longer, Content.of([WIDE, prompt]), Content.of("Hello?")]
    assert model.generate_batch(batch, max_new_tokens=6)[1] == answer

    vector, said = model.embed_and_generate(WIDE, prompt, max_new_tokens=6)
    np.testing.assert_allclose(vector, model.embed([WIDE])[0], atol=1e-5)
    assert said == answer
    looks = []
    with vision_tower_of(model.lvlm).register_forward_hook(lambda *_: looks.append(1)):
        vectors, answers = model.describe([TALL, WIDE], prompt, max_new_tokens=6)
    assert len(looks) == 1 + (family in PREFIX_LMS)  # at all pictures, once, or with each prompt
    np.testing.assert_allclose(vectors, model.embed([TALL, WIDE]), atol=1e-5)
    assert answers == [model.generate(picture, prompt, max_new_tokens=6) for picture in (TALL, WIDE)]


@every_family
def test_answers_scored_in_one_pass_have_the_likelihood_of_transformers_own_logits(family):
    model = make(family)
    asked = [Content.of([WIDE, "What is it?"]), Content.of("a question"), Content.of([SMALL, TALL, "Which one?"])]
    said = [["a red circle", "two", "a red circle and more"], ["yes", "no"], ["the first"]]
    scores = model.score_batch(asked, said, batch_size=2)
    for content, answers, found in zip(asked, said, scores, strict=True):
        for answer, score in zip(answers, found, strict=True):
            row = model.encode_dialogue(chat(content, answer))
            inputs = model._inputs([row])
            with torch.inference_mode():
                logits = model.lvlm(**inputs).logits[0, :-1].double().log_softmax(-1)
            wanted = row.supervised[1:].nonzero()[:, 0]
            expected = logits[wanted, row.input_ids[1:][wanted]].sum().item()
            assert score == pytest.approx(expected, abs=1e-3, rel=1e-4)
            assert model.score(content, answer) == pytest.approx(score, abs=1e-3, rel=1e-4)


@every_family
def test_a_saved_checkpoint_loads_and_embeds_the_same(family, tmp_path):
    model = make(family)
    model.save(tmp_path / "saved")
    again = Cafe.load(tmp_path / "saved")
    assert type(again.lvlm) is type(model.lvlm) and again.packing.share == model.packing.share
    contents = list(CONTENTS.values())
    np.testing.assert_array_equal(again.embed(contents), model.embed(contents))


@pytest.mark.parametrize("family", sorted(set(families.FAMILIES) & set(FAMILIES)))
def test_a_family_of_the_table_has_every_part(family):
    model = make(family)
    parts = {part_of(name, family) for name, _ in model.lvlm.named_parameters()}
    assert parts == {"vision_tower", "projector", "language_model"}


def test_a_sliding_window_or_another_attention_keeps_branches_apart():
    lvlm = families.llava_next().lvlm
    text = lvlm.config.get_text_config()
    assert may_share(lvlm)
    text.sliding_window = 64
    assert may_share(lvlm) is False
    text.sliding_window = None
    text._attn_implementation = "flash_attention_2"
    assert may_share(lvlm) is False


@pytest.mark.parametrize("family", PREFIX_LMS)
@pytest.mark.parametrize("training", [True, False])
def test_a_prefix_lms_answers_have_the_loss_that_transformers_takes_of_its_processors_suffix(family, training):
    model = make(family)
    model.lvlm.train(training)
    for content, answer in (([WIDE, "What is it?"], "a red circle"), ([SMALL, TALL, "Which one?"], "the first")):
        [*images, prompt] = content
        own = model.processing.processor(
            text=["<image>" * len(images) + prompt], images=[images], suffix=[answer], return_tensors="pt"
        )
        packed = pack([[]], [[model.encode_dialogue(chat(Content.of(content), answer))]], model.packing)
        assert torch.equal(packed.inputs["input_ids"], own["input_ids"])
        assert torch.equal(packed.labels, own["labels"][own["labels"] >= 0])
        with torch.no_grad():
            loss = F.cross_entropy(logits_of(model.lvlm, read(model.lvlm, packed)[1]), packed.labels)
            torch.testing.assert_close(loss, model.lvlm(**own).loss, atol=1e-5, rtol=1e-5)


def test_an_attention_without_masks_would_read_a_prefix_lms_prompts_otherwise_and_is_refused():
    model = make("paligemma")
    model.lvlm.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(CafeError, match="reads prompts both ways, and flash_attention_2 takes no mask"):
        packing_for(model.lvlm, model.processing)


def test_a_template_that_shows_no_picture_is_refused():
    processor = families.llava().processing.processor
    for template in (None, "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"):
        processor.chat_template = template
        with pytest.raises(CafeError, match="LlavaProcessor has no chat template that shows pictures"):
            Processing(processor, Prompts())
    Processing(processor, Prompts(chat_template="chatml"))


@pytest.mark.parametrize("size", [(1, 300), (300, 1)])
def test_a_picture_that_a_family_refuses_is_a_bad_record(size):
    processing = make("qwen2_vl").processing
    example = Example(Pair(Content.of(Image.new("RGB", size)), Content.of("a line")), None, "record 3")
    for way in (processing, raw(processing)[0]):
        with pytest.raises(CafeError, match=f"record 3: The .* takes no picture of {size[0]} x {size[1]} pixels"):
            encode(example, way)
