"""`deepspeed --config FILE script`: the launcher's command line, what the ranks run, and whose config wins."""

import argparse
import base64
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_fused.engine.default_config import two_configs
from tests.launching import REPO, Ended, cpu_environment, free_port, launch, start

SCRIPT = Path(__file__).with_name("user_script.py")
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "gradient_clipping": 1.0,
    "steps_per_print": 5,
    "ds_fused": {"enabled": True},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "ds config.json"
    file.write_text(json.dumps(CONFIG))
    return file


def said(ended: Ended) -> list[dict]:
    lines = [json.loads(line[5:]) for line in ended.output.splitlines() if line.startswith("SAID ")]
    assert lines, ended.output
    return lines


def deepspeed(*args: str | Path, ranks: int = 1, cwd: Path = REPO) -> Ended:
    command = [Path(sys.executable).with_name("deepspeed"), "--num_accelerators", ranks, "--master_port", free_port()]
    return start([str(word) for word in (*command, *args)], cwd=cwd)


# -- the whole way, through the command ------------------------------------------------------------------------------


def test_two_ranks_paths_with_spaces_and_a_strict_parser(config: Path, tmp_path: Path):
    script = tmp_path / "my script.py"
    script.write_text(SCRIPT.read_text())
    ended = deepspeed("--config", config.name, script.name, "--text", "--config 'a b'", ranks=2, cwd=tmp_path)
    assert ended.status == 0, ended.output
    assert "ds_fused: 0 layers replaced" in ended.output
    lines = said(ended)
    assert sorted(line["RANK"] for line in lines) == ["0", "1"]
    for line in lines:
        assert line["config"]["gradient_clipping"] == 1.0
        assert line["text"] == "--config 'a b'"
        # as `python my\ script.py --local_rank=0 ...`, which is what DeepSpeed runs without --config
        assert line["argv"][0] == script.name and line["argv"][1].startswith("--local_rank=")
        assert line["path"] == str(tmp_path) and line["file"].endswith("my script.py")


# -- the command line, in this process -------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """command(words): the words with which DeepSpeed's launcher would start its per-node process."""
    from deepspeed.launcher import runner

    from ds_fused.engine import launcher

    launcher.hook(runner)
    started = []

    class Process:
        returncode = 0

        def __init__(self, cmd, **_):
            started.append(cmd)

        def wait(self):
            pass

    def command(*words: str | Path) -> list[str]:
        runner.main(["--num_accelerators", "1", *map(str, words)])
        return started.pop()

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=Process))
    return command


def test_without_config_nothing_changes(command):
    words = command("train.py", "--config", "mine.yaml")
    assert words[-3:] == ["train.py", "--config", "mine.yaml"]
    assert "--module" not in words


def test_script(command, config: Path):
    words = command("--config", config, "--no_local_rank", "train.py", "--config", "mine.yaml")
    assert words[-5:] == ["ds_fused.run", str(config), "train.py", "--config", "mine.yaml"]
    assert "--module" in words and "--no_local_rank" in words


def test_module(command, config: Path):
    words = command(f"--config={config}", "--module", "pkg.train", "-x")
    assert words[-5:] == ["ds_fused.run", "--module", str(config), "pkg.train", "-x"]
    assert words.count("--module") == 2


def test_no_python(command, config: Path):
    words = command("--config", config, "--no_python", "./run.sh", "a b")
    assert words[-5:] == ["ds_fused.run", "--no_python", str(config), "./run.sh", "a b"]
    assert words.count("--no_python") == 1


# whose helper DeepSpeed starts in the way that the script asks for, and it is a path
def test_mpich_is_given_a_path(config: Path, tmp_path: Path):
    from ds_fused.engine.launcher import rewritten

    (tmp_path / "own.py").write_text("import sys; print(sys.path[0], sys.argv[1:])")
    target = {"user_script": "own", "user_args": ["-x"], "module": True, "no_python": False}
    args = rewritten(argparse.Namespace(config=str(config), launcher="mpich", **target))
    assert not args.module and not args.no_python
    ended = start([sys.executable, args.user_script, *args.user_args], cwd=tmp_path, PYTHONPATH=str(REPO))
    assert (ended.status, ended.output) == (0, f"{tmp_path} ['-x']\n")


def test_the_path_becomes_absolute(command, config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(config.parent)
    assert str(config) in command("--config", config.name, "train.py")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--config", "nowhere.json", "train.py"], "no such file: nowhere.json"),
        (["--config", "CONFIG", "--autotuning", "run", "train.py"], "--autotuning"),
        (["--config", "CONFIG", "--no_python", "--module", "train.py"], "--no_python can't be combined"),
    ],
)
def test_refused(command, config: Path, words, named, capsys):
    with pytest.raises(SystemExit):
        command(*[config if word == "CONFIG" else word for word in words])
    assert named in capsys.readouterr().err


def test_the_launcher_lists_the_option(command, capsys):
    with pytest.raises(SystemExit):
        command("--help")
    assert "--config CONFIG" in capsys.readouterr().out


def test_a_config_in_base64_is_read_as_deepspeed_does(config: Path):
    def coded(content: dict) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).decode()

    assert two_configs(str(config), coded(CONFIG)) is None
    assert "gradient_clipping" in two_configs(str(config), coded(CONFIG | {"gradient_clipping": 0.5}))
    for own in ("nowhere.json", coded([1])):
        assert f"{own} (no such file, and not base64)" in two_configs(str(config), own)


# -- what a rank runs ------------------------------------------------------------------------------------------------


def rank(*args: str | Path, ok: bool = True, **env: str) -> Ended:
    return launch("-m", "ds_fused.run", *map(str, args), ranks=1, env=env, expect_success=ok)[0]


def test_every_way_of_giving_a_config(config: Path, tmp_path: Path):
    link, other = tmp_path / "link.json", tmp_path / "other.json"
    link.symlink_to(config)
    other.write_text(json.dumps(CONFIG | {"gradient_clipping": 0.5}))
    agreeing = "none,config_none,arguments,own,filled"
    good = said(rank("--local_rank=0", config, SCRIPT, "--ways", agreeing, "--own", link))
    assert [line["way"] for line in good] == agreeing.split(",")
    for line in good:
        assert "error" not in line
        assert line["config"]["gradient_clipping"] == 1.0
        assert line["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert good[2]["deepspeed"] is True

    bad = said(rank(config, SCRIPT, "--ways", "own,own_params,changed,block_lost", "--own", other))
    for line in bad[:2]:
        assert str(config) in line["error"] and str(other) in line["error"] and "gradient_clipping" in line["error"]
    assert "train_micro_batch_size_per_gpu = 2" in bad[2]["error"] and "dict" in bad[2]["error"]
    assert "ds_fused" in bad[3]["error"]


def test_a_module_and_a_program(config: Path, tmp_path: Path):
    by_module = said(rank("--module", config, "tests.engine.user_script", "--text", "x"))[0]
    assert by_module["config"]["gradient_clipping"] == 1.0 and by_module["text"] == "x"

    # a program that starts a Python in which deepspeed is imported before torch
    by_program = said(rank("--no_python", config, sys.executable, SCRIPT, "--text", "x"))[0]
    assert by_program["config"]["gradient_clipping"] == 1.0 and by_program["text"] == "x"


def test_accelerate_was_told_another_file(config: Path):
    ended = rank(config, SCRIPT, ok=False, ACCELERATE_DEEPSPEED_CONFIG_FILE="/else/where.json")
    assert ended.status == 1
    assert str(config) in ended.output and "/else/where.json" in ended.output and "Traceback" not in ended.output


@pytest.mark.parametrize("words", [[], ["--module"], ["only.json"], ["--what", "a", "b"]])
def test_the_runner_says_how_it_is_used(words):
    ended = subprocess.run(
        [sys.executable, "-m", "ds_fused.run", *words], capture_output=True, text=True, env=cpu_environment(), cwd=REPO
    )
    assert ended.returncode == 1 and "usage:" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_module_in_front_of_a_script(config: Path, tmp_path: Path):
    """A file by its name from here, a script behind a link whose neighbours are where it is."""
    real = tmp_path / "real"
    real.mkdir()
    (real / "helper.py").write_text("WORD = 'found'\n")
    (real / "s.py").write_text(
        "import os\nfrom helper import WORD\nos.chdir('/')\n"
        "print(WORD, os.path.isfile(os.environ['ACCELERATE_DEEPSPEED_CONFIG_FILE']))\n"
    )
    (tmp_path / "link.py").symlink_to(real / "s.py")
    (tmp_path / "mine.json").write_text(config.read_text())
    run = [sys.executable, "-m", "ds_fused.run"]
    environment = {"PYTHONPATH": str(REPO), "ACCELERATE_DEEPSPEED_CONFIG_FILE": "mine.json"}
    ended = start([*run, "mine.json", "link.py"], cwd=tmp_path, **environment)
    assert (ended.status, ended.output) == (0, "found True\n")
    ended = start([*run, "none.json", "link.py"], cwd=tmp_path, PYTHONPATH=str(REPO))
    assert ended.status == 1 and "ds_fused.run: no such file: none.json" in ended.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ds.json", "none.py"], "no such script: none.py"),
        (["ds.json", "folder"], "no such script: folder"),
        (["--module", "ds.json", "none.of.it"], "no such module: none.of.it, or a package without __main__.py"),
        (["--module", "ds.json", "xml"], "no such module: xml, or a package without __main__.py"),
        (["--no_python", "ds.json", "none"], "none can't be started: No such file or directory"),
    ],
)
def test_what_is_not_there_to_be_run_is_named(arguments: list[str], said: str, tmp_path: Path):
    (tmp_path / "ds.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    ended = start([sys.executable, "-m", "ds_fused.run", *arguments], cwd=tmp_path, PYTHONPATH=str(REPO))
    assert (ended.status, ended.output) == (1, f"ds_fused.run: {said}\n")


def test_what_a_module_does_not_find_itself_is_its_own_error(tmp_path: Path):
    (tmp_path / "ds.json").write_text("{}")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("import none_of_it\n")
    command = [sys.executable, "-m", "ds_fused.run", "--module", "ds.json", "package.part"]
    ended = start(command, cwd=tmp_path, PYTHONPATH=str(REPO))
    assert ended.status == 1 and ended.output.endswith("ModuleNotFoundError: No module named 'none_of_it'\n")
