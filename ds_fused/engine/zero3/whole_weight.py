"""ZeRO-3: read the whole weight of a layer outside its forward, where DeepSpeed's hooks don't gather it.

Gathering is a collective, so a rank that gathers alone hangs. Therefore the ranks first meet (modules/loss/meeting.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from torch import distributed as dist
from torch import nn

from ds_fused.modules.loss.meeting import meet

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


def whole_weight_of(engine: DeepSpeedEngine) -> Callable[[nn.Module], AbstractContextManager]:
    """layer -> context in which its parameters are whole; nothing to do unless the engine shards parameters."""
    if not engine.zero_optimization_partition_weights():
        return nullcontext
    meeting = Meeting(engine)

    @contextmanager
    def whole_weight(layer: nn.Module) -> Iterator[None]:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

        params = [p for p in layer.parameters() if hasattr(p, "ds_id")]
        for p in params:
            if p.ds_status == ZeroParamStatus.INFLIGHT:
                _land(engine, p)
        # Who is here already (persistent, or kept from forward for backward) needs no collective, and must not be
        # given to GatheredParameters, which would partition it when it ends.
        absent = [p for p in params if p.ds_status != ZeroParamStatus.AVAILABLE]
        if not absent:
            yield
            return
        meeting.hold(absent)
        with GatheredParameters(absent):
            yield

    return whole_weight


def _land(engine: DeepSpeedEngine, param: nn.Parameter) -> None:
    """Wait for the gather that DeepSpeed's prefetch has under way. Its coordinator may wait for it again."""
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    # no public way leads to the handle: fetch_sub_module would count the layer into the trace of the step
    flights = coordinator._PartitionedParameterCoordinator__inflight_param_registry
    flights[param].wait()


class Meeting:
    """A place where the ranks that share a parameter find out whether all of them came."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._step: object = None
        self._reads = 0

    def hold(self, params: list[nn.Parameter]) -> None:
        """Return when all ranks of the parameters' group are here; RuntimeError on all that came when some did not."""
        ranks = dist.get_process_group_ranks(params[0].ds_process_group)
        if len(ranks) > 1:
            meet(f"{self._name()}/{[p.ds_id for p in params]}", ranks, "ZeRO-3")

    def _name(self) -> str:
        # By step, not by a count since the start: a rank that once read alone would be out of step with the others for
        # ever after.
        step = (self._engine.global_steps, self._engine.micro_steps)
        self._reads = self._reads + 1 if step == self._step else 0
        self._step = step
        return f"{step[0]}.{step[1]}.{self._reads}"
