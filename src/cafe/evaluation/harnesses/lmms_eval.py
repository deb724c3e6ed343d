"""A checkpoint as a model of lmms-eval, by name:

    lmms-eval --model cafe --model_args pretrained=runs/mine/checkpoint --tasks mmmu_val,mmstar,mme --batch_size 8

lmms-eval finds it through the entry point `lmms_eval.models` that this package declares. lmms-eval requires
torchvision, which this package does not: docs/suites/understanding.md has the commands for a separate environment.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

from cafe.content import Content, ImageRef
from cafe.data.image_fields import IMAGE_TOKEN, place_images
from cafe.errors import CafeError
from cafe.model import Cafe

MAX_NEW_TOKENS = 1024  # of an answer, if a task sets no limit


class CafeModel(lmms):
    """Generate and score answers; started by `accelerate launch`, each process answers its share of the requests.

    Args:
        pretrained: a directory, a Hub id, or a loaded `Cafe`.
        batch_size: prompts per forward pass.
        device: the model's device; this process's GPU by default, if there is one.
        dtype: of the weights, such as "bfloat16"; by default that of `Cafe.load`.
        attn_implementation: the attention implementation by transformers' name.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: "str | Cafe",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str = "sdpa",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()  # lmms-eval gathers with it
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        # With several processes, one device for all would be wrong.
        self.device = self.accelerator.device
        if device and self._world_size == 1:
            self.device = torch.device(device)
        self.batch_size = int(batch_size)
        if isinstance(pretrained, Cafe):
            self.model = pretrained
            return
        self.model = Cafe.load(
            pretrained,
            dtype=getattr(torch, dtype) if dtype else None,
            device=self.device,
            attention=attn_implementation,
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Generate the answer to each request, cut before the first of its stop words."""
        # One forward pass generates with one set of options.
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            options = request.args[1]
            groups.setdefault(repr(sorted(options.items())), []).append(index)
        # The answers return to the order of the requests.
        answers = [""] * len(requests)
        for indices in groups.values():
            options = requests[indices[0]].args[1]
            prompts = [self._prompt(requests[index]) for index in indices]
            generated = self.model.generate_batch(prompts, batch_size=self.batch_size, **_generation_options(options))
            for index, answer in zip(indices, generated, strict=True):
                answers[index] = cut(answer, options.get("until", ()))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Score each continuation: the mean loss of its tokens, and whether the model would generate exactly it.

        lmms-eval's multiple choice takes the option with the least loss.
        """
        prompts = [self._prompt(request) for request in requests]
        continuations = [self._continuation(request) for request in requests]
        scores = self.model.score_batch(prompts, [[text] for text in continuations], self.batch_size)
        # Greedy generation up to the longest continuation tells which of them the model would give itself.
        lengths = [self._num_tokens(text) for text in continuations]
        generated = self.model.generate_batch(
            prompts, max_new_tokens=max(lengths, default=1), batch_size=self.batch_size
        )
        results = []
        for score, length, answer, text in zip(scores, lengths, generated, continuations, strict=True):
            # `Cafe.score_batch` sums log-likelihoods over tokens; the loss is their negative mean.
            results.append((-float(score[0]) / length, answer == text.strip()))
        return results

    def _num_tokens(self, text: str) -> int:
        """Count the tokens of an answer, with the one that ends it."""
        return len(self.model.chat_processor.tokenizer(text, add_special_tokens=False).input_ids) + 1

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse tasks in which the harness answers back."""
        raise NotImplementedError("CAFe's plug-in does not support multi-round tasks.")

    def _prompt(self, request: Instance) -> Content:
        """Build the prompt of a request, whose images its task finds in a document."""
        text, _, visuals, document, task, split = request.args
        return content(text, visuals(self.task_dict[task][split][document]) or [])

    def _continuation(self, request: Instance) -> str:
        """Get the continuation of a request, which its task gives as a text or as a function of a document."""
        _, target, _, document, task, split = request.args
        if isinstance(target, str):
            return target
        continuation: str = target(self.task_dict[task][split][document])
        return continuation


def _generation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a task's options into those of `Cafe.generate_batch`; a temperature of 0 is greedy."""
    # A task may set an option to None, which means its default.
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", True):
        temperature = 0.0
    return {
        "max_new_tokens": options.get("max_new_tokens", MAX_NEW_TOKENS),
        "temperature": temperature,
        "top_p": float(options.get("top_p") or 1.0),
    }


def content(text: str, visuals: Sequence[Any]) -> Content:
    """Build a prompt: images go to their marks `<image>`, or first if the text does not have one mark for each.

    Raises:
        CafeError: a visual is not an image.
    """
    # lmms-eval passes videos and audio as paths or arrays.
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise CafeError(f"CAFe's plug-in supports images; this task gives a {type(visual).__name__}.")
    refs = list(map(ImageRef, visuals))
    if text.count(IMAGE_TOKEN) == len(refs):
        return place_images(text, list(refs))
    return Content((*refs, text))


def cut(answer: str, until: str | Sequence[str]) -> str:
    """Cut an answer before the first of some stop words, and strip it.

    A blank line, lmms-eval's default where a task says nothing, is ignored: longer answers have paragraphs.
    """
    stops = [until] if isinstance(until, str) else until
    for stop in stops:
        if stop.strip():
            answer = answer.split(stop)[0]
    return answer.strip()
