"""Numbers of any magnitude, in models of any dtype, through the whole engine."""

import pytest
import torch
from families import FAMILIES

from trimtab.engines.transformers import SteeredModel

PROMPTS = [[5, 17, 3, 44, 9], [7, 8]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("power", [-40, -8, 30])
def test_a_tiny_vector_at_a_huge_scale_adds_their_product_in_every_dtype(dtype: torch.dtype, power: int) -> None:
    llama = FAMILIES["llama"].model().to(dtype)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vector = (direction * 10.0**power).float()
    scale = min(3e38, 4.0 / 10.0**power)
    left: list[torch.Tensor] = []
    added: list[torch.Tensor] = []
    step = {"kind": "add", "vector": {"post_block": {"0": vector.tolist()}}, "scale": scale}
    with SteeredModel(llama) as model:
        llama.model.layers[0].register_forward_hook(lambda _m, _args, output: left.append(output.double()))
        llama.model.layers[1].register_forward_pre_hook(lambda _m, args: added.append(args[0].double() - left.pop()))
        model.generate(PROMPTS, [{"interventions": [step]}, None], max_new_tokens=2)
    want = scale * vector.double()
    tolerance = 8 * {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    torch.testing.assert_close(added[0][0], want.expand(5, 32), atol=tolerance, rtol=0)
    torch.testing.assert_close(added[1][0], want.expand(1, 32), atol=tolerance, rtol=0)
    assert not added[0][1].any()
