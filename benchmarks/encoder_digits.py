"""How far the encoder row of a feature moves when it is stored in bfloat16: in one table row, in two, or in three.

    python benchmarks/encoder_digits.py

Random unit rows on random streams in bfloat16, four of whose coordinates are large, as in models. `u` is the score, the
truth is float64 on the stream as it is, and a feature fires where u is among the largest 1 % of its own.
"""

import torch
from torch import Tensor

WIDTH, FEATURES, TOKENS = 2304, 256, 2048
LARGE, EVERY = 400.0, 37


def main() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(FEATURES, WIDTH, generator=generator), dim=1)
    streams = 4 * torch.randn(TOKENS, WIDTH, generator=generator)
    for number in range(4):
        streams[:, number * EVERY] += LARGE * (1 if number % 2 else -1)
    streams = streams.bfloat16()
    true = streams.double() @ rows.double().T
    found = {"float32 rows": (streams.float() @ rows.T).double()}
    left, held = rows.double(), torch.zeros_like(rows, dtype=torch.float64)
    for count in (1, 2, 3):
        part = left.bfloat16().double()
        left, held = left - part, held + part
        found[f"{count} rows in bfloat16"] = streams.double() @ held.T
    print(f"torch {torch.__version__}, width {WIDTH}, |x| {streams.float().norm(dim=1).mean():.0f}")
    for name, scores in found.items():
        print(f"{name}: {told(scores, true)}")


def told(scores: Tensor, true: Tensor) -> str:
    threshold = true.quantile(0.99, dim=0)
    error, fires = (scores - true).abs(), true > threshold
    other = ((scores > threshold) != fires).sum() / fires.sum()
    return f"u is off by {error.square().mean().sqrt():.1e}, at most {error.max():.1e}; {other:.1%} fire otherwise"


if __name__ == "__main__":
    main()
