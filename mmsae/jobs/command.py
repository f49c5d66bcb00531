"""``mmsae status``: how far a job over shards is."""

from __future__ import annotations


def status(out: str) -> None:
    """Say which shards of a job are done, missing and failed, how fast it goes, and what to run next.

    It reads the job's folder alone, whoever works on it. The exit code is 0 where the result is finished, and 1 where
    it is not.

    Args:
        out: The --out of the job.
    """
    from mmsae.jobs.status import job_status

    found = job_status(out)
    print(found)
    if not found.finished:
        raise SystemExit(1)
