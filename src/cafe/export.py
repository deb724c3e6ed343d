"""What a checkpoint holds for others: sentence-transformers' files, a prompt template for servers, a model card.

A server renders a chat by a template and takes the last token's hidden state. So the template written here,
`embedding_template.jinja`, renders a user's turn as our embedding prompt: it puts the system prompt before it, the
embedding instruction behind it and the frame around it, and has the result rendered by the template for conversations.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from jinja2 import ChainableUndefined, Environment
from PIL import Image
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
from transformers.utils import PROCESSOR_NAME, VIDEO_PROCESSOR_NAME
from transformers.video_processing_utils import BaseVideoProcessor

from cafe.content import Content
from cafe.errors import CafeError
from cafe.lvlm.images import ProcessedImages
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import Prompts, embedding_messages

TEMPLATE = "embedding_template.jinja"
MODULES = "modules.json"  # by which sentence-transformers knows a checkpoint
Library = Literal["peft", "sentence-transformers", "transformers"]
NEWLINE = "\n"


def embedding_template(chat_template: str, prompts: Prompts) -> str:
    """A chat template that renders a user's turn as the prompt whose last token is the readout."""
    *before, words = embedding_messages(Content.of("a"), prompts)
    picture = embedding_messages(Content.of(Image.new("RGB", (1, 1))), prompts)[-1]
    closed = prompts.assistant_frame == "closed"
    answer = [{"role": "assistant", "content": [{"type": "text", "text": ""}]}] if closed else []

    def literal(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    return (
        "{%- set user = (messages | selectattr('role', 'equalto', 'user') | list)[-1] -%}"
        "{%- set parts = [{'type': 'text', 'text': user['content']}] if user['content'] is string"
        " else user['content'] | list -%}"
        "{%- set shown = parts | rejectattr('type', 'equalto', 'text') | list -%}"
        f"{{%- set behind = {literal(picture['content'][1:])} if shown else {literal(words['content'][1:])} -%}}"
        f"{{%- set messages = {literal(before)} + [{{'role': 'user', 'content': parts + behind}}]"
        f" + {literal(answer)} -%}}"
        f"{{%- set add_generation_prompt = {'false' if closed else 'true'} -%}}"
        # Jinja, as transformers sets it, drops a newline behind a block and one at a template's end.
        f"{{%- set rendered %}}\n{chat_template.removesuffix(NEWLINE)}{{% endset -%}}"
        f"{{{{- rendered{'.rstrip()' if closed else ''} -}}}}"
    )


def write_sentence_transformers(directory: Path, chat_processor: ChatProcessor, width: int) -> None:
    """Writes what `SentenceTransformer(directory)` reads, for a model whose embeddings are `width` wide.

    The modules are sentence-transformers' own: the model's last hidden states, that of the last token, unit length.
    """
    template = embedding_template(chat_processor.processor.chat_template, chat_processor.prompts)
    prompt = chat_processor.encode_embedding(
        embedding_messages(Content.of("a"), chat_processor.prompts), ProcessedImages([], {})
    )
    begun = int(prompt.input_ids[0]) == chat_processor.tokenizer.bos_token_id
    (directory / TEMPLATE).write_text(template, encoding="utf-8")
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    files: dict[str, Any] = {
        # The names that sentence-transformers had before 6: it still reads them, and servers look for them.
        MODULES: [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": output, "image": output, "message": {**output, "format": "structured"}},
            "module_output_name": "token_embeddings",
            "processing_kwargs": {
                "chat_template": {"chat_template": template},
                # transformers adds none itself where the template begins with the token that begins texts
                **({} if begun else {"text": {"add_special_tokens": False}}),
            },
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": False,
            "pooling_mode_max_tokens": False,
            "pooling_mode_lasttoken": True,
            "include_prompt": True,
        },
    }
    for name, content in files.items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n")


def write_video_processor_config(directory: Path, base: str, family: str) -> None:
    """Writes a family's settings for videos, which `load_processor` leaves out.

    Where torchvision is installed, transformers wants them, whether or not a video is ever shown. They are those of the
    base, which has them under one of several names; where it has none they are those for pictures, as transformers
    reads older ones.
    """
    written = json.loads((directory / PROCESSOR_NAME).read_text())
    if family not in VIDEO_PROCESSOR_MAPPING_NAMES or "video_processor" in written:
        return
    try:
        settings, _ = BaseVideoProcessor.get_video_processor_dict(base, local_files_only=True)
    except OSError:
        settings = written["image_processor"]
    (directory / VIDEO_PROCESSOR_NAME).write_text(json.dumps(settings, indent=2) + "\n")


def detect_library(checkpoint: Path) -> Library:
    """The library that a checkpoint is for, by its files."""
    if (checkpoint / "adapter_config.json").is_file():
        return "peft"
    return "sentence-transformers" if (checkpoint / MODULES).is_file() else "transformers"


def model_card(
    record: dict[str, Any], results: dict[str, float] | None = None, library: Library = "sentence-transformers"
) -> str:
    """A checkpoint's README.md, filled in from its record.

    Args:
        record: what `cafe.json` holds.
        results: of an evaluation, as `results.json` holds them; those of the evaluation during training, which the
            record of a best checkpoint has, unless given.
        library: see `detect_library`.
    """
    recipe: dict[str, Any] = record.get("recipe", {})
    base = str(recipe.get("model", {}).get("base", "")) or "an unrecorded base model"
    about: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "feature-extraction" if library == "sentence-transformers" else "image-text-to-text",
        "tags": ["cafe", "embeddings", "image-text-to-text"],
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():  # a Hub id
        about["base_model"] = base
    made = {name: record[name] for name in ("steps", "temperature", "versions") if name in record}
    plain = json.loads(json.dumps(recipe))  # tuples become lists
    environment = Environment(
        undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string((Path(__file__).parent / "model_card.md.jinja").read_text()).render(
        about=yaml.safe_dump(about, sort_keys=False),
        library=library,
        base=base,
        prompts=record["prompts"],
        recipe=plain,
        results=results or record.get("results"),
        training=[yaml.safe_dump(part, sort_keys=False) for part in (made, plain) if part],
    )


def push_to_hub(checkpoint: Path, repository: str, card: str, private: bool = True) -> str:
    """Uploads a checkpoint to the Hugging Face Hub; returns where it then is.

    Args:
        checkpoint: the directory.
        repository: "owner/name"; it is made where there is none.
        card: its README.md.
        private: of a repository that is made.

    Raises:
        CafeError: the Hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        where = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=checkpoint, ignore_patterns=["README.md"])
        api.upload_file(repo_id=repository, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except (HTTPError, HFValidationError, OSError) as error:
        raise CafeError(
            f"{checkpoint} cannot be pushed to {repository}: {str(error).strip().splitlines()[0]}"
        ) from error
    return str(where)
