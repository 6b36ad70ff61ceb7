"""`python -m launch cluster=hostfile` on two hosts with a network between them: the whole of it, and a cut link."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import runs
from hosts import Host
from launching import REPO, Ended, start

TIMEOUT_S = 15


def launch_on(host: Host, *words: str, **options: int) -> Ended:
    command = host.inside([sys.executable, "-m", "launch", *words], REPO)
    return start(command, PYTHONPATH=str(REPO), **options)


def test_a_cut_link_ends_the_job_which_resumes_to_the_same_losses(two_hosts, tmp_path, tiny_model, text, local_run):
    alpha, beta = two_hosts
    folder = tmp_path / "run"
    words = [
        *runs.overrides(tiny_model, text, folder), "cluster=hostfile", "cluster.hosts={alpha: 1, beta: 1}",
        f"train.timeout_s={TIMEOUT_S}",
    ]  # fmt: skip

    with ThreadPoolExecutor() as pool:
        # a second start would find the link cut
        job = pool.submit(launch_on, alpha, *words, attempts=1)
        assert runs.comes_to(12, folder, job.done), job.result().output
        beta.run("ip", "link", "set", "cable", "down")
        was_cut = time.monotonic()
        ended = job.result()
    # ssh asks three times in the time-out, and once more
    assert time.monotonic() - was_cut < TIMEOUT_S * 4 / 3 + 10
    assert ended.status != 0
    assert "rank 0 on alpha has lost the other ranks" in ended.output, ended.output
    assert "Traceback" not in ended.output, ended.output
    so_far = runs.losses(folder)
    assert 12 <= len(so_far) < runs.STEPS
    assert alpha.wait_until_idle(5) == []
    # its rank may wait for the job's store, which is on alpha, until it is ended
    assert beta.wait_until_idle(2 * TIMEOUT_S) == []

    beta.run("ip", "link", "set", "cable", "up")
    ended = launch_on(alpha, *words, "resume=auto")
    assert ended.status == 0, ended.output
    assert f"resumed from {folder}/checkpoints/global_step" in ended.output
    expected = runs.losses(local_run)
    assert so_far == pytest.approx({step: expected[step] for step in so_far}, rel=1e-6)
    assert runs.losses(folder) == pytest.approx(expected, rel=1e-6)
