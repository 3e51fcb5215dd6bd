"""plotly.js from the installed plotly package, packed for a page.

plotly itself is not imported: that takes a second, and a figure is a plain dict.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class PackedScript:
    """A script that the page unpacks.

    Attributes:
        packed: Base64 of its gzip, less than half its size.
        digest: What the page's content security policy knows the unpacked script by.
    """

    packed: str
    digest: str


def plotly_script() -> PackedScript | None:
    """plotly.js, or ``None`` where plotly is not installed."""
    spec = find_spec("plotly")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "package_data" / "plotly.min.js"
        if path.is_file():
            return _packed(path)
    return None


def digest_of(script: str) -> str:
    """A script as a content security policy names it.

    Example:
        >>> digest_of("alert(1)")
        'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='
    """
    return _digest(script.encode())


@lru_cache(maxsize=1)
def _packed(path: Path) -> PackedScript:
    script = path.read_bytes()
    # Without the time, which would make each page different.
    packed = gzip.compress(script, mtime=0)
    return PackedScript(base64.b64encode(packed).decode("ascii"), _digest(script))


def _digest(script: bytes) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode('ascii')}"
