import tomllib
from dataclasses import FrozenInstanceError

import pytest

from bluejay.accounts.plans import PLANS, Plan, read_plans
from bluejay.errors import ConfigError


def test_dearer_plans_allow_no_less() -> None:
    free, developer, premium = (PLANS[name] for name in ("free", "developer", "premium"))
    for name in vars(free).keys() - {"name", "models", "priority"}:
        steps = [getattr(plan, name) or float("inf") for plan in (free, developer, premium)]
        assert steps == sorted(steps), name
    assert free.priority < developer.priority < premium.priority
    with pytest.raises(FrozenInstanceError):
        free.priority = 100  # type: ignore[misc]


def test_without_tables_the_plans_are_those_of_the_package() -> None:
    assert read_plans({}) == dict(PLANS)


def test_tables_change_plans_and_add_some() -> None:
    tables = tomllib.loads(
        """
        [plans.free]
        requests_per_day = "unlimited"
        models = ["default"]
        [plans.batch]
        priority = -10
        concurrent_requests = 1
        models = "all"
        """
    )["plans"]
    plans = read_plans(tables)
    free = PLANS["free"]
    assert plans["free"] == Plan("free", 20, None, 20_000, 200_000, 2, 0, ("default",))
    assert plans["batch"] == Plan("batch", 20, 500, free.tokens_per_minute, free.tokens_per_day, 1, -10, None)
    assert plans["premium"] == PLANS["premium"]


def test_all_that_is_wrong_is_said_at_once() -> None:
    wrong = {
        "free": {"requests_per_day": 0, "tokens_per_day": True, "priority": 101, "models": [], "requests": 3},
        "premium": {"concurrent_requests": 1.5, "models": ["a", 3], "priority": "high"},
        "Bad Name": {},
        "developer": 3,
    }
    with pytest.raises(ConfigError) as caught:
        read_plans(wrong)
    for part in (
        "[plans.free]: requests_per_day is 0, expected a whole number from 1",
        "[plans.free]: tokens_per_day is True",
        "[plans.free]: priority is 101, expected -100 to 100",
        "[plans.free]: models is []",
        "[plans.free]: unknown key requests; there are requests_per_minute",
        "[plans.premium]: concurrent_requests is 1.5",
        "[plans.premium]: models is ['a', 3]",
        "[plans.premium]: priority is 'high'",
        "[plans.Bad Name]",
        "plans.developer is 3",
    ):
        assert part in str(caught.value)
