"""One layer's attention over rows of trees at real sizes, by every kernel: time, error, and which kernels ran.

All go through the attention implementation of the package (`cafe.attention.registration.attend`). A causal row without
a tree is the floor. The error is relative to float64, of one row: of the output and of the three gradients. What a row
length costs that was not seen before is measured as well, and NaN under a mask of 704 columns
(pytorch/pytorch#196678), where the package pads rows to a multiple of 128.

python benchmarks/attention_kernels.py [--small] [--json FILE]

--small takes tiny sizes, as a CPU can.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import clock, machine
from journal import Journal
from profiling import NAME_LENGTH, profile_kernels
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cafe.attention.blockwise import tree_to_blocks
from cafe.attention.flex import FlexTree
from cafe.attention.masks import dense_mask, tree_mask
from cafe.attention.registration import attend
from cafe.attention.tree import make_tree
from cafe.lvlm.forward import CUDNN_MULTIPLE

ROOT = 14  # tokens of the system prompt, which the branches of a pair share
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5  # of matrices: the backward pass computes the scores again
REPETITIONS = 20
NAN_COLUMNS, NAN_SCORE = 704, -120  # a row's log-sum-exp below -88.7, in columns of 64 more than a multiple of 128
NO_TOKENS = torch.empty(0, 2, dtype=torch.long)


@dataclass(frozen=True)
class Case:
    """Describe rows of one pair each, and the attention layer that reads them.

    Attributes:
        name: of the case.
        prefix: tokens of the system prompt and the image.
        branches: tokens of each branch behind them.
        text: tokens of a text that shares the system prompt alone.
        rows: how many rows.
        heads, key_heads, head_dim: of the layer.
    """

    name: str
    prefix: int
    branches: tuple[int, ...]
    text: int
    rows: int
    heads: int
    key_heads: int
    head_dim: int


CASES = (
    Case("0.5B, 640x480, 4 rows", 2943, (216, 16), 216, 4, 14, 2, 64),
    Case("7B, 384x384, 2 rows", 1499, (216, 16), 216, 2, 28, 4, 128),
    Case("7B, 384x384, six branches, 2 rows", 1499, (250, 200, 150, 100, 50, 10), 216, 2, 28, 4, 128),
)
SMALL_CASES = (Case("small", 60, (20, 5), 17, 2, 4, 2, 16),)


@dataclass(frozen=True)
class States:
    """Hold the queries, keys and values of an attention layer, and the gradient of its output."""

    query: Tensor
    key: Tensor
    value: Tensor
    output_grad: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what gradients are taken of."""
        return self.query, self.key, self.value

    def first_row(self) -> "States":
        """Return the first row in float64."""
        leaves = [each[:1].detach().double().requires_grad_() for each in self.leaves]
        return States(*leaves, self.output_grad[:1].double())


# Takes states, and returns the output as (rows, columns, heads, dim).
Attention = Callable[[States], Tensor]


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """Return where attention is measured, and in which precision."""
    return (torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else (torch.device("cpu"), torch.float32)


def tree_rows(case: Case) -> Tensor:
    """Lay out a pair in each row, and return `subtree_end`: the prefix, its branches, and the text behind the root."""
    image_end = case.prefix + sum(case.branches)
    columns = image_end + case.text
    ends = [columns] * ROOT + [image_end] * (case.prefix - ROOT)
    for length in case.branches:
        ends += [len(ends) + length] * length
    ends += [columns] * case.text
    return torch.tensor(ends).repeat(case.rows, 1)


def pad(end: Tensor, multiple: int) -> Tensor:
    """Pad rows to a multiple of so many tokens; the padding is one more tree, as in `cafe.packing`."""
    missing = -end.shape[1] % multiple
    return F.pad(end, (0, missing), value=end.shape[1] + missing)


def make_states(case: Case, columns: int, padded_columns: int) -> States:
    """Make random states in the layout that projections give them, the same for any padding."""
    device, dtype = device_and_dtype()
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for heads in (case.heads, case.key_heads, case.key_heads, case.heads):
        states = torch.randn(case.rows, columns, heads, case.head_dim, device=device, generator=generator)
        made.append(F.pad(states.to(dtype), (0, 0, 0, 0, 0, padded_columns - columns)))
    # Attention layers view (rows, columns, heads, dim) as (rows, heads, columns, dim).
    query, key, value = (each.transpose(1, 2).requires_grad_() for each in made[:3])
    return States(query, key, value, made[3])


def call(states: States, mask: Tensor | None = None, tree: Any = None, backend: SDPBackend | None = None) -> Tensor:
    """Call the package's attention implementation as a layer does."""
    layer: Any = nn.Module()
    layer.num_key_value_groups, layer.is_causal = states.query.shape[1] // states.key.shape[1], True
    chosen: AbstractContextManager[None] = sdpa_kernel(backend) if backend else nullcontext()
    with chosen:
        return attend(layer, *states.leaves, mask, tree=tree)[0]


def kernels(end: Tensor, padded_end: Tensor) -> dict[str, tuple[bool, Attention]]:
    """Return every way to attend by name, and whether it reads padded rows."""
    device, dtype = device_and_dtype()
    mask = dense_mask(padded_end.to(device), dtype, "sdpa")
    flex = FlexTree(padded_end.to(device))
    ways: dict[str, tuple[bool, Attention]] = {
        "dense mask, as PyTorch chooses": (True, partial(call, mask=mask)),
        "causal without a tree, as PyTorch chooses": (True, call),
    }
    if device.type == "cuda":
        cudnn, efficient, flash = (
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
        )
        ways |= {
            "dense mask, cuDNN": (True, partial(call, mask=mask, backend=cudnn)),
            "dense mask, memory-efficient": (True, partial(call, mask=mask, backend=efficient)),
            "causal without a tree, cuDNN": (True, partial(call, backend=cudnn)),
            "causal without a tree, flash": (True, partial(call, backend=flash)),
        }
    else:
        ways["blocks"] = (False, partial(call, tree=tree_to_blocks(end)))
    ways["paths"] = (False, paths_attention(end))
    ways["flex"] = (True, partial(call, tree=flex))
    return ways


def paths_attention(end: Tensor) -> Attention:
    """Make attention by variable-length calls with gathered keys."""
    paths: Any = make_tree(end, NO_TOKENS, "paths").all_tokens
    return partial(call, tree=paths.to(device_and_dtype()[0]))


def forward_backward(attention: Attention, states: States) -> Tensor:
    """Run attention forward and backward; return the output, and leave gradients in the states."""
    for leaf in states.leaves:
        leaf.grad = None
    output = attention(states)
    output.backward(states.output_grad)
    return output.detach()


def results(attention: Attention, states: States, columns: int) -> list[Tensor]:
    """Return the output and the gradients of the first row in float64, without padding."""
    output = forward_backward(attention, states)
    grads = [leaf.grad.transpose(1, 2) for leaf in states.leaves if leaf.grad is not None]
    return [each[:1, :columns].double() for each in (output, *grads)]


def compare(case: Case, repetitions: int, journal: Journal) -> None:
    """Measure every kernel."""
    torch.compiler.reset()  # FlexAttention is compiled for the sizes of this case alone
    end = tree_rows(case)
    columns, padded_end = end.shape[1], pad(end, CUDNN_MULTIPLE)
    exact, padded = make_states(case, columns, columns), make_states(case, columns, padded_end.shape[1])
    # What must come out, and the pairs of tokens that are seen in a row: of the tree, and of a causal row.
    seen = tree_mask(end[:1]).to(exact.query.device)
    references = {
        False: (
            results(partial(call, mask=seen, backend=SDPBackend.MATH), exact.first_row(), columns),
            int(seen.sum()),
        ),
        True: (
            results(partial(call, backend=SDPBackend.MATH), exact.first_row(), columns),
            columns * (columns + 1) // 2,
        ),
    }

    for name, (reads_padding, attention) in kernels(end, padded_end).items():
        title, states = f"{case.name}: {name}", padded if reads_padding else exact
        expected, pairs = references[name.startswith("causal")]
        # FLOPs of one product of matrices.
        product = 2 * case.rows * pairs * case.heads * case.head_dim
        both = partial(forward_backward, attention, states)
        try:
            actual = results(attention, states, columns)  # compiles and warms up as well
            forward = statistics.median(clock(partial(attention, states)) for _ in range(repetitions))
            seconds = statistics.median(clock(both) for _ in range(repetitions))
            top = list(profile_kernels(both))[:2]
        except Exception as error:  # a kernel that does not take these states is a result too
            journal.add_failure(title, error)
            continue
        errors = [((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]
        journal.add(
            {
                "figure": title,
                "ms forward": 1e3 * forward,
                "ms both": 1e3 * seconds,
                "TFLOP/s of what is seen": (FORWARD_PRODUCTS + BACKWARD_PRODUCTS) * product / seconds / 1e12,
                "error": [f"{each:.0e}" for each in errors],
                "kernels": [each[:NAME_LENGTH] for each in top],
            }
        )


def cost_of_new_lengths(case: Case, count: int, journal: Journal) -> None:
    """Time the first and the second call at row lengths that were not seen before."""
    for name in ("dense mask", "paths"):
        first, second = [], []
        for number in range(1, count + 1):
            # Even when padded, each row is longer than all before it.
            longer = Case(**{**vars(case), "branches": (*case.branches, number * CUDNN_MULTIPLE)})
            end = tree_rows(longer)
            if name == "dense mask":
                end = pad(end, CUDNN_MULTIPLE)
            states = make_states(longer, end.shape[1], end.shape[1])
            device, dtype = states.query.device, states.query.dtype
            attention = paths_attention(end)
            if name == "dense mask":
                attention = partial(call, mask=dense_mask(end.to(device), dtype, "sdpa"))
            both = partial(forward_backward, attention, states)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # done with what came before
            first.append(1e3 * clock(both))
            second.append(1e3 * clock(both))
        journal.add({"figure": f"{count} new row lengths, {name}", "ms first": first, "ms second": second})


def count_nan(columns: int, padded_columns: int, backend: SDPBackend | None) -> int:
    """Count the entries of the gradient of queries that are not finite, where scores are large and negative."""
    case = Case("", 0, (), columns, 1, 1, 1, 64)
    states = make_states(case, columns, padded_columns)
    with torch.no_grad():
        states.query[..., 0], states.key[..., 0] = 1.0, NAN_SCORE * case.head_dim**0.5
    end = pad(torch.full((1, columns), columns), padded_columns).to(states.query.device)
    forward_backward(partial(call, mask=dense_mask(end, states.query.dtype, "sdpa"), backend=backend), states)
    return int((~states.query.grad.isfinite()).sum())


def look_for_nan(journal: Journal) -> None:
    """Count NaN under a mask of 704 columns, and with the package's padding."""
    backends: dict[str, SDPBackend | None] = {"as PyTorch chooses": None}
    if torch.cuda.is_available():
        backends["cuDNN"] = SDPBackend.CUDNN_ATTENTION
    for name, backend in backends.items():
        for padded_columns in (NAN_COLUMNS, NAN_COLUMNS + -NAN_COLUMNS % CUDNN_MULTIPLE):
            title = f"NaN in the gradient of queries, {NAN_COLUMNS} tokens in {padded_columns} columns, {name}"
            try:
                journal.add({"figure": title, "count": count_nan(NAN_COLUMNS, padded_columns, backend)})
            except Exception as error:
                journal.add_failure(title, error)


def main() -> None:
    """Print what is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        torch.compiler.set_stance("force_eager")  # compiled FlexAttention has no backward pass on a CPU
    print(f"Attention over rows of trees on {machine()}", flush=True)
    journal = Journal(options.json)
    cases = SMALL_CASES if options.small else CASES
    for case in cases:
        compare(case, 2 if options.small else REPETITIONS, journal)
    cost_of_new_lengths(cases[-1], 2 if options.small else 6, journal)
    look_for_nan(journal)


if __name__ == "__main__":
    main()
