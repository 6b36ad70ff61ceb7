"""What two ranks see of the hook on DeepSpeedEngine. Prints one JSON line per case; test_engine.py judges them."""

import gc
import json
import sys

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

deepspeed.init_distributed()
# ZeRO-3 collects garbage for each engine, and of all that was imported there is none
gc.freeze()
rank = deepspeed.comm.get_rank()
ON = {"enabled": True}


def case(name, act):
    said = {}
    try:
        act(said)
    except Exception as e:
        said["error"] = f"{type(e).__name__}: {e}"
    print("SAID " + json.dumps({"case": name, **said}), flush=True)


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def config(stage=0, block=None, **more):
    made = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
        # nothing persistent, so that the head really is gone outside its forward
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **more,
    }
    return made if block is None else made | {"ds_fused": block}


def batch(i):
    generator = torch.Generator().manual_seed(10 * i + rank)
    return torch.randint(0, 96, (2, 12), generator=generator)


def is_stock(model):
    return not any(hasattr(type(m), "_ds_fused_original") for m in model.modules())


def disabled(said):
    for block in (None, {"enabled": False}):
        model = llama()
        engine, *_ = deepspeed.initialize(model=model, config=config(block=block))
        assert is_stock(model) and not hasattr(engine, "ds_fused_report")
    said["ours"] = sorted(name for name in sys.modules if name.startswith("ds_fused."))


def train(stage, block, said, compiled=False, **more):
    engine, *_ = deepspeed.initialize(model=llama(), config=config(stage, block, **more))
    graphs = CompileCounterWithBackend("eager")
    if compiled:
        engine.compile(backend=graphs)
    said["losses"], said["logits"] = [], []
    for i in range(3):
        out = engine(input_ids=batch(i), labels=batch(i))
        said["logits"].append(out.logits.float().square().sum().item())
        engine.backward(out.loss)
        engine.step()
        said["losses"].append(out.loss.item())
    said["graphs"] = graphs.frame_count
    if block:
        said["replaced"] = {row.key: row.count for row in engine.ds_fused_report.replaced}
        said["undone"] = len(engine.ds_fused_report.recheck())
        said["silent"] = len(engine.ds_fused_report.verify_live())
    return engine


def read_alone(said):
    from ds_fused.modules.loss import meeting

    meeting.PATIENCE_SECONDS = 1.0
    engine = train(3, ON, {})
    out = engine(input_ids=batch(5), labels=batch(5))
    engine.backward(out.loss)
    # until here DeepSpeed may keep the head whole; now it is sharded again
    if rank == 0:
        try:
            out.logits.sum().item()
        except RuntimeError as e:
            said["alone"] = str(e)
    engine.step()
    meeting.PATIENCE_SECONDS = 60.0
    # the job goes on, and so do reads by all
    out = engine(input_ids=batch(6), labels=batch(6))
    said["together"] = list(out.logits.argmax(-1).shape)


def in_flight(said):
    engine = train(3, ON, {})
    out = engine(input_ids=batch(7), labels=batch(7))
    engine.backward(out.loss)
    # as DeepSpeed's prefetch does
    weight = engine.module.lm_head.weight
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    flights = coordinator._PartitionedParameterCoordinator__inflight_param_registry
    flights[weight] = weight.all_gather_coalesced([weight])
    said["before"] = weight.ds_status.name
    said["read"] = list(out.logits.argmax(-1).shape)
    said["after"] = weight.ds_status.name
    flights.pop(weight).wait()
    weight.partition()
    engine.step()


def by_position(said):
    model, conf = llama(), config(block=ON)
    DeepSpeedEngine(None, model, None, None, None, None, None, None, None, conf, DeepSpeedConfig(conf))
    said["stock"] = is_stock(model)


def malformed_here(said):
    deepspeed.initialize(model=llama(), config=config(block=ON | {"rms_nrom": True}))


def malformed_on_one(said):
    deepspeed.initialize(model=llama(), config=config(block=ON | ({"strict": 1} if rank else {})))


def other_ops_on_one(said):
    model = llama()
    try:
        deepspeed.initialize(model=model, config=config(block=ON | ({"rope": False} if rank else {})))
    finally:
        said["stock"] = is_stock(model)


def strict(said):
    deepspeed.initialize(model=torch.nn.Linear(4, 4), config=config(block=ON | {"strict": True}))


def strict_without_norms(said):
    block = ON | {"strict": True, "rms_norm": False, "report": False}
    engine, *_ = deepspeed.initialize(model=llama(), config=config(block=block))
    said["replaced"] = {row.key: row.count for row in engine.ds_fused_report.replaced}


def strict_by_name(said):
    deepspeed.initialize(model=llama(), config=config(block=ON | {"strict": True, "geglu": True, "profile": "small"}))


def broken_engine(said):
    model = llama()
    try:
        deepspeed.initialize(model=model, config=config(block=ON, optimizer={"type": "NoSuchOptimizer"}))
    finally:
        said["stock"] = is_stock(model)


def failed_at_the_end(said):
    """Behind all of stock's: the optimizer was made, claims on it are committed."""
    from ds_fused.engine import hooks
    from ds_fused.modules.swap import unswap

    model, loads, before = llama(), DeepSpeedEngine._configure_optimizer, {*hooks._reports}

    def undoing(engine, *args):
        loads(engine, *args)
        unswap(model.model.norm)

    DeepSpeedEngine._configure_optimizer = undoing
    try:
        deepspeed.initialize(model=model, config=config(3, {**ON, "strict": True, "leaf_modules": True}))
    finally:
        DeepSpeedEngine._configure_optimizer = loads
        said["stock"] = is_stock(model)
        said["kept"] = len({*hooks._reports} - before), vars(model).get("_ds_fused_reports")


def pipeline(said):
    layers = [LayerSpec(torch.nn.Linear, 32, 32), LayerSpec(LlamaRMSNorm, 32), LayerSpec(torch.nn.Linear, 32, 1)]
    model = PipelineModule(layers=layers, num_stages=1, loss_fn=torch.nn.functional.mse_loss)
    engine, *_ = deepspeed.initialize(model=model, config=config(block=ON))
    engine.train_batch(iter([(torch.ones(2, 32), torch.ones(2, 1))]))
    said["replaced"] = {row.key: row.count for row in engine.ds_fused_report.replaced}


def autocast(said):
    """Which parameters travel in lower precision, and losses under ZeRO-3; with the layers that are so by default."""
    listed = ["torch.nn.Linear", "torch.nn.Embedding", "transformers.models.llama.modeling_llama.LlamaRMSNorm"]
    silent = ON | {"report": False}
    blocks = {"stock": None, "fused": silent, "gather": silent | {"fused_linear_cross_entropy": {"mode": "gather"}}}
    for layers, more in {"default": {}, "listed": {"lower_precision_safe_modules": listed}}.items():
        for name, block in blocks.items():
            section = {"enabled": True, "dtype": "bfloat16", **more}
            found = said[f"{layers}, {name}"] = {}
            try:
                engine = train(3, block, found, torch_autocast=section)
            finally:
                # DeepSpeed remembers it, and then asks no other engine what its gradients travel in
                torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
            named = engine.module.named_parameters()
            found["marked"] = [path for path, p in named if torch_autocast.get_comm_dtype(p) is torch.bfloat16]
            found["stock"] = is_stock(engine.module)


case("disabled", disabled)
for stage in (0, 3):
    case(f"stock {stage}", lambda said, stage=stage: train(stage, None, said) and None)
    case(f"fused {stage}", lambda said, stage=stage: train(stage, ON, said) and None)
case("compiled", lambda said: train(2, ON | {"report": False}, said, compiled=True) and None)
case("keep 3", lambda said: train(3, ON | {"logits": "keep", "report": False}, said) and None)
for act in (read_alone, in_flight, by_position, malformed_here, malformed_on_one, other_ops_on_one):
    case(act.__name__, act)
for act in (strict, strict_without_norms, strict_by_name, broken_engine, failed_at_the_end, autocast, pipeline):
    case(act.__name__, act)
