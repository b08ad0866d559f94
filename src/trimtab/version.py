"""The version of the package, and that of its code, for the keys of whatever keeps on disk what was compiled from it.

A version number changes with a release, the code with every edit, and what was compiled from other code is wrong in
silence. So keys hold a digest of the source itself. It changes with comments too, which costs a compilation.
"""

import hashlib
from functools import cache
from pathlib import Path

__version__ = "0.1.0"

PACKAGE = Path(__file__).parent


@cache
def code_version(folder: str = "") -> str:
    """Hex SHA-256 of every source file of `trimtab`, or of those in one `folder` of it, with their names."""
    root = PACKAGE / folder
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
