"""The README's tables against the code, and its blocks by running them: it cannot drift."""

from __future__ import annotations

import argparse
import inspect
import json
import operator
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from launching import REPO, start

README = (REPO / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    return [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]


def assert_table(header: str, rows: Iterable[Iterable[object]]) -> None:
    """The table under that header holds these rows; otherwise the message is the table that should stand there."""
    rule = "|" + "---|" * (header.count("|") - 1)
    wanted = "\n".join([header, rule, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])
    start_at = README.find(header)
    assert start_at >= 0, f"README.md has no table {header}"
    found = README[start_at:].split("\n\n")[0].rstrip()
    assert found == wanted, f"README.md should have\n{wanted}"


def test_the_table_of_ops_is_the_registry():
    from ds_fused.ops.registry import OPS

    rows = [(f"`{op.name}`", ", ".join(f"`{key}`" for key in op.keys), op.summary) for op in OPS]
    assert_table("| op | JSON key | what it is |", rows)


def test_what_stands_for_liger_is_there():
    import ds_fused

    table = README[README.find("| Liger 0.8.5 | here |") :].split("\n\n")[0].splitlines()
    for row in table[2:]:
        names = re.findall(r"`([\w.]+)`", row.split(" | ")[1])
        things = [operator.attrgetter(name)(ds_fused) for name in names if hasattr(ds_fused, name.split(".")[0])]
        arguments = {word for thing in things for word in inspect.signature(thing).parameters}
        # what is no function here is an argument of one in its row
        missing = [name for name in names if not hasattr(ds_fused, name.split(".")[0]) and name not in arguments]
        assert not missing and (things or '"' in row), row


def test_the_table_of_the_json_block_is_the_parser():
    from ds_fused.engine.config import CHOICES, OP_OPTIONS, RECOMPUTE, SWITCHES, TILED, options_of, parse_config

    default = parse_config({"enabled": True})
    words = {
        "enabled": "whether anything of ds_fused happens",
        "strict": "raise where a requested kind of layer is not in the model",
        "verify": "compare every replacement with the original, where it will train, before it is used",
        "report": "print on rank 0 what was replaced, and what was not and why",
        "embedding": 'except in mode "gather": input embeddings not tied to the head are looked up like tied ones',
        "leaf_modules": "under ZeRO-3 the weights of a repeated layer are gathered together, not module by module",
        "warmup": "compile the kernels of the model on each host, side by side, before its layers are replaced",
        "tiled_mlp": "MLPs that are replaced run tile by tile and are computed again in backward",
        "recompute": "what layers under gradient checkpointing keep of their forward",
        "logits": 'after a fused loss, logits are computed when they are read ("defer") or in the forward ("keep")',
        "eval": 'whether an evaluation\'s loss is fused too ("defer") or left alone ("stock")',
        "profile": 'values for the keys that are not given; "auto" and "fit": "fast" where it fits, else "small"',
        "zero_sizes": "under ZeRO-3: sizes that the JSON does not give DeepSpeed, by the size of the model's layers",
        "collectives": "under ZeRO-3: whether weights and gradients travel from place to place, or through buffers",
        "rotary_frequencies": "whether rotary frequencies that zero.Init has rounded stay so, or are computed again",
    }
    rows = []
    for key in SWITCHES:
        given = "must be given" if key == "enabled" else json.dumps(getattr(default, key))
        rows.append((f"`{key}`", "true, false", given, words[key]))
    for key, choices in CHOICES.items():
        rows.append(
            (f"`{key}`", ", ".join(json.dumps(c) for c in choices), json.dumps(getattr(default, key)), words[key])
        )
    for key in (TILED, RECOMPUTE, *OP_OPTIONS):
        options = options_of(key)
        value = "true, false" + (", or an object" if options else "")
        given = json.dumps(key in default.wanted)
        if key == RECOMPUTE:
            value, given = "a level, or an object", json.dumps(default.recompute.level)
        rows.append((f"`{key}`", value, given, words.get(key, "this op")))
        for name, option in options.items():
            kind = {int: "an integer", float: "a number", bool: "true, false", str: "a string"}[option.type]
            kind += f", at least {option.least}" if option.type in (int, float) else ""
            kind = ", ".join(json.dumps(choice) for choice in option.choices) or kind
            rows.append((f"`{key}.{name}`", kind, json.dumps(option.default), option.doc))
    assert_table("| key | value | default | meaning |", rows)


def test_the_table_of_profiles_is_the_engines():
    from ds_fused.engine.profiles import PROFILES

    def cell(profile: str, key: str) -> str:
        value = PROFILES[profile].get(key)
        said = "" if value is None else json.dumps(value)
        return f"`{said}`" if isinstance(value, dict) else said

    assert list(PROFILES) == ["stock", "fast", "small"] and not PROFILES["stock"]
    keys = dict.fromkeys([*PROFILES["fast"], *PROFILES["small"]])
    rows = [(f"`{key}`", cell("fast", key), cell("small", key)) for key in keys]
    assert_table('| key | `"fast"` | `"small"` |', rows)


def test_the_table_of_models_is_that_of_the_tested_families():
    from policies.tiny_families import COVERED, FIRST, LONG_TAIL, TOWERS

    tested = [(name.removesuffix("Text"), layers) for name, layers, _ in (*FIRST, *COVERED, *LONG_TAIL)]
    tested += [(name.partition(".")[2], layers) for name, _, layers, *_ in TOWERS]
    rows: dict[str, list[str]] = {}
    for name, layers in tested:
        keys = sorted(each.split()[0] for each in layers.split(", "))
        rows.setdefault(", ".join(f"`{key}`" for key in keys if key != "plain"), []).append(name)
    assert_table("| replaced | in |", [(keys, ", ".join(names)) for keys, names in rows.items()])


def test_every_folder_that_is_named_exists():
    section = README.partition("## How it works")[2].partition("\n## ")[0]
    named = [
        name for line in section.splitlines() if line.startswith("| `") for name in re.findall("`([a-z_/]+)`", line)
    ]
    assert "ds_fused/ops" in named
    assert [name for name in named if not (REPO / name).is_dir()] == []


@pytest.mark.parametrize("code", blocks("python"))
def test_a_python_block_runs(code):
    ended = start([sys.executable, "-c", code])
    assert ended.status == 0, ended.output


def test_a_json_block_is_a_config():
    from ds_fused.engine.config import parse_config

    given = [json.loads(text) for text in blocks("json")]
    assert given
    for config in given:
        assert parse_config(config["ds_fused"]).enabled


def test_every_command_is_of_a_kind_that_is_tested_below():
    kinds = {
        "python launch/quickstart.py",
        "python -m launch",
        "pip install",
        "deepspeed --config",
        "python -m ds_fused.doctor",
        "python tests/sweep.py",
        "python tests/versions.py",
        "python -m ds_fused.warmup",
    }
    assert {" ".join(c[:3]) if c[1] == "-m" else " ".join(c[:2]) for c in commands()} == kinds


def test_the_quickstart_commands_are_understood(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "launch"))
    import quickstart

    done = []
    monkeypatch.setattr(quickstart, "install", lambda gpus: None)
    monkeypatch.setattr(quickstart, "count_gpus", lambda: 0)
    monkeypatch.setattr(quickstart, "train", lambda gpus: done.append("train") or 0)
    monkeypatch.setattr(quickstart, "test", lambda gpus, more: done.append(["test", *more]) or 0)
    for command in commands():
        if command[:2] == ["python", "launch/quickstart.py"]:
            assert quickstart.main(command[2:]) == 0
    assert done == ["train", ["test"], ["test", "--all"]]


def test_the_launch_commands_compose():
    from hydra import compose, initialize_config_dir

    import launch.__main__  # noqa: F401  (registers the resolver)
    from launch.check import check, typed
    from launch.clusters import KINDS
    from launch.render import Host

    host = Host(gpus=2, cores=8, bin="/bin", path="/bin", free_port=1)
    for command in commands():
        if command[:3] == ["python", "-m", "launch"]:
            # of a sweep, its first point
            overrides = [re.sub(r"^(\S+=[^\[{]\w*),.*", r"\1", word) for word in command[3:] if word != "-m"]
            with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
                run = typed(compose("config", overrides=["folder=/runs/a", *overrides]))
            check(run, KINDS[run.cluster.kind].render(run, host).ranks)


def test_the_table_of_clusters_is_the_folder():
    from launch.clusters import KINDS

    table = README[README.find("| `cluster=` |") :].split("\n\n")[0]
    assert re.findall("^[|] `([a-z]+)`", table, re.MULTILINE) == [*KINDS]


def test_the_warmup_commands_are_understood():
    from ds_fused import warmup

    for command in commands():
        if command[:3] == ["python", "-m", "ds_fused.warmup"]:
            args = warmup.options_of(command[3:])
            assert args.model == "FOLDER_OR_NAME" and warmup.target_of(args.target)


def test_the_deepspeed_commands_are_understood(tmp_path: Path, monkeypatch):
    from deepspeed.launcher import runner

    from ds_fused import install

    install()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text(blocks("json")[0])
    (tmp_path / "FILE_OR_FOLDER").write_text("a text")
    monkeypatch.syspath_prepend(str(REPO / "launch"))
    from train import parse_options

    for command in commands():
        if command[0] == "deepspeed":
            args = runner.parse_args(command[1:])
            assert args.config == str(tmp_path / "ds.json")
            if "launch/train.py" in command:
                options = parse_options(command[command.index("launch/train.py") + 1 :])
                assert isinstance(options, argparse.Namespace) and options.steps == 100


def test_the_doctor_understands_its_commands(capsys):
    from ds_fused.doctor.__main__ import main

    for command in commands():
        if command[:3] == ["python", "-m", "ds_fused.doctor"]:
            assert main(command[3:]) == 0 and "loss: fused" in capsys.readouterr().out


def test_the_sweep_is_where_the_readme_says():
    assert (REPO / "tests" / "sweep.py").is_file() and (REPO / "benchmarks" / "results" / "architectures.md").is_file()


def test_what_pip_installs_is_this_project():
    pyproject = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    assert 'readme = "README.md"' in pyproject
    for command in commands():
        if command[0] == "pip":
            assert command[1:] == ["install", "-e", "."]
