"""Two ranks of FSDP2 that read logits of a fused loss once their weight is sharded again. test_fsdp.py judges.

Each prints one JSON line: what stock and fused models made, and what a rank is told that reads alone.
"""

import json

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import ds_fused
from ds_fused.modules.loss import meeting

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
rank = dist.get_rank()
# of 61 words each rank has another number
SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded(options: dict | None, policy: MixedPrecisionPolicy) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    if options is not None:
        ds_fused.apply(model, **options)
    for part in (*model.model.layers, model.lm_head, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def forward(model: LlamaForCausalLM, i: int) -> object:
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(10 * i + rank))
    return model(input_ids=ids, labels=ids)


def train(options: dict | None, policy: MixedPrecisionPolicy) -> list[float]:
    model = sharded(options, policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for i in range(3):
        outputs = forward(model, i)
        # in turn they are a part of the loss, are read behind its backward, and by nobody
        (outputs.loss + (outputs.logits.float().square().mean() if i == 0 else 0.0)).backward()
        if i == 1:
            found.append(outputs.logits.float().square().mean().item())
        optimizer.step()
        optimizer.zero_grad()
        found.append(outputs.loss.item())
    model.eval()
    with torch.no_grad():
        outputs = forward(model, 3)
    return [*found, outputs.loss.item(), outputs.logits.float().square().mean().item()]


def read_alone() -> str:
    model = sharded({}, MixedPrecisionPolicy())
    outputs = forward(model, 0)
    outputs.loss.backward()
    told = ""
    patience, meeting.PATIENCE_SECONDS = meeting.PATIENCE_SECONDS, 1.0
    try:
        if rank == 0:
            outputs.logits.sum()
    except RuntimeError as error:
        told = str(error)
    meeting.PATIENCE_SECONDS = patience
    dist.barrier()
    # and they go on
    assert forward(model, 1).logits.sum().isfinite()
    return told


said = {}
for name, policy in (("fp32", MixedPrecisionPolicy()), ("bf16", BF16)):
    for key, options in (("stock", None), ("defer", {}), ("keep", {"logits": "keep"})):
        said[f"{name} {key}"] = train(options, policy)
said["alone"] = read_alone()
print("SAID " + json.dumps(said), flush=True)
dist.destroy_process_group()
