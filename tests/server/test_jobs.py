"""Jobs: who begins first, what happens where there is no place, what is kept; with a service that tests play."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from bluejay.accounts.plans import Plan
from bluejay.errors import EngineError, InvalidRequest, Overloaded, QuotaExceeded
from bluejay.server.auth import Principal
from bluejay.server.errors import NoSuchThing
from bluejay.server.jobs import Job, Jobs, JobState, Retries, Work
from bluejay.server.options import ServerOptions

PLAN = Plan("test", None, None, None, None, None)


class Run:
    """Ends when it is told to."""

    def __init__(self, service: Service, request_id: str, name: str) -> None:
        self.service, self.request_id, self.name = service, request_id, name
        self.ending: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self.delivered = self.closed = False
        self.num_generated, self.prompts = 3, [[1, 2]]
        params = SimpleNamespace(max_new_tokens=None, max_length=8, num_return_sequences=1)
        self.asked = SimpleNamespace(items=[SimpleNamespace(params=params)])

    async def outputs(self) -> list[str]:
        return await self.ending

    def deliver(self) -> None:
        self.delivered = True

    def close(self) -> None:
        self.closed = True


class Service:
    """Begins runs, or refuses to."""

    def __init__(self, request_timeout_s: float = 60.0) -> None:
        self.options = ServerOptions(request_timeout_s=request_timeout_s)
        self.runs: list[Run] = []
        self.refusals: list[Exception] = []

    async def begin(self, caller: Any, asked: Any) -> Run:
        if self.refusals:
            raise self.refusals.pop(0)
        self.runs.append(run := Run(self, caller.request_id, asked.asked_model))
        return run


def principal(project: str = "project") -> Principal:
    return Principal(project, "key", "name", PLAN, is_admin=False)


def work(name: str = "a", **options: Any) -> Work:
    asked: Any = SimpleNamespace(dialect="test", model=SimpleNamespace(name="jay"), asked_model=name)
    return Work(asked, lambda outputs: outputs, options.pop("num_bytes", 10), **options)


def played(play: Callable[[Service, Jobs], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Let a test play with jobs; nothing may be left of it."""

    async def all_of_it() -> None:
        service = Service(options.pop("request_timeout_s", 60.0))
        bounds = {"max_running": 2, "max_open": 8, "max_bytes": 1000, "keep_s": 60.0, **options}
        jobs = Jobs(service, **bounds)  # type: ignore[arg-type]
        await play(service, jobs)
        await jobs.close()
        assert all(run.closed for run in service.runs)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(all_of_it())


async def until(job: Job, *states: JobState) -> None:
    async with asyncio.timeout(20):
        while job.state not in states:
            await asyncio.sleep(0.001)


async def begun(service: Service, count: int) -> None:
    async with asyncio.timeout(20):
        while len(service.runs) < count:
            await asyncio.sleep(0.001)


def test_a_job_runs_and_its_result_is_kept_for_its_owner() -> None:
    async def play(service: Service, jobs: Jobs) -> None:
        job = jobs.submit(principal(), work("asked"))
        assert (job.state, job.progress, job.place, job.model) == (JobState.QUEUED, 0.0, "asked", "jay")
        await begun(service, 1)
        await until(job, JobState.RUNNING)
        assert job.progress == 0.5
        assert jobs.count("project", "jay") == (0, 1)
        assert service.runs[0].request_id == job.id
        service.runs[0].ending.set_result(["text"])
        await until(job, JobState.DONE)
        assert service.runs[0].delivered
        assert (job.answer, job.progress, job.failure, job.run) == (["text"], 1.0, None, None)
        assert jobs.find("project", "test", job.id) is job
        assert jobs.count("project", "jay") == (0, 0)
        for owner, dialect, job_id in (("", "test", job.id), ("project", "other", job.id), ("project", "test", "no")):
            with pytest.raises(NoSuchThing):
                jobs.find(owner, dialect, job_id)

    played(play)


def test_projects_take_turns_and_then_the_lower_priority_comes_first_then_the_earlier() -> None:
    async def play(service: Service, jobs: Jobs) -> None:
        for name, priority in (("first", 0), ("low", 2), ("high", 1), ("high too", 1)):
            jobs.submit(principal("one"), work(name, priority=priority))
        await begun(service, 1)
        jobs.submit(principal("two"), work("other", priority=2))
        while len(service.runs) < 5:
            count = len(service.runs)
            service.runs[-1].ending.set_result([])
            await begun(service, count + 1)
        service.runs[-1].ending.set_result([])
        assert [run.name for run in service.runs] == ["first", "other", "high", "high too", "low"]

    played(play, max_running=1)


@pytest.mark.parametrize("error", [Overloaded("no place", 0.01), QuotaExceeded("used up", 0.01)])
def test_a_job_that_finds_no_place_asks_again_and_others_go_before_it(error: Exception) -> None:
    async def play(service: Service, jobs: Jobs) -> None:
        service.refusals = [error]
        job = jobs.submit(principal(), work("held"))
        other = jobs.submit(principal(), work("other"))
        await until(other, JobState.RUNNING)
        assert job.state is JobState.QUEUED
        service.runs[0].ending.set_result([])
        await until(job, JobState.RUNNING)
        assert [run.name for run in service.runs] == ["other", "held"]

    played(play, max_running=1)


def test_a_job_that_waits_too_long_expires() -> None:
    async def play(service: Service, jobs: Jobs) -> None:
        running = jobs.submit(principal(), work("running", max_queued_s=0.05))
        waiting = jobs.submit(principal(), work("waiting", max_queued_s=0.05))
        await until(waiting, JobState.EXPIRED)
        assert waiting.failure is not None
        assert "0.05 s" in waiting.failure.message
        assert running.state is JobState.RUNNING
        service.runs[0].ending.set_result([])
        await until(running, JobState.DONE)
        assert len(service.runs) == 1

    played(play, max_running=1)


def test_what_the_engine_could_not_finish_is_tried_again_under_another_name() -> None:
    async def play(service: Service, jobs: Jobs) -> None:
        job = jobs.submit(principal(), work(retries=Retries(max_attempts=3, first_delay_s=0.001)))
        for count in range(3):
            await begun(service, count + 1)
            if count < 2:
                service.runs[count].ending.set_exception(EngineError("the worker died, at /a/path"))
        service.runs[2].ending.set_result(["at last"])
        await until(job, JobState.DONE)
        assert job.answer == ["at last"]
        assert [run.request_id for run in service.runs] == [job.id, f"{job.id}-1", f"{job.id}-2"]
        assert [run.delivered for run in service.runs] == [False, False, True]

    played(play)


@pytest.mark.parametrize(
    "error, status, said",
    [
        (InvalidRequest("top_k is -1", "top_k"), 400, "top_k is -1"),
        (EngineError("the worker died, at /a/path"), 503, "could not finish"),
        (ZeroDivisionError("of ours"), 500, "something went wrong"),
    ],
)
def test_a_job_that_fails_says_why_and_no_more(error: Exception, status: int, said: str) -> None:
    async def play(service: Service, jobs: Jobs) -> None:
        job = jobs.submit(principal(), work())
        await begun(service, 1)
        service.runs[0].ending.set_exception(error)
        await until(job, JobState.FAILED)
        assert job.failure is not None
        assert job.failure.status == status
        assert said in job.failure.message
        assert not service.runs[0].delivered

    played(play)


def test_a_job_that_takes_too_long_has_failed() -> None:
    async def play(service: Service, jobs: Jobs) -> None:
        job = jobs.submit(principal(), work(retries=Retries(max_attempts=5)))
        await until(job, JobState.FAILED)
        assert job.failure is not None
        assert (job.failure.status, len(service.runs)) == (504, 1)

    played(play, request_timeout_s=0.02)


def test_jobs_can_be_cancelled_wherever_they_are() -> None:
    async def play(service: Service, jobs: Jobs) -> None:
        running, waiting = (jobs.submit(principal(), work(name)) for name in ("running", "waiting"))
        await until(running, JobState.RUNNING)
        for job in (waiting, running):
            assert jobs.cancel(job)
            assert job.state is JobState.CANCELLED
            assert not jobs.cancel(job)
        later = jobs.submit(principal(), work("later"))
        await until(later, JobState.RUNNING)
        assert service.runs[0].closed
        assert [run.name for run in service.runs] == ["running", "later"]

    played(play, max_running=1)


def test_only_so_many_wait_of_a_project_and_in_all() -> None:
    async def play(service: Service, jobs: Jobs) -> None:
        for _ in range(4):
            jobs.submit(principal("one"), work())
        with pytest.raises(QuotaExceeded, match="4 asynchronous"):
            jobs.submit(principal("one"), work())
        with pytest.raises(Overloaded, match="no room"):
            jobs.submit(principal("two"), work(num_bytes=961))
        for _ in range(4):
            jobs.submit(principal("two"), work())
        with pytest.raises(Overloaded, match="no room"):
            jobs.submit(principal("three"), work())

    played(play)


def test_results_are_bounded_in_number_and_in_bytes() -> None:
    async def play(service: Service, jobs: Jobs) -> None:
        ended = []
        for number, size in enumerate((1, 1, 1, 1, 1, 600)):
            ended.append(job := jobs.submit(principal(), work()))
            await begun(service, number + 1)
            service.runs[number].ending.set_result(["x" * size])
            await until(job, JobState.DONE, JobState.FAILED)
        assert (ended[5].state, ended[5].result) == (JobState.FAILED, None)
        with pytest.raises(NoSuchThing):
            jobs.find("project", "test", ended[0].id)
        assert jobs.find("project", "test", ended[5].id) is ended[5]

    played(play)


def test_a_server_that_ends_finishes_what_runs_and_gives_up_what_waits() -> None:
    async def play(service: Service, jobs: Jobs) -> None:
        running, waiting = (jobs.submit(principal(), work(name)) for name in ("running", "waiting"))
        await until(running, JobState.RUNNING)
        jobs.drain()
        assert waiting.state is JobState.CANCELLED
        with pytest.raises(Overloaded, match="about to end"):
            jobs.submit(principal(), work())
        service.runs[0].ending.set_result(["text"])
        await until(running, JobState.DONE)
        assert service.runs[0].delivered

    played(play, max_running=1)
