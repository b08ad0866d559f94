"""What the routes that register vectors and probes share: reading what was sent, and answering a refusal."""

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from trimtab.engines.vllm.doors import current_front_end
from trimtab.engines.vllm.frontend import FrontEnd
from trimtab.engines.vllm.registry import check_name
from trimtab.errors import SteeringError
from trimtab.json_text import read_json

Content = TypeVar("Content")


def served_front_end() -> FrontEnd:
    """This process's front end, which is there wherever the routes are."""
    front_end = current_front_end()
    assert front_end is not None, "the routes are attached only where steering is on"
    return front_end


def refusal(error: SteeringError, status: int = 400) -> Response:
    """`error` as vLLM's servers answer errors."""
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    content = {"error": {"message": str(error), "type": kind, "param": error.field or None, "code": status}}
    return JSONResponse(content, status)


async def read_registration(
    request: Request,
    field: str,
    limit: int,
    load: Callable[[Path], Content],
    parse: Callable[[Mapping[str, Any]], Content],
    wanted: str,
) -> tuple[str, Content]:
    """The name and the content of a registration, whose body has at most `limit` bytes.

    A file of ours (`load` reads it) with the name in the URL, or JSON `{"name", field}` (`parse` reads an inline
    `field`; anything but an object is refused with what is `wanted`). Raises `SteeringError` at `name` or `field`.
    """
    body = await _read_body(request, limit)
    if request.headers.get("content-type", "").split(";")[0].strip() == "application/octet-stream":
        name = check_name(request.query_params.get("name"), "name")
        return name, await asyncio.to_thread(load_upload, body, field, load)
    try:
        data = read_json(body)
    except SteeringError as error:
        raise SteeringError(
            "", f"the body: {error.message}; send JSON, or a file as application/octet-stream"
        ) from None
    if not isinstance(data, dict) or set(data) != {"name", field}:
        raise SteeringError("", f'want {{"name": ..., "{field}": {{...}}}}')
    name = check_name(data["name"], "name")
    if not isinstance(data[field], Mapping):
        raise SteeringError(field, f"want {wanted}, not a name")
    return name, parse(data[field])


def load_upload(body: bytes, field: str, load: Callable[[Path], Content]) -> Content:
    """What `load` makes of a file with this content. Raises `SteeringError` at `field`, naming no file of ours."""
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        file = Path(folder) / f"{field}.safetensors"
        file.write_bytes(body)
        try:
            return load(file)
        except SteeringError as error:
            raise SteeringError(field, error.message) from error


async def _read_body(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise SteeringError("", f"the body is larger than a vector of this model can be ({limit} bytes)")
        parts.append(part)
    return b"".join(parts)
