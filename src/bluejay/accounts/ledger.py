"""Where usage is written."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from bluejay.accounts.records import Usage
from bluejay.accounts.store import Store


class Ledger:
    """Writes to the store at once."""

    def __init__(self, folder: Path | None, store: Store) -> None:
        self._store = store

    def begin(
        self,
        request_id: str,
        project_id: str | None,
        key_id: str | None,
        dialect: str,
        model: str,
        served_model: str,
        prompt_tokens: int,
        started_at: datetime,
    ) -> None:
        """A request was admitted."""

    def progress(self, request_id: str, generated_tokens: int) -> None:
        """So many tokens go to the caller."""

    def end(self, usage: Usage) -> None:
        """It ended."""
        self._store.record_usage([usage])

    def close(self) -> None:
        """Nothing is left."""
