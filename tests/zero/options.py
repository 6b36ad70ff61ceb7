"""Options of DeepSpeed's JSON beside which a fused model trains as stock's."""

from __future__ import annotations


def _zero(stage: int, **options: object) -> dict[str, dict]:
    return {"zero_optimization": {"stage": stage, **options}}


_BF16 = {"enabled": True}

OPTIONS: dict[str, dict[str, object]] = {
    # how weights and gradients travel, and which ones stay
    "overlap_comm_1": _zero(1, overlap_comm=True),
    "overlap_comm_2": _zero(2, overlap_comm=True, contiguous_gradients=False),
    "overlap_comm_3": _zero(3, overlap_comm=True, contiguous_gradients=False),
    "round_robin": _zero(2, round_robin_gradients=True),
    "allgather_partitions": _zero(2, allgather_partitions=False),
    "reduce_scatter": _zero(1, reduce_scatter=False),
    "all_reduce_for_fetch": _zero(3, stage3_use_all_reduce_for_fetch_params=True),
    "sequential": _zero(3, stage3_allgather_sequential=True),
    "nothing_ahead": _zero(3, stage3_max_live_parameters=0, stage3_prefetch_bucket_size=0),
    "all_persistent": _zero(3, stage3_param_persistence_threshold=10**6),
    "some_persistent": _zero(3, stage3_param_persistence_threshold=1000),
    "few_persistent": _zero(3, stage3_param_persistence_threshold=10**6, stage3_model_persistence_threshold=2000),
    # how layers run
    "memory_efficient_linear": _zero(3, memory_efficient_linear=False),
    "override_module_apply": _zero(3, override_module_apply=False),
    "activation_checkpointing": _zero(3) | {"activation_checkpointing": {"partition_activations": True}},
    # dtypes
    "bf16": _zero(3) | {"bf16": _BF16},
    "bf16_master": _zero(3) | {"bf16": _BF16 | {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
    "bf16_immediate": _zero(1) | {"bf16": _BF16 | {"immediate_grad_update": True}},
    "accumulated_in_fp32": _zero(3) | {"bf16": _BF16, "data_types": {"grad_accum_dtype": "fp32"}},
    "predivided": _zero(0) | {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
    # what is watched
    "sanity_checks": _zero(3, enable_sanity_checks=True, log_trace_cache_warnings=True),
    "flops_profiler": _zero(3) | {"flops_profiler": {"enabled": True, "profile_step": 2}},
    "wall_clock_breakdown": _zero(3) | {"wall_clock_breakdown": True, "memory_breakdown": True, "steps_per_print": 1},
    "comms_logger": _zero(3) | {"comms_logger": {"enabled": True, "prof_all": True}},
}
