"""The language-model head and its loss on a GPU: Liger's kernel beside our tiles, numbers first, then time.

python benchmarks/language_head.py [--json FILE]

Without a GPU, TRITON_INTERPRET=1 runs the kernel in Triton's interpreter: the numbers are compared, nothing is timed.
Liger and Triton have to be installed (`pip install liger-kernel triton`).
"""

from collections.abc import Callable

import torch
from common import Row, paired, show
from torch import Tensor

from cafe.objectives import _NextToken, liger

Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Prints the table."""
    fused = liger()
    if fused is None:
        raise SystemExit("Liger is not installed: pip install liger-kernel triton.")
    on_gpu = torch.cuda.is_available()
    tokens, dim, vocabulary = (4096, 896, 151_936) if on_gpu else (37, 32, 101)
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    labels = torch.randint(vocabulary, (tokens,), device=device)
    sides = torch.randn(tokens, dim, device=device, dtype=dtype), torch.randn(vocabulary, dim, device=device) / dim**0.5

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        loss: Tensor = _NextToken.apply(hidden, labels, weight, None, None, 32 * 2**20)
        return loss

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused(hidden, weight, labels, None, reduction="sum", accum_dtype=torch.float32)

    def follow(loss: Loss) -> list[Tensor]:
        hidden, weight = (side.clone().requires_grad_() for side in sides)
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            value = loss(hidden, weight)
        (value / tokens).backward()
        return [value.detach(), hidden.grad, weight.grad]

    pairs = zip(follow(ours), follow(theirs), strict=True)
    apart = [((a.double() - b.double()).norm() / a.double().norm()).item() for a, b in pairs]
    bound = 1e-2 if on_gpu else 1e-5
    names = ("loss", "gradient of the hidden states", "gradient of the head")
    rows = [Row(f"{name}, apart by", far, bound, bound, False) for name, far in zip(names, apart, strict=True)]
    if on_gpu:
        _, ratio = paired(lambda: follow(theirs), lambda: follow(ours))
        rows.append(Row("time, tiles / Liger", ratio, 0.0, 1.0))
    show(f"Head and loss of {tokens:,} supervised tokens, {dim} wide, {vocabulary:,} words", rows)


if __name__ == "__main__":
    main()
