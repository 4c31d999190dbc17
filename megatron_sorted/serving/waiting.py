"""The queue of requests: API keys take turns, in the order of arrival, with a bound on time."""

import time
from collections import deque
from collections.abc import Callable

from megatron_sorted.serving.job import Job


class WaitingJobs:
    """Jobs that wait; the caller holds a lock.

    Args:
        max_wait_seconds: Longest time that a job may wait.
        clock: Returns the time in seconds.
    """

    def __init__(self, max_wait_seconds: float, clock: Callable[[], float] = time.monotonic):
        self.max_wait_seconds, self.clock = max_wait_seconds, clock
        self._jobs: dict[str, deque[Job]] = {}

    def __len__(self) -> int:
        """Return the number of jobs."""
        return sum(map(len, self._jobs.values()))

    @property
    def num_texts(self) -> int:
        """Return the number of their texts."""
        return sum(len(job.prompts) for jobs in self._jobs.values() for job in jobs)

    def add(self, job: Job) -> None:
        """Add a job behind those of its owner."""
        job.waits_since = self.clock()
        self._jobs.setdefault(job.tenant, deque()).append(job)

    def tenants(self) -> list[str]:
        """Return the owners of jobs."""
        return list(self._jobs)

    def next(self, tenant: str, before: float) -> Job | None:
        """Take an owner's first job if its turn comes before another one; None without one."""
        job = next(iter(self._jobs.get(tenant, ())), None)
        if job is None or job.turn >= before:
            return None
        self.remove(job)
        return job

    def remove(self, job: Job) -> bool:
        """Remove a job; return whether it waited."""
        jobs = self._jobs.get(job.tenant, ())
        if job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._jobs[job.tenant]
        return True

    def is_overdue(self, job: Job) -> bool:
        """Return whether a job that has not begun has waited too long."""
        return self.clock() - job.waits_since > self.max_wait_seconds

    def overdue(self) -> list[Job]:
        """Take the jobs that have waited too long."""
        late = [job for job in self.all() if self.is_overdue(job)]
        for job in late:
            self.remove(job)
        return late

    def all(self) -> list[Job]:
        """Return all jobs."""
        return [job for jobs in self._jobs.values() for job in jobs]
