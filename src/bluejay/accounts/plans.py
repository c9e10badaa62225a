"""Plans: how much a project may ask for, how urgently, and of which models.

[plans.premium]                      # in the settings file: changes these figures of a plan
tokens_per_day = 20000000
concurrent_requests = "unlimited"

[plans.batch]                        # a plan of one's own; what it does not say is as in the "free" of the package
requests_per_minute = 600
priority = -10
models = ["gpt-j-6b"]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from bluejay.errors import ConfigError

UNLIMITED = "unlimited"
MAX_LIMIT = 2**53  # beyond it JSON's numbers are no longer whole everywhere
PRIORITIES = range(-100, 101)


@dataclass(frozen=True)
class Plan:
    """What a project may take. None is no limit.

    Attributes:
        tokens_per_minute, tokens_per_day: of prompts and generated.
        priority: the engine serves the higher first.
        models: the names that may be asked for, None for all.
    """

    name: str
    requests_per_minute: int | None
    requests_per_day: int | None
    tokens_per_minute: int | None
    tokens_per_day: int | None
    concurrent_requests: int | None
    priority: int = 0
    models: tuple[str, ...] | None = None


# Sized for one machine with a GPU, which generates some thousand tokens a second: "free" is for trying, ten developers
# fit, and premium is held back by the machine alone, but for what would lock all others out.
PLANS: Mapping[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan("free", 20, 500, 20_000, 200_000, 2, priority=0),
        Plan("developer", 120, 20_000, 200_000, 5_000_000, 8, priority=10),
        Plan("premium", 1_200, None, 2_000_000, None, 64, priority=20),
    )
}
DEFAULT_PLAN = "free"
_LIMITS = tuple(field.name for field in fields(Plan) if field.name.endswith(("_minute", "_day", "_requests")))


def read_plans(tables: Mapping[str, Any]) -> dict[str, Plan]:
    """The plans of the package, as the settings file's [plans.NAME] tables change them and add to them.

    Raises: ConfigError with every problem of every table at once.
    """
    problems: list[str] = []
    plans = dict(PLANS)
    for name, table in tables.items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
            problems.append(f"[plans.{name}]: expected a name of small letters, digits, - and _, at most 63")
        elif not isinstance(table, Mapping):
            problems.append(f"plans.{name} is {table!r}, expected a table [plans.{name}]")
        else:
            changes = {key: _checked(f"[plans.{name}]", key, value, problems) for key, value in table.items()}
            known = {key: value for key, value in changes.items() if key in _LIMITS or key in ("priority", "models")}
            plans[name] = replace(PLANS.get(name, PLANS[DEFAULT_PLAN]), name=name, **known)
    if problems:
        raise ConfigError("; ".join(problems))
    return plans


def _checked(where: str, key: str, value: Any, problems: list[str]) -> Any:
    if key in _LIMITS:
        if value == UNLIMITED:
            return None
        if not _is_whole(value) or not 1 <= value <= MAX_LIMIT:
            problems.append(f'{where}: {key} is {value!r}, expected a whole number from 1 or "{UNLIMITED}"')
    elif key == "priority":
        if not _is_whole(value) or value not in PRIORITIES:
            problems.append(f"{where}: priority is {value!r}, expected {PRIORITIES[0]} to {PRIORITIES[-1]}")
    elif key == "models":
        if value == "all":
            return None
        if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
            problems.append(f'{where}: models is {value!r}, expected a list of names or "all"')
        else:
            return tuple(value)
    else:
        problems.append(f"{where}: unknown key {key}; there are {', '.join((*_LIMITS, 'priority', 'models'))}")
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
