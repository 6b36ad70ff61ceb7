"""The plug-in entry point: cheap, silent, harmless; and its three hooks, in every order of imports."""

import importlib.metadata
import json
import sys

import pytest

from ds_fused import autoload
from tests.launching import start

HEAVY = ("triton", "transformers", "deepspeed", "wrapt")


def python(code: str, **env: str):
    """The last line that `code` prints in a fresh process, as JSON, and everything that it printed."""
    ended = start([sys.executable, "-c", code], **env)
    assert ended.status == 0, ended.output
    return json.loads(ended.output.splitlines()[-1]), ended.output


def test_the_entry_point_is_installed():
    points = importlib.metadata.entry_points(group="torch.backends")
    assert {p.name: p.value for p in points}["ds_fused"] == "ds_fused.autoload:register"


COST = f"""
import json, statistics, sys, time
import torch

def once():
    for name in [n for n in sys.modules if n.split(".")[0] == "ds_fused"]:
        del sys.modules[name]
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__module__", "") != "ds_fused.autoload"]
    start = time.process_time()
    from ds_fused.autoload import register
    register()
    return 1000 * (time.process_time() - start)

before = set(sys.modules)
cost = statistics.median(once() for _ in range(20))
added = sorted(n for n in set(sys.modules) - before)
heavy = sorted(n for n in sys.modules if n.split(".")[0] in {HEAVY})
print(json.dumps(dict(cost=cost, added=added, heavy=heavy)))
"""


def test_importing_torch_costs_little_and_loads_nothing_heavy():
    # switched off, so that the first of the 20 is as cold as the others
    seen, _ = python(COST, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert seen["cost"] < 5  # ms
    assert seen["heavy"] == []
    assert seen["added"] == ["ds_fused", "ds_fused.autoload"]


HOOKED = """
def hooked():
    import json, sys
    engine = sys.modules["deepspeed.runtime.engine"].DeepSpeedEngine
    ours = sorted(n for n in sys.modules if n.startswith("ds_fused."))
    print(json.dumps(dict(init=hasattr(engine.__init__, "_ds_fused_hook"), ours=ours, triton="triton" in sys.modules)))
"""


@pytest.mark.parametrize("imports", ["import torch, deepspeed", "import deepspeed"])
def test_deepspeed_is_hooked(imports):
    seen, output = python(f"{imports}{HOOKED}\nhooked()")
    assert seen["init"]
    # the hook, and nothing of what it would do with a block
    assert seen["ours"] == ["ds_fused.autoload", "ds_fused.engine", "ds_fused.engine.hooks"]
    assert "ds_fused:" not in output


def test_opt_out_and_install():
    code = f"""
import deepspeed
{HOOKED}
hooked()
import ds_fused
ds_fused.install()
ds_fused.install()
hooked()
"""
    after, output = python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    before = json.loads(output.splitlines()[-2])
    assert not before["init"] and before["ours"] == []
    assert after["init"]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """autoload as in a process where it has not run yet."""
    monkeypatch.setattr(autoload._Finder, "homes", {})
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f is not autoload._Finder])
    monkeypatch.delenv(autoload.CONFIG_VARIABLE, raising=False)
    return autoload


def test_no_failure_of_ours_reaches_the_import_of_torch(fresh, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no luck")

    monkeypatch.setattr(fresh, "watch", broken)
    fresh.register()
    assert "no luck" in capsys.readouterr().err

    monkeypatch.setattr(sys, "stderr", None)
    fresh.register()


@pytest.fixture
def victim(tmp_path, monkeypatch):
    """An importable module `ds_fused_victim`, and a home for its hook that counts its calls or fails."""
    (tmp_path / "ds_fused_victim.py").write_text("value = 1\n")
    (tmp_path / "ds_fused_home.py").write_text(
        "calls = []\n\ndef hook(module):\n    calls.append(module.value)\n    module.value = 2\n"
    )
    (tmp_path / "ds_fused_broken.py").write_text("def hook(module):\n    raise OSError('broken hook')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("ds_fused_victim", "ds_fused_home", "ds_fused_broken"):
        sys.modules.pop(name, None)


def test_a_hook_runs_once_when_the_import_ends(fresh, victim):
    fresh.watch("ds_fused_victim", "ds_fused_home")
    fresh.watch("ds_fused_victim", "ds_fused_home")
    import ds_fused_victim

    assert sys.modules["ds_fused_home"].calls == [1]
    assert ds_fused_victim.value == 2
    # no trace on the loader
    assert "exec_module" not in vars(ds_fused_victim.__loader__)


def test_a_hook_runs_at_once_where_the_module_is_there(fresh, victim):
    import ds_fused_victim

    fresh.watch("ds_fused_victim", "ds_fused_home")
    assert ds_fused_victim.value == 2


def test_a_reloaded_module_is_hooked_again(fresh, victim):
    fresh.watch("ds_fused_victim", "ds_fused_home")
    import ds_fused_victim

    importlib.reload(ds_fused_victim)
    assert ds_fused_victim.value == 2


def test_a_failing_hook_is_one_line(fresh, victim, capsys):
    fresh.watch("ds_fused_victim", "ds_fused_broken")
    import ds_fused_victim

    assert ds_fused_victim.value == 1
    err = capsys.readouterr().err
    assert "ds_fused_victim" in err and "broken hook" in err and err.count("\n") == 1


def test_a_module_that_does_not_exist_stays_missing(fresh):
    fresh.watch("ds_fused_nowhere", "ds_fused_home")
    with pytest.raises(ModuleNotFoundError):
        import ds_fused_nowhere  # noqa: F401
