"""What steering should do, said the slow way: every step recomputes the whole batch with a family's edited layers."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from families import Family


@dataclass
class Addition:
    """One vector [H] added at a hook point of some layers, on the tokens of a phase ("all", "prefill", "decode")."""

    hook: str
    layers: tuple[int, ...]
    vector: torch.Tensor
    scale: float = 1.0
    phase: str = "all"

    def spec(self) -> dict[str, Any]:
        """The same as one intervention of a request."""
        plain = {self.hook: {str(layer): self.vector.tolist() for layer in self.layers}}
        return {"kind": "add", "vector": plain, "scale": self.scale, "phase": self.phase}


@dataclass
class Recorder:
    """A logits processor that keeps what it sees and changes nothing."""

    logits: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits.append(scores.clone())
        return scores


def greedy(
    family: Family, model: Any, prompts: list[list[int]], additions: list[list[Addition]], steps: int
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """New tokens of each prompt, and the logits [B, V] of each step. `model` is altered: pass a copy of its own."""
    width = max(map(len, prompts))

    def steer(layer: int, hook: str, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        for row, prompt in enumerate(prompts):
            for column in range(width - len(prompt), value.shape[1]):
                phase = "prefill" if column < width else "decode"
                for addition in additions[row]:
                    if addition.hook == hook and layer in addition.layers and addition.phase in ("all", phase):
                        value[row, column] += addition.scale * addition.vector
        return value

    family.edited(model, steer)
    return recompute(model, prompts, steps)


def recompute(model: Any, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy tokens of each prompt and the logits [B, V] of each step, all computed anew each step, padded left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    logits = []
    for _ in range(steps):
        extra = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if takes_positions else {}
        with torch.no_grad():
            logits.append(model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits[:, -1].float())
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], dim=1)
    return ids[:, width:].tolist(), logits
