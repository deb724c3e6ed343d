"""Judges: who says from a description's text alone which objects it states.

| judge | what it is |
|---|---|
| `exact` | a class is stated where a word for it stands in the text; one vote; for closed vocabularies |
| `self` | the evaluated model reads the text and answers each question; a vote a question |
| a directory or Hub id | a language model does, text-to-text (FLAN-T5 in THRONE) or causal; a vote a question |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from cafe.checkpoint import fingerprint
from cafe.content import Content
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suites.coco import Vocabulary
from cafe.evaluation.suites.pope import parse_strictly

QUESTIONS = (
    "Does the text say that there is {} in the picture?",
    "According to the text, can {} be seen? Answer yes or no.",
    "Answer yes or no. Going by the text alone, does the picture show {}?",
)
ASKED = "Text: {text}\n\nRead the text and answer the question.\n\n{question}"
ANSWER = 8  # tokens of an answer
READ = 1024  # characters of a description that are shown, as in THRONE's code
PHRASES = {"skis": "a pair of skis", "scissors": "a pair of scissors", "tie": "a necktie"}


def require_judges(judges: Sequence[str]) -> None:
    """Looks whether language models that are to judge are there, before descriptions are made for them.

    Raises:
        CafeError: one is not.
    """
    for name in judges:
        if name not in ("exact", "self"):
            _is_paired(name)


def _is_paired(path: str) -> bool:
    """Whether a language model has an encoder and a decoder."""
    try:
        return bool(AutoConfig.from_pretrained(path).is_encoder_decoder)
    except (ImportError, OSError, ValueError) as error:
        raise _none(path, error) from error


def _none(path: str, error: Exception) -> CafeError:
    return CafeError(f"No judge can be loaded from {path}: {str(error).strip().splitlines()[0]}")


def votes(model: CachedModel, texts: Sequence[str], vocabulary: Vocabulary) -> Bool[np.ndarray, "votes texts classes"]:
    """What each vote of the subject's judges says of each class; of `exact` alone where it has no judges."""
    cast = []
    for name in model.judges or ("exact",):
        if name == "exact":
            cast.append(exact(texts, vocabulary)[None])
        else:
            judge = model if name == "self" else model.with_model(LanguageModel.load(name))
            cast.append(ask(judge, texts, vocabulary.classes))
    return np.concatenate(cast)


def exact(texts: Sequence[str], vocabulary: Vocabulary) -> Bool[np.ndarray, "texts classes"]:
    """The classes that texts name."""
    found = [set(vocabulary.mentions(text)) for text in texts]
    return np.array([[name in named for name in vocabulary.classes] for named in found], bool)


def ask(judge: CachedModel, texts: Sequence[str], classes: Sequence[str]) -> Bool[np.ndarray, "votes texts classes"]:
    """A judge's answers: yes where the answer begins with it, or says it and not no."""
    prompts = [
        Content.of(ASKED.format(text=text[:READ], question=question.format(phrase(name))))
        for question in QUESTIONS
        for text in texts
        for name in classes
    ]
    said = [parse_strictly(answer) is True for answer in judge.generate(prompts, ANSWER)]
    return np.array(said, bool).reshape(len(QUESTIONS), len(texts), len(classes))


def phrase(name: str) -> str:
    """A class with its article."""
    return PHRASES.get(name, f"{'an' if name[0] in 'aeiou' else 'a'} {name}")


@dataclass
class LanguageModel:
    """A language model that answers, as a `CachedModel` wants it."""

    lm: PreTrainedModel
    tokenizer: Any

    @classmethod
    def load(cls, path: str) -> "LanguageModel":
        """A model of a local directory or Hub id; on a GPU where there is one, in bfloat16 there.

        Raises:
            CafeError: there is no language model.
        """
        device, paired = torch.device("cuda" if torch.cuda.is_available() else "cpu"), _is_paired(path)
        auto = AutoModelForSeq2SeqLM if paired else AutoModelForCausalLM
        try:
            lm = auto.from_pretrained(path, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right" if paired else "left")
        except (ImportError, OSError, ValueError) as error:
            raise _none(path, error) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(lm.to(device).eval(), tokenizer)

    def fingerprint(self) -> str:
        """A digest of what decides the answers."""
        return fingerprint(self.lm, self.tokenizer.get_vocab(), self.tokenizer.chat_template)

    @torch.inference_mode()
    def generate_batch(self, prompts: Sequence[Content], max_new_tokens: int = 8, batch_size: int = 64) -> list[str]:
        """The likeliest answer to each text, in the order given."""
        texts = [self._render(prompt.text) for prompt in prompts]
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        answers = [""] * len(texts)
        paired = self.lm.config.is_encoder_decoder
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = self.tokenizer(
                [texts[index] for index in chosen],
                padding=True,
                add_special_tokens=not self.tokenizer.chat_template,  # a template writes them itself
                return_tensors="pt",
            )
            inputs = {name: inputs[name].to(self.lm.device) for name in ("input_ids", "attention_mask")}
            output = self.lm.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
            said = output if paired else output[:, inputs["input_ids"].shape[1] :]
            for index, answer in zip(chosen, self.tokenizer.batch_decode(said, skip_special_tokens=True), strict=True):
                answers[index] = answer.strip()
        return answers

    def _render(self, text: str) -> str:
        if not self.tokenizer.chat_template:
            return text
        turns = [{"role": "user", "content": text}]
        rendered: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return rendered
