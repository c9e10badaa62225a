"""What the store hands out and takes in: frozen, known to every room above, and no part of any database session.

Times are in UTC, with their zone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Literal, get_args

Outcome = Literal["completed", "cancelled", "error", "lost"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)
SCOPES = ("user", "admin")

MAX_NAME_CHARS = 200  # ids and names in usage; clients choose some of them, and a journal's record has to stay small
MAX_COUNT = 2**63 - 1  # what a column of either database holds


@dataclass(frozen=True)
class ProjectRecord:
    """Who is served and counted together.

    Attributes:
        id: 24 hexadecimal digits.
        plan: the name of its plan.
        disabled_at: when it was closed, None while it is open.
    """

    id: str
    name: str
    plan: str
    created_at: datetime
    disabled_at: datetime | None


@dataclass(frozen=True)
class KeyRecord:
    """A key, without its text.

    Attributes:
        id: 24 hexadecimal digits.
        prefix: how the key's text begins, to tell keys apart.
        digest: SHA-256 of the key's text, hexadecimal.
        scopes: "user", "admin".
        last_used_at: to the minute.
    """

    id: str
    project: ProjectRecord
    name: str
    prefix: str
    digest: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    def problem(self, now: datetime) -> str | None:
        """Why the key does not open the door at that time; None where it does."""
        if self.revoked_at is not None:
            return f"the key {self.prefix}… was revoked on {self.revoked_at:%Y-%m-%d}"
        if self.expires_at is not None and self.expires_at <= now:
            return f"the key {self.prefix}… expired on {self.expires_at:%Y-%m-%d}"
        if self.project.disabled_at is not None:
            return f"the project {self.project.name} was disabled on {self.project.disabled_at:%Y-%m-%d}"
        return None


@dataclass(frozen=True)
class CreatedKey:
    """A new key. `text` is nowhere else: it is shown once."""

    text: str
    record: KeyRecord


@dataclass(frozen=True)
class Usage:
    """What one request took. Texts are made storable: cut to 200 characters, without NUL and half characters.

    Attributes:
        request_id: of the server's making, and of no other request.
        project_id, key_id: None on a server that asks for no key.
        dialect: the protocol that was spoken.
        model, served_model: as asked; the one that answered.
        cached_tokens: those of the prompt that the prefix cache had.
        generated_tokens: as delivered.
        first_token_s: from the start to the first token, None where there was none.
        outcome: "completed", "cancelled", "error", or "lost" with a server that was killed.
    """

    request_id: str
    project_id: str | None
    key_id: str | None
    dialect: str
    model: str
    served_model: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    started_at: datetime
    ended_at: datetime
    first_token_s: float | None
    outcome: Outcome

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome is {self.outcome!r}, expected one of {', '.join(OUTCOMES)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                object.__setattr__(self, field.name, storable(value, MAX_NAME_CHARS))
            elif field.name.endswith("_tokens") and not 0 <= value <= MAX_COUNT:
                raise ValueError(f"{field.name} is {value}, expected 0 to {MAX_COUNT}")
            elif isinstance(value, datetime):
                object.__setattr__(self, field.name, in_utc(value, field.name))


@dataclass(frozen=True)
class UsageTotal:
    """The usage of one group.

    Attributes:
        group: a project's name, a key's prefix and name, a model or a day (2026-01-31), as asked; "" for all together,
            None for requests of no project or key.
    """

    group: str | None
    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int

    @property
    def num_tokens(self) -> int:
        """What limits count: tokens of prompts and tokens generated."""
        return self.prompt_tokens + self.generated_tokens


@dataclass(frozen=True)
class FlaggedRecord:
    """A generation that a filter flagged, kept for review.

    Attributes:
        rule, action: which rule of the filter, and what it did.
        status: "pending", "accepted", "rejected".
    """

    id: int
    request_id: str
    project_id: str | None
    model: str
    rule: str
    action: str
    prompt: str
    text: str
    status: str
    created_at: datetime
    reviewed_at: datetime | None
    reviewer: str | None
    note: str | None


def storable(text: str, max_chars: int | None = None) -> str:
    """The text as PostgreSQL takes it too: U+FFFD for NUL and for halves of characters, cut to `max_chars`."""
    text = text[:max_chars]
    if text.isascii():
        return text.replace("\0", "\ufffd")
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole.replace("\0", "\ufffd")[:max_chars]


def in_utc(time: datetime, name: str) -> datetime:
    """The same moment in UTC. Raises: ValueError if it has no zone, since it then is no moment."""
    if time.tzinfo is None:
        raise ValueError(f"{name} is {time}, which has no time zone")
    return time.astimezone(UTC)
