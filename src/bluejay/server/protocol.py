"""HTTP/1.1 of one connection: uvicorn's, with bounds on what a client may send and how long it may take."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""
