"""What a delivery does to an optimizer's methods, and what is left of it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

from ds_fused.engine.zero3.delivery import KEPT_GRADIENTS, Delivery


class Optimizer:
    def partition_grads(self) -> None: ...

    def zero_grad(self) -> None: ...


def test_an_optimizer_has_its_own_methods_again() -> None:
    optimizer = Optimizer()
    setattr(optimizer, KEPT_GRADIENTS, {})
    before = dict(vars(optimizer))
    engine = SimpleNamespace(optimizer=optimizer)
    first, second = (Delivery(SimpleNamespace(ds_id=i), engine) for i in range(2))
    # what a copied model has of them is not the engine's
    copy.deepcopy(second.restore)()
    assert vars(optimizer)["partition_grads"] == second._partition_grads
    for delivery in (second, first, first):
        delivery.restore()
    assert vars(optimizer) == before
    # somebody's wrapper of ours stays
    third = Delivery(SimpleNamespace(ds_id=3), engine)
    optimizer.zero_grad = wrapper = lambda: third._forget()
    third.restore()
    assert vars(optimizer) == {**before, "zero_grad": wrapper}
    # as DeepSpeed leaves an engine behind
    del engine.optimizer
    third.restore()
