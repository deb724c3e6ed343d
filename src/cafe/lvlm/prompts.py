"""Embedding instructions, and how content becomes chat messages.

The defaults are CAFe's (arXiv 2503.19900): a user turn `<image>\\nCompress this image in one word:` for images,
`{caption}Compress this sentence in one word:` for text, after the system prompt "You are a helpful assistant." In
multimodal mode, as for MMEB, the content itself is the user turn and no instruction is added.
"""

from dataclasses import dataclass
from typing import Any, Literal

from cafe.content import Content, Dialogue, ImageRef
from cafe.utils.ranges import check_ranges

DESCRIBE_PROMPT = "Describe the image."
"""The default request for a caption."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The published prompt format of LLaVA-OneVision's Qwen2 models, as a chat template; `<image>` stands for an image."""


RENAMED_PROMPTS = {"frame": "assistant_frame"}
"""Fields of `Prompts` that had another name before the first release, and their name today."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Configure how content becomes a prompt. A checkpoint carries its prompts, so that training and use agree.

    Attributes:
        mode: "compress" asks the model to compress content into one token, as CAFe does with images and texts;
            "multimodal" takes content as the user's turn, as CAFe and VLM2Vec do for MMEB, whose texts already contain
            the instruction.
        system: the system prompt; empty for none.
        image_instruction: appended to content with an image.
        text_instruction: appended to content of text alone.
        assistant_frame: "closed" opens and closes the assistant's turn, as published, and the embedding is read at the
            closing token; "open" stops where the assistant would begin to answer.
        chat_template: "chatml" for the published template, "family" for the one the base model came with.
    """

    mode: Literal["compress", "multimodal"] = "compress"
    system: str = "You are a helpful assistant."
    image_instruction: str = "Compress this image in one word:"
    text_instruction: str = "Compress this sentence in one word:"
    assistant_frame: Literal["closed", "open"] = "closed"
    chat_template: Literal["chatml", "family"] = "family"

    def __post_init__(self) -> None:
        check_ranges(self, "prompts")


Message = dict[str, Any]  # a turn of a chat as transformers' templates take it, with "role" and "content"


def embedding_messages(content: Content, prompts: Prompts) -> list[Message]:
    """Return the chat that asks for content in one token; in multimodal mode, the content alone."""
    # In multimodal mode, the texts of the data contain the instruction.
    if prompts.mode == "multimodal":
        return [*system_messages(prompts), _message("user", content)]
    # Content that mixes text and images takes the instruction for images.
    instruction = prompts.image_instruction if content.images else prompts.text_instruction
    instructed = Content((*content.parts, instruction))
    return [*system_messages(prompts), _message("user", instructed)]


def dialogue_messages(dialogue: Dialogue, prompts: Prompts) -> list[Message]:
    """Return the chat of a dialogue, with the system prompt before it."""
    return [*system_messages(prompts), *(_message(turn.role, turn.content) for turn in dialogue.turns)]


def system_messages(prompts: Prompts) -> list[Message]:
    """Return the system turn, in a list that is empty where there is no system prompt."""
    if not prompts.system:
        return []
    return [{"role": "system", "content": [{"type": "text", "text": prompts.system}]}]


def _message(role: str, content: Content) -> Message:
    """Return one turn of a chat."""
    return {"role": role, "content": [_message_part(part) for part in content.parts]}


def _message_part(part: str | ImageRef) -> dict[str, str]:
    """Return one part of a turn, as templates take it."""
    # The template writes a placeholder for an image; its tokens and pixels come from the image processor.
    if isinstance(part, ImageRef):
        return {"type": "image"}
    return {"type": "text", "text": part}
