"""``python -m ds_fused.warmup``: a step after it compiles nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from launching import free_port
from transformers import LlamaConfig

from ds_fused import warmup
from ds_fused.policies.report import Left
from ds_fused.warmup import dtype_of, job_of
from launch.schema import Run

# the GPU where there is one, which a step then really uses
if torch.cuda.is_available():
    from ds_fused.ops.common._warmup import target_here

    TARGET = target_here()
else:
    TARGET = "sm90"


def run(*command: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept |= {"TRITON_CACHE_DIR": str(cache), **environment}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=kept, timeout=600)


def warm_up(*arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "ds_fused.warmup", *arguments, "--processes", "2", cache=cache, **environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model's folder that holds a config alone, and a DeepSpeed JSON."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.save_pretrained(folder)
    ds_config = {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 2, "ds_fused": {"enabled": True}}
    (folder / "ds.json").write_text(json.dumps(ds_config))
    return folder


@pytest.fixture(scope="module")
def warm(folder, tmp_path_factory) -> tuple[Path, str]:
    """A cache that was warmed up, and what was said."""
    cache = tmp_path_factory.mktemp("cache")
    done = warm_up(str(folder), "--config", str(folder / "ds.json"), "--target", TARGET, cache=cache)
    assert done.returncode == 0, done.stderr
    return cache, done.stdout


def counts(said: str) -> tuple[int, int]:
    compiled, found = re.search(r"(\d+) kernels compiled, (\d+) found in ", said).groups()
    return int(compiled), int(found)


def test_the_cache_is_filled(warm):
    cache, said = warm
    compiled, found = counts(said)
    assert compiled > 10 and found == 0
    assert f"LlamaForCausalLM in bfloat16 on {TARGET}" in said
    for kernel in ("_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel", "_glu_bwd_kernel", "_rope_kernel"):
        assert re.search(rf"^ +\d+ x {kernel} +\d+\.\d\d s$", said, re.MULTILINE)
    binary = "hsaco" if TARGET.startswith("gfx") else "cubin"
    assert len(list(cache.rglob(f"*.{binary}"))) == compiled


def test_a_step_compiles_nothing_more(warm, folder):
    step = run(str(Path(__file__).with_name("warmup_step.py")), str(folder / "config.json"), TARGET, cache=warm[0])
    assert step.returncode == 0, step.stderr
    kernels = json.loads(step.stdout.splitlines()[-1])
    assert kernels["compiled"] == []
    assert len(kernels["found"]) > 8


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.all)])
def test_a_step_under_zero3_compiles_nothing_more(ranks, folder, tmp_path):
    ds_config = json.loads((folder / "ds.json").read_text())
    optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
    ds_config |= {"zero_optimization": {"stage": 3}, "optimizer": optimizer, "zero_force_ds_cpu_optimizer": False}
    # "auto" may have the head whole
    ds_config["ds_fused"] = {"enabled": True, "fused_linear_cross_entropy": {"mode": "stream"}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(ds_config))
    done = warm_up(
        str(folder), "--config", str(file), "--target", TARGET, "--ranks", str(ranks), cache=tmp_path / "cache"
    )
    assert done.returncode == 0, done.stderr

    def step(rank: int) -> subprocess.CompletedProcess[str]:
        script = str(Path(__file__).with_name("warmup_step.py"))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        where = meet | {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": accelerator}
        return run(script, str(folder / "config.json"), TARGET, str(file), cache=tmp_path / "cache", **where)

    port, accelerator = str(free_port()), "cuda" if torch.cuda.is_available() else "cpu"
    with ThreadPoolExecutor(ranks) as pool:
        for done in pool.map(step, range(ranks)):
            assert done.returncode == 0, done.stderr
            kernels = json.loads(done.stdout.splitlines()[-1])
            assert kernels["compiled"] == [] and "_cross_entropy_bwd_kernel" in kernels["found"]


MEETING = """
import torch
from ds_fused.ops import softmax
from ds_fused.ops.common._warmup import META, noted, target_of
for name in ("sm90", "gfx942"):
    with noted(target_of(name)) as launches:
        softmax(torch.empty(2, 65536, dtype=torch.bfloat16, device=META))
    print([(launch.constants["MEASURES"], launch.constants["WRITES"]) for launch in launches])
"""


def test_programs_meet_as_they_will_on_the_target(tmp_path):
    done = run("-c", MEETING, cache=tmp_path)
    assert done.stdout.splitlines() == ["[(True, True)]", "[(True, False), (False, True)]"], done.stderr


GATES = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from ds_fused.engine import config
from ds_fused.ops.common._warmup import META, target_of
from ds_fused.warmup import launches_of
sizes = dict(vocab_size=1000, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4)
for tiles in (False, {"tiles": 2, "least_tokens": 1}, {"tiles": 2, "least_tokens": 65}):
    with META:
        model = LlamaForCausalLM._from_config(LlamaConfig(**sizes, use_cache=False), dtype=torch.bfloat16)
    block = config.parse_config({"enabled": True, "verify": False, "tiled_mlp": tiles})
    launches, problem = launches_of(model, block, (2, 64), target_of("sm90"))
    gates = [launch for launch in launches if launch.kernel.fn.__name__ == "_glu_bwd_kernel"]
    print(problem, {launch.constants["OVERWRITES_DY"] for launch in gates})
"""


def test_mlps_are_tiled_as_the_config_says(tmp_path):
    done = run("-c", GATES, cache=tmp_path)
    # 128 tokens are not two tiles of 65
    assert done.stdout.splitlines()[-3:] == ["None {False}", "None {True}", "None {False}"], done.stderr


ADAPTERS = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from ds_fused.engine import config
from ds_fused.ops.common._warmup import META, target_of
from ds_fused.warmup import launches_of
sizes = dict(vocab_size=1000, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4)
for lora, ranks in ((False, [4]), (True, []), (True, [4])):
    with META:
        model = LlamaForCausalLM._from_config(LlamaConfig(**sizes, use_cache=False), dtype=torch.bfloat16)
    block = config.parse_config({"enabled": True, "verify": False, "lora": lora})
    launches, problem = launches_of(model, block, (2, 64), target_of("sm90"), lora_ranks=ranks)
    names = {launch.kernel.fn.__name__ for launch in launches}
    print(problem, sorted(name for name in names if "pieces" in name or "narrow" in name))
"""


def test_an_adapter_is_warmed_up_where_there_is_one(tmp_path):
    done = run("-c", ADAPTERS, cache=tmp_path)
    kernels = ["_narrow_times_kernel", "_pieces_kernel", "_times_narrow_kernel"]
    assert done.stdout.splitlines()[-3:] == ["None []", "None []", f"None {kernels}"], done.stderr


MIXTURES = """
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from ds_fused.engine import config
from ds_fused.ops.common._warmup import META, target_of
from ds_fused.warmup import LENGTH, launches_of
sizes = dict(vocab_size=1000, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
for block in ({}, {"experts": False}):
    with META:
        mixtral = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=64, use_cache=False)
        model = MixtralForCausalLM._from_config(mixtral, dtype=torch.bfloat16)
    block = config.parse_config({"enabled": True, "verify": False, **block})
    launches, problem = launches_of(model, block, (1, LENGTH), target_of("sm90"))
    rows = [launch.constants["ROWS"] for launch in launches if launch.kernel.fn.__name__ == "_product_of_rows_kernel"]
    print(problem, sorted(set(rows)))
"""


def test_experts_are_warmed_up_for_few_and_for_many_rows_of_each(tmp_path):
    done = run("-c", MIXTURES, cache=tmp_path)
    assert done.stdout.splitlines()[-2:] == ["None [64, 128]", "None []"], done.stderr


def test_a_second_run_compiles_nothing(warm, folder):
    done = warm_up(str(folder / "config.json"), "--config", str(folder / "ds.json"), "--target", TARGET, cache=warm[0])
    assert counts(done.stdout) == (0, counts(warm[1])[0])


def test_ops_that_are_off_are_not_compiled(warm, folder, tmp_path):
    block = {"enabled": True, "verify": False, "rope": False, "rms_norm": False, "swiglu": False}
    (tmp_path / "ds.json").write_text(json.dumps({"bf16": {"enabled": True}, "ds_fused": block}))
    done = warm_up(str(folder), "--config", str(tmp_path / "ds.json"), "--target", TARGET, cache=warm[0])
    assert set(re.findall(r"_\w+_kernel", done.stdout)) == {
        "_labels_kernel",
        "_cross_entropy_fwd_kernel",
        "_lent_logits_kernel",
        "_scale_kernel",
    }


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        (["{folder}/nothing", "--target", "sm90"], {}, "there is no causal language model {folder}/nothing: "),
        (["{folder}", "--target", "tpu"], {}, "target is 'tpu'; it can be such as sm90 or gfx942"),
        (["{folder}", "--target", "sm90", "--config", "{folder}/no.json"], {}, "{folder}/no.json can't be read"),
        (["{folder}", "--target", "sm90"], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
        (["{folder}"], {}, "there is no GPU here: name one"),
        (["{folder}", "--target", "sm90", "--lora-rank", "0"], {}, "--lora-rank is 0; it must be at least 1"),
        (["{folder}", "--target", "sm90", "--ranks", "0"], {}, "--ranks is 0; it must be at least 1"),
        (["{folder}", "--target", "sm90", "--processes", "-1"], {}, "--processes is -1; it must be at least 1"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, environment, message, folder, monkeypatch, capsys):
    monkeypatch.setattr(warmup, "target_here", lambda: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        warmup.main([a.format(folder=folder) for a in arguments])
    assert ended.value.code == 2
    assert message.format(folder=folder) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", "{", "a.json can't be read: "),
        ("a.json", "[]", "a.json holds [], but must hold keys with their values"),
        ("a.json", '{"bf16": true}', "bf16 is True, but must be a block"),
        ("a.json", '{"zero_optimization": 3}', "zero_optimization is 3, but must be a block"),
        ("a.yaml", "a: [", "a.yaml can't be read: "),
        ("a.yaml", "model: 3", "a.yaml is no run.yaml of python -m launch: "),
    ],
)
def test_a_file_that_is_none_is_named_in_one_line(name, text, message, folder, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    words = [str(tmp_path / name)] if name == "a.yaml" else [str(folder), "--config", str(tmp_path / name)]
    with pytest.raises(SystemExit) as ended:
        warmup.main([*words, "--target", "sm90"])
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in line


def test_a_gpu_that_there_is_none_of_is_named(folder, tmp_path):
    ended = run("-m", "ds_fused.warmup", str(folder), "--target", "sm95", cache=tmp_path)
    assert ended.returncode == 2 and "target is 'sm95', which this Triton's ptxas doesn't know" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_model_of_which_nothing_is_replaced_is_said(folder, monkeypatch):
    report = SimpleNamespace(replaced=(), left=[Left("LlamaRMSNorm", 3, "they differ")])
    monkeypatch.setattr(warmup.plan, "apply", lambda *_, **named: report)
    with pytest.raises(SystemExit, match="^ds_fused.warmup: LlamaForCausalLM keeps all of its layers: they differ$"):
        warmup.main([str(folder), "--target", "sm90"])


def test_a_run_names_its_model_and_config(tmp_path):
    file = tmp_path / "run.yaml"
    deepspeed = {"fp16": {"enabled": True}}
    given = {"model": {"path": "a/b"}, "data": {"block": 512}, "deepspeed": deepspeed, "fused": {"enabled": True}}
    # as launch writes them
    kinds = typing.get_type_hints(Run)
    assert given.keys() <= kinds.keys()
    assert "path" in typing.get_type_hints(kinds["model"]) and "block" in typing.get_type_hints(kinds["data"])
    file.write_text(yaml.safe_dump(given))
    job = job_of(str(file), None)
    assert (job.model, job.length, dtype_of(job.ds_config)) == ("a/b", 512, torch.float16)
    assert job.ds_config["ds_fused"] == {"enabled": True}
    file.write_text("a: 1\n")
    with pytest.raises(ValueError, match="run.yaml is no run.yaml of python -m launch: it has no 'model'"):
        job_of(str(file), None)


@pytest.mark.parametrize(
    "ds_config, dtype",
    [({}, torch.float32), ({"bf16": {"enabled": True}}, torch.bfloat16), ({"bf16": {}}, torch.float32)],
)
def test_the_dtype_is_that_of_the_config(ds_config, dtype):
    assert dtype_of(ds_config) == dtype
