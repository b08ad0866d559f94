"""The HTTP routes that list, register and delete names, the same for vectors and for probes.

Each change is logged with the name, both digests and who asked. Names of the server's start cannot be changed; all
others by whoever may send requests or, where there is an administrator's key, by its holders.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from trimtab.engines.vllm.frontend.admission import FrontEnd
from trimtab.engines.vllm.http.registration_body import read_registration, refusal, served_front_end
from trimtab.errors import SteeringError
from trimtab.program.joint_gate import check_served
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.serving.admin_key import ForbiddenError, check_admin
from trimtab.serving.metrics import metrics
from trimtab.serving.registry import Entry, ReadOnlyNameError, Registry
from trimtab.serving.registry_store import Content
from trimtab.spec import Gate, Steering
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import summary

logger = logging.getLogger("vllm.trimtab")


@dataclass(frozen=True)
class NameRoutes(Generic[Content]):
    """The routes of one kind of content below `/v1/steering/`."""

    what: str
    wanted: str  # what an inline content is, for messages
    registry: Callable[[FrontEnd], Registry[Content]]
    limit: Callable[[FrontEnd], int]  # bytes of a body
    load: Callable[[Path], Content]
    parse: Callable[[Mapping[str, Any]], Content]
    check: Callable[[Content, FrontEnd], None]
    describe: Callable[[str, Content], dict[str, Any]]

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to `app`."""
        path = f"/v1/steering/{self.what}s"
        app.add_api_route(path, self.list, methods=["GET"])
        app.add_api_route(path, self.register, methods=["POST"])
        app.add_api_route(path + "/{name:path}", self.delete, methods=["DELETE"])

    def described(self, front_end: FrontEnd) -> list[dict[str, Any]]:
        """The registered names as the routes show them."""
        return [self._describe(entry) for entry in self.registry(front_end).entries()]

    async def list(self) -> Response:
        """The registered names, with the digest of their content and where it acts."""
        return JSONResponse({f"{self.what}s": self.described(served_front_end())})

    async def register(self, request: Request) -> Response:
        """Register content under a name. Requests that are running keep what the name meant to them."""
        front_end = served_front_end()
        registry = self.registry(front_end)
        name = "?"
        try:
            check_admin(request.headers)
            limit = self.limit(front_end)
            name, content = await read_registration(request, self.what, limit, self.load, self.parse, self.wanted)
            self.check(content, front_end)
            previous = await asyncio.to_thread(registry.add, name, content)
        except SteeringError as error:
            return self._refused(error, request)
        self._changed(front_end, request, name, previous, content.digest.hex())
        entry = Entry(name, content, registry.held_by_workers(content.digest), False)
        return JSONResponse({**self._describe(entry), "replaced": previous}, 201 if previous is None else 200)

    async def delete(self, name: str, request: Request) -> Response:
        """Forget a name. Requests that are running are untouched."""
        front_end = served_front_end()
        registry = self.registry(front_end)
        try:
            check_admin(request.headers)
            digest = await asyncio.to_thread(registry.remove, name)
        except KeyError:
            known = summary(sorted(registry.vectors())) or "none"
            error = SteeringError("name", f"there is no {self.what} {name!r:.160}; registered are: {known}")
            return refusal(error, 404)
        except SteeringError as error:
            return self._refused(error, request)
        self._changed(front_end, request, name, digest, None)
        return JSONResponse({"name": name, "digest": digest, "deleted": True})

    def _describe(self, entry: Entry[Content]) -> dict[str, Any]:
        return {
            **self.describe(entry.name, entry.content),
            "loaded_at_start": entry.at_start,
            "read_only": entry.read_only,
        }

    def _changed(self, front_end: FrontEnd, request: Request, name: str, before: str | None, after: str | None) -> None:
        verb = "deleted" if after is None else "registered" if before is None else "replaced"
        logger.info(
            "Steering: %s %s %s by %s: %s -> %s",
            self.what, name, verb, _peer(request), before or "nothing", after or "nothing",
        )  # fmt: skip
        metrics().vectors(len(front_end.registry.vectors()))

    def _refused(self, error: SteeringError, request: Request) -> Response:
        if isinstance(error, ForbiddenError | ReadOnlyNameError):
            logger.warning("Steering: %s refused to %s: %s", request.method, _peer(request), error)
        return refusal(error)


def _peer(request: Request) -> str:
    return f"{request.client.host}:{request.client.port}" if request.client else "a peer without an address"


# --- vectors


def check_fits(vector: SteeringVector, front_end: FrontEnd) -> None:
    """Refuse a vector that no request could use here. Raises `SteeringError` at `vector`."""
    try:
        Steering.parse({"interventions": [{"kind": "add", "vector": vector}]}).resolve({}, front_end.model)
    except SteeringError as error:
        raise SteeringError(error.field.removeprefix("interventions[0].") or "vector", error.message) from error


def _parse_vector(content: Mapping[str, Any]) -> SteeringVector:
    try:
        vector = (
            Steering.parse({"interventions": [{"kind": "add", "vector": content}]}).interventions[0].sources["vector"]
        )
    except SteeringError as error:
        raise SteeringError(error.field.removeprefix("interventions[0]."), error.message) from error
    assert isinstance(vector, SteeringVector)
    return vector


VECTOR_ROUTES = NameRoutes[SteeringVector](
    what="vector",
    wanted="packed objects or lists per hook point",
    registry=lambda front_end: front_end.registry,
    limit=lambda front_end: 64 * 1024 + 64 * front_end.model.hidden_size * len(front_end.model.sites),
    load=SteeringVector.load,
    parse=_parse_vector,
    check=check_fits,
    describe=lambda name, vector: {
        "name": name,
        "digest": vector.digest.hex(),
        "hidden_size": vector.hidden_size,
        "sites": [str(site) for site in vector.sites],
    },
)


# --- probes


def check_probe(probe: Probe, front_end: FrontEnd) -> None:
    """Refuse a probe that no gate could use here. Raises `SteeringError` at `probe`."""
    model = front_end.model
    if probe.vector.hidden_size != model.hidden_size:
        given = probe.vector.hidden_size
        raise SteeringError("probe", f"has width {given}, this model has hidden size {model.hidden_size}")
    if not model.gates.count:
        remedy = f"start it with --steering-probe-layers {probe.site.layer}, or with a probe in --steering-probes"
        raise SteeringError("probe", f"cannot be used: this engine reads no probes; {remedy}")
    check_served(ResolvedGate.of(probe.vector, -probe.bias, 1.0), [], model.gates)


def _parse_probe(content: Mapping[str, Any]) -> Probe:
    probe = Gate(**dict[str, Any](probe=content, threshold=0.0)).probe
    assert isinstance(probe, Probe)
    return probe


PROBE_ROUTES = NameRoutes[Probe](
    what="probe",
    wanted="a direction at one site, and perhaps its bias",
    registry=lambda front_end: front_end.probes,
    limit=lambda front_end: 64 * 1024 + 64 * front_end.model.hidden_size,
    load=Probe.load,
    parse=_parse_probe,
    check=check_probe,
    describe=lambda name, probe: {
        "name": name,
        "digest": probe.digest.hex(),
        "direction": probe.vector.digest.hex(),
        "hidden_size": probe.vector.hidden_size,
        "site": str(probe.site),
        "bias": probe.bias,
    },
)
