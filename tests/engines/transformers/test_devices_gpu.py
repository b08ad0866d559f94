"""A model that accelerate has put on two CUDA devices."""

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
def test_a_model_over_two_devices_is_steered_as_on_one(options: dict[str, object]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("pydantic")  # a GPU machine may have no more than the operators need
    from families import FAMILIES
    from oracle import Addition

    from trimtab.engines.transformers import SteeredModel

    def numbers(seed: int) -> torch.Tensor:
        return torch.randn(32, generator=torch.Generator().manual_seed(seed))

    parts = [
        Addition("post_block", (0, 1), numbers(1), 1.5).spec(),
        Addition("mlp_out", (2,), numbers(2), phase="decode").spec(),
        Addition("post_attn", (0, 2), numbers(3), phase="prefill").spec(),
    ]
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{index}": min(index, 1) for index in range(3)}
    steering = [{"interventions": parts}, None]
    prompts = [[5, 17, 3, 44, 9], [7, 8]]
    with SteeredModel(FAMILIES["llama"].model().to("cuda:1")) as one:
        expected = one.generate(prompts, steering, max_new_tokens=5, **options)
    with SteeredModel(accelerate.dispatch_model(FAMILIES["llama"].model(), places)) as two:
        assert two.generate(prompts, steering, max_new_tokens=5, **options) == expected
