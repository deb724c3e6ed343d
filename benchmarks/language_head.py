"""The language-model head and its loss on a GPU: our chunks beside Liger's kernel, numbers first, then time.

python benchmarks/language_head.py [--dim 896] [--json FILE]

Without a GPU, TRITON_INTERPRET=1 runs the kernel in Triton's interpreter: the numbers are compared, nothing is timed.
Liger and Triton have to be installed (`pip install liger-kernel triton`).
"""

import argparse
from collections.abc import Callable

import torch
from common import Row, paired, show
from torch import Tensor

from cafe.losses import linear_cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=896, help="of the hidden states; 3584 in a model of 7B")
    options, _ = parser.parse_known_args()
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused
    except ImportError:
        raise SystemExit("Liger is not installed: pip install liger-kernel triton.") from None
    on_gpu = torch.cuda.is_available()
    tokens, dim, vocabulary = (4096, options.dim, 151_936) if on_gpu else (37, 32, 101)
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    labels = torch.randint(vocabulary, (tokens,), device=device)
    sides = torch.randn(tokens, dim, device=device, dtype=dtype), torch.randn(vocabulary, dim, device=device) / dim**0.5

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, labels, weight)

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused(hidden, weight, labels, None, reduction="sum", accum_dtype=torch.float32)

    def gradients(loss: Loss) -> list[Tensor]:
        hidden, weight = (side.clone().requires_grad_() for side in sides)
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            value = loss(hidden, weight)
        (value / tokens).backward()
        return [value.detach(), hidden.grad, weight.grad]

    pairs = zip(gradients(ours), gradients(theirs), strict=True)
    apart = [((a.double() - b.double()).norm() / a.double().norm()).item() for a, b in pairs]
    bound = 1e-2 if on_gpu else 1e-5
    names = ("loss", "gradient of the hidden states", "gradient of the head")
    rows = [Row(f"{name}, apart by", far, bound, bound, False) for name, far in zip(names, apart, strict=True)]
    if on_gpu:
        _, ratio = paired(lambda: gradients(theirs), lambda: gradients(ours))
        rows.append(Row("time, chunks / Liger", ratio, 1.0, 1.0, at_least=False))
    show(f"Head and loss of {tokens:,} supervised tokens, {dim} wide, {vocabulary:,} words", rows)


if __name__ == "__main__":
    main()
