"""Ranks that decide differently all raise, naming the rank and the item."""

from pathlib import Path

import pytest

from ds_fused.engine.agreement import Agreement, disagreement, versions
from tests.launching import launch


@pytest.fixture(scope="module")
def cases() -> list[dict[str, str]]:
    """Per rank: case -> what was raised there."""
    ended = launch(Path(__file__).with_name("agreeing_ranks.py"), ranks=2)
    lines = [[line[5:] for line in e.output.splitlines() if line.startswith("CASE ")] for e in ended]
    return [dict(line.split(": ", 1) for line in rank) for rank in lines]


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("claims", ["rank 1 has decisions.claims[0].proven = False", "rank 0 has True"]),
        ("left", ["rank 1", "decisions.left[1]", "MixtralExperts", "nothing"]),
        ("versions", ["rank 1 has versions.triton = '9.9'"]),
    ],
)
def test_a_difference_is_an_error_on_every_rank(cases, case, named):
    assert len(cases) == 2
    for rank in cases:
        assert rank[case].startswith("RuntimeError: ds_fused")
        assert all(text in rank[case] for text in named)


def test_agreement_is_silent(cases):
    assert [rank[case] for case in ("least", "equal") for rank in cases] == ["fine"] * 4


def test_a_rank_that_fails_tells_those_that_wait(cases):
    assert "rank 1 failed: ValueError: no such op" in cases[0]["failed"]
    assert "rank 1 failed: ValueError: malformed" in cases[0]["failed early"]
    assert cases[1]["failed"] == cases[1]["failed early"] == "fine"


def test_one_process_needs_no_group():
    Agreement()({"claims": []})


def test_the_first_difference_is_named():
    same = {"part": 0, "versions": {"torch": "2.13"}, "decisions": {"claims": []}}
    assert disagreement([same, same]) is None
    assert disagreement([same, same, {"error": "x"}]) == "rank 2 failed: x"
    assert "'nothing'" in disagreement([same, same | {"versions": {}}])


def test_a_reason_is_said_and_not_compared():
    def rank(proven, why):
        return {"part": 0, "decisions": {"claims": [{"proven": proven, "why": why}]}}

    assert disagreement([rank(False, "off by 1"), rank(False, "off by 2")]) is None
    said = disagreement([rank(True, None), rank(False, "Norm: off by 2")])
    assert said == "rank 1 has decisions.claims[0].proven = False (Norm: off by 2), rank 0 has True"


def test_pipeline_stages_decide_for_themselves():
    def rank(part, *claims):
        return {"part": part, "decisions": {"claims": list(claims)}}

    assert disagreement([rank(0, "a"), rank(0, "a"), rank(1, "b"), rank(1, "b")]) is None
    assert "rank 3 has decisions.claims[0] = 'c', rank 2 has 'b'" in disagreement(
        [rank(0, "a"), rank(0, "a"), rank(1, "b"), rank(1, "c")]
    )


def test_versions_of_what_decides():
    assert set(versions()) == {"torch", "triton", "transformers", "deepspeed", "ds-fused"}
