"""Embedding instructions, and rendering content to chat messages.

The defaults are CAFe's (arXiv 2503.19900): a user turn `<image>\\nCompress this image in one word:` for pictures,
`{caption}Compress this sentence in one word:` for text, after the system prompt "You are a helpful assistant." In
multimodal mode, as for MMEB, the content is the user turn as it is and no instruction is added.
"""

from dataclasses import dataclass
from typing import Any, Literal

from cafe.content import Content, Dialogue, ImageRef

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
"""The published prompt frame of LLaVA-OneVision's Qwen2 models, as a chat template; `<image>` stands for an image."""

PREFIX_LM = {
    "PaliGemmaProcessor": (
        "{% for message in messages if message['role'] != 'system' %}"
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
        "{{ bos_token if loop.first else '' }}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    )
}
"""Prefix-LMs by their processor's class, which has no chat template, and one that writes what it writes by itself.

Such a model reads a prompt both ways: its tokens, those of pictures among them, all see each other. An answer it reads
as other models do. The template writes what the processor makes of a prompt and its `suffix`: a turn's pictures before
its words, wherever they stood, and no system prompt. What follows the first answer is read as an answer too.
"""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """How content becomes a prompt. It travels in the checkpoint, so that training and use agree.

    Attributes:
        mode: "compress" asks the model to compress content into one token, as CAFe does with pictures and texts;
            "multimodal" takes content as the user's turn as it is, as CAFe and VLM2Vec do with MMEB, whose texts say
            themselves what is asked.
        system: the system prompt; empty for none.
        image_instruction: follows content that holds an image.
        text_instruction: follows content of text alone.
        assistant_frame: "closed" opens and closes the assistant's turn at once, as published, and reads the closing token;
            "open" stops where the assistant would begin to speak.
        chat_template: "chatml" for the published frame, "family" for the template the base model came with.
    """

    mode: Literal["compress", "multimodal"] = "compress"
    system: str = "You are a helpful assistant."
    image_instruction: str = "Compress this image in one word:"
    text_instruction: str = "Compress this sentence in one word:"
    assistant_frame: Literal["closed", "open"] = "closed"
    chat_template: Literal["chatml", "family"] = "family"


Message = dict[str, Any]


def embedding_messages(content: Content, prompts: Prompts) -> list[Message]:
    """The chat that asks the model to compress content into one token, or in multimodal mode the content alone."""
    if prompts.mode == "multimodal":
        return [*_system(prompts), _message("user", content)]
    instruction = prompts.image_instruction if content.images else prompts.text_instruction
    return [*_system(prompts), _message("user", Content((*content.parts, instruction)))]


def dialogue_messages(dialogue: Dialogue, prompts: Prompts) -> list[Message]:
    """The chat of a dialogue, the system prompt before it."""
    return [*_system(prompts), *(_message(turn.role, turn.content) for turn in dialogue.turns)]


def _system(prompts: Prompts) -> list[Message]:
    return [{"role": "system", "content": [{"type": "text", "text": prompts.system}]}] if prompts.system else []


def _message(role: str, content: Content) -> Message:
    parts = [
        {"type": "image"} if isinstance(part, ImageRef) else {"type": "text", "text": part} for part in content.parts
    ]
    return {"role": role, "content": parts}
