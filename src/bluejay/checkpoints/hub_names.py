"""What a model may be called: OWNER/NAME or NAME as on the hub, with @REVISION behind it where one is wanted."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bluejay.errors import InvalidRequest

DEFAULT_REVISION = "main"

# Short names for the models that Bluejay is made for.
ALIASES = {
    "gpt-j-6b": "EleutherAI/gpt-j-6b",
    "gpt-neo-125m": "EleutherAI/gpt-neo-125m",
    "gpt-neo-1.3b": "EleutherAI/gpt-neo-1.3B",
    "gpt-neo-2.7b": "EleutherAI/gpt-neo-2.7B",
}

# The hub's own rules, in ASCII: a name becomes a folder, so nothing in it may climb, hide or look like something else.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(rf"{_PART}(?:/{_PART})*")
_MAX_REPO_ID = 96
_MAX_REVISION = 200


@dataclass(frozen=True)
class HubName:
    """A model on the hub.

    Attributes:
        repo_id: OWNER/NAME, or NAME.
        revision: a branch, a tag or a commit.
    """

    repo_id: str
    revision: str = DEFAULT_REVISION

    def __str__(self) -> str:
        return self.repo_id if self.revision == DEFAULT_REVISION else f"{self.repo_id}@{self.revision}"

    @classmethod
    def parse(cls, name: str, revision: str | None = None) -> HubName:
        """Read NAME[@REVISION]; a short name such as gpt-j-6b becomes EleutherAI/gpt-j-6b.

        Args:
            name: what the user wrote.
            revision: the revision where it comes apart from the name.
        Raises: InvalidRequest if the name or the revision breaks the rules, or two revisions are asked for.
        """
        repo_id, at, suffix = name.partition("@")
        if at and revision is not None and suffix != revision:
            raise InvalidRequest(f"model {name!r} and revision {revision!r} name two revisions", param="revision")
        repo_id = ALIASES.get(repo_id.lower(), repo_id)
        if not _is_plain(repo_id, _REPO_ID, _MAX_REPO_ID) or "--" in repo_id or repo_id.endswith(".git"):
            raise InvalidRequest(
                f"model name {name[:120]!r}: expected NAME or OWNER/NAME of letters, digits, '.', '_' and '-', at most "
                f"{_MAX_REPO_ID} characters, without '..' or '--', and @REVISION behind it where one is wanted",
                param="model",
            )
        wanted = suffix if at else DEFAULT_REVISION if revision is None else revision
        if not _is_plain(wanted, _REVISION, _MAX_REVISION):
            raise InvalidRequest(
                f"revision {wanted[:120]!r}: expected a branch, tag or commit of letters, digits, '.', '_', '-' and "
                f"'/', at most {_MAX_REVISION} characters, without '..'",
                param="revision",
            )
        return cls(repo_id, wanted)


def _is_plain(text: str, pattern: re.Pattern[str], max_length: int) -> bool:
    return len(text) <= max_length and ".." not in text and pattern.fullmatch(text) is not None
