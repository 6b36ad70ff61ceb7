"""`python -m launch cluster=hostfile` on two hosts with a network between them: the whole of it, and a cut link."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import hosts
import pytest
import runs
from hosts import Host
from launching import REPO, Ended, start

TIMEOUT_S = 15


# runner -> its own mpirun, Debian's package, what it takes to get from host to host (and root's consent), its library
MPI = {
    "openmpi": (
        "mpirun.openmpi", "openmpi-bin",
        "--mca btl_tcp_if_include cable --mca oob_tcp_if_include cable --allow-run-as-root", "libmpi.so.40",
    ),
    "mpich": ("mpirun.mpich", "mpich", "-iface cable", "libmpich.so.12"),
}  # fmt: skip


def mpi_lacks(runner: str) -> str | None:
    """What this machine lacks for an MPI runner, in one line; None where it lacks nothing."""
    if reason := hosts.lacking(MPI[runner][:1], MPI[runner][1]):
        return reason
    return None if find_spec("mpi4py") else "needs the package mpi4py"


def launch_on(host: Host, *words: str, **options: int | str) -> Ended:
    command = host.inside([sys.executable, "-m", "launch", *words], REPO)
    # with what else this test run finds there
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    return start(command, PYTHONPATH=path, **options)


def test_a_cut_link_ends_the_job_which_resumes_to_the_same_losses(two_hosts, tmp_path, tiny_model, text, local_run):
    alpha, beta = two_hosts
    folder, machines = tmp_path / "run", tmp_path / "machines"
    machines.write_text("# the two of them\nalpha slots=1\n\nbeta slots=1  # at the other end of the cable\n")
    words = [
        *runs.overrides(tiny_model, text, folder), "cluster=hostfile", f"cluster.hostfile={machines}",
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
    assert '<p class="quiet">failed, ' in (folder / "report.html").read_text()
    so_far = runs.losses(folder)
    assert 12 <= len(so_far) < runs.STEPS
    assert alpha.wait_until_idle(5) == []
    # its rank may wait for the job's store, which is on alpha, until it is ended
    assert beta.wait_until_idle(2 * TIMEOUT_S) == []

    # while it is, the preflight says so
    again = [*words, "resume=auto", "cluster.preflight=true", f"cluster.address={hosts.ADDRESSES['alpha']}"]
    began = time.monotonic()
    ended = launch_on(alpha, *again)
    assert ended.status == 1 and time.monotonic() - began < 60, ended.output
    assert "preflight: beta can't be reached: " in ended.output and "nothing was started" in ended.output, ended.output

    beta.run("ip", "link", "set", "cable", "up")
    ended = launch_on(alpha, *again)
    assert ended.status == 0, ended.output
    assert "preflight: beta: rank 1; " in ended.output and "preflight: all-reduce over 2 ranks, " in ended.output
    assert f"resumed from {folder}/checkpoints/global_step" in ended.output
    expected = runs.losses(local_run)
    assert so_far == pytest.approx({step: expected[step] for step in so_far}, rel=1e-6)
    assert runs.losses(folder) == pytest.approx(expected, rel=1e-6)


@pytest.mark.all
def test_a_launch_that_is_told_to_end_ends_the_ranks_of_both_hosts(two_hosts, tmp_path, tiny_model, text):
    alpha, beta = two_hosts
    folder = tmp_path / "run"
    words = [*runs.overrides(tiny_model, text, folder), "cluster=hostfile", "cluster.hosts={alpha: 1, beta: 1}"]
    with ThreadPoolExecutor() as pool:
        job = pool.submit(launch_on, alpha, *words, "train.steps=100000", attempts=1)
        assert runs.comes_to(3, folder, job.done), job.result().output
        alpha.run("pkill", "-TERM", "--full", "python[0-9.]* -m launch ")
        ended = job.result()
    assert ended.status == 130 and "launch: interrupted" in ended.output, ended.output
    assert '<p class="quiet">interrupted, ' in (folder / "report.html").read_text()
    assert alpha.wait_until_idle(5) == [] and beta.wait_until_idle(5) == []


@pytest.mark.all
@pytest.mark.parametrize("runner", MPI)
def test_an_mpi_runner_starts_the_same_training(runner, two_hosts, tmp_path, tiny_model, text, local_run):
    if reason := mpi_lacks(runner):
        pytest.skip(f"{runner}: {reason}")
    alpha, _ = two_hosts
    folder = tmp_path / "run"
    command, _, arguments, library = MPI[runner]
    # as on a machine with this MPI alone; MPICH's command looks for a second one beside itself
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "mpirun").symlink_to(shutil.which(command))
    if second := shutil.which("hydra_pmi_proxy"):
        (tools / "hydra_pmi_proxy").symlink_to(second)
    words = [
        *runs.overrides(tiny_model, text, folder), "cluster=hostfile", "cluster.hosts={alpha: 1, beta: 1}",
        f"cluster.launcher={runner}", f"cluster.launcher_args='{arguments}'", "cluster.port=29511",
        f"+cluster.env.MPI4PY_LIBMPI={library}",
    ]  # fmt: skip
    ended = launch_on(alpha, *words, PATH=os.pathsep.join([str(tools), os.environ["PATH"]]))
    assert ended.status == 0, ended.output
    # a rank on each host, which met at the port that was asked for
    captured = {path.stem: json.loads(path.read_text()) for path in (folder / "environment").iterdir()}
    assert captured.keys() == {"alpha", "beta", "launching"}
    assert captured["beta"]["settings"]["MASTER_PORT"] == "29511"
    assert runs.losses(folder) == pytest.approx(runs.losses(local_run), rel=1e-6)


@pytest.mark.all
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_torchrun_on_two_hosts_by_the_lines_that_are_printed(
    rendezvous, two_hosts, tmp_path, tiny_model, text, local_run
):
    alpha, _ = two_hosts
    folder = tmp_path / "run"
    words = [
        *runs.overrides(tiny_model, text, folder), "cluster=torchrun", "cluster.nodes=2", "cluster.ranks=1",
        "cluster.address=alpha", f"cluster.rendezvous={rendezvous}",
    ]  # fmt: skip
    # a dry run tells the lines, and both are then typed
    planned = launch_on(alpha, *words, "dry_run=true")
    assert planned.status == 0, planned.output
    lines = [line.partition(": ")[2] for line in (folder / "nodes.txt").read_text().splitlines()]

    def typed(host: Host, line: str) -> Ended:
        # started again it would not find the other one
        return start(host.inside(["bash", "-c", line]), attempts=1, PYTHONPATH=str(REPO))

    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(typed, two_hosts, lines))
    assert all(e.status == 0 or e.aborted_at_its_end for e in ends), "\n".join(ended.output for ended in ends)
    assert runs.losses(folder) == pytest.approx(runs.losses(local_run), rel=1e-6)
