"""The routes that register content read JSON as strictly as a request's spec is read."""

from collections.abc import Iterator

import pytest

from trimtab.engines.vllm.frontend.admission import FrontEnd
from trimtab.serving.registry import VectorRegistry
from trimtab.sites import GateLimits, HookPoint, ModelSites, Site

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from trimtab.engines.vllm.frontend import requests
from trimtab.engines.vllm.http.routes import EndpointPlugin

pytestmark = pytest.mark.vllm

SITE = Site(0, HookPoint.POST_BLOCK)
ROW = '{"post_block": {"0": [1.0, 2.0]}}'


@pytest.fixture
def client() -> Iterator[TestClient]:
    requests.set_current_front_end(
        FrontEnd(ModelSites(2, 1, frozenset({SITE}), GateLimits(4, frozenset({SITE}))), VectorRegistry({}))
    )
    app = FastAPI()
    EndpointPlugin().attach_router(app)
    yield TestClient(app, raise_server_exceptions=False)
    requests.set_current_front_end(None)


@pytest.mark.parametrize("field", ["vector", "probe"])
def test_a_body_that_says_two_things_or_nothing_readable_is_a_400(client: TestClient, field: str) -> None:
    path = f"/v1/steering/{field}s"
    good = f'{{"name": "calm", "{field}": {ROW}}}'
    bad = [
        f'{{"name": "a", "name": "calm", "{field}": {ROW}}}',
        f'{{"name": "calm", "{field}": {ROW}, "{field}": {ROW}}}',
        f'{{"name": "calm", "{field}": {{"post_block": {{"0": [1.0, 2.0], "0": [2.0, 1.0]}}}}}}',
        '{"name": ' + "[" * 990 + "]" * 990 + "}",
        b'{"name": "\xff"}',
        "9" * 10_000,
    ]
    for content in bad:
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "BadRequestError"), answer.text
    assert client.post(path, content=good, headers={"Content-Type": "application/json"}).status_code == 201
