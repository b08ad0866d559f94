"""HTTP routes of gates: the registry of probes, and what the gates of a request did."""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from trimtab.engines.vllm.accounts import ACCOUNT_NAME, Answers
from trimtab.engines.vllm.frontend import FrontEnd
from trimtab.engines.vllm.registration import read_registration, refusal, served_front_end
from trimtab.engines.vllm.registry import Entry
from trimtab.engines.vllm.worker_status import PAGE_WAIT, Workers
from trimtab.errors import SteeringError
from trimtab.gates import ResolvedGate, check_served
from trimtab.spec import Gate
from trimtab.vectors.probe import Probe

BY_NAME = "its header x-trimtab-answer names it for certain, and its receipt has the same numbers"


def add_gate_routes(app: FastAPI, workers: Workers, answers: Answers) -> None:
    """Add the routes to `app`. `answers` are those whose gates can be asked for by their ids."""

    async def gate_uses(answer_id: str) -> Response:
        """What each gate of an answer, under way or recently finished, has done: by its id, or by the name that its
        header gives, which any API server process knows."""
        try:
            name = answer_id if ACCOUNT_NAME.fullmatch(answer_id) else answers.find(answer_id)
        except KeyError:
            error = SteeringError("id", f"no answer {answer_id!r:.160} with gates is known to this process; {BY_NAME}")
            return refusal(error, 404)
        if name is None:
            return refusal(SteeringError("id", f"several answers have the id {answer_id!r:.160}; {BY_NAME}"), 409)
        uses = await workers.gates(name, PAGE_WAIT)
        if uses is None:
            return refusal(SteeringError("id", f"the workers did not answer within {PAGE_WAIT:g} seconds"), 503)
        return JSONResponse({"id": answer_id, "gates": uses})

    app.add_api_route("/v1/steering/probes", list_probes, methods=["GET"])
    app.add_api_route("/v1/steering/probes", register_probe, methods=["POST"])
    app.add_api_route("/v1/steering/probes/{name}", delete_probe, methods=["DELETE"])
    app.add_api_route("/v1/steering/gates/{answer_id}", gate_uses, methods=["GET"])


async def list_probes() -> Response:
    """The registered names, with the digest of their content and where each is read."""
    return JSONResponse({"probes": [describe_probe(entry) for entry in served_front_end().probes.entries()]})


async def register_probe(request: Request) -> Response:
    """Register a probe under a name. Requests that are running keep what the name meant to them."""
    front_end = served_front_end()
    try:
        limit = 64 * 1024 + 64 * front_end.model.hidden_size
        wanted = "a direction at one site, and perhaps its bias"
        name, probe = await read_registration(request, "probe", limit, Probe.load, _parse_probe, wanted)
        check_probe(probe, front_end)
        previous = await asyncio.to_thread(front_end.probes.add, name, probe)
    except SteeringError as error:
        return refusal(error)
    entry = next(entry for entry in front_end.probes.entries() if entry.name == name)
    replaced = None if previous is None else previous.digest.hex()
    return JSONResponse({**describe_probe(entry), "replaced": replaced}, 201 if previous is None else 200)


async def delete_probe(name: str) -> Response:
    """Forget a name. Requests that are running are untouched."""
    front_end = served_front_end()
    try:
        removed = await asyncio.to_thread(front_end.probes.remove, name)
    except KeyError:
        known = ", ".join(sorted(front_end.probes.vectors())) or "none"
        return refusal(SteeringError("name", f"there is no probe {name!r:.160}; registered are: {known}"), 404)
    return JSONResponse({"name": name, "digest": removed.digest.hex(), "deleted": True})


def describe_probe(entry: Entry[Probe]) -> dict[str, Any]:
    """A registered probe as the routes show it."""
    probe = entry.content
    return {
        "name": entry.name,
        "digest": probe.digest.hex(),
        "direction": probe.vector.digest.hex(),
        "hidden_size": probe.vector.hidden_size,
        "site": str(probe.site),
        "bias": probe.bias,
        "loaded_at_start": entry.at_start,
    }


def check_probe(probe: Probe, front_end: FrontEnd) -> None:
    """Refuse a probe that no gate could use here. Raises `SteeringError` at `probe`."""
    model = front_end.model
    if probe.vector.hidden_size != model.hidden_size:
        given = probe.vector.hidden_size
        raise SteeringError("probe", f"has width {given}, this model has hidden size {model.hidden_size}")
    check_served(ResolvedGate.of(probe.vector, -probe.bias, 1.0), [], model.gates)


def _parse_probe(content: Mapping[str, Any]) -> Probe:
    probe = Gate(**dict[str, Any](probe=content, threshold=0.0)).probe
    assert isinstance(probe, Probe)
    return probe
