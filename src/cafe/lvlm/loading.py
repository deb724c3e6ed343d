"""Load models and processors by transformers, and ours around them.

A processor that declares a video processor is loaded without it: transformers cannot construct that without
torchvision, and with torchvision it expects video settings that a checkpoint may not have. The files that are saved are
the family's standard ones all the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from cafe.attention.registration import use_tree_attention
from cafe.errors import CafeError, CheckpointError, load_error
from cafe.lvlm.adapters import load_adapter, read_adapter_config
from cafe.lvlm.architectures import meta_model
from cafe.lvlm.families import attention_kwargs
from cafe.lvlm.hub import ensure_exists, find_file
from cafe.lvlm.image_size import set_max_image_size, sync_image_grids
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import Prompts
from cafe.lvlm.quantization import quantization_kwargs
from cafe.utils.nonfinite import find_nonfinite

if TYPE_CHECKING:
    from peft import PeftConfig

# A directory with one of these has a processor of images, and not merely a tokenizer.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


class _VideoDropped(ProcessorMixin):
    """Take the place of the base class that a processor class without video calls."""

    def __init__(self, *args: Any, video_processor: None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@cache
def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return a processor class without its video processor, under the same name, so that it saves the same files."""

    class WithoutVideo(processor_class, _VideoDropped):
        """Stand for the processor class; the base class behind it takes no video processor."""

        apply_chat_template = ProcessorMixin.apply_chat_template  # SmolVLM's own needs its video processor

        @classmethod
        def get_attributes(cls) -> list[str]:
            """Return the names of the parts to load."""
            return [name for name in processor_class.get_attributes() if "video" not in name]

        @classmethod
        def from_args_and_dict(cls, args: list[Any], *rest: Any, **kwargs: Any) -> ProcessorMixin:
            """Construct the processor from the parts that were loaded."""
            # Some classes insist on all their arguments, in order: the video processor becomes None.
            loaded = dict(zip(cls.get_attributes(), args, strict=True))
            all_args = [loaded.get(name) for name in processor_class.get_attributes()]
            return super().from_args_and_dict(all_args, *rest, **kwargs)

        def __reduce__(self) -> tuple[Any, ...]:
            """Pickle by the processor class: pickle would not find this one, which is made here."""
            return _new_processor, (processor_class,), self.__dict__

    WithoutVideo.__name__ = processor_class.__name__
    return WithoutVideo


def _new_processor(processor_class: Any) -> ProcessorMixin:
    """Make a processor without video and without its parts, which pickle restores."""
    without: Any = without_video(processor_class)
    processor: ProcessorMixin = without.__new__(without)
    return processor


@contextmanager
def loading_errors(what: str, name: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong in loading into an error that names the model.

    A file may hold anything, and transformers, tokenizers and PEFT raise whatever they run into when they read it.
    """
    try:
        yield
    except (CafeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise load_error(what, name, error) from error


def load_processor(path: str, model_type: str = "") -> ProcessorMixin:
    """Load the processor of a local directory or Hub id.

    Args:
        path: the directory or Hub id.
        model_type: the model's type, where no model is saved beside the processor.

    Raises:
        CheckpointError: the model's family has no processor.
    """
    model_type = model_type or AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
    if model_type not in PROCESSOR_MAPPING_NAMES:
        raise CheckpointError(
            f"{path} is a {model_type} model, for which transformers has no processor of images and text."
        )
    processor_class = without_video(processor_class_from_name(PROCESSOR_MAPPING_NAMES[model_type]))
    return processor_class.from_pretrained(path, trust_remote_code=False)


def load_chat_processor(
    base: str, prompts: Prompts, max_pixels: int | None = None, grids: Sequence[Sequence[int]] = ()
) -> ChatProcessor:
    """Load the processor of a base model or adapter, without the weights, and limit the size of its images.

    Raises:
        CheckpointError: no processor can be loaded from there.
        RecipeError: the limits do not fit the model, see `set_max_image_size`.
    """
    # An adapter has its base's configuration.
    _, model, source = _find_parts(base)
    with loading_errors("processor", source):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        processor = load_processor(source, config.model_type)
        lvlm = meta_model(config)
    set_max_image_size(lvlm, processor, max_pixels, grids)
    with loading_errors("processor", source):
        return ChatProcessor(processor, prompts)


def _find_parts(path: str | Path) -> tuple["PeftConfig | None", str, str]:
    """Return a model's adapter, if it is one, and the directories or Hub ids of its weights and its processor.

    An adapter's weights are its base's, and so is the processor where the adapter has none.
    """
    adapter = read_adapter_config(path)
    if adapter is None:
        return None, str(path), str(path)
    base = str(adapter.base_model_name_or_path or path)
    try:
        ensure_exists(base)
    except CheckpointError as error:
        raise CheckpointError(f"The base model of the adapter {path} is missing. {error}") from None
    has_processor = any(find_file(path, name) for name in PROCESSOR_FILES)
    return adapter, base, str(path) if has_processor else base


def load_lvlm(
    path: str | Path,
    prompts: Prompts,
    dtype: torch.dtype | str,
    device: torch.device,
    attention: str = "sdpa",
    four_bit: bool = False,
) -> tuple[PreTrainedModel, ChatProcessor]:
    """Load a model for inference, with its adapter if there is one, and its processor.

    Args:
        path: a local directory or a Hub id, of a model or of an adapter, which is loaded together with its base.
        prompts: how content becomes a prompt.
        dtype: of the weights; "auto" for that of the files.
        device: where the model goes.
        attention: the attention implementation, by transformers' name; see `attention_kwargs`.
        four_bit: hold the language model's matrices in 4 bits.

    Raises:
        CheckpointError: nothing can be loaded from there, or a weight is not finite.
        MissingPackageError: a package that it needs is not installed.
    """
    adapter, base, source = _find_parts(path)
    with loading_errors("vision-language model", base):
        quantization = quantization_kwargs(base, device, dtype) if four_bit else {}
        implementation = attention_kwargs(AutoConfig.from_pretrained(base, trust_remote_code=False), attention)
        lvlm = AutoModelForImageTextToText.from_pretrained(
            base, dtype=dtype, attn_implementation=implementation, trust_remote_code=False, **quantization
        )
    with loading_errors("processor", source):
        processor = load_processor(source, lvlm.config.model_type)
        chat_processor = ChatProcessor(processor, prompts)
    # The processor may be an adapter's, trained with other grids than its base has.
    sync_image_grids(lvlm, processor)
    use_tree_attention(lvlm, attention)
    if not four_bit:  # bitsandbytes has put the weights on the device itself
        lvlm = lvlm.to(device)
    if adapter:
        with loading_errors("adapter", path):
            load_adapter(lvlm, path, adapter)
    nonfinite = find_nonfinite(lvlm.named_parameters())
    if nonfinite is not None:
        raise CheckpointError(f"The weight {nonfinite} of {path} holds values that are not finite: it is damaged.")
    return lvlm.eval(), chat_processor
