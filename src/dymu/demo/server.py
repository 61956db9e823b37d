"""The page as an app that answers this machine, and asks no other."""

from __future__ import annotations

from typing import Any

import gradio as gr
from fastapi import FastAPI

from dymu.demo.page import look_of_the_page

LARGEST_UPLOAD = "100mb"
HEADERS = [
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    # Whatever a library may come to ask for, the browser asks this server alone.
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
        b"connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
        b"frame-ancestors 'none'",
    ),
]


def app_of(blocks: gr.Blocks) -> Any:
    """The app that serves the page at /."""
    app = gr.mount_gradio_app(
        FastAPI(title="dymu demo", openapi_url=None), blocks, "/", footer_links=[], run_history=False,
        show_error=False, max_file_size=LARGEST_UPLOAD, ssr_mode=False, enable_monitoring=False, pwa=False,
        mcp_server=False, **look_of_the_page(),
    )  # fmt: skip

    async def with_headers(scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                added = [(name, value) for name, value in HEADERS if name not in given]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await app(scope, receive, sending)

    return with_headers
