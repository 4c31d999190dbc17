"""The page at /: one file that loads nothing from elsewhere, under a policy that allows no more."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

PAGE = Path(__file__).parent / "page" / "index.html"


def page_response() -> Response:
    """Return the page; browsers run the scripts and styles that it holds, and no others."""
    text = PAGE.read_text(encoding="utf-8")
    return Response(
        text,
        media_type="text/html",
        headers={
            "content-security-policy": policy_of(text),
            "cache-control": "no-cache",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        },
    )


def policy_of(page: str) -> str:
    """Return the strictest Content-Security-Policy with which a page works."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(page, 'script')}",
            f"style-src {_hashes(page, 'style')}",
            "connect-src 'self'",
            "img-src data:",  # its icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hashes(page: str, element: str) -> str:
    """Return the sources of a policy that allow the page's own elements of this kind."""
    found = re.findall(rf"<{element}\b[^>]*>(.*?)</{element}>", page, re.DOTALL | re.IGNORECASE)
    return (
        " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in found
        )
        or "'none'"
    )
