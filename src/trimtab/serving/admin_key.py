"""Who may change what names stand for: anyone who may send requests or, once there is an administrator's key, its
holders.

The key stands in the environment and nowhere else: no setting, since vLLM logs, hashes and sends round its settings.
"""

import hmac
import os
import re
from collections.abc import Mapping, MutableMapping

from trimtab.errors import SteeringError

FLAG = "--steering-admin-key"
VARIABLE = "TRIMTAB_ADMIN_KEY"
HEADER = "X-Steering-Admin-Key"

_KEY = re.compile(r"[\x21-\x7e]+")  # what a header can carry as it is


class ForbiddenError(SteeringError):
    """A change without the administrator's key."""


def set_admin_key(key: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let changes need `key`, in this process and in those that it starts. Raises `SteeringError`, without the key."""
    environment[VARIABLE] = _checked(key, FLAG)


def admin_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that changes need; None where they need none. Raises `SteeringError` for one that cannot be sent."""
    key = environment.get(VARIABLE)
    return None if key is None else _checked(key, VARIABLE)


def check_admin(headers: Mapping[str, str]) -> None:
    """Raise `ForbiddenError` unless a request with these headers may make changes."""
    key = admin_key()
    if key is None:
        return
    given = headers.get(HEADER)
    if given is None:
        raise ForbiddenError("", f"changes need the administrator's key of this server, in the header {HEADER}")
    if not hmac.compare_digest(given.encode("latin-1", "replace"), key.encode()):
        raise ForbiddenError("", f"the key in the header {HEADER} is not the administrator's key of this server")


def _checked(key: str, where: str) -> str:
    if not _KEY.fullmatch(key):
        raise SteeringError(
            where, "the administrator's key must be printable ASCII without spaces, 1 character or more"
        )
    return key
