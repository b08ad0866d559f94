"""A registration as it comes in over HTTP: its name, its content, and how a refusal is answered."""

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from trimtab.engines.vllm.frontend.admission import FrontEnd
from trimtab.engines.vllm.frontend.requests import current_front_end
from trimtab.errors import SteeringError
from trimtab.json_text import read_json
from trimtab.serving.admin_key import ForbiddenError
from trimtab.serving.registry import ReadOnlyNameError, check_name
from trimtab.serving.registry_store import RegistryUnavailableError

Content = TypeVar("Content")

_STATUS: tuple[tuple[type[SteeringError], int], ...] = (
    (ForbiddenError, 403),
    (ReadOnlyNameError, 409),
    (RegistryUnavailableError, 503),
)

_KINDS = {
    400: "BadRequestError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    409: "ConflictError",
    503: "ServiceUnavailableError",
}


def served_front_end() -> FrontEnd:
    """This process's front end, which is there wherever the routes are."""
    front_end = current_front_end()
    assert front_end is not None, "the routes are attached only where steering is on"
    return front_end


def refusal(error: SteeringError, status: int | None = None) -> Response:
    """`error` as vLLM's servers answer errors; the status follows from its class."""
    if status is None:
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 400)
    content = {"message": str(error), "type": _KINDS[status], "param": error.field or None, "code": status}
    return JSONResponse({"error": content}, status)


async def read_registration(
    request: Request,
    field: str,
    limit: int,
    load: Callable[[Path], Content],
    parse: Callable[[Mapping[str, Any]], Content],
    wanted: str,
) -> tuple[str, Content]:
    """The name and the content of a registration, whose body has at most `limit` bytes.

    A file (`load` reads it) with the name in the URL, or JSON `{"name", field}` (`parse` reads an inline `field`;
    anything but an object is refused with what is `wanted`). Which of the two it is, its first bytes say, whatever its
    Content-Type. Raises `SteeringError` at `name` or `field`.
    """
    in_url = _name_in_url(request)
    body = await _read_body(request, limit)
    if (suffix := _suffix(body)) is not None:
        if in_url is None:
            raise SteeringError("name", "is required in the URL where the body is a file: ?name=calm")
        return check_name(in_url, "name"), await asyncio.to_thread(_load_file, body, field, suffix, load)
    data = _read_object(body, field)
    if set(data) != {"name", field}:
        raise SteeringError("", f'want {{"name": ..., "{field}": {{...}}}}')
    if in_url is not None:
        raise SteeringError("name", "is given twice, in the URL and in the body")
    name = check_name(data["name"], "name")
    if not isinstance(data[field], Mapping):
        raise SteeringError(field, f"want {wanted}, not a {type(data[field]).__name__}")
    return name, parse(data[field])


def _name_in_url(request: Request) -> str | None:
    given = request.query_params
    if unknown := [key for key in given if key != "name"]:
        raise SteeringError(f"{unknown[0]:.80}", "is an unknown parameter; the URL may have one, name")
    names = given.getlist("name")
    if len(names) > 1:
        raise SteeringError("name", f"is given {len(names)} times in the URL")
    return names[0] if names else None


def _suffix(body: bytes) -> str | None:
    """The suffix of the files whose format `body` has; None if it is none that holds vectors."""
    if body.startswith(b"GGUF"):
        return ".gguf"
    # Eight bytes of a length, then a JSON object: no text has zeros, and no header is so long that there are none.
    return ".safetensors" if body[8:9] == b"{" and b"\0" in body[:8] else None


def _read_object(body: bytes, field: str) -> Mapping[str, Any]:
    formats = f'want JSON {{"name": ..., "{field}": {{...}}}}, or a safetensors file of trimtab as it is' + (
        ", or a GGUF control vector" if field == "vector" else ""
    )
    if body.startswith((b"PK\x03\x04", b"\x80")):
        raise SteeringError("", f"the body looks like a PyTorch file, and nothing is unpickled here; {formats}")
    if body.startswith(b"--"):
        raise SteeringError("", f"the body looks like a form; {formats}, not as a part of a form")
    try:
        data = read_json(body)
    except SteeringError as error:
        raise SteeringError(error.field, f"the body {error.message}; {formats}") from error
    if isinstance(data, dict) and isinstance(data.get("directions"), dict):
        remedy = "read it with SteeringVector.load, and send what its save writes as .safetensors"
        raise SteeringError("", f"the body is a .svec file, which is not taken here: {remedy}")
    if not isinstance(data, dict):
        raise SteeringError("", f"the body is JSON, but no object; {formats}")
    return data


def _load_file(body: bytes, field: str, suffix: str, load: Callable[[Path], Content]) -> Content:
    """What `load` makes of a file with this content. Raises `SteeringError` at `field`, naming no file of ours."""
    try:
        with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
            file = Path(folder) / f"{field}{suffix}"
            file.write_bytes(body)
            try:
                return load(file)
            except SteeringError as error:
                raise SteeringError(field, error.message) from error
    except OSError as error:
        reason = f"the upload cannot be put into the temporary directory ({error.strerror or error})"
        raise RegistryUnavailableError("", reason) from error


async def _read_body(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise SteeringError("", f"the body is larger than what this model can use ({limit} bytes)")
        parts.append(part)
    return b"".join(parts)
