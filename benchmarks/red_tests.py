"""Whose tests have failed: ``run.py --tests FILE...`` times no such op. FILE is what ``pytest --junit-xml`` wrote."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from pathlib import Path

# files of tests that are named for a part of an op, or hold another op's tests as well
PARTS = {
    "layer_norm": ("layer_norm", "add_layer_norm"),
    "experts_tma": ("experts",),
    "along_rows": ("softmax", "sparsemax"),
    "lent_logits": ("cross_entropy",),
    "one_pass": ("linear_cross_entropy",),
    "one_pass_node": ("linear_cross_entropy",),
    "divergence_in_forward": ("linear_jsd", "linear_kl_div", "linear_cosine"),
    "frozen_head": ("linear_cross_entropy",),
    "stationary": ("linear_cross_entropy", "linear_log_probs"),
    "slab_embedding": ("embedding",),
    "stationary_embedding": ("embedding",),
    "sliced_mlp": ("tiled_mlp",),
}


def _parsed(report: Path) -> ElementTree.ElementTree:
    try:
        return ElementTree.parse(report)
    except ElementTree.ParseError as error:
        raise ValueError(f"{report} is no XML: {error}") from None


def red_tests(reports: Iterable[Path], ops: Iterable[str]) -> Mapping[str, str]:
    """Of each op that may not be timed the reason: a test that failed, or that none has passed."""
    ops = set(ops)
    reasons: dict[str, str] = {}
    passed: set[str] = set()
    for test in (test for report in reports for test in _parsed(report).iter("testcase")):
        name = test.get("name", "")
        file = re.sub(r".*test_", "", test.get("classname", ""))
        whose = set(PARTS.get(file, ())) or {file} & ops
        # what several ops share names the op in brackets, or is everybody's
        named = {op for op in whose or ops if re.search(rf"[\[-]{op}[\]-]", name)}
        whose = named or whose or ops
        if test.find("failure") is not None or test.find("error") is not None:
            for op in whose:
                reasons.setdefault(op, f"test_{file}.py::{name} failed")
        elif test.find("skipped") is None:
            passed |= whose if file in ops or file in PARTS else set()
    red = {op: reason for op, reason in reasons.items() if op in ops}
    return red | {op: "no test of it has passed" for op in ops - passed - set(red)}
