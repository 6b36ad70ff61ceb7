"""`python -m launch cluster=slurm` on a real Slurm of two nodes: submitted, signalled, requeued, and at its end."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import runs
import slurm
from launching import REPO, TEARDOWN, start


@pytest.fixture
def cluster(two_hosts, tmp_path: Path) -> slurm.Slurm:
    if reason := slurm.missing():
        pytest.skip(f"Slurm: {reason}")
    folder = tmp_path / "slurm"
    folder.mkdir()
    return slurm.Slurm(two_hosts, folder)


def test_a_signalled_job_saves_and_goes_on_to_the_same_losses(request, cluster, tmp_path, tiny_model, text, local_run):
    folder = tmp_path / "run"
    # ranks of two hosts report and reduce in test_two_hosts.py, too
    has_preflight = request.config.getoption("--all")
    words = [*runs.overrides(tiny_model, text, folder), "cluster=slurm", "cluster.nodes=2", "cluster.ranks=1"]
    words += [f"cluster.preflight={str(has_preflight).lower()}"]
    command = cluster.first.inside([sys.executable, "-m", "launch", *words], REPO)
    submitted = start(command, SLURM_CONF=str(cluster.config), PYTHONPATH=str(REPO))
    assert submitted.status == 0, submitted.output
    job = int(re.search(r"Submitted batch job (\d+)", submitted.output)[1])

    def output() -> str:
        file = folder / f"slurm-{job}.out"
        return file.read_text() if file.exists() else ""

    def has_ended() -> bool:
        return cluster.state(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")

    assert runs.comes_to(7, folder, has_ended), output()
    # to the job's steps, as Slurm does it some time before the end
    cluster.say("scancel", "--signal=USR1", str(job))
    cluster.wait(has_ended, 600, "at its end", output)
    # a job whose rank aborts once all is done and said has failed to Slurm
    assert cluster.state(job)["JobState"] == "COMPLETED" or TEARDOWN in output(), output()
    assert cluster.state(job)["Restarts"] == "1"
    # both times
    assert output().count("preflight: all-reduce over 2 ranks, ") == (2 if has_preflight else 0)
    assert ("preflight: beta: rank 1; " in output()) == has_preflight
    stopped = int(re.search(r"stopped by SIGUSR1 after step (\d+)", output())[1])
    assert f"resumed from {folder}/checkpoints/global_step{stopped}" in output()
    assert runs.losses(folder) == pytest.approx(runs.losses(local_run), rel=1e-6)
