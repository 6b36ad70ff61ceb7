"""ZeRO 0, 1, 2 and 3, fused against stock DeepSpeed, judged by an fp64 run on one process.

Allowed everywhere: twice stock's own distance from the judge, and 4 ulp, so that a stock run without error can be met.
All cases of the CPU run in one pair of processes, all of the GPU in one process.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import fp64
import jobs
import products
import pytest
import torch
from launching import launch
from torch import Tensor

HERE = Path(__file__).parent
EPS, THETA = 1e-6, 10000.0  # LlamaConfig's defaults
ULP = {"fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}  # of 1.0
# Farther from the judge, stock does another job, and every bound would be loose.
SAME_JOB = {"fp32": 1e-4, "bf16": 0.5, "fp16": 0.05}


def marks(case: products.Case) -> list[pytest.MarkDecorator]:
    on_gpu = [pytest.mark.gpu] if case.device == "gpu" else []
    return on_gpu if products.is_quick(case) else [*on_gpu, pytest.mark.all]


each_case = pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=marks(c)) for c in products.ALL])


@cache
def judge(
    ranks: int, accumulation: int, optimizer: str, tied: bool
) -> tuple[list[list[float]], list[float], fp64.Weights]:
    steps = [[batch for micro in step for batch in micro[:ranks]] for step in jobs.batches(accumulation)]
    lr = products.LEARNING_RATE[optimizer]
    return fp64.train(jobs.first_weights(tied), products.SIZES, EPS, THETA, steps, optimizer, lr=lr, clip=products.CLIP)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Case -> its stock run and its fused run. Only what this session selected is launched."""
    here = [i for i in request.session.items if i.module is request.module and not i.get_closest_marker("skip")]
    chosen = list(dict.fromkeys(item.callspec.params["case"] for item in here))
    out = tmp_path_factory.mktemp("zero")

    @cache
    def trained(device: str) -> None:
        names = [case.name for case in chosen if case.device == device]
        env = {"DS_ACCELERATOR": {"cpu": "cpu", "gpu": "cuda"}[device]}
        ranks, timeout = products.RANKS[device], 60 + 8 * len(names)
        launch(HERE / "ranks.py", str(out), *names, ranks=ranks, timeout=timeout, env=env)

    @cache
    def runs_of(case: products.Case) -> tuple[dict, dict]:
        trained(case.device)
        saved = torch.load(out / f"{case.name}.pt")
        for name, run in saved.items():
            assert "error" not in run, f"the {name} run failed:\n{run['error']}"
        return saved["stock"], saved["fused"]

    def stock_norms(case: products.Case) -> list[list[float]]:
        """Of every stage that this session launched for the same job in the same dtype."""
        alike = [c for c in chosen if (c.device, c.job, c.dtype) == (case.device, case.job, case.dtype)]
        return [runs_of(c)[0]["norms"] for c in alike]

    runs_of.stock_norms = stock_norms
    return runs_of


def distances(found: list, true: list, case: products.Case) -> Tensor:
    """[steps]: the largest distance in each step; of a noisy case [1]: the root mean square over all of them."""
    apart = torch.tensor(found, dtype=torch.float64) - torch.tensor(true, dtype=torch.float64)
    if case.is_noisy:
        return apart.square().mean().sqrt().view(1)
    return apart.abs().view(len(true), -1).amax(1)


def bound(stock: Tensor, true: list, ulp: float) -> Tensor:
    """[steps]: one step's distance may be small by luck, so stock's largest so far counts."""
    size = torch.tensor(true, dtype=torch.float64).abs().view(len(true), -1).amax(1)
    return 2 * stock.cummax(0).values + 4 * ulp * size


@each_case
def test_losses(runs, case):
    stock, fused = runs(case)
    true, _, _ = judge(*case.job)
    far, stock_far = (distances(run["losses"], true, case) for run in (fused, stock))
    assert (far <= bound(stock_far, true, ULP["fp32"])).all(), (far, stock_far, fused["losses"], stock["losses"], true)
    assert stock_far.max() < SAME_JOB[case.dtype]


@each_case
def test_gradient_norms(runs, case):
    _, fused = runs(case)
    _, true, _ = judge(*case.job)
    assert min(true) > products.CLIP, "these jobs are made so that clipping acts"
    # one number a step is small by luck more often than the largest of many: the stages' stock runs, which sum in
    # different orders, are so many draws of the same distance
    stock = torch.stack([distances(norms, true, case) for norms in runs.stock_norms(case)]).amax(0)
    allowed = bound(stock, true, ULP[case.dtype])
    assert (distances(fused["norms"], true, case) <= allowed).all(), (fused["norms"], stock, true)


@each_case
def test_final_weights(runs, case):
    stock, fused = runs(case)
    _, _, true = judge(*case.job)
    assert stock["weights"].keys() == fused["weights"].keys() == true.keys()
    for name, w in true.items():
        if case.optimizer == "sgd" and not case.is_noisy:
            # element by element: none may be further off than twice the worst of stock's
            far = [(run["weights"][name].double() - w).abs().max().item() for run in (fused, stock)]
            floor = 4 * ULP["fp32"] * w.abs().max().item()
        else:
            # one element is noise; AdamW, dividing by the root of a gradient's square, makes a whole step of it
            far = [((run["weights"][name].double() - w).norm() / w.norm()).item() for run in (fused, stock)]
            floor = 4 * ULP["fp32"]
        assert far[0] <= 2 * far[1] + floor, f"{name}: {far[0]:.2e} from the judge, stock {far[1]:.2e}"


@each_case
def test_nothing_is_renamed(runs, case):
    stock, fused = runs(case)
    assert fused["state"] == stock["state"]
    assert fused["class"] == stock["class"] == "LlamaForCausalLM"


@each_case
def test_all_of_the_model_is_fused(runs, case):
    _, fused = runs(case)
    layers = products.SIZES["num_hidden_layers"]
    tied_in_slabs = {"embedding": 1} if case.mode in products.SHARDED and case.tied else {}
    assert fused["replaced"] == tied_in_slabs | {
        "rms_norm": 2 * layers + 1,
        "rope": layers,
        "swiglu": layers,
        "fused_linear_cross_entropy": 1,
        "cross_entropy": 1,
    }
    # of one row a rank, and on two ranks one of the row that both have a part of
    slabs = {"cpu": 34, "gpu": 67}[case.device]
    assert (f"its weight in {slabs} slabs" in fused["head"]) == (case.mode == "stream"), fused["head"]
    assert ("its rows stay on" in fused["head"]) == (case.mode == "stationary"), fused["head"]
