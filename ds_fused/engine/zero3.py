"""ZeRO-3: read the whole weight of a layer outside its forward, where DeepSpeed's hooks don't gather it.

Gathering is a collective, so a rank that gathers alone hangs. Therefore the ranks first meet at the store (a plain
key-value exchange, no collective): all arrived within the time-out, all gather; otherwise every rank that did arrive
gets one error that names the remedy, and the job can go on, since nothing was started.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from torch import distributed as dist
from torch import nn

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

# How long the first rank waits for the last. Ranks that all read do so within moments of each other; much longer, and a
# read on one rank alone would look like a hang.
PATIENCE_SECONDS = 60.0
# the store is asked this often meanwhile
POLL_SECONDS = 0.01


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
        if len(ranks) == 1:
            return
        store = dist.PrefixStore("ds_fused/whole_weight", dist.distributed_c10d._get_default_store())
        place = f"{self._name()}/{[p.ds_id for p in params]}/{ranks}"
        arrived, verdict, gone = f"{place}/arrived", f"{place}/verdict", f"{place}/gone"
        if store.add(arrived, 1) == len(ranks):
            store.compare_set(verdict, "", "all")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not store.check([verdict]):
            if time.monotonic() > deadline:
                # whoever writes first decides for all: the last rank may be arriving at this moment
                store.compare_set(verdict, "", "some")
                break
            time.sleep(POLL_SECONDS)
        if store.get(verdict) != b"all":
            raise RuntimeError(
                f"ds_fused: outputs.logits were read on {store.add(arrived, 0)} of {len(ranks)} ranks within "
                f"{PATIENCE_SECONDS:g} s. Under ZeRO-3 the head's weight is sharded, so after a fused loss they can be "
                'computed only where all ranks read them. Read them on every rank, or set "logits": "keep" in the '
                "ds_fused block, which computes them inside the forward."
            )
        if store.add(gone, 1) == len(ranks):
            for key in (arrived, verdict, gone):
                store.delete_key(key)

    def _name(self) -> str:
        # By step, not by a count since the start: a rank that once read alone would be out of step with the others for
        # ever after.
        step = (self._engine.global_steps, self._engine.micro_steps)
        self._reads = self._reads + 1 if step == self._step else 0
        self._step = step
        return f"{step[0]}.{step[1]}.{self._reads}"
