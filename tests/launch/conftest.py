"""A model, a tokenizer and text, small enough to train in seconds and made here: nothing is fetched."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
import runs
from launching import start


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers with random weights and a tokenizer of one token per byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=vocabulary["<end>"], bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files that differ, about 6 KB."""
    folder = tmp_path_factory.mktemp("text")
    for name, line in (("a", "To {0} or not to {0}, that is question {0}.\n"), ("b", "All the world's a stage {0}.\n")):
        (folder / f"{name}.txt").write_text("".join(line.format(i) for i in range(80)))
    return folder


@pytest.fixture(scope="session")
def local_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text: Path) -> Path:
    """The folder of the run of runs.py on two ranks of this machine, which other ways of starting it must equal."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # the folder of all workers, of which the first makes the run
        place = place.parent
    folder = place / "local-run"
    with (place / "local-run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it where a worker dies
        if not (folder / "is-whole").exists():
            words = [*runs.overrides(tiny_model, text, folder), "cluster.ranks=2"]
            ended = start([sys.executable, "-m", "launch", *words])
            assert ended.status == 0, ended.output
            assert len(runs.losses(folder)) == runs.STEPS
            (folder / "is-whole").touch()
    return folder


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[tuple[hosts.Host, hosts.Host]]:
    if reason := hosts.missing():
        pytest.skip(f"two hosts: {reason}")
    folder = tmp_path / "hosts"
    folder.mkdir()
    with hosts.two_hosts(folder) as pair:
        yield pair
