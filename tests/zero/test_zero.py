"""ZeRO 0, 1, 2 and 3, fused against stock DeepSpeed, judged by an fp64 run on one process.

Allowed everywhere: twice stock's own distance from the judge, and 4 ulp, so that a stock run without error can be met.
All cases of the CPU run in one pair of processes, all of the GPU in one process.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import fp64
import jobs
import products
import pytest
import torch
from launching import PATIENCE, launch
from torch import Tensor

from ds_fused.engine.zero3.shards import Shards

HERE = Path(__file__).parent
EPS, THETA = 1e-6, 10000.0  # LlamaConfig's defaults
ULP = {"fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}  # of 1.0
# Farther from the judge, stock does another job, and every bound would be loose.
SAME_JOB = {"fp32": 1e-4, "bf16": 0.5, "fp16": 0.05}


def marks(case: products.Case) -> list[pytest.MarkDecorator]:
    on_gpu = {"gpu": [pytest.mark.gpu], "gpus": [pytest.mark.gpus]}.get(case.device, [])
    return on_gpu if products.is_quick(case) else [*on_gpu, pytest.mark.all]


each_case = pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=marks(c)) for c in products.ALL])


@cache
def judge(
    ranks: int, accumulation: int, optimizer: str, tied: bool, skipped: tuple[int, ...] = ()
) -> tuple[list[list[float]], list[float], fp64.Weights, dict[str, fp64.Weights]]:
    steps = [[batch for micro in step for batch in micro[:ranks]] for step in jobs.batches(accumulation)]
    update_of = partial(jobs.optimizer_of, optimizer)
    return fp64.train(
        jobs.first_weights(tied), products.SIZES, EPS, THETA, steps, update_of, products.CLIP, skipped=skipped
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Case -> its stock run and its fused run. Only what this session selected is launched."""
    here = [i for i in request.session.items if i.module is request.module and not i.get_closest_marker("skip")]
    chosen = list(dict.fromkeys(item.callspec.params["case"] for item in here))
    out = tmp_path_factory.mktemp("zero")

    def launch_of(case: products.Case) -> tuple[str, str]:
        """Which cases one launch trains. NCCL's communicators and windows of many engines add up: a mode each."""
        return case.device, case.mode if case.device == "gpus" else ""

    @cache
    def problem(device: str, mode: str) -> str | None:
        """Trains all cases of a launch, once, however it ends."""
        names = [case.name for case in chosen if launch_of(case) == (device, mode)]
        env = {"DS_ACCELERATOR": "cuda" if device in ("gpu", "gpus") else "cpu"}
        ranks, timeout = products.RANKS[device], PATIENCE + 12 * len(names)
        try:
            launch(HERE / "ranks.py", str(out), *names, ranks=ranks, timeout=timeout, env=env)
        except AssertionError as error:
            return str(error)
        return None

    @cache
    def runs_of(case: products.Case) -> tuple[dict, dict]:
        said = problem(*launch_of(case))
        assert said is None, said
        saved = torch.load(out / f"{case.name}.pt")
        for name, run in saved.items():
            assert "error" not in run, f"the {name} run failed:\n{run['error']}"
        return saved["stock"], saved["fused"]

    def stocks(case: products.Case) -> list[dict]:
        """The stock runs of all stages that this session launched for the same job in the same dtype.

        One number is small by luck more often than the largest of many: these, which sum in different orders, are so
        many draws of the same distance.
        """

        def kind(c: products.Case) -> tuple:
            return c.device, c.job, c.dtype, c.special == "overflow"

        return [runs_of(c)[0] for c in chosen if kind(c) == kind(case)]

    runs_of.stocks = stocks
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


def judged(runs, case: products.Case) -> tuple[dict, dict, tuple]:
    """Stock, fused, and what the judge says of a job that skips the same steps."""
    stock, fused = runs(case)
    return stock, fused, judge(*case.job, tuple(stock["skipped"]))


@each_case
def test_losses(runs, case):
    stock, fused, (true, *_) = judged(runs, case)
    far, stock_far = (distances(run["losses"], true, case) for run in (fused, stock))
    assert (far <= bound(stock_far, true, ULP["fp32"])).all(), (far, stock_far, fused["losses"], stock["losses"], true)
    assert stock_far.max() < SAME_JOB[case.dtype]


@each_case
def test_gradient_norms(runs, case):
    stock, fused, (_, true, *_) = judged(runs, case)
    # an overflow has no norm
    taken = [step for step in range(len(true)) if step not in stock["skipped"]]
    true = [true[step] for step in taken]

    def far(norms: list[float]) -> Tensor:
        return distances([norms[step] for step in taken], true, case)

    assert min(true) > products.CLIP, "these jobs are made so that clipping acts"
    stock_far = torch.stack([far(run["norms"]) for run in runs.stocks(case)]).amax(0)
    assert (far(fused["norms"]) <= bound(stock_far, true, ULP[case.dtype])).all(), (fused["norms"], stock_far, true)


@each_case
def test_final_weights(runs, case):
    stock, fused, (_, _, true, _) = judged(runs, case)
    assert stock["weights"].keys() == fused["weights"].keys() == true.keys()
    for name, w in true.items():
        ours, theirs = fused["weights"][name], stock["weights"][name]
        not_further(name, ours, [theirs], w, case)
        if case.optimizer == "adamw":
            far, stock_far = ((found.double() - w).abs().max().item() for found in (ours, theirs))
            step = products.LEARNING_RATE["adamw"]
            assert far <= 2 * stock_far + 1e-3 * step, (
                f"{name}: {far / step:.2e} steps off, stock {stock_far / step:.2e}"
            )


@each_case
def test_optimizer_states(runs, case):
    _, fused, (*_, true) = judged(runs, case)
    stocks = [run["states"] for run in runs.stocks(case) if run["states"][next(iter(true))]]
    for name, states in fused["states"].items():
        for kind, ours in states.items():
            not_further(f"{kind} of {name}", ours, [s[name][kind] for s in stocks], true[name][kind], case)
    assert case.stage == 0 or all(set(s) == set(products.STATES[case.optimizer]) for s in fused["states"].values())


def not_further(name: str, ours: Tensor, stocks: list[Tensor], true: Tensor, case: products.Case) -> None:
    """From the judge than twice stock's distance."""
    if case.optimizer == "momentum" and not case.is_noisy:
        # element by element: none may be further off than twice the worst of stock's
        far, *stock_far = ((found.double() - true).abs().max().item() for found in (ours, *stocks))
        floor = 4 * ULP["fp32"] * true.abs().max().item()
    else:
        # one element is noise; AdamW, dividing by the root of a gradient's square, makes a whole step of it
        far, *stock_far = (((found.double() - true).norm() / true.norm()).item() for found in (ours, *stocks))
        floor = 4 * ULP["fp32"]
    assert far <= 2 * max(stock_far) + floor, f"{name}: {far:.2e} from the judge, stock {max(stock_far):.2e}"


@each_case
def test_overflows_are_skipped_as_in_stock(runs, case):
    stock, fused = runs(case)
    assert fused["skipped"] == stock["skipped"]
    assert fused["scales"] == stock["scales"]
    if case.special == "overflow":
        assert 0 < len(stock["skipped"]) < products.STEPS - 2
        # each one halves the scale
        assert stock["scales"][-1] == 2.0 ** (products.SCALE_POWER_OF_OVERFLOW - len(stock["skipped"]))
    else:
        assert not stock["skipped"]


@each_case
def test_nothing_is_renamed(runs, case):
    stock, fused = runs(case)
    assert fused["state"] == stock["state"]
    assert fused["class"] == stock["class"] == "LlamaForCausalLM"


@each_case
def test_all_of_the_model_is_fused(runs, case):
    _, fused = runs(case)
    layers = products.SIZES["num_hidden_layers"]
    tied_in_slabs = {"embedding": 1} if case.mode != "gather" and case.tied else {}
    # weights, and gradients
    in_place = {"collectives": 2} if case.stage == 3 and products.RANKS[case.device] > 1 else {}
    assert fused["replaced"] == tied_in_slabs | in_place | {
        "rms_norm": 2 * layers + 1,
        "rope": layers,
        "swiglu": layers,
        "fused_linear_cross_entropy": 1,
        "cross_entropy": 1,
    }
    # of one row a rank, and one of those that lie on two ranks or are more than the others have
    shards = Shards(products.SIZES["vocab_size"], products.SIZES["hidden_size"], products.RANKS[case.device])
    slabs = shards.common + (shards.seam_rows > 0)
    mode = products.BY_COPY_ENGINES.get(case.mode, case.mode)
    assert (f"its weight in {slabs} slabs" in fused["head"]) == (mode == "stream"), fused["head"]
    assert ("its rows stay on" in fused["head"]) == (mode == "stationary"), fused["head"]
    assert (" by copy engines; " in fused["head"]) == (case.mode in products.BY_COPY_ENGINES), fused["head"]
