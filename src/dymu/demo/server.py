"""The page as an app that answers this machine, and asks no other."""

from __future__ import annotations

from typing import Any

import gradio as gr
from fastapi import FastAPI, Request

from dymu.demo.page import look_of_the_page

LARGEST_UPLOAD = "100mb"
HEADERS = {
    # Whatever a library may come to ask for, the browser asks this server alone.
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
        "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def app_of(blocks: gr.Blocks) -> FastAPI:
    """The app that serves the page at /."""
    app = FastAPI(title="dymu demo", openapi_url=None)

    @app.middleware("http")
    async def _headers(request: Request, go_on: Any) -> Any:
        response = await go_on(request)
        response.headers.update(HEADERS)
        return response

    return gr.mount_gradio_app(
        app, blocks, "/", footer_links=[], run_history=False, show_error=False, max_file_size=LARGEST_UPLOAD,
        ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, **look_of_the_page(),
    )  # fmt: skip
