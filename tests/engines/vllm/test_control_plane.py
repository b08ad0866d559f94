"""The routes that change names, in process: who may, what is refused and how, what the log says."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")

from fastapi import FastAPI
from starlette.testclient import TestClient

from trimtab.engines.vllm.frontend import requests
from trimtab.engines.vllm.frontend.admission import FrontEnd
from trimtab.engines.vllm.frontend.build import build_front_end
from trimtab.engines.vllm.frontend.workers import Told
from trimtab.engines.vllm.http import registration_body as registration
from trimtab.engines.vllm.http.routes import EndpointPlugin
from trimtab.engines.vllm.settings.config import SteeringSettings, stamped
from trimtab.engines.vllm.settings.flags import apply_flags
from trimtab.errors import SteeringError
from trimtab.serving import admin_key as admin
from trimtab.serving.registry import ProbeRegistry, VectorRegistry
from trimtab.sites import GateLimits, HookPoint, ModelSites, Site
from trimtab.vectors.formats.gguf import write_gguf
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

H, LAYERS = 8, 3
SITES = frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(LAYERS))
PROBE_SITE = Site(1, HookPoint.POST_BLOCK)
MODEL = ModelSites(H, LAYERS, SITES, GateLimits(4, frozenset({PROBE_SITE})))

KEY = "an-admin's-key"
ADMIN = {"X-Steering-Admin-Key": KEY}

DEFAULT = {"interventions": [{"kind": "add", "vector": "calm"}]}


def vector(seed: int, layers: int = LAYERS) -> SteeringVector:
    numbers = np.random.default_rng(seed).normal(size=(layers, H))
    return SteeringVector({Site(layer, HookPoint.POST_BLOCK): numbers[layer] for layer in range(layers)})


CALM, JOY = vector(1), vector(2)
ANGER = Probe.at(PROBE_SITE, [1.0] * H, 0.5)

CONTENT = {"vectors": {"post_block": {"0": [1.0] * H}}, "probes": {"post_block": {"1": [1.0] * H}}}


@pytest.fixture(autouse=True)
def front_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[FrontEnd]:
    monkeypatch.delenv(admin.VARIABLE, raising=False)
    caplog.set_level(logging.INFO, "vllm.trimtab")
    vectors = VectorRegistry({"calm": CALM}, tmp_path / "shared")
    probes = ProbeRegistry({"anger": ANGER}, tmp_path / "shared" / "probes")
    front_end = FrontEnd(MODEL, vectors, DEFAULT, probes=probes)
    requests.set_current_front_end(front_end)
    yield front_end
    requests.set_current_front_end(None)


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    EndpointPlugin().attach_router(app)
    return TestClient(app, raise_server_exceptions=False)


def body(kind: str, name: str = "mood") -> dict[str, Any]:
    return {"name": name, kind.removesuffix("s"): CONTENT[kind]}


def error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


# --- who may


@pytest.mark.parametrize(("kind", "name"), [("vectors", "calm"), ("probes", "anger")])
@pytest.mark.parametrize("headers", [{}, ADMIN], ids=["no admin key", "admin key"])
def test_names_of_the_start_are_read_only_for_everybody(
    client, front_end, kind: str, name: str, headers, monkeypatch
) -> None:
    if headers:
        monkeypatch.setenv(admin.VARIABLE, KEY)
    before = front_end.admit(None).steering.decode.identity
    for answer in (
        client.post(f"/v1/steering/{kind}", json=body(kind, name), headers=headers),
        client.delete(f"/v1/steering/{kind}/{name}", headers=headers),
    ):
        said = error(answer, 409)
        assert (said["param"], said["type"]) == ("name", "ConflictError")
        assert f"{name!r} belongs to the start of this server" in said["message"]
    assert front_end.admit(None).steering.decode.identity == before
    listed = {entry["name"]: entry for entry in client.get(f"/v1/steering/{kind}").json()[kind]}
    assert listed[name]["read_only"] is True


@pytest.mark.parametrize("kind", ["vectors", "probes"])
def test_once_there_is_an_admin_key_every_change_needs_it_and_reading_does_not(client, kind: str, monkeypatch) -> None:
    assert client.post(f"/v1/steering/{kind}", json=body(kind, "before")).status_code == 201
    monkeypatch.setenv(admin.VARIABLE, KEY)
    for headers in ({}, {"X-Steering-Admin-Key": ""}, {"X-Steering-Admin-Key": KEY[:-1]}, {"Authorization": KEY}):
        for answer in (
            client.post(f"/v1/steering/{kind}", json=body(kind), headers=headers),
            client.post(f"/v1/steering/{kind}", json=body(kind, "before"), headers=headers),
            client.delete(f"/v1/steering/{kind}/before", headers=headers),
            client.delete(f"/v1/steering/{kind}/nobody", headers=headers),
        ):
            said = error(answer, 403)
            assert "X-Steering-Admin-Key" in said["message"]
            assert KEY not in answer.text
    assert "before" in {entry["name"] for entry in client.get(f"/v1/steering/{kind}").json()[kind]}
    assert client.post(f"/v1/steering/{kind}", json=body(kind), headers=ADMIN).status_code == 201
    assert client.delete(f"/v1/steering/{kind}/before", headers=ADMIN).status_code == 200


def test_every_change_is_logged_with_name_digests_and_peer_and_the_key_nowhere(client, monkeypatch, caplog) -> None:
    monkeypatch.setenv(admin.VARIABLE, KEY)
    one = client.post("/v1/steering/vectors", json=body("vectors"), headers=ADMIN).json()["digest"]
    other = {"name": "mood", "vector": {"post_block": {"1": [2.0] * H}}}
    two = client.post("/v1/steering/vectors", json=other, headers=ADMIN).json()["digest"]
    client.delete("/v1/steering/vectors/mood", headers=ADMIN)
    client.post("/v1/steering/vectors", json=body("vectors"), headers={"X-Steering-Admin-Key": "wrong"})
    client.delete("/v1/steering/vectors/calm", headers=ADMIN)
    said = [record.getMessage() for record in caplog.records]
    assert said[:3] == [
        f"Steering: vector mood registered by testclient:50000: nothing -> {one}",
        f"Steering: vector mood replaced by testclient:50000: {one} -> {two}",
        f"Steering: vector mood deleted by testclient:50000: {two} -> nothing",
    ]
    assert "POST refused to testclient:50000" in said[3]
    assert "DELETE refused to testclient:50000" in said[4]
    assert KEY not in caplog.text


def test_the_flag_of_the_key_goes_to_the_environment_and_into_no_setting(monkeypatch) -> None:
    monkeypatch.setenv(admin.VARIABLE, "from outside")
    args = SimpleNamespace(enable_steering=True, steering_admin_key=KEY, additional_config=None)
    assert apply_flags(args) is True  # type: ignore[arg-type]
    assert args.additional_config == {"steering": {}}
    assert KEY not in repr(args)
    assert admin.admin_key() == KEY
    args = SimpleNamespace(
        enable_steering=True, steering_admin_key=KEY, additional_config={"steering": {"layers": "1"}}
    )
    assert apply_flags(args) is True  # type: ignore[arg-type]
    with pytest.raises(SteeringError, match="--steering-admin-key: given without --enable-steering"):
        apply_flags(SimpleNamespace(steering_admin_key=KEY))  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["", " ", "two words", "tab\t", "line\n", "schlüssel"])
def test_a_key_that_no_header_can_carry_stops_the_start_and_is_not_repeated(key: str, monkeypatch) -> None:
    with pytest.raises(SteeringError, match="printable ASCII") as caught:
        apply_flags(SimpleNamespace(enable_steering=True, steering_admin_key=key))  # type: ignore[arg-type]
    assert caught.value.field == "--steering-admin-key"
    monkeypatch.setenv(admin.VARIABLE, key)
    with pytest.raises(SteeringError, match="printable ASCII") as caught:
        build_front_end(config({}))
    assert caught.value.field == admin.VARIABLE


def test_a_key_among_the_settings_is_refused_unread() -> None:
    with pytest.raises(SteeringError, match=r"steering.admin_key: unknown setting") as caught:
        SteeringSettings.parse({"admin_key": KEY})
    assert KEY not in str(caught.value)


# --- the start


def config(settings: dict[str, Any]) -> Any:
    """What trimtab reads of a `VllmConfig`."""
    return SimpleNamespace(
        additional_config={"steering": settings},
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(num_hidden_layers=LAYERS), get_hidden_size=lambda: H, dtype=torch.float16
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
    )


def test_a_start_prints_vectors_probes_digests_default_monitor_and_who_may_change_names(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setenv(admin.VARIABLE, KEY)
    monkeypatch.setenv("TRIMTAB_REGISTRY_DIR", str(tmp_path / "names"))
    VectorRegistry({}, tmp_path / "names").add("mood", JOY)
    for name, content in (("calm", CALM), ("anger", ANGER)):
        content.save(tmp_path / f"{name}.safetensors")
    inline = {"post_block": {"0": [1.0] * H}}
    default = {"interventions": [{"kind": "add", "vector": "calm", "scale": 0.5}, {"kind": "add", "vector": inline}]}
    given = {
        "vectors": {"calm": str(tmp_path / "calm.safetensors")},
        "probes": {"anger": str(tmp_path / "anger.safetensors")},
        "default": default,
        "monitor": {"probe": str(tmp_path / "anger.safetensors"), "threshold": 2.0},
    }
    plain = stamped(config(given), SteeringSettings.parse({**given, "table_memory": "1MiB"})).model_dump(mode="json")
    assert build_front_end(config(plain)) is not None
    (block,) = [record.getMessage() for record in caplog.records if "Steering is on" in record.getMessage()]
    lines = block.splitlines()
    assert lines[0] == "Steering is on at 3 sites: post_block:0, post_block:1, post_block:2"
    assert lines[1] == "  tables: 48 rows for requests in 0.0 MiB of each device"
    assert lines[2].startswith("  slots: none, so requests can add and nothing else; --steering-slots")
    assert f"    calm {CALM.digest.hex()} (calm.safetensors)" in lines
    assert f"    mood {JOY.digest.hex()} (registered at run time)" in lines
    assert f"    anger {ANGER.digest.hex()} (anger.safetensors)" in lines
    shown = json.loads(next(line for line in lines if "default: " in line).split("default: ")[1])
    expected = {"kind": "add", "vector": "calm", "phase": "all", "scale": 0.5, "unit": "raw"}
    assert shown["interventions"][0] == expected
    assert shown["interventions"][1]["vector"].startswith("inline ")
    monitor = json.loads(next(line for line in lines if "monitor: " in line).split("monitor: ")[1])
    assert (monitor["probe"], monitor["threshold"]) == ("anger.safetensors", 2.0)
    assert "with the administrator's key" in lines[-1]
    assert KEY not in caplog.text
    assert KEY not in json.dumps(plain)


# --- what comes in


@pytest.mark.parametrize("content_type", ["application/octet-stream", "application/json", "", "text/plain; charset=x"])
def test_what_a_body_is_follows_from_its_content_whatever_its_content_type(
    client, content_type: str, tmp_path: Path
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    JOY.save(tmp_path / "joy.safetensors")
    high = JOY.at([1, 2])
    write_gguf(high, tmp_path / "joy.gguf")
    for file, expected in (("joy.safetensors", JOY), ("joy.gguf", high)):
        content = (tmp_path / file).read_bytes()
        answer = client.post("/v1/steering/vectors?name=joy", content=content, headers=headers)
        assert answer.status_code in (200, 201), answer.text
        assert answer.json()["digest"] == expected.digest.hex()
    written = client.post("/v1/steering/vectors", content=json.dumps(body("vectors")), headers=headers)
    assert written.status_code == 201


SVEC = json.dumps({"model_type": "llama", "directions": {"1": [1.0] * H}}).encode()

GOOD = json.dumps(body("vectors")).encode()


def deep(depth: int, kind: str = "[") -> bytes:
    inner = b"[" * depth + b"]" * depth if kind == "[" else b'{"a":' * depth + b"1" + b"}" * depth
    return b'{"name": "x", "vector": ' + inner + b"}"


BODIES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("", b"", "is not JSON"),
    "svec": ("?name=x", SVEC, "is a .svec file"),
    "pickle": ("?name=x", b"\x80\x04K\x01.", "nothing is unpickled"),
    "zip": ("?name=x", b"PK\x03\x04rest", "nothing is unpickled"),
    "form": ("?name=x", b"--boundary\r\nContent-Disposition: form-data", "looks like a form"),
    "utf-16": ("", GOOD.decode().encode("utf-16"), "not text in UTF-8"),
    "utf-32": ("", GOOD.decode().encode("utf-32-le"), "is not JSON"),
    "half a safetensors file": ("?name=x", b"\x40\x00\x00\x00\x00\x00\x00\x00{", "cannot be read as a steering vector"),
    "half a GGUF file": ("?name=x", b"GGUF\x03\x00", "cannot be read as a steering vector"),
    "a list": ("", b"[1]", "no object"),
    "a list nested 990 deep": ("", deep(990), "want"),
    "an object nested 990 deep": ("", deep(990, "{"), ""),
    "nested 30000 deep": ("", deep(30_000), "nested too deeply"),
    "the key self": ("", b'{"self": 1}', 'want {"name"'),
    "the key self in the vector": ("", b'{"name": "x", "vector": {"self": 1}}', "vector.self: unknown hook point"),
    "a repeated name": ("", b'{"name": "x", "name": "y", "vector": {}}', "'name' is given twice"),
    "a repeated layer": (
        "", b'{"name": "x", "vector": {"post_block": {"1": [1], "1": [2]}}}', "'1' is given twice"
    ),
    "a name in both": ("?name=x", GOOD, "given twice, in the URL and in the body"),
    "two names in the URL": ("?name=x&name=y", GOOD, "given 2 times"),
    "an unknown parameter": ("?nam=x", GOOD, "unknown parameter"),
    "a surrogate as hook point": ("", b'{"name": "x", "vector": {"\\ud800": 1}}', "unknown hook point"),
    "a surrogate as layer": ("", b'{"name": "x", "vector": {"post_block": {"\\ud800": 1}}}', "not a layer"),
    "a surrogate as name": ("", b'{"name": "\\ud800", "vector": {}}', "a name has 1 to 128"),
    "a name of 129": ("", GOOD.replace(b"mood", b"x" * 129), "a name has 1 to 128"),
    "no name": ("", GOOD.replace(b"mood", b""), "a name has 1 to 128"),
    "a huge number": ("", b'{"name": "x", "vector": {"post_block": {"1": [' + b"9" * 400 + b"]}}}", "float32"),
    "NaN": ("", b'{"name": "x", "vector": {"post_block": {"1": [NaN, 1, 1, 1, 1, 1, 1, 1]}}}', "finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_is_no_registration_is_a_400_that_says_what_it_is_and_what_is_taken(client, case: str) -> None:
    query, content, words = BODIES[case]
    answer = client.post(f"/v1/steering/vectors{query}", content=content)
    assert words in error(answer, 400)["message"]
    assert client.post(f"/v1/steering/probes{query}", content=content).status_code == 400
    assert len(client.get("/v1/steering/vectors").json()["vectors"]) == 1


def test_a_file_without_a_name_says_where_the_name_belongs(client, tmp_path: Path) -> None:
    JOY.save(tmp_path / "joy.safetensors")
    answer = client.post("/v1/steering/vectors", content=(tmp_path / "joy.safetensors").read_bytes())
    assert "is required in the URL where the body is a file" in error(answer, 400)["message"]


def test_a_body_in_pieces_is_read_and_one_beyond_the_limit_is_refused_before_its_end(client) -> None:
    pieces = [GOOD[:10], b"", GOOD[10:]]
    assert client.post("/v1/steering/vectors", content=iter(pieces)).status_code == 201
    sent = []

    def endless() -> Iterator[bytes]:
        for _ in range(64):
            sent.append(1)
            yield b" " * (1 << 16)

    assert "is larger than" in error(client.post("/v1/steering/vectors", content=endless()), 400)["message"]


@pytest.mark.parametrize(
    "name", ["a%2Fb", "%00", "%C3%A4", "..%2F..", "x" * 5000, "", "a/b", "%F0%9F%98%80", "%ED%A0%80"]
)
@pytest.mark.parametrize("kind", ["vectors", "probes"])
def test_deleting_a_name_that_cannot_be_is_a_404_in_our_own_words(client, kind: str, name: str) -> None:
    said = error(client.delete(f"/v1/steering/{kind}/{name}"), 404)
    assert "registered are: " in said["message"]
    assert said["type"] == "NotFoundError"


# --- when something is broken


def test_a_damaged_registry_is_a_503_with_the_reason_and_inline_requests_go_on(client, front_end, tmp_path) -> None:
    assert client.post("/v1/steering/vectors", json=body("vectors")).status_code == 201
    (tmp_path / "shared" / "index.json").write_text('{"mood": "60')
    for answer in (
        client.post("/v1/steering/vectors", json=body("vectors", "other")),
        client.delete("/v1/steering/vectors/mood"),
    ):
        said = error(answer, 503)
        assert "TRIMTAB_REGISTRY_DIR" in said["message"]
        assert "index.json is not JSON" in said["message"]
    inline = {"interventions": [{"kind": "add", "vector": CONTENT["vectors"]}]}
    assert front_end.admit(inline) is not None
    assert front_end.admit(None) is not None
    assert {entry["name"] for entry in client.get("/v1/steering/vectors").json()["vectors"]} == {"calm", "mood"}


def test_an_upload_without_room_for_it_is_a_503(client, monkeypatch, tmp_path: Path) -> None:
    JOY.save(tmp_path / "joy.safetensors")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(registration.tempfile, "TemporaryDirectory", full)
    content = (tmp_path / "joy.safetensors").read_bytes()
    assert "No space left" in error(client.post("/v1/steering/vectors?name=joy", content=content), 503)["message"]


def test_the_page_of_the_server_says_nothing_of_answers_that_others_ask_about(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(*_: Any, **__: Any) -> Told:  # a call is shared by all who ask meanwhile
        return Told({0: [{"rank": 0, "digest": b"\1", "uses": {"an answer": [{"gate": "g", "tokens": 3}]}}]}, ())

    plugin, app = EndpointPlugin(), FastAPI()
    monkeypatch.setattr(plugin.workers, "ask", ask)
    plugin.attach_router(app)
    page = TestClient(app).get("/v1/steering").json()
    assert page["workers"] == [{"engine": 0, "rank": 0, "digest": "01"}]
