"""A checkpoint as a model of lmms-eval, by name:

    lmms-eval --model cafe --model_args pretrained=runs/mine/checkpoint --tasks mmmu_val,mmstar,mme --batch_size 8

lmms-eval finds it through the entry point `lmms_eval.models` that this package declares. lmms-eval wants torchvision,
which this package does without: docs/suites/understanding.md has the commands for an environment of its own.
"""

from collections.abc import Callable, Sequence
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

MAX_NEW_TOKENS = 1024  # tokens of an answer where a task names no limit


class CafeModel(lmms):
    """Answers and scores; started by `accelerate launch`, each process answers its share.

    Args:
        pretrained: a directory, a Hub id, or a loaded `Cafe`.
        batch_size: prompts at once.
        device: where the model goes; this process's GPU where there is one, unless given.
        dtype: of the weights, such as "bfloat16"; that of `Cafe.load` unless given.
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
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        self.batch_size = int(batch_size)
        self.model = (
            pretrained
            if isinstance(pretrained, Cafe)
            else Cafe.load(
                pretrained,
                dtype=getattr(torch, dtype) if dtype else None,
                device=self.device,
                attention=attn_implementation,
            )
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answer to each request, cut before the first of its stop words."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in groups.values():  # what goes through the model at once is generated alike
            options = requests[numbers[0]].args[1]
            prompts = []
            for number in numbers:
                words, _, visuals, document, task, split = requests[number].args
                prompts.append(self._content(words, visuals, document, task, split))
            said = self.model.generate_batch(
                prompts,
                max_new_tokens=options.get("max_new_tokens", MAX_NEW_TOKENS),
                batch_size=self.batch_size,
                temperature=float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0,
                top_p=float(options.get("top_p") or 1.0),
            )
            for number, answer in zip(numbers, said, strict=True):
                answers[number] = cut(answer, options.get("until", ()))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """For each request the mean loss of the continuation's tokens, which is what lmms-eval's multiple choice takes
        the least of, and whether the model would say just that."""
        prompts, wanted = [], []
        for request in requests:
            words, target, visuals, document, task, split = request.args
            wanted.append(target if isinstance(target, str) else target(self.task_dict[task][split][document]))
            prompts.append(self._content(words, visuals, document, task, split))
        scores = self.model.score_batch(prompts, [[text] for text in wanted], self.batch_size)
        tokens = [
            len(self.model.chat_processor.tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in wanted
        ]
        said = self.model.generate_batch(prompts, max_new_tokens=max(tokens, default=1), batch_size=self.batch_size)
        return [
            (-float(score[0]) / count, answer == text.strip())
            for score, count, answer, text in zip(scores, tokens, said, wanted, strict=True)
        ]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not there: tasks in which the harness answers back."""
        raise NotImplementedError("CAFe's plug-in has no tasks of several rounds.")

    def _content(self, words: str, visuals: Callable[[Any], Any], document: int, task: str, split: str) -> Content:
        return content(words, visuals(self.task_dict[task][split][document]) or [])


def content(words: str, visuals: Sequence[Any]) -> Content:
    """A prompt: pictures stand at their marks `<image>`, or first where the words do not mark a place for each.

    Raises:
        CafeError: a visual is no picture.
    """
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise CafeError(f"CAFe's plug-in shows pictures; this task gives a {type(visual).__name__}.")
    refs = [ImageRef(visual) for visual in visuals]
    if words.count(IMAGE_TOKEN) == len(refs):
        return place_images(words, list(refs))
    return Content((*refs, words))


def cut(answer: str, until: str | Sequence[str]) -> str:
    """The answer up to the first of some stop words.

    A blank line, which lmms-eval names where a task says nothing, is none: longer answers have paragraphs.
    """
    for stop in [until] if isinstance(until, str) else until:
        answer = answer.split(stop)[0] if stop.strip() else answer
    return answer.strip()
