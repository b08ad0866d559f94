"""HTTP routes beside vLLM's own, and the receipt header: `vllm.endpoint_plugins` entry point `trimtab`.

    GET    /v1/steering                  what is on: sites, vectors, default, and each worker's state
    GET    /v1/steering/vectors          the registered names
    POST   /v1/steering/vectors          register one: JSON {"name", "vector"}, or a .safetensors body with ?name=
    DELETE /v1/steering/vectors/{name}   forget one
    GET, POST, DELETE /v1/steering/probes...  the same for probes: JSON {"name", "probe"}
    GET    /v1/steering/gates/{id}       what the gates of a request, by the id in its answer, did

All stand below /v1, which vLLM guards with `--api-key`. The front end they speak for is this process's.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from trimtab.engines.vllm.accounts import Answers
from trimtab.engines.vllm.doors import current_front_end
from trimtab.engines.vllm.frontend import FrontEnd
from trimtab.engines.vllm.gate_routes import add_gate_routes, describe_probe
from trimtab.engines.vllm.guard import guard_routes
from trimtab.engines.vllm.metrics import metrics
from trimtab.engines.vllm.receipts import ExchangeMiddleware
from trimtab.engines.vllm.registration import read_registration, refusal, served_front_end
from trimtab.engines.vllm.registry import Entry
from trimtab.engines.vllm.worker_status import PAGE_WAIT, Workers
from trimtab.errors import SteeringError
from trimtab.sites import site_order
from trimtab.spec import Steering
from trimtab.vectors.vector import SteeringVector

logger = logging.getLogger("vllm.trimtab")


def endpoint_plugin() -> "EndpointPlugin":
    """The factory that vLLM calls."""
    return EndpointPlugin()


class EndpointPlugin:
    """The routes and the receipt header, in the shape that vLLM's `EndpointPlugin` protocol asks for."""

    name = "trimtab"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.workers = Workers()
        self.answers = Answers()

    def attach_router(self, app: FastAPI) -> None:
        """Guard the routes that are there, and add ours where steering is on."""
        if current_front_end() is None:
            try:
                guard_routes(app)
            except Exception as error:  # a server that is not steered starts whatever its routes look like
                logger.warning("trimtab cannot guard this server's routes, which are those of plain vLLM: %r", error)
            return
        guard_routes(app)
        app.add_api_route("/v1/steering", self.status, methods=["GET"])
        app.add_api_route("/v1/steering/vectors", self.list_vectors, methods=["GET"])
        app.add_api_route("/v1/steering/vectors", self.register_vector, methods=["POST"])
        app.add_api_route("/v1/steering/vectors/{name}", self.delete_vector, methods=["DELETE"])
        add_gate_routes(app, self.workers, self.answers)
        # vLLM's authentication is added later, and so is outside.
        app.add_middleware(ExchangeMiddleware, workers=self.workers, answers=self.answers)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Compare what the workers serve with what requests are checked against; a mismatch stops the start."""
        front_end = current_front_end()
        if front_end is None or engine_client is None:
            return
        self.workers.client = engine_client
        check_workers(front_end, (await self.workers.ask(None)).engines)

    async def status(self) -> Response:
        """What this server steers, and the state of each worker."""
        front_end = served_front_end()
        engines, silent = await self.workers.ask(PAGE_WAIT, digest=True)
        sites = sorted(front_end.model.sites, key=site_order)
        return JSONResponse(
            {
                "model": {"hidden_size": front_end.model.hidden_size, "num_layers": front_end.model.num_layers},
                "sites": [str(site) for site in sites],
                "vectors": [describe(entry) for entry in front_end.registry.entries()],
                "probes": [describe_probe(entry) for entry in front_end.probes.entries()],
                "gates": {
                    "per_phase": front_end.model.gates.count,
                    "probe_sites": list(map(str, sorted(front_end.model.gates.probe_sites, key=site_order))),
                },
                "monitor": front_end.monitor,
                "default": None if front_end.default is None else front_end.default.shown(),
                "workers": [{"engine": engine, **_plain(worker)} for engine in engines for worker in engines[engine]],
                "workers_agree": all(len({worker.get("digest") for worker in own}) == 1 for own in engines.values()),
                "engines_silent": silent,
            }
        )

    async def list_vectors(self) -> Response:
        """The registered names, with the digest of their content and where it acts."""
        return JSONResponse({"vectors": [describe(entry) for entry in served_front_end().registry.entries()]})

    async def register_vector(self, request: Request) -> Response:
        """Register content under a name. Requests that are running keep what the name meant to them."""
        front_end = served_front_end()
        try:
            limit = 64 * 1024 + 64 * front_end.model.hidden_size * len(front_end.model.sites)
            wanted = "packed objects or lists per hook point"
            name, vector = await read_registration(request, "vector", limit, SteeringVector.load, _parse_vector, wanted)
            check_fits(vector, front_end)
            previous = await asyncio.to_thread(front_end.registry.add, name, vector)
        except SteeringError as error:
            return refusal(error)
        entries = front_end.registry.entries()
        metrics().vectors(len(entries))
        entry = next(entry for entry in entries if entry.name == name)
        replaced = None if previous is None else previous.digest.hex()
        return JSONResponse({**describe(entry), "replaced": replaced}, 201 if previous is None else 200)

    async def delete_vector(self, name: str) -> Response:
        """Forget a name. Requests that are running are untouched."""
        front_end = served_front_end()
        try:
            removed = await asyncio.to_thread(front_end.registry.remove, name)
        except KeyError:
            known = ", ".join(sorted(front_end.registry.vectors())) or "none"
            return refusal(SteeringError("name", f"there is no vector {name!r:.160}; registered are: {known}"), 404)
        metrics().vectors(len(front_end.registry.vectors()))
        return JSONResponse({"name": name, "digest": removed.digest.hex(), "deleted": True})


def describe(entry: Entry[SteeringVector]) -> dict[str, Any]:
    """A registered vector as the routes show it."""
    vector = entry.content
    return {
        "name": entry.name,
        "digest": vector.digest.hex(),
        "hidden_size": vector.hidden_size,
        "sites": [str(site) for site in vector.sites],
        "loaded_at_start": entry.at_start,
    }


def check_fits(vector: SteeringVector, front_end: FrontEnd) -> None:
    """Refuse a vector that no request could use here. Raises `SteeringError` at `vector`."""
    try:
        Steering.parse({"interventions": [{"kind": "add", "vector": vector}]}).resolve({}, front_end.model)
    except SteeringError as error:
        raise SteeringError(error.field.removeprefix("interventions[0].") or "vector", error.message) from error


def check_workers(front_end: FrontEnd, engines: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
    """Raise `SteeringError` if there are sites that requests may name and that no worker of an engine serves."""
    expected = {str(site) for site in front_end.model.sites}
    for workers in engines.values():
        served = {site for worker in workers for site in worker.get("sites") or ()}
        if workers and (missing := sorted(expected - served)):
            raise SteeringError("steering", f"no worker serves these sites: {', '.join(missing[:8])}")


def _parse_vector(content: Mapping[str, Any]) -> SteeringVector:
    try:
        vector = Steering.parse({"interventions": [{"kind": "add", "vector": content}]}).interventions[0].vector
    except SteeringError as error:
        raise SteeringError(error.field.removeprefix("interventions[0]."), error.message) from error
    assert isinstance(vector, SteeringVector)
    return vector


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: bytes as hex."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value
