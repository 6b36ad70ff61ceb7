"""A tenth of all types, each day another, and some every day: what the committed table says holds."""

from __future__ import annotations

import re
import textwrap
from datetime import date
from pathlib import Path

import pytest

from ds_fused.compat import FAMILIES
from tests import sweep, versions
from tests.policies.tiny_families import FIRST

PARTS = 10
TODAY = date.today().toordinal() % PARTS
EVERY_DAY = {f"{name.removesuffix('Text')}ForCausalLM" for name, *_ in FIRST}


def of_today() -> list[sweep.Case]:
    return [case for i, case in enumerate(sweep.cases()) if i % PARTS == TODAY or case[1] in EVERY_DAY]


def committed() -> dict[sweep.Case, str]:
    """Type and class -> what the table says of the loss, or why there is none."""
    rows = re.findall(r"^\| `(\S+)` \| `(\S+)` \| (.*?) \|", sweep.TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    return {(model_type, cls): loss for model_type, cls, loss in rows}


def test_what_the_table_says_holds() -> None:
    said = committed()
    for row in sweep.sweep(of_today()):
        case = row["type"], row["class"]
        assert case in said, f"{case} is not in {sweep.TABLE.name}: python tests/sweep.py"
        assert said[case] != "fused" or row.get("loss_fused"), row
        assert not row.get("differs"), row


def test_the_table_covers_what_it_promises() -> None:
    counts = re.findall(r"^\| ([a-z ]+) \| (\d+) \| \d+ \|$", sweep.TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    found = {what: int(count) for what, count in counts}
    assert found["built and run"] >= 170 and found["different"] == 0
    assert found["with a fused loss"] >= 160 and found["with fused norms"] >= 150


# what Liger's functions switch on for a family, and the layers' key in the table
OPS = {"rms_norm": "rms_norm", "layer_norm": "layer_norm", "rope": "rope", "swiglu": "swiglu", "geglu": "geglu"}
# ops that have another one within
WITHIN = {"qk_norm_rope": {"rope"}, "experts": {"swiglu", "geglu"}}
# a tower alone, which has no loss of words (tests/policies/test_towers.py)
TOWERS = {"pixtral"}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - TOWERS))
def test_the_table_has_all_that_liger_covers(family: str) -> None:
    rows = re.findall(
        rf"^\| `{family}` \| `\S+` \| (.*?) \| (.*?) \|", sweep.TABLE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert rows and {loss for loss, _ in rows} == {"fused"}
    wanted = {OPS[name] for name, is_on in FAMILIES[family].items() if is_on and name in OPS}
    found = {key for _, layers in rows for key in re.findall(r"\((\w+)\)", layers)}
    assert wanted <= found.union(*(WITHIN.get(key, ()) for key in found))


def test_a_type_that_hangs_or_dies_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stand-in for the worker, one of whose types sleeps and another ends its process."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, os, sys, time
            for model_type, cls in json.load(sys.stdin):
                if model_type == "hangs":
                    time.sleep(600)
                if model_type == "dies":
                    os._exit(3)
                print(json.dumps({"type": model_type, "class": cls}), flush=True)
            """
        )
    )
    monkeypatch.setattr(sweep, "__file__", str(script))
    rows = list(sweep.sweep([(name, "C") for name in ("a", "hangs", "b", "dies", "c")], seconds=6))
    assert [row["type"] for row in rows] == ["a", "hangs", "b", "dies", "c"]
    assert [row.get("failed") for row in rows] == [None, "took more than 6 s", None, "ended its process (3)", None]


def test_the_table_tells_what_was_built_and_what_was_not() -> None:
    rows = [sweep.run("llama", "LlamaForCausalLM"), sweep.run("bert", "NoSuchModel")]
    text = sweep.table(rows, seconds=1.0)
    assert "| `llama` | `LlamaForCausalLM` | fused | 2 LlamaAttention (rope)" in text
    assert "| `bert` | `NoSuchModel` | AttributeError: " in text
    assert "| built and run | 1 | 0 |" in text


def test_versions_of_transformers_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stand-in for pip, sweep and tests: the counts of the table that the sweep wrote, and those of the tests."""
    said = []

    def run(command: list[str], **environment: str) -> None:
        said.append((command[-1], environment))
        if "--table" in command:
            text = sweep.table([sweep.run("llama", "LlamaForCausalLM")], seconds=1.0)
            Path(command[-1]).write_text(re.sub(r"transformers \S+,", "transformers 5.3.0,", text))

    monkeypatch.setattr(versions, "_run", run)
    monkeypatch.setattr(versions, "_ended", lambda site, tests: {"passed": str(len(tests))})
    counts = versions.swept("5.3.0")
    assert counts["built and run"] == "1 + 0" and counts["passed"] == str(len(versions.TESTS))
    assert said[0][0] == "transformers==5.3.0" and "PYTHONPATH" in said[1][1]
    with pytest.raises(AssertionError, match="another version was imported"):
        versions.swept("5.4.0")


def test_no_version_trains_differently() -> None:
    rows = re.findall(r"^\| (\d+\.\S+) \|.*?\|.*?\| (.*?) \|", versions.TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == dict.fromkeys(versions.VERSIONS, "0 + 0")
