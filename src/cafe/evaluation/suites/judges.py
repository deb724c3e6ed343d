"""Judges decide from a description's text alone which objects it states.

| judge | what it is |
|---|---|
| `exact` | a class is stated if a word for it is in the text; one vote; for closed vocabularies |
| `self` | the evaluated model reads the text and answers each question; one vote per question |
| a directory or Hub id | a language model, text-to-text (FLAN-T5 in THRONE) or causal; one vote per question |
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from cafe.checkpoint import fingerprint
from cafe.content import Content
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suites.coco import Vocabulary
from cafe.evaluation.suites.pope import parse_strictly
from cafe.lvlm.hub import ensure_exists
from cafe.lvlm.loading import loading_errors

QUESTIONS = (
    "Does the text say that there is {} in the picture?",
    "According to the text, can {} be seen? Answer yes or no.",
    "Answer yes or no. Going by the text alone, does the picture show {}?",
)
PROMPT = "Text: {text}\n\nRead the text and answer the question.\n\n{question}"
MAX_NEW_TOKENS = 8
MAX_CHARACTERS = 1024  # of a description, as in THRONE's code
# Names that need another article than their first letter suggests, or another word: a tie may also be a draw.
PHRASES = {"skis": "a pair of skis", "scissors": "a pair of scissors", "tie": "a necktie"}


def require_judges(judges: Sequence[str]) -> None:
    """Check that the language models that are to judge exist, before descriptions are generated for them.

    Raises:
        CheckpointError: a language model does not exist.
    """
    for name in judges:
        if name not in ("exact", "self"):
            _is_encoder_decoder(os.path.expanduser(name))


def _is_encoder_decoder(path: str) -> bool:
    """Tell whether a language model has an encoder; raises if there is no such model."""
    ensure_exists(path)
    with loading_errors("judge", path):
        return bool(AutoConfig.from_pretrained(path, trust_remote_code=False).is_encoder_decoder)


def votes(model: CachedModel, texts: Sequence[str], vocabulary: Vocabulary) -> Bool[np.ndarray, "votes texts classes"]:
    """Let each of the model's judges vote on each class of each text; `exact` alone if it has no judges.

    Args:
        model: the evaluated model, with the names of its judges.
        texts: descriptions.
        vocabulary: the classes, and the words for them.

    Raises:
        CheckpointError: a language model does not exist.
    """
    ballots = []
    for name in model.judges or ("exact",):
        match name:
            case "exact":
                ballots.append(exact(texts, vocabulary)[None])  # one vote
            case "self":
                ballots.append(ask(model, texts, vocabulary.classes))
            case _:
                # As a `CachedModel`, so that an interrupted evaluation does not ask again.
                judge = model.with_model(LanguageModel.load(name))
                ballots.append(ask(judge, texts, vocabulary.classes))
    return np.concatenate(ballots)


def exact(texts: Sequence[str], vocabulary: Vocabulary) -> Bool[np.ndarray, "texts classes"]:
    """Find the classes that texts name."""
    states = np.zeros((len(texts), len(vocabulary.classes)), bool)
    for row, text in zip(states, texts, strict=True):
        mentioned = vocabulary.mentions(text)
        row[:] = [name in mentioned for name in vocabulary.classes]
    return states


def ask(judge: CachedModel, texts: Sequence[str], classes: Sequence[str]) -> Bool[np.ndarray, "votes texts classes"]:
    """Ask a judge every question about every class; yes if the answer begins with it, or has it and not no.

    Args:
        judge: the model that reads and answers.
        texts: descriptions.
        classes: names of objects.
    """
    # The order of the loops gives the shape of the array: votes, texts, classes.
    prompts = []
    for question, text, name in product(QUESTIONS, texts, classes):
        prompt = PROMPT.format(text=text[:MAX_CHARACTERS], question=question.format(phrase(name)))
        prompts.append(Content.of(prompt))
    answers = judge.generate(prompts, MAX_NEW_TOKENS)
    # An answer that is neither yes nor no states nothing.
    is_yes = [parse_strictly(answer) is True for answer in answers]
    return np.array(is_yes, bool).reshape(len(QUESTIONS), len(texts), len(classes))


def phrase(name: str) -> str:
    """Put a class's name after its article."""
    article = "an" if name[0] in "aeiou" else "a"
    return PHRASES.get(name, f"{article} {name}")


@dataclass
class LanguageModel:
    """Wrap a language model with the methods that a `CachedModel` needs."""

    lm: PreTrainedModel
    tokenizer: Any

    @classmethod
    def load(cls, path: str) -> "LanguageModel":
        """Load a model from a local directory or the Hub, in bfloat16 on a GPU if there is one.

        Raises:
            CheckpointError: there is no language model.
        """
        path = os.path.expanduser(path)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        encoder_decoder = _is_encoder_decoder(path)
        auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        # A decoder continues the last token, which must not be padding.
        padding_side = "right" if encoder_decoder else "left"
        with loading_errors("judge", path):
            lm = auto.from_pretrained(path, dtype=dtype, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(path, padding_side=padding_side, trust_remote_code=False)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(lm.to(device).eval(), tokenizer)

    def fingerprint(self) -> str:
        """Compute a digest of everything that determines the answers."""
        return fingerprint(self.lm, self.tokenizer.get_vocab(), self.tokenizer.chat_template)

    @torch.inference_mode()
    def generate_batch(self, prompts: Sequence[Content], max_new_tokens: int = 8, batch_size: int = 64) -> list[str]:
        """Generate the likeliest answer to each text, in the order given."""
        texts = [self._render(prompt.text) for prompt in prompts]
        # Texts of similar length share a batch; the longest come first, so that a lack of memory shows at once.
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        answers = [""] * len(texts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = self._generate([texts[index] for index in chosen], max_new_tokens)
            for index, answer in zip(chosen, batch, strict=True):
                answers[index] = answer.strip()
        return answers

    def _generate(self, texts: list[str], max_new_tokens: int) -> list[str]:
        """Answer one batch of rendered texts."""
        encoded = self.tokenizer(
            texts,
            padding=True,
            add_special_tokens=not self.tokenizer.chat_template,  # a template writes them itself
            return_tensors="pt",
        )
        # Some tokenizers also return token types, which `generate` refuses.
        inputs = {name: encoded[name].to(self.lm.device) for name in ("input_ids", "attention_mask")}
        output = self.lm.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
        )
        if not self.lm.config.is_encoder_decoder:
            output = output[:, inputs["input_ids"].shape[1] :]  # a decoder's output begins with the prompt
        answers: list[str] = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return answers

    def _render(self, text: str) -> str:
        """Put a text into the chat template, if the model has one."""
        if not self.tokenizer.chat_template:
            return text
        turns = [{"role": "user", "content": text}]
        rendered: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return rendered
