"""Keys and values of sequences of any length, read side by side: each has a slot, joins and leaves by itself.

The cache of transformers holds rows of one length, padded, which all begin and end together. Here a row of the cache is
a slot: the tokens of its sequence stand at columns 0, 1, 2, ..., whatever the others' lengths, and a mask hides what is
behind them. The slots in use are the first ones, so that a forward pass reads a view of the cache and copies nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from cafe.utils.memory import available_memory

LENGTH_MULTIPLE = 256  # columns by which slots become longer

# The keys and values of one sequence in each layer, each of shape (heads, tokens, dim).
KeyValues = list[tuple[Float[Tensor, "heads tokens dim"], Float[Tensor, "heads tokens value_dim"]]]


@dataclass(frozen=True)
class Window:
    """Say what a forward pass reads and writes.

    Attributes:
        start, stop: its slots.
        length: columns up to the end of the longest of their sequences, or some more, which the mask hides.
        columns: where each new token is written.
    """

    start: int
    stop: int
    length: int
    columns: Int64[Tensor, "slots tokens"]


class SlotLayer(CacheLayerMixin):
    """Hold the slots of one layer, as tensors of shape (slots, heads, columns, dim)."""

    def __init__(self) -> None:
        super().__init__()
        self.window: Window | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Hold slots whose heads are those of some states, and no slot yet."""
        self.keys, self.values = (_no_slots(states) for states in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the states of new tokens, and return those of all tokens that the window shows."""
        window = self.window
        assert window is not None, "no forward pass is under way"
        for states, new in ((self.keys, key_states), (self.values, value_states)):
            index = window.columns[:, None, :, None].expand_as(new)
            states[window.start : window.stop].scatter_(2, index, new)
        keys, values = (states[window.start : window.stop, :, : window.length] for states in (self.keys, self.values))
        return keys, values

    def resize(self, num_slots: int, length: int) -> None:
        """Make room for slots and columns, or take it away; what fits into the new size is kept."""
        self.keys, self.values = (_resize(states, num_slots, length) for states in (self.keys, self.values))

    def get_seq_length(self) -> int:
        """Return the columns that the window shows."""
        return self.window.length if self.window else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns that a mask has, and where they begin."""
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1, by the name that older versions of transformers know."""
        return -1


class SlotCache(Cache):
    """Hold the keys and values of sequences in slots.

    Args:
        num_layers: of the language model.

    Attributes:
        lengths: the tokens in each slot in use.
    """

    layers: list[SlotLayer]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[SlotLayer() for _ in range(num_layers)])
        self.lengths: list[int] = []
        self._capacity = (0, 0)  # slots and columns that there is memory for

    def join(self, key_values: KeyValues, room: int = 1) -> None:
        """Put a sequence into the next slot, which has room for so many further tokens."""
        slot = len(self.lengths)
        length = key_values[0][0].shape[1]
        for layer, (keys, values) in zip(self.layers, key_values, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
        self.reserve(slot + 1, length + room)
        for layer, (keys, values) in zip(self.layers, key_values, strict=True):
            layer.keys[slot, :, :length] = keys
            layer.values[slot, :, :length] = values
        self.lengths.append(length)

    def leave(self, slot: int) -> None:
        """Take a sequence out of its slot, into which the last one moves."""
        last = len(self.lengths) - 1
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[slot] = states[last]
                # What a mask hides counts for nothing, but nothing times NaN is NaN: the next sequence finds zeros.
                states[last] = 0
        self.lengths[slot] = self.lengths[last]
        self.lengths.pop()
        # Memory that the others do not need is given back, all of it by the last.
        columns = _round_up(max(self.lengths, default=0))
        if columns < self._capacity[1]:
            self._resize(len(self.lengths), columns)

    def reserve(self, num_slots: int, length: int) -> None:
        """Make room for at least so many slots and columns."""
        slots, columns = self._capacity
        # Spare slots are no waste while they are short: with longer ones, there are as many as are needed.
        if length > columns:
            self._resize(num_slots, _round_up(length))
        elif num_slots > slots:
            self._resize(max(num_slots, slots + slots // 2), columns)

    def _resize(self, num_slots: int, length: int) -> None:
        """Hold memory for so many slots and columns."""
        for layer in self.layers:
            layer.resize(num_slots, length)
        self._capacity = (num_slots, length)


@torch.inference_mode()
def read_slots(
    lvlm: PreTrainedModel,
    cache: SlotCache,
    start: int,
    counts: Sequence[int],
    input_ids: Int64[Tensor, "slots tokens"],
    position_ids: Int64[Tensor, "axes slots tokens"],
) -> Float[Tensor, "slots dim"]:
    """Read the next tokens of the sequences in some slots, and return the hidden state of the last one of each.

    Args:
        lvlm: the model.
        cache: the slots.
        start: the first of them; the others follow it.
        counts: the number of next tokens of each, at least one.
        input_ids: the tokens, padded on the right.
        position_ids: their positions; one axis, or three under M-RoPE.
    """
    device, (num_rows, width) = lvlm.device, input_ids.shape
    stop = start + num_rows
    lengths = cache.lengths[start:stop]
    # Padding is written behind a sequence, where its next tokens will be.
    columns = torch.tensor(lengths)[:, None] + torch.arange(width)
    length = _shown_columns(max(lengths) + width, device)
    cache.reserve(len(cache.lengths), length)

    # A token sees the columns up to its own.
    window = Window(start, stop, length, columns.to(device, non_blocking=True))
    visible = torch.arange(length, device=device) <= window.columns[:, None, :, None]
    mask = torch.zeros(visible.shape, dtype=lvlm.dtype, device=device)
    mask.masked_fill_(~visible, torch.finfo(lvlm.dtype).min)
    for layer in cache.layers:
        layer.window = window
    output = lvlm.base_model(
        input_ids=input_ids.to(device, non_blocking=True),
        attention_mask=mask,
        position_ids=position_ids.squeeze(0).to(device, non_blocking=True),
        past_key_values=cache,
        use_cache=True,
    )
    # Only now, so that the same tokens can be read again after an error.
    cache.lengths[start:stop] = [before + count for before, count in zip(lengths, counts, strict=True)]
    last = torch.tensor(counts) - 1
    hidden: Tensor = output.last_hidden_state[torch.arange(num_rows), last]
    return hidden


def select_key_values(cache: DynamicCache, coords: Int64[Tensor, "tokens 2"]) -> KeyValues:
    """Return the keys and values of the tokens at some (row, column) of a cache that holds a pack."""
    selected = []
    for layer in cache.layers:
        rows, columns = coords.to(layer.keys.device, non_blocking=True).unbind(1)
        # Indices on both sides of a slice put their dimension first.
        keys, values = (states[rows, :, columns].transpose(0, 1) for states in (layer.keys, layer.values))
        selected.append((keys, values))
    return selected


def count_tokens_that_fit(lvlm: PreTrainedModel, share: float) -> int:
    """Count the tokens whose keys and values fit into a share of the memory that is free now."""
    config = lvlm.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * num_heads * head_dim * lvlm.dtype.itemsize
    free = available_memory()
    if lvlm.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(lvlm.device)
    return int(share * free) // token_bytes


def _round_up(length: int) -> int:
    """Return the columns of slots that are at least so long."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def _shown_columns(length: int, device: torch.device) -> int:
    """Return the columns that a forward pass reads of slots that are so long."""
    # On a GPU, PyTorch may take cuDNN's attention, which makes and keeps a plan for each shape: one for each token.
    return _round_up(length) if device.type == "cuda" else length


def _no_slots(states: Float[Tensor, "slots heads tokens dim"]) -> Float[Tensor, "0 heads 0 dim"]:
    """Return a tensor that holds no slot, and is otherwise as some states."""
    return states.new_zeros(0, states.shape[1], 0, states.shape[3])


def _resize(states: Float[Tensor, "slots heads columns dim"], num_slots: int, length: int) -> Tensor:
    """Copy slots into a tensor of another size."""
    resized = states.new_zeros(num_slots, states.shape[1], length, states.shape[3])
    kept_slots, kept_columns = min(num_slots, len(states)), min(length, states.shape[2])
    resized[:kept_slots, :, :kept_columns] = states[:kept_slots, :, :kept_columns]
    return resized
