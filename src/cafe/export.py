"""Write what other software reads in a checkpoint: sentence-transformers' files, a template for servers, a model card.

A server renders a chat by a template and takes the last token's hidden state. So the template written here,
`embedding_template.jinja`, renders a user's turn as our embedding prompt: it puts the system prompt before the turn,
the embedding instruction behind it and the frame around it, and renders the result by the template for conversations.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
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
from cafe.errors import CafeError, first_line
from cafe.lvlm.images import ProcessedImages
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import Prompts, embedding_messages

TEMPLATE_FILE = "embedding_template.jinja"
MODULES_FILE = "modules.json"  # by which sentence-transformers recognizes a checkpoint
NEWLINE = "\n"
Library = Literal["peft", "sentence-transformers", "transformers"]


def embedding_template(chat_template: str, prompts: Prompts) -> str:
    """Write a chat template that renders a user's turn as the prompt whose last token is the readout."""
    *before, text_turn = embedding_messages(Content.of("a"), prompts)
    image_turn = embedding_messages(Content.of(Image.new("RGB", (1, 1))), prompts)[-1]
    # A closed frame ends with an empty answer, an open one where the answer would begin.
    closed = prompts.assistant_frame == "closed"
    answer = [{"role": "assistant", "content": [{"type": "text", "text": ""}]}] if closed else []

    def literal(value: Any) -> str:
        """Write a value as Jinja reads it."""
        return json.dumps(value, ensure_ascii=False)

    # What follows the content in our own turns is the instruction; in multimodal mode there is none.
    instruction = f"{literal(image_turn['content'][1:])} if shown else {literal(text_turn['content'][1:])}"
    # The template takes the last of the user's turns, whose content may be a string or a list of parts, puts it into
    # the prompt, and renders that by the model's own template as if it had been given so.
    return (
        "{%- set user = (messages | selectattr('role', 'equalto', 'user') | list)[-1] -%}"
        "{%- set parts = [{'type': 'text', 'text': user['content']}] if user['content'] is string"
        " else user['content'] | list -%}"
        "{%- set shown = parts | rejectattr('type', 'equalto', 'text') | list -%}"
        f"{{%- set behind = {instruction} -%}}"
        f"{{%- set messages = {literal(before)} + [{{'role': 'user', 'content': parts + behind}}]"
        f" + {literal(answer)} -%}}"
        f"{{%- set add_generation_prompt = {'false' if closed else 'true'} -%}}"
        # Jinja, as transformers configures it, drops a newline behind a block and one at the end of a template.
        f"{{%- set rendered %}}\n{chat_template.removesuffix(NEWLINE)}{{% endset -%}}"
        f"{{{{- rendered{'.rstrip()' if closed else ''} -}}}}"
    )


def write_sentence_transformers(directory: Path, chat_processor: ChatProcessor, width: int) -> None:
    """Write the files that `SentenceTransformer(directory)` reads, for embeddings of `width` dimensions.

    The modules are sentence-transformers' own: the model's last hidden states, the last token's, unit length.
    """
    chat_template = chat_processor.processor.chat_template
    if isinstance(chat_template, dict):  # a processor may have several, by name
        chat_template = chat_template["default"]
    template = embedding_template(chat_template, chat_processor.prompts)
    (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    files: dict[str, Any] = {
        # The module names of sentence-transformers before 6: it still reads them, and servers look for them.
        MODULES_FILE: [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
        "sentence_bert_config.json": _transformer_settings(template, chat_processor),
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": False,
            "pooling_mode_max_tokens": False,
            "pooling_mode_lasttoken": True,
            "include_prompt": True,
        },
    }
    for name, settings in files.items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(settings, indent=2) + "\n")


def _transformer_settings(template: str, chat_processor: ChatProcessor) -> dict[str, Any]:
    """Return the settings of sentence-transformers' module that runs the model."""
    # Texts, images and messages of both all pass the whole model.
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    processing_kwargs: dict[str, Any] = {"chat_template": {"chat_template": template}}
    # transformers itself adds no special tokens where the template begins with the one that begins texts.
    messages = embedding_messages(Content.of("a"), chat_processor.prompts)
    prompt = chat_processor.encode_embedding(messages, ProcessedImages([], {}))
    if int(prompt.input_ids[0]) != chat_processor.tokenizer.bos_token_id:
        processing_kwargs["text"] = {"add_special_tokens": False}
    return {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": output, "image": output, "message": {**output, "format": "structured"}},
        "module_output_name": "token_embeddings",
        "processing_kwargs": processing_kwargs,
    }


def write_video_processor_config(directory: Path, base: str, model_type: str) -> None:
    """Write a family's video settings, which `load_processor` leaves out.

    With torchvision installed, transformers needs them even if no video is ever processed. They are the base's, which
    stores them under one of several names; if it has none, they are those for images, which is how transformers reads
    older checkpoints.
    """
    saved = json.loads((directory / PROCESSOR_NAME).read_text())
    if model_type not in VIDEO_PROCESSOR_MAPPING_NAMES or "video_processor" in saved:
        return
    try:
        settings, _ = BaseVideoProcessor.get_video_processor_dict(base, local_files_only=True)
    except OSError:
        settings = saved["image_processor"]
    (directory / VIDEO_PROCESSOR_NAME).write_text(json.dumps(settings, indent=2) + "\n")


def detect_library(checkpoint: Path) -> Library:
    """Return the library that a checkpoint is for, by its files."""
    if (checkpoint / "adapter_config.json").is_file():
        return "peft"
    if (checkpoint / MODULES_FILE).is_file():
        return "sentence-transformers"
    return "transformers"


def model_card(
    metadata: dict[str, Any], results: dict[str, float] | None = None, library: Library = "sentence-transformers"
) -> str:
    """Fill in a checkpoint's README.md from its metadata.

    Args:
        metadata: the content of `cafe.json`.
        results: of an evaluation, as in `results.json`; by default those of the evaluation during training, which the
            metadata of a best checkpoint has.
        library: see `detect_library`.
    """
    # A checkpoint that was not trained by a recipe has none in its metadata, and one by a stranger may hold anything.
    recipe: dict[str, Any] = metadata.get("recipe", {})
    base = str(_field(recipe, "model", "base") or "")
    sources = _field(recipe, "data", "sources") or []
    dims = _field(recipe, "objective", "matryoshka_dims") or []
    numbers = results or metadata.get("results") or {}
    run = {name: metadata[name] for name in ("steps", "temperature", "versions") if name in metadata}
    plain_recipe = json.loads(json.dumps(recipe))  # tuples become lists
    # With `ChainableUndefined`, fields that a recipe does not have are empty and no error.
    environment = Environment(
        undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"code": code_span, "cell": _table_cell, "fence": _yaml_block}
    template = (Path(__file__).parent / "model_card.md.jinja").read_text()
    return environment.from_string(template).render(
        about=yaml.safe_dump(_card_header(base, library), sort_keys=False),
        library=library,
        base=code_span(base) if base else "an unrecorded base model",
        prompts=asdict(Prompts()) | metadata.get("prompts", {}),
        matryoshka_dims=[dim for dim in _as_list(dims) if isinstance(dim, int)],
        sources=[str(_field(source, "path")) for source in _as_list(sources)],
        results={name: value for name, value in numbers.items() if _fits_float(value)},
        training=[yaml.safe_dump(part, sort_keys=False) for part in (run, plain_recipe) if part],
    )


def _field(tree: Any, *names: str) -> Any:
    """Return what stands under nested names; None if there is nothing."""
    for name in names:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(name)
    return tree


def _fits_float(value: Any) -> bool:
    """Return whether a value is a number that a float can hold: JSON's integers have no limit."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max)


def _as_list(value: Any) -> list[Any]:
    """Return a list or tuple as a list, and an empty one for anything else."""
    return list(value) if isinstance(value, (list, tuple)) else []


def code_span(text: Any) -> str:
    """Quote a text as Markdown's inline code, within which nothing is markup, on one line."""
    # Control characters would end the line, or move a terminal's cursor.
    plain = "".join(character if character.isprintable() else " " for character in str(text))
    longest = max(map(len, re.findall("`+", plain)), default=0)
    fence = "`" * (longest + 1)
    # A space keeps a backtick of the text apart from those around it; Markdown drops one on each side.
    pad = " " if longest or not plain.strip() else ""
    return f"{fence}{pad}{plain}{pad}{fence}"


def _table_cell(text: Any) -> str:
    """Quote a text for a cell of a table: as it is if it is a plain name, as code otherwise."""
    if re.fullmatch(r"[\w./@ -]+", str(text)):
        return str(text)
    return code_span(text).replace("|", "\\|")


def _yaml_block(text: str) -> str:
    """Put YAML into a code block that no line of it can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}{fence}"


def _card_header(base: str, library: Library) -> dict[str, Any]:
    """Return the YAML header by which the Hub sorts a model."""
    header: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "feature-extraction" if library == "sentence-transformers" else "image-text-to-text",
        "tags": ["cafe", "embeddings", "image-text-to-text"],
    }
    # A local directory means nothing on the Hub, even if it looks like "owner/name".
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    if is_hub_id:
        header["base_model"] = base
    return header


def push_to_hub(checkpoint: Path, repository: str, card: str, private: bool = True) -> str:
    """Upload a checkpoint to the Hugging Face Hub and return its address.

    Args:
        checkpoint: the directory.
        repository: "owner/name"; created if it does not exist.
        card: its README.md.
        private: whether a created repository is private.

    Raises:
        CafeError: the Hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        # The card takes the place of the checkpoint's own, which has no results.
        api.upload_folder(repo_id=repository, folder_path=checkpoint, ignore_patterns=["README.md"])
        api.upload_file(repo_id=repository, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except (HTTPError, HFValidationError, OSError) as error:
        reason = first_line(error)
        raise CafeError(f"{checkpoint} cannot be pushed to {repository}: {reason}") from error
    return str(address)
