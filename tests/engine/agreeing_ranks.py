"""Two ranks that agree, and disagree in several ways. Prints one line per case: its name and what was raised."""

import torch.distributed as dist

from ds_fused.engine import agreement
from ds_fused.engine.agreement import Agreement

dist.init_process_group("gloo")
rank = dist.get_rank()
DECISIONS = {
    "claims": [{"key": "rms_norm", "paths": ["model.norm"], "proven": True}],
    "left": [["MixtralExperts", 2, "stacked"]],
}
other_claims = DECISIONS | {"claims": [{"key": "rms_norm", "paths": ["model.norm"], "proven": rank == 0}]}
other_left = DECISIONS | {"left": DECISIONS["left"] * (1 + rank)}


def case(name, act):
    agree = Agreement()
    try:
        act(agree)
        said = "fine"
    except Exception as e:
        said = f"{type(e).__name__}: {e}"
    print(f"CASE {name}: {said}", flush=True)


def one_fails(agree):
    if rank == 1:
        agree.failed(ValueError("no such op"))
        agree.failed(ValueError("said once only"))
    else:
        agree(DECISIONS)


def other_versions(agree):
    if rank == 1:
        real = agreement.versions
        agreement.versions = lambda: real() | {"triton": "9.9"}
    agree(DECISIONS)


def least_then_equal(agree):
    assert agree.least(7.0 - 2 * rank) == 5.0
    agree(DECISIONS)


def one_fails_early(agree):
    if rank == 1:
        agree.failed(ValueError("malformed"))
    else:
        agree.least(7.0)


case("least", least_then_equal)
case("failed early", one_fails_early)
case("equal", lambda agree: agree(DECISIONS))
case("claims", lambda agree: agree(other_claims))
case("left", lambda agree: agree(other_left))
case("failed", one_fails)
case("versions", other_versions)
dist.destroy_process_group()
