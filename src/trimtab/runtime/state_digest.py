"""One digest of many parts of a state, each under a name."""

import hashlib
from collections.abc import Iterable


def digest_of(state: Iterable[tuple[str, Iterable[bytes]]]) -> str:
    """Hex SHA-256 of every name and every part; no other split of the same bytes has the same."""
    digest = hashlib.sha256()
    for name, parts in state:
        whole = [*parts]
        digest.update(f"{name} {len(whole)}\0".encode())
        for part in whole:
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
