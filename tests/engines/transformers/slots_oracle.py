"""Kinds of intervention as their formulas say them, in float64, in a family's own layers: a slow forward pass.

Nothing here knows of slots, rows or records. A set is the shortest step that takes every projection where it is asked
to, found by least squares.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from families import Family
from oracle import recompute

HIDDEN = 32


def numbers(seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))


@dataclass
class Gate:
    """A probe at a site, read before any steering there."""

    layer: int
    hook: str
    probe: torch.Tensor
    threshold: float = 0.0
    hard: bool = False

    def spec(self) -> dict[str, Any]:
        how = {"hard": True} if self.hard else {"sharpness": 1.5}
        return {"probe": {self.hook: {str(self.layer): self.probe.tolist()}}, "threshold": self.threshold, **how}

    def factor(self, x: torch.Tensor) -> float:
        score = x.double() @ self.probe.double() - self.threshold
        return float(score > 0) if self.hard else float(torch.sigmoid(1.5 * score))


@dataclass
class Act:
    """One intervention: its kind and options, one vector at some layers and hook points, perhaps behind a gate."""

    kind: str
    vector: torch.Tensor
    layers: tuple[int, ...]
    hooks: tuple[str, ...] = ("post_block",)
    phase: str = "all"
    options: dict[str, Any] = field(default_factory=dict)
    gate: Gate | None = None

    def spec(self) -> dict[str, Any]:
        def named(vector: torch.Tensor) -> dict[str, Any]:
            return {hook: {str(layer): vector.tolist() for layer in self.layers} for hook in self.hooks}

        options = {name: named(value) if torch.is_tensor(value) else value for name, value in self.options.items()}
        step = {"kind": self.kind, "vector": named(self.vector), "phase": self.phase, **options}
        if self.kind == "lowrank":
            step |= {"read": [step.pop("vector")], "write": [step["write"]]}
        if self.kind == "feature":  # rows of one place, spread
            rows = {"encoder": step.pop("vector"), "decoder": step["decoder"]}
            first = {name: {self.hooks[0]: {str(self.layers[0]): row[self.hooks[0]][str(self.layers[0])]}}
                     for name, row in rows.items()}  # fmt: skip
            step |= first | {"layers": list(self.layers), "hooks": list(self.hooks)}
        return step if self.gate is None else {**step, "gate": self.gate.spec()}

    @property
    def unit(self) -> torch.Tensor:
        return self.vector.double() / self.vector.double().norm()

    def change(self, u: torch.Tensor) -> torch.Tensor:
        """How far the projection is to move."""
        if self.kind == "ablate":
            return -self.options.get("strength", 1.0) * u
        if self.kind == "scale":
            return (self.options["factor"] - 1.0) * u
        low, high = self.options.get("min"), self.options.get("max")
        low, high = (self.options["value"],) * 2 if "value" in self.options else (low, high)
        return self.options.get("strength", 1.0) * (u.clamp(low, high) - u)

    def turned(self, y: torch.Tensor) -> torch.Tensor:
        """`y` with its part in the plane turned: it is decomposed in a basis that a QR decomposition makes."""
        basis = torch.linalg.qr(torch.stack([self.unit, self.options["plane"].double()], 1)).Q
        basis = basis * torch.sign(basis.T @ torch.stack([self.unit, self.options["plane"].double()], 1)).diagonal()
        p, q = basis.T @ y
        if self.options.get("adaptive") and p <= 0:
            return y
        at = torch.atan2(q, p) + torch.deg2rad(torch.tensor(self.options.get("by", 0.0), dtype=y.dtype))
        if "to" in self.options:
            at = torch.deg2rad(torch.tensor(self.options["to"], dtype=y.dtype))
        new = torch.hypot(p, q) * torch.stack([at.cos(), at.sin()])
        return y + basis @ (new - torch.stack([p, q]))


@dataclass
class Slow:
    """Greedy decoding that recomputes the whole batch at each step, `acts[b]` on row b."""

    acts: list[list[Act]]
    tokens: list[list[int]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    factors: dict[tuple[int, int, int], float] = field(default_factory=dict)  # row, column, intervention
    # by row and intervention: what each slot of it did, by column and site
    corrections: dict[tuple[int, int], dict[tuple[int, tuple[int, str]], list[float]]] = field(default_factory=dict)

    def run(self, family: Family, prompts: list[list[int]], steps: int) -> "Slow":
        model = family.model()
        width = max(map(len, prompts))

        def steer(layer: int, hook: str, value: torch.Tensor) -> torch.Tensor:
            out = value.clone()
            for row, prompt in enumerate(prompts):
                for column in range(width - len(prompt), value.shape[1]):
                    phase = "prefill" if column < width else "decode"
                    x = value[row, column].double()
                    out[row, column] = self.one(x, row, column, (layer, hook), phase).to(value.dtype)
            return out

        family.edited(model, steer)
        self.tokens, self.logits = recompute(model, prompts, steps)
        return self

    def one(self, x: torch.Tensor, row: int, column: int, site: tuple[int, str], phase: str) -> torch.Tensor:
        y, here = x.clone(), []
        for number, act in enumerate(self.acts[row]):
            if act.phase not in ("all", phase):
                continue
            if act.gate is not None and (act.gate.layer, act.gate.hook) == site:
                self.factors[row, column, number] = act.gate.factor(x)
            if site[0] in act.layers and site[1] in act.hooks:
                here.append((act, 1.0 if act.gate is None else self.factors[row, column, number]))
                if act.kind != "add":
                    self.corrections.setdefault((row, number), {})[column, site] = []
        where = {id(act): self.corrections.get((row, number), {}) for number, act in enumerate(self.acts[row])}

        def note(act: Act, *told: float | torch.Tensor) -> None:
            where[id(act)][column, site] = [abs(float(c)) for c in told]

        for act, factor in here:
            if act.kind == "add":
                y += factor * act.options["scale"] * act.vector.double()
        z = y.clone()
        held = [(act, factor) for act, factor in here if act.kind in ("ablate", "scale", "clamp")]
        if held:
            directions = torch.stack([act.unit for act, _ in held])
            changes = torch.stack([factor * act.change(y @ act.unit) for act, factor in held])
            for (act, _), change in zip(held, changes, strict=True):
                note(act, change)
            z += torch.linalg.lstsq(directions, changes[:, None], driver="gelsd").solution[:, 0]
        for act, factor in here:
            if act.kind == "swap":
                to = act.options["to"].double()
                note(act, factor * (y @ act.unit))
                z += factor * (y @ act.unit) * (to / to.norm() - act.unit)
            if act.kind == "lowrank":
                note(act, factor * (y @ act.vector.double() + act.options["bias"][0]))
                z += factor * (y @ act.vector.double() + act.options["bias"][0]) * act.options["write"].double()
            if act.kind == "feature":
                u = y @ act.vector.double() + act.options["bias"]
                f = u if u > act.options["threshold"] else 0.0
                note(act, factor * (act.options["set"] - f))
                z += factor * (act.options["set"] - f) * act.options["decoder"].double()
            if act.kind == "rotate":
                z += factor * (act.turned(y) - y)
                across = act.options["plane"].double()
                across = across - (across @ act.unit) * act.unit
                moved = factor * (act.turned(y) - y)
                note(act, moved @ act.unit, moved @ across / across.norm())
        return z


def specs(acts: list[list[Act]]) -> list[dict[str, Any] | None]:
    """The same as requests."""
    return [{"interventions": [act.spec() for act in row]} if row else None for row in acts]
