"""The roll of nodes ahead of torchrun: who has come and who has not is said when the time is over, on every node."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import runs
from launching import REPO, Ended, free_port, start
from test_clusters import rendered
from test_two_hosts import launch_on

from launch import roll_call
from launch.clusters.kubernetes import job_name
from launch.roll_call import is_here, verdict

HERE = platform.node()


def called(nodes: int, *present: int | None, seconds: float) -> list[Ended]:
    """How the nodes that are present end; None: one without a number."""
    port = free_port()

    def call(node: int | None) -> Ended:
        number = [] if node is None else ["--node", node]
        where = ["--address", "127.0.0.1", "--port", port, "--seconds", seconds]
        return start([sys.executable, REPO / "launch" / "roll_call.py", "--nodes", nodes, *number, *where])

    with ThreadPoolExecutor() as pool:
        return list(pool.map(call, present))


def test_all_have_come():
    assert called(2, 0, 1, seconds=60) == [Ended(0, "")] * 2


@pytest.mark.parametrize(
    ("present", "seconds", "says"),
    [
        ((0, 2), 6, f"missing after 6 s: node 1, node 3; there: node 0 ({HERE}), node 2 ({HERE})"),
        ((1,), 1, f"node 0 is missing: nobody listens at 127.0.0.1:PORT; {HERE} has waited 1 s"),
        ((None,), 1, f"after 1 s 1 of 4 nodes have come: {HERE}"),
    ],
)
def test_who_is_missing_is_said_by_all_that_have_come(present, seconds, says):
    for ended in called(4, *present, seconds=seconds):
        assert ended.status == 1
        assert re.sub(r"(127\.0\.0\.1):\d+", r"\1:PORT", ended.output) == f"preflight: {says}\n"


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (0, f"missing after 1 s: node 1; there: node 0 ({HERE})"),
        (1, f"node 0 is missing: nobody listens at 127.0.0.1:PORT; {HERE} has waited 1 s"),
    ],
)
def test_who_is_missing_is_said_while_they_are_waited_for(node, says, monkeypatch, capfd):
    monkeypatch.setattr(roll_call, "SAY_EVERY", 1.0)
    port = free_port()
    words = f"--nodes 2 --node {node} --address 127.0.0.1 --port {port} --seconds 1.9"
    assert "1.9 s" in roll_call.call(roll_call.parse_options(words.split()))
    assert capfd.readouterr().err == f"preflight: waits; {says.replace('PORT', str(port))}\n"


def test_nodes_have_the_names_that_people_know():
    names = ["job-master-0", "job-worker-0", "job-worker-1"]
    said = verdict(3, {0: "job-master-0", 2: "ip-10-0-0-7"}, names, True, 300)
    assert said == "missing after 300 s: job-worker-0; there: job-master-0, job-worker-1 (ip-10-0-0-7)"
    assert verdict(1, {0: "a"}, None, True, 1) == ""


def test_an_address_of_this_machine():
    assert is_here("127.0.0.1") and is_here("localhost")
    assert not is_here("192.0.2.1") and not is_here("no.such.host.invalid")


@pytest.mark.parametrize(("form", "names"), [("job", ["{}-0", "{}-1"]), ("pytorchjob", ["{}-master-0", "{}-worker-0"])])
def test_a_pods_shell_spells_the_names_out(form, names):
    words = ["cluster=kubernetes", "cluster.image=i", "cluster.claim=c", "cluster.nodes=2", "cluster.preflight=true"]
    name = job_name("/runs/a")
    line = rendered(*words, f"cluster.form={form}").nodes[names[1].format(name)]
    before, _, rest = line.partition(" && ")
    said = subprocess.run(["bash", "-c", f"printf '%s ' {before}"], capture_output=True, text=True).stdout
    assert said.endswith(f"--seconds 300 --names {' '.join(names).replace('{}', name)} ")
    assert rest.startswith("torchrun ")


@pytest.mark.all
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_torchruns_line_says_it_on_two_hosts(rendezvous, two_hosts, tmp_path, tiny_model, text):
    alpha, beta = two_hosts
    folder = tmp_path / "run"
    words = [
        *runs.overrides(tiny_model, text, folder), "cluster=torchrun", "cluster.nodes=2", "cluster.ranks=1",
        "cluster.address=alpha", f"cluster.rendezvous={rendezvous}", "cluster.preflight=true", "cluster.wait_s=10",
    ]  # fmt: skip
    # beta never comes
    ended = launch_on(alpha, *words)
    there = "missing after 10 s: node 1; there: node 0 (alpha)"
    assert ended.status == 1
    assert (
        f"preflight: {there if rendezvous == 'static' else 'after 10 s 1 of 2 nodes have come: alpha'}" in ended.output
    )
    assert '<p class="quiet">failed: exit status 1, ' in (folder / "report.html").read_text()

    # both do
    lines = [line.partition(": ")[2] for line in (folder / "nodes.txt").read_text().splitlines()]

    def typed(host: object, line: str) -> Ended:
        path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
        # started again it would not find the other one
        return start(host.inside(["bash", "-c", line]), attempts=1, PYTHONPATH=path)

    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(typed, (alpha, beta), lines))
    assert all(e.status == 0 or e.aborted_at_its_end for e in ends), "\n".join(ended.output for ended in ends)
    assert "preflight: all-reduce over 2 ranks, " in ends[0].output + ends[1].output
    assert runs.losses(folder).keys() == set(range(1, runs.STEPS + 1))
