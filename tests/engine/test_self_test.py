"""What slabs count on inside ZeRO-3, where that is looked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ds_fused.engine.zero3 import self_test
from ds_fused.engine.zero3.delivery import KEPT_GRADIENTS

SIZE = 5


class Optimizer:
    """Keeps gradients as ZeRO-3 does with the optimizer on the host: copied there, some time after they were handed in.

    ``fault``: what it does otherwise.
    """

    gradient_accumulation_dtype = torch.float32
    micro_step_id = 3
    is_gradient_accumulation_boundary = True

    def __init__(self, fault: str = "") -> None:
        self._fault = fault
        self._copies: list[tuple[torch.Tensor, bool]] = []
        setattr(self, KEPT_GRADIENTS, {7: torch.full((SIZE,), float("nan"))})

    def partition_grads(self, params: list, parts: list[torch.Tensor]) -> None:
        assert not self.is_gradient_accumulation_boundary
        self._copies.append((parts[0], self.micro_step_id > 0 and self._fault != "copies"))

    def synchronize(self) -> None:
        (kept,) = getattr(self, KEPT_GRADIENTS).values()
        for part, adds in self._copies:
            kept.copy_(kept + part if adds else part)
        self._copies.clear()


@pytest.mark.parametrize(
    ("fault", "reason"), [("", None), ("copies", "partition_grads does not keep what it is given")]
)
def test_gradients_that_are_copied_to_the_host_are_waited_for(fault, reason, monkeypatch):
    optimizer = Optimizer(fault)
    accelerator = SimpleNamespace(synchronize=optimizer.synchronize, current_device_name=lambda: "cpu")
    monkeypatch.setattr(self_test, "get_accelerator", lambda: accelerator)
    param = SimpleNamespace(ds_id=7, requires_grad=True, ds_tensor=SimpleNamespace(ds_numel=SIZE))
    assert self_test._keeping(optimizer, param) == reason
    # left as it was found
    assert optimizer.micro_step_id == 3 and optimizer.is_gradient_accumulation_boundary
