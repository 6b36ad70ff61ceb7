"""ZeRO 0, 1, 2 and 3, fused against stock DeepSpeed, judged by an fp64 run on one process.

Allowed everywhere: twice stock's own distance from the judge, and 4 ulp, so that a stock run without error can be met.
All cases run in one pair of processes.
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
ULP = {"fp32": 2.0**-23, "bf16": 2.0**-7}  # of 1.0

each_case = pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[] if products.in_ci(c) else [pytest.mark.all]) for c in products.ALL],
)


@cache
def judge(accumulation: int, optimizer: str, tied: bool) -> tuple[list[list[float]], list[float], fp64.Weights]:
    steps = [[batch for micro in step for batch in micro] for step in jobs.batches(accumulation)]
    lr = products.LEARNING_RATE[optimizer]
    return fp64.train(jobs.first_weights(tied), products.SIZES, EPS, THETA, steps, optimizer, lr=lr, clip=products.CLIP)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Case -> its stock run and its fused run. Only what this session selected is launched."""
    here = [i for i in request.session.items if i.module is request.module and not i.get_closest_marker("skip")]
    chosen = list(dict.fromkeys(item.callspec.params["case"].name for item in here))
    out = tmp_path_factory.mktemp("zero")
    launch(HERE / "ranks.py", str(out), *chosen, ranks=products.RANKS, timeout=60 + 8 * len(chosen))

    @cache
    def runs_of(case: products.Case) -> tuple[dict, dict]:
        saved = torch.load(out / f"{case.name}.pt")
        for name, run in saved.items():
            assert "error" not in run, f"the {name} run failed:\n{run['error']}"
        return saved["stock"], saved["fused"]

    def stock_norms(case: products.Case) -> list[list[float]]:
        """Of every stage that this session launched for the same job in the same dtype."""
        alike = [c for c in products.ALL if c.name in chosen and (c.job, c.dtype) == (case.job, case.dtype)]
        return [runs_of(c)[0]["norms"] for c in alike]

    runs_of.stock_norms = stock_norms
    return runs_of


def distances(found: list, true: list) -> Tensor:
    """[steps]: the largest distance in each step."""
    apart = torch.tensor(found, dtype=torch.float64) - torch.tensor(true, dtype=torch.float64)
    return apart.abs().view(len(true), -1).amax(1)


def bound(stock: Tensor, true: list, ulp: float) -> Tensor:
    """[steps]: one step's distance may be small by luck, so stock's largest so far counts."""
    size = torch.tensor(true, dtype=torch.float64).abs().view(len(true), -1).amax(1)
    return 2 * stock.cummax(0).values + 4 * ulp * size


@each_case
def test_losses(runs, case):
    stock, fused = runs(case)
    true, _, _ = judge(*case.job)
    allowed = bound(distances(stock["losses"], true), true, ULP["fp32"])
    assert (distances(fused["losses"], true) <= allowed).all(), (fused["losses"], stock["losses"], true)
    # the judge computes this very job: else a common error would loosen every bound
    assert distances(stock["losses"], true).max() < {"fp32": 1e-4, "bf16": 0.5}[case.dtype]


@each_case
def test_gradient_norms(runs, case):
    _, fused = runs(case)
    _, true, _ = judge(*case.job)
    assert min(true) > products.CLIP, "these jobs are made so that clipping acts"
    # one number a step is small by luck more often than the largest of many: the stages' stock runs, which sum in
    # different orders, are so many draws of the same distance
    stock = torch.stack([distances(norms, true) for norms in runs.stock_norms(case)]).amax(0)
    allowed = bound(stock, true, ULP[case.dtype])
    assert (distances(fused["norms"], true) <= allowed).all(), (fused["norms"], stock, true)


@each_case
def test_final_weights(runs, case):
    stock, fused = runs(case)
    _, _, true = judge(*case.job)
    assert stock["weights"].keys() == fused["weights"].keys() == true.keys()
    for name, w in true.items():
        if case.optimizer == "sgd":
            # element by element: none may be further off than twice the worst of stock's
            far = [(run["weights"][name].double() - w).abs().max().item() for run in (fused, stock)]
            floor = 4 * ULP["fp32"] * w.abs().max().item()
        else:
            # AdamW divides by the root of a gradient's square: noise in an element near 0 becomes a whole step
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
    assert fused["replaced"] == {
        "rms_norm": 2 * layers + 1,
        "rope": layers,
        "swiglu": layers,
        "fused_linear_cross_entropy": 1,
        "cross_entropy": 1,
    }
