"""The trimmed last layer: it computes only what is read.

Of the last hidden states, a step reads those of the readouts and those that predict supervised tokens. So the last
layer computes attention queries and the MLP for these tokens alone. Its keys and values are those of all tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from cafe.attention.registration import CAFE_TREE, CAFE_TREE_FLEX, TreeAttention

# The parts of a layer of a known kind. A layer with other parts may mix tokens in them.
SUPPORTED_CHILDREN = {
    "self_attn",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
}


QUERY_MULTIPLE = 128  # tokens


@contextmanager
def restrict_last_layer(
    lvlm: PreTrainedModel, *read_index: Int64[Tensor, "_tokens 2"], read_tokens: TreeAttention | None = None
) -> Iterator[None]:
    """Make the last hidden states meaningless for all tokens but those that are read.

    Where the last layer is recomputed in the backward pass, or is of an unknown kind, it computes all tokens.

    Args:
        lvlm: the model.
        read_index: the (row, column) of the tokens that are read.
        read_tokens: computes attention along trees for these tokens; None where rows are not read by such a kernel.
    """
    modules = tokenwise_modules(lvlm)
    if not modules:
        yield
        return

    handles = []
    coords = torch.cat(read_index).unique(dim=0)  # sorted, and each token once: a gradient must not be counted twice
    # Attention computes its queries for these tokens only; the modules behind it run on these tokens only.
    attention = lvlm.get_decoder().layers[-1].self_attn
    read_queries = _this_thread_only(_read_queries_hook(coords, read_tokens))
    handles.append(attention.register_forward_pre_hook(read_queries, with_kwargs=True))
    for module in modules:
        hooks = TokenwiseHooks(coords)
        handles.append(module.register_forward_pre_hook(_this_thread_only(hooks.gather)))
        handles.append(module.register_forward_hook(_this_thread_only(hooks.scatter)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _this_thread_only(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Limit a hook to this thread: another may use the same model meanwhile, as when an answer is streamed."""
    thread = get_ident()

    def limited(*args: Any) -> Any:
        """Call the hook; in another thread, return None, which leaves a module's inputs and output as they are."""
        if get_ident() != thread:
            return None
        return hook(*args)

    return limited


def tokenwise_modules(lvlm: PreTrainedModel) -> list[nn.Module]:
    """List the modules of the last layer that follow attention and work on one token at a time.

    The list is empty where the layer is of an unknown kind or is recomputed in the backward pass, when the hooks of the
    forward pass are gone.
    """
    layers = getattr(lvlm.get_decoder(), "layers", None)
    if layers is None:
        return []
    layer = layers[-1]
    is_recomputed = layer.training and getattr(layer, "gradient_checkpointing", False)
    if is_recomputed:
        return []
    children = {name for name, _ in layer.named_children()}
    if not children <= SUPPORTED_CHILDREN:
        return []
    # Attention has already run on the chosen queries; its output projection need not see the zeros of the others.
    modules = [module for name, module in layer.self_attn.named_children() if name == "o_proj"]
    # The experts of some families take further inputs with one entry per token, such as its modality.
    if len(signature(layer.mlp.forward).parameters) == 1:
        modules.append(layer.mlp)
    return modules


class TokenwiseHooks:
    """Compute some tokens of a module only, by hooks before and after its forward pass."""

    def __init__(self, coords: Int64[Tensor, "tokens 2"]) -> None:
        self.coords = coords
        self.shape = torch.Size()

    def gather(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Pass only these tokens to the module, as one row."""
        [hidden] = args
        self.shape = hidden.shape
        self.coords = self.coords.to(hidden.device, non_blocking=True)
        return (hidden[self.coords[:, 0], self.coords[:, 1]][None],)

    def scatter(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Put the module's output back where the tokens were, with zeros elsewhere.

        Experts also return their router's scores, which are left as they are.
        """
        if isinstance(output, tuple):
            return (self.scatter(module, args, output[0]), *output[1:])
        full = output.new_zeros(*self.shape[:2], output.shape[-1])
        full[self.coords[:, 0], self.coords[:, 1]] = output[0]
        return full


def _read_queries_hook(coords: Int64[Tensor, "tokens 2"], read_tokens: TreeAttention | None) -> Callable[..., Any]:
    """Make the hook that has attention compute some queries only, where that can be and saves work."""

    def pre_hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Replace the tree that attention is given."""
        if read_tokens is not None:
            return args, {**kwargs, "tree": read_tokens}
        mask: Any = kwargs.get("attention_mask")
        if kwargs.get("tree") is not None or not len(coords) or not _can_subset(module, mask):
            return None
        subset = QuerySubset(coords, mask)
        # The queries and their masks are copied, which is not worth it for more than half of a row.
        if 2 * subset.grid.shape[1] > mask.shape[2]:
            return None
        return args, {**kwargs, "tree": subset}

    return pre_hook


def _can_subset(module: Any, mask: Any) -> bool:
    """Tell whether an attention module looks at a `tree`, and its mask is a dense one that can be cut."""
    if getattr(getattr(module, "config", None), "_attn_implementation", "") not in (CAFE_TREE, CAFE_TREE_FLEX):
        return False
    drops_weights = module.training and getattr(module, "attention_dropout", 0.0)
    return isinstance(mask, Tensor) and mask.ndim == 4 and not drops_weights


class QuerySubset:
    """Compute attention for some queries only, under a dense mask.

    The queries form a grid: a row per row of the batch, padded on the right.

    Attributes:
        rows, columns: of each token in the batch.
        slots: the column of each token in the grid.
        grid: the columns of the tokens of each row.
        mask: of all tokens.
    """

    def __init__(
        self, coords: Int64[Tensor, "tokens 2"], mask: Shaped[Tensor, "rows mask_heads columns columns"]
    ) -> None:
        self.rows, self.columns = coords.unbind(1)
        counts = self.rows.bincount(minlength=len(mask))
        # `coords` are sorted: within its row, a token's slot is its index minus that of the row's first token.
        first = counts.cumsum(0) - counts
        self.slots = torch.arange(len(coords)) - first[self.rows]
        # Of few different widths on a GPU, where a kernel may make a plan for each.
        multiple = QUERY_MULTIPLE if mask.is_cuda else 1
        width = -(-int(counts.max()) // multiple) * multiple  # rounded up
        self.grid = torch.zeros(len(counts), width, dtype=torch.long)
        self.grid[self.rows, self.slots] = self.columns
        self.mask = mask

    def attend(
        self,
        query: Float[Tensor, "rows heads columns dim"],
        key: Float[Tensor, "rows key_heads columns dim"],
        value: Float[Tensor, "rows key_heads columns dim"],
        scale: float | None,
    ) -> Float[Tensor, "rows columns heads dim"]:
        """Compute attention; the output of other tokens is zero."""
        grid, rows, slots, columns = (
            each.to(query.device, non_blocking=True) for each in (self.grid, self.rows, self.slots, self.columns)
        )
        # Padding of the grid repeats column 0; its output is computed and dropped.
        index = grid[:, None, :, None]
        subset_query = query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[3]))
        subset_mask = self.mask.gather(2, index.expand(-1, self.mask.shape[1], -1, self.mask.shape[3]))
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        output = F.scaled_dot_product_attention(subset_query, key, value, attn_mask=subset_mask, scale=scale)

        output = output.transpose(1, 2)  # rows, slots, heads, dim: tokens can be indexed
        full = output.new_zeros(len(query), query.shape[2], *output.shape[2:])
        full[rows, columns] = output[rows, slots]
        return full
