"""HTTP routes beside vLLM's own, and the receipt header: `vllm.endpoint_plugins` entry point `trimtab`.

    GET    /v1/steering                  what is on: sites, vectors, default, and each worker's state
    GET    /v1/steering/vectors          the registered names
    POST   /v1/steering/vectors          register one: JSON {"name", "vector"}, or a file as the body with ?name=
    DELETE /v1/steering/vectors/{name}   forget one
    GET, POST, DELETE /v1/steering/probes...  the same for probes: JSON {"name", "probe"}
    GET    /v1/steering/gates/{id}       what the gates of a request, by the id in its answer, did

All stand below /v1, which vLLM guards with `--api-key`; changes may need a key of their own (`admin`). The front end
they speak for is this process's.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from trimtab.engines.vllm.frontend.accounts import Answers
from trimtab.engines.vllm.frontend.admission import FrontEnd
from trimtab.engines.vllm.frontend.requests import current_front_end
from trimtab.engines.vllm.frontend.workers import PAGE_WAIT, Workers
from trimtab.engines.vllm.http.before_routes import guard_routes
from trimtab.engines.vllm.http.gate_routes import add_gate_routes
from trimtab.engines.vllm.http.receipts import ExchangeMiddleware
from trimtab.engines.vllm.http.registration_body import served_front_end
from trimtab.engines.vllm.http.registry_routes import PROBE_ROUTES, VECTOR_ROUTES
from trimtab.errors import SteeringError
from trimtab.serving.admin_key import admin_key
from trimtab.sites import site_order

logger = logging.getLogger("vllm.trimtab")

OF_ANSWERS = {"uses", "slot_uses"}  # said of answers that were asked about
OF_POOL = {"rows_reserved", "requests_waiting"}  # of an engine, said with the states of its workers


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
        VECTOR_ROUTES.add_to(app)
        PROBE_ROUTES.add_to(app)
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
                "tables": {
                    "rows": None if front_end.model.room is None else front_end.model.room.rows,
                    "engines": [{"engine": engine, **_tables(engines[engine])} for engine in engines],
                },
                "vectors": VECTOR_ROUTES.described(front_end),
                "probes": PROBE_ROUTES.described(front_end),
                "changes_need_admin_key": admin_key() is not None,
                "gates": {
                    "per_phase": front_end.model.gates.count,
                    "probe_sites": list(map(str, sorted(front_end.model.gates.probe_sites, key=site_order))),
                },
                "slots": {
                    "per_site": front_end.model.slots.count,
                    "kinds": sorted(front_end.model.slots.kinds),
                    "sites": list(map(str, sorted(front_end.model.slots.sites, key=site_order))),
                },
                "monitor": None if front_end.monitor is None else front_end.monitor.shown,
                "default": None if front_end.default is None else front_end.default.shown(),
                "workers": [{"engine": engine, **_shown(worker)} for engine in engines for worker in engines[engine]],
                "workers_agree": all(len({worker.get("digest") for worker in own}) == 1 for own in engines.values()),
                "engines_silent": silent,
            }
        )


def check_workers(front_end: FrontEnd, engines: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
    """Raise `SteeringError` if there are sites that requests may name and that no worker of an engine serves."""
    expected = {str(site) for site in front_end.model.sites}
    for workers in engines.values():
        served = {site for worker in workers for site in worker.get("sites") or ()}
        if workers and (missing := sorted(expected - served)):
            raise SteeringError("steering", f"no worker serves these sites: {', '.join(missing[:8])}")


def _shown(worker: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a worker: not what was done for answers that were asked about in the same call, nor what
    its engine said."""
    return {str(key): _plain(value) for key, value in worker.items() if key not in OF_ANSWERS and key not in OF_POOL}


def _tables(workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page shows of an engine's tables: the most that one of its devices holds, and who has their rows."""
    pool = next(({key: worker[key] for key in OF_POOL} for worker in workers if worker.keys() >= OF_POOL), {})
    return {"most_bytes_of_a_device": max((worker.get("nbytes", 0) for worker in workers), default=0), **pool}


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: bytes as hex."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value
