"""Uses of a model beside the plain step: equal to stock with everything fused, for three families."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ds_fused
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from tests.policies.tiny import FAMILIES, LAYERS, VOCAB, Tiny, assert_same_step, batch

TINY = {family.name: family for family in FAMILIES}
# rotary in halves and gated MLPs; norms on q and k, experts; softcapped, sliding windows, norms of 1 + weight
SEED = [TINY["Llama"], TINY["Qwen3Moe"], TINY["Gemma2"]]
each_family = pytest.mark.parametrize("family", SEED, ids=lambda family: family.name)


def pair(
    family: Tiny,
    attention: str = "eager",
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
    **config: object,
) -> tuple[nn.Module, nn.Module]:
    """Fused and stock; ``prepare`` is what a user does to a model before the training."""
    model = family.make(**config)
    model.set_attn_implementation(attention)
    stock = prepare(copy.deepcopy(model))
    model = prepare(model)
    assert ds_fused.apply(model).replaced
    return model, stock


def ids(shape: tuple[int, int] = (2, 11)) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(4))


def assert_same_outputs(model: nn.Module, stock: nn.Module, **inputs: object) -> None:
    """Logits and every hidden state; of a step the loss and all gradients."""
    with torch.no_grad():
        ours, wanted = (each(**inputs) for each in (model, stock))
    torch.testing.assert_close(ours.logits.clone(), wanted.logits, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours.hidden_states or (), wanted.hidden_states or (), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert_same_step(model, stock, tolerance=1e-5, inputs=inputs)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@each_family
def test_adapters(family: Tiny, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    # PEFT adapts experts, which are no Linears, too, but not with DoRA
    targets = ["q_proj", "o_proj"] if dora else ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, use_dora=dora, init_lora_weights=False)

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        return peft.get_peft_model(model, config)

    assert_same_step(*pair(family, prepare=adapted), tolerance=1e-5)


@each_family
def test_quantised_with_adapters(family: Tiny, tmp_path: Path) -> None:
    """QLoRA: weights of 4 bits, twice quantised, under adapters of their own."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    family.make().save_pretrained(tmp_path)
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )

    def adapted() -> nn.Module:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=four_bits, dtype=torch.float32, attn_implementation="eager", device_map="cpu"
        )
        model = peft.prepare_model_for_kbit_training(model)
        config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        torch.manual_seed(3)
        return peft.get_peft_model(model, config)

    model, stock = adapted(), adapted()
    assert any(type(module).__name__ == "Linear4bit" for module in stock.modules())
    replaced = {row.key for row in ds_fused.apply(model).replaced}
    assert {"rms_norm", "fused_linear_cross_entropy"} <= replaced
    assert replaced & {"rope", "qk_norm_rope"} and replaced & {"swiglu", "geglu"}
    assert_same_step(model, stock, tolerance=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@each_family
def test_gradient_checkpointing(family: Tiny, reentrant: bool) -> None:
    def checkpointed(model: nn.Module) -> nn.Module:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    assert_same_step(*pair(family, prepare=checkpointed), tolerance=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@each_family
def test_generation(family: Tiny, cache: str) -> None:
    model, stock = (each.eval() for each in pair(family))
    padded = ids((2, 6))
    padded[0, :2] = 0
    mask = (torch.arange(6) >= torch.tensor([[2], [0]])).long()
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    ours, wanted = (each.generate(padded, attention_mask=mask, **options) for each in (model, stock))
    assert torch.equal(ours.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-5)


# from transformers 5.24 on Gemma 2, whose scores are softcapped, has no sdpa
each_attention = pytest.mark.parametrize(
    ("family", "attention"),
    [
        pytest.param(family, attention, id=f"{family.name}-{attention}")
        for family in SEED
        for attention in ("eager", "sdpa")
        if attention == "eager" or getattr(transformers, f"{family.name}ForCausalLM")._supports_sdpa
    ],
)


@each_attention
def test_hidden_states(family: Tiny, attention: str) -> None:
    model, stock = pair(family, attention)
    inputs = {"input_ids": ids(), "labels": ids(), "output_hidden_states": True}
    assert len(stock(**inputs).hidden_states) == LAYERS + 1
    assert_same_outputs(model, stock, **inputs)


# PyTorch has no backward of it on a CPU
@each_family
def test_flex_attention(family: Tiny) -> None:
    model, stock = (each.eval() for each in pair(family, "flex_attention", head_dim=16))
    mask = (torch.arange(11) >= torch.tensor([[4], [0]])).long()
    inputs = {"input_ids": ids(), "labels": ids().masked_fill(mask == 0, -100), "attention_mask": mask}
    with torch.no_grad():
        ours, wanted = (each(**inputs) for each in (model, stock))
    torch.testing.assert_close(ours.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.logits[mask > 0], wanted.logits[mask > 0], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@each_family
def test_flex_attention_trains(family: Tiny, device: torch.device) -> None:
    torch.compiler.reset()
    model, stock = pair(family, "flex_attention", lambda model: model.to(device), head_dim=16)
    assert_same_step(model, stock, tolerance=1e-4)


@pytest.mark.parametrize("told", ["by position_ids", "by cu_seq_lens too"])
@each_attention
def test_packed_sequences(family: Tiny, attention: str, told: str) -> None:
    """As the padding-free collator of transformers packs them."""
    model, stock = pair(family, attention)
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=told == "by cu_seq_lens too")
    inputs = collate([{"input_ids": ids((1, n))[0].tolist()} for n in (4, 3, 4)])
    assert ("cu_seq_lens_q" in inputs) == (told == "by cu_seq_lens too")
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]]
    assert_same_outputs(model, stock, **inputs)


@each_attention
def test_left_padding(family: Tiny, attention: str) -> None:
    model, stock = pair(family, attention)
    mask = (torch.arange(11) >= torch.tensor([[4], [0]])).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    labels = ids().masked_fill(mask == 0, -100)
    assert_same_outputs(model, stock, input_ids=ids(), attention_mask=mask, position_ids=positions, labels=labels)


@pytest.mark.parametrize(
    "name",
    ["Llama", "Mixtral", *(pytest.param(n, marks=pytest.mark.all) for n in ("Gemma2", "Qwen3", "Gemma3Text"))],
)
def test_trains_compiled(name: str) -> None:
    """The loss included, in one graph that holds from step to step."""
    torch.compiler.reset()
    # what stands in for grouped_mm on a CPU is not to be traced, stock neither
    experts = {"experts_implementation": "batched_mm"} if name == "Mixtral" else {}
    model, stock = pair(TINY[name], num_hidden_layers=1, **experts)
    eager, graphs = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
    model.compile(backend=graphs, fullgraph=True)
    for seed, n_items in ((1, 7), (2, 9)):
        inputs = batch(seed) | {"num_items_in_batch": torch.tensor(n_items)}
        assert_same_step(model, eager, 1e-6, inputs)
        assert_same_step(model, stock, 1e-5, inputs)
    assert graphs.frame_count == 1
    outputs, wanted = (each(**inputs).logits for each in (model, stock))
    assert type(outputs) is LogitsOnDemand
    torch.testing.assert_close(outputs.clone(), wanted, rtol=1e-5, atol=1e-5)
