"""The page at `/`: one static file, nothing from elsewhere."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.responses import HTMLResponse


def page_response() -> HTMLResponse:
    """The page, under a policy that lets it load nothing but itself and talk to nobody but this server."""
    html, policy = _page()
    return HTMLResponse(html, headers={"content-security-policy": policy})


@cache
def _page() -> tuple[str, str]:
    html = files("llama_adapter.serving").joinpath("page.html").read_text(encoding="utf-8")
    sources = {
        f"{kind}-src": " ".join(
            f"'sha256-{_digest(body)}'" for body in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        )
        for kind, tag in (("script", "script"), ("style", "style"))
    }
    policy = {
        "default-src": "'none'", **sources, "img-src": "'self' data: blob:", "connect-src": "'self'",
        "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip
    return html, "; ".join(f"{key} {value}" for key, value in policy.items())


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
