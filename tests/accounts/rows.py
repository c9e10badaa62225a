"""Usage for tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from bluejay.accounts.records import Usage

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def begun(request_id: str, **changes: Any) -> dict[str, Any]:
    """What `Ledger.begin` takes."""
    return {
        "request_id": request_id,
        "project_id": None,
        "key_id": None,
        "dialect": "openai",
        "model": "eleutherai-gpt-j-6b",
        "served_model": "default",
        "prompt_tokens": 3,
        "started_at": NOON,
    } | changes


def usage(request_id: str, **changes: Any) -> Usage:
    ended = {
        "cached_tokens": 1,
        "generated_tokens": 5,
        "ended_at": NOON + timedelta(seconds=2),
        "first_token_s": 0.25,
        "outcome": "completed",
    }
    return Usage(**begun(request_id) | ended | changes)
