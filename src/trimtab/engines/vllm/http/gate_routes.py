"""The HTTP route that says what the gates of a request did."""

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from trimtab.engines.vllm.frontend.accounts import ACCOUNT_NAME, Answers
from trimtab.engines.vllm.frontend.workers import PAGE_WAIT, Workers
from trimtab.engines.vllm.http.registration_body import refusal
from trimtab.errors import SteeringError
from trimtab.serving.receipt import with_gates

BY_NAME = "its header x-trimtab-answer names it for certain, and its receipt has the same numbers"


def add_gate_routes(app: FastAPI, workers: Workers, answers: Answers) -> None:
    """Add the route to `app`. `answers` are those whose gates can be asked for by their ids."""

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
        uses = await workers.uses(name, PAGE_WAIT)
        if uses is None:
            return refusal(SteeringError("id", f"the workers did not answer within {PAGE_WAIT:g} seconds"), 503)
        return JSONResponse(with_gates({"id": answer_id}, uses.gates))

    app.add_api_route("/v1/steering/gates/{answer_id}", gate_uses, methods=["GET"])
