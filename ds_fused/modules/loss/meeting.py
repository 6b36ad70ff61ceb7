"""Where ranks find out whether all of them came, before a collective in which a rank alone would hang.

They meet at the store (a plain key-value exchange, no collective): all arrived within the time-out, all go on;
otherwise every rank that did arrive gets one error, and the job can go on, since nothing was started.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import distributed as dist

# How long the first rank waits for the last. Ranks that all read do so within moments of each other; much longer, and a
# read on one rank alone would look like a hang.
PATIENCE_SECONDS = 60.0
# the store is asked this often meanwhile
POLL_SECONDS = 0.01


def meet(place: str, ranks: Sequence[int], who_shards: str) -> None:
    """Return when all these ranks are here; RuntimeError on all that came when some did not.

    ``place``: its name, the same on all ranks, and of this read alone.
    """
    store = dist.PrefixStore("ds_fused/whole_weight", dist.distributed_c10d._get_default_store())
    place = f"{place}/{list(ranks)}"
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
            f"{PATIENCE_SECONDS:g} s. Under {who_shards} the head's weight is sharded, so after a fused loss they can "
            'be computed only where all ranks read them. Read them on every rank, or set "logits": "keep" in the '
            "ds_fused block, which computes them inside the forward."
        )
    if store.add(gone, 1) == len(ranks):
        for key in (arrived, verdict, gone):
            store.delete_key(key)
