"""`lowrank`: adds an affine function of the stream that has a low rank (LoReFT, arXiv:2404.03592, and its relatives).

    z = y + sum over j of (y . a_j + b_j) r_j

with the vectors of `read` as a_j and those of `write` as r_j, as long as they are. docs/kinds.md says how LoReFT, its
relatives, and LM-Steer come down to this.
"""

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from trimtab.errors import SteeringError
from trimtab.program import Numbers, Slot
from trimtab.program.ranges import MAX_VALUE
from trimtab.responses import CLIP
from trimtab.spec import fields
from trimtab.spec.fields import Sources
from trimtab.spec.kinds.intervention import Step, Vectors, same_places


class Lowrank(Step):
    """Writes along each vector of `write` what the stream has along that of `read`, and its `bias`: 0 if left out."""

    responses: ClassVar[tuple[str, ...]] = (CLIP.name,)
    writes: ClassVar[bool] = True

    kind: Literal["lowrank"] = "lowrank"
    read: Sources
    write: Sources
    bias: fields.Numbers | None = None

    @model_validator(mode="after")
    def _has_one_rank(self) -> Self:
        for name in ("write", "bias"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.read):
                raise SteeringError(name, f"has {len(given)} items, but `read` has {len(self.read)}")
        return self

    def lower(self, vectors: Vectors, path: str) -> tuple[Slot, ...]:
        """A slot for each vector of `read`. Raises `SteeringError` below `path`."""
        slots: list[Slot] = []
        first = self.raw(vectors, path, "read[0]")
        for index, bias in enumerate(self.bias or (0.0,) * len(self.read)):
            if abs(bias) > MAX_VALUE:
                raise SteeringError(f"{path}.bias[{index}]", f"got {bias:g}, want at most {MAX_VALUE:g}")
            read, write = self.raw(vectors, path, f"read[{index}]"), self.raw(vectors, path, f"write[{index}]")
            same_places(first, read, path, f"read[{index}]", "read[0]")
            same_places(first, write, path, f"write[{index}]", "read[0]")
            numbers = Numbers.of(bias, -1.0, 0.0, 0.0)  # c = u
            slots.append(Slot(CLIP.name, read, write, tuple((site, numbers) for site in first.sites)))
        return tuple(slots)
