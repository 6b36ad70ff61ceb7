"""Who may import whom: every import of the package, read with ast (an import inside a function counts too)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = sys.stdlib_module_names

# a script of launch/ sees the files beside it as top-level modules
BESIDE = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__", "__main__"}

# floor -> what its files may import besides the standard library; the longest entry that holds a file is its floor
MAY_IMPORT = {
    "ds_fused/ops": {"torch", "triton", "ds_fused.ops"},
    # of a room: what all share, itself, and rooms whose parts it is made of
    **{
        f"ds_fused/ops/{room}": {"torch", "triton", *(f"ds_fused.ops.{each}" for each in ("common", room, *others))}
        for room, others in {
            "common": (),
            "norms": (),
            "rotary": ("norms",),
            "mlp": (),
            "attention": (),
            "residual": ("norms",),
            "losses": (),
            "vocab": ("losses",),
        }.items()
    },
    "ds_fused/modules": {"torch", "ds_fused.ops", "ds_fused.modules"},
    "ds_fused/modules/memory": {"torch", "ds_fused.ops", "ds_fused.modules.memory", "ds_fused.modules.swap"},
    "ds_fused/modules/layers": {
        "torch",
        "ds_fused.ops",
        "ds_fused.modules.counted",
        "ds_fused.modules.layers",
        "ds_fused.modules.memory",
        "ds_fused.modules.swap",
    },
    "ds_fused/modules/loss": {
        "torch",
        "ds_fused.ops",
        "ds_fused.modules.counted",
        "ds_fused.modules.loss",
        "ds_fused.modules.layers",
        "ds_fused.modules.swap",
    },
    "ds_fused/policies": {"torch", "ds_fused.modules", "ds_fused.policies"},
    "ds_fused/engine": {
        "torch",
        "deepspeed",
        "hjson",  # what deepspeed reads its configs with
        "ds_fused.autoload",
        "ds_fused.ops",
        "ds_fused.modules",
        "ds_fused.policies",
        "ds_fused.engine",
    },
    # asks whether triton is there, to say why an op is not compatible
    "ds_fused/engine/builders.py": {"torch", "deepspeed", "triton", "ds_fused.ops", "ds_fused.engine"},
    "ds_fused/auto_models.py": {"torch", "transformers", "ds_fused.policies"},
    "ds_fused/compat.py": {"torch", "transformers", "ds_fused.modules", "ds_fused.policies"},
    "ds_fused/doctor": {"torch", "transformers", "ds_fused.modules", "ds_fused.policies", "ds_fused.doctor"},
    # modules made of ops, for whoever writes a model
    "ds_fused/nn": {"torch", "ds_fused.ops", "ds_fused.nn"},
    # may run tile by tile, and back slice by slice
    "ds_fused/nn/mlp.py": {
        "torch",
        "ds_fused.ops",
        "ds_fused.modules.layers.mlp",
        "ds_fused.modules.layers.sliced_mlp",
        "ds_fused.modules.layers.tiled_mlp",
    },
    # the package's door: names load on first use
    "ds_fused/__init__.py": set(),
    # runs at `import torch`: only registers hooks, which import ds_fused.engine once deepspeed is there
    "ds_fused/autoload.py": {"wrapt", "ds_fused.engine"},
    # builds a model without memory to see what it would launch
    "ds_fused/warmup.py": {
        "torch",
        "triton",
        "transformers",
        "hjson",
        "yaml",
        "ds_fused.ops",
        "ds_fused.modules",
        "ds_fused.policies",
        "ds_fused.engine",
    },
    # the rank runner
    "ds_fused/run.py": {"deepspeed", "ds_fused.autoload", "ds_fused.engine"},
    # pydantic: its errors are what deepspeed says of a config; psutil: what it finds processes with; yaml: what kubectl
    # reads
    "launch": {
        "psutil",
        "pydantic",
        "yaml",
        "torch",
        "hydra",
        "omegaconf",
        "transformers",
        "deepspeed",
        "accelerate",
        "launch",
        "ds_fused",
        *BESIDE,
    },
    # the script of a user who never heard of ds_fused
    "launch/train.py": {"torch", "transformers", "deepspeed", *BESIDE},
    "launch/text_blocks.py": {"torch", "transformers", "deepspeed"},
    "launch/journal.py": {"torch", "deepspeed", "tqdm", *BESIDE},
    # starts on a bare Python
    "launch/quickstart.py": BESIDE,
}
# public names of ds_fused only
PUBLIC_ONLY = "launch"


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, module or module.name) of every import in a file, relative ones resolved."""
    package = [*path.relative_to(ROOT).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def floor_of(path: str) -> str:
    fits = [floor for floor in MAY_IMPORT if path == floor or path.startswith(f"{floor}/")]
    assert fits, f"{path} stands on no floor: name it in MAY_IMPORT"
    return max(fits, key=len)


FILES = sorted(path for folder in ("ds_fused", "launch") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    floor = floor_of(path.relative_to(ROOT).as_posix())
    allowed = MAY_IMPORT[floor]
    for line, module in imports_of(path):
        known = module.split(".")[0] in STANDARD
        fits = any(module == name or module.startswith(f"{name}.") for name in allowed)
        assert known or fits, f"{path.relative_to(ROOT)}:{line} imports {module}; {floor} may import {sorted(allowed)}"
        if floor == PUBLIC_ONLY and module.startswith("ds_fused."):
            assert module.count(".") == 1, f"{path.relative_to(ROOT)}:{line} imports {module}: internals of ds_fused"


def test_every_floor_is_there():
    assert {floor_of(path.relative_to(ROOT).as_posix()) for path in FILES} == set(MAY_IMPORT)


def test_the_rules_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "ds_fused" / "modules" / "norm.py"
    file.parent.mkdir(parents=True)
    file.write_text("def f():\n    from ..engine import config\n    import triton.language as tl\n")
    assert imports_of(file) == [(2, "ds_fused.engine.config"), (3, "triton.language")]
    with pytest.raises(AssertionError, match=r"norm.py:2 imports ds_fused.engine.config; ds_fused/modules may import"):
        test_imports(file)
