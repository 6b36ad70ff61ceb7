"""What people do to a model behind apply: it trains as stock still, and restore finds its way back."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import transformers
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING

import ds_fused
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from ds_fused.modules.swap import is_fused
from tests.policies.tiny import (
    LLAMA,
    VOCAB,
    assert_same_step,
    batch,
    classes,
    counts,
    n_hooks,
    pair,
    prompt,
    step,
    twins,
)

# the model's whole life in one file, as torch.save(model) writes it


@pytest.mark.parametrize("steps", [0, 1])
def test_a_pickle_of_the_model(steps: int, caplog: pytest.LogCaptureFixture) -> None:
    model, stock = pair()
    for _ in range(steps):
        step(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert sum(map(is_fused, loaded.modules())) == sum(map(is_fused, model.modules())) == 10
    assert_same_step(loaded, stock, tolerance=1e-5)
    assert isinstance(loaded(**batch()).logits, LogitsOnDemand)
    ds_fused.restore(loaded)
    assert classes(loaded) == classes(stock) and loaded.loss_function is stock.loss_function
    assert "_loss_function" not in vars(loaded)
    assert_same_step(loaded, stock, tolerance=0.0)
    assert type(loaded(**batch()).logits) is torch.Tensor
    # nothing of it was the original's
    assert_same_step(model, stock, tolerance=1e-5)
    assert not caplog.messages


def test_a_copy_of_the_head_alone_copies_nothing_else() -> None:
    model, stock = pair()

    class Owner:
        lock = None

        def __init__(self) -> None:
            self.lock = threading.Lock()  # can't be copied

        def hook(self, *_: object) -> None: ...

    model.register_forward_hook(Owner().hook)
    head = copy.deepcopy(model.lm_head)
    x = torch.randn(3, 32)
    assert torch.equal(head(x), stock.lm_head(x)) and head._ds_fused_scope is not model.lm_head._ds_fused_scope
    assert_same_step(model, stock, tolerance=1e-5)


def test_a_copy_watches_its_own_first_step() -> None:
    model, stock = pair()
    twin = copy.deepcopy(model)
    step(twin)
    # the scope's two are left, and the first step of the other is still to come
    assert (n_hooks(twin), n_hooks(model)) == (2, 4)
    step(model)
    assert n_hooks(model) == 2
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert_same_step(averaged.module, stock, tolerance=1e-5)


# another dtype, other weights, another head


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 3e-2)])
def test_another_dtype(dtype: torch.dtype, tolerance: float) -> None:
    # ForCausalLMLoss is of fp32 also where the model is of more
    model, stock = (each.to(dtype) for each in pair())
    assert_same_step(model, stock, tolerance)


def test_weights_tied_and_untied() -> None:
    model, stock = pair(tie_word_embeddings=False)
    for each in (model, stock):
        each.config.tie_word_embeddings = True
        each.tie_weights()
        assert each.lm_head.weight is each.model.embed_tokens.weight
    assert_same_step(model, stock, tolerance=1e-5)
    for each in (model, stock):
        each.lm_head.weight = nn.Parameter(each.lm_head.weight.detach().clone())
    assert_same_step(model, stock, tolerance=1e-5)


def test_weights_that_come_later() -> None:
    model, stock = pair()
    model.to("meta").to_empty(device="cpu").load_state_dict(stock.state_dict())
    model.model.rotary_emb = copy.deepcopy(stock.model.rotary_emb)  # its buffers are in no state dict
    assert_same_step(model, stock, tolerance=1e-5)


def test_a_vocabulary_resized(caplog: pytest.LogCaptureFixture) -> None:
    model, stock = pair()
    for each in (model, stock):
        each.resize_token_embeddings(VOCAB + 12, mean_resizing=False)
    stock.load_state_dict(model.state_dict())
    assert_same_step(model, stock, tolerance=1e-5)
    assert "Its head was exchanged since" in caplog.text
    assert type(model(**batch()).logits) is torch.Tensor
    # a second apply can't know of the first head; it says what to do, and then all is fused
    assert "ds_fused.restore(model) comes before another apply" in str(ds_fused.apply(model))
    ds_fused.restore(model)
    assert classes(model) == classes(stock)
    assert counts(ds_fused.apply(model, strict=False))["fused_linear_cross_entropy"] == 1
    assert_same_step(model, stock, tolerance=1e-5)
    assert model(**batch()).logits.shape[-1] == VOCAB + 12


def own_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: object) -> torch.Tensor:
    return logits.float().square().mean()


def test_a_loss_of_the_users_own_that_comes_later(caplog: pytest.LogCaptureFixture) -> None:
    model, stock = pair()
    for each in (model, stock):
        each.loss_function = own_loss
    assert_same_step(model, stock, tolerance=1e-5)
    assert "Its loss_function was exchanged since, and is now own_loss" in caplog.text
    ds_fused.restore(model)
    assert model.loss_function is own_loss
    assert_same_step(model, stock, tolerance=0.0)


@pytest.mark.parametrize(("loss_type", "is_fused"), [("ForMaskedLM", True), ("own", False)])
def test_a_loss_type_that_is_set_later(
    loss_type: str, is_fused: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(LOSS_MAPPING, "own", own_loss)
    model, stock = pair()
    step(model)
    twin = copy.deepcopy(model)
    for each in (twin, model, stock):
        each.loss_type = loss_type
    assert_same_step(model, stock, tolerance=1e-5)
    assert_same_step(twin, stock, tolerance=1e-5)
    # a loss that is PyTorch's cross entropy takes logits that wait
    assert (type(model(**batch()).logits) is LogitsOnDemand) == is_fused
    assert ("Its loss_type was exchanged since, ForCausalLM for own" in caplog.text) == (not is_fused)
    ds_fused.restore(model)
    assert classes(model) == classes(stock) and model.loss_function is stock.loss_function
    assert_same_step(model, stock, tolerance=0.0)


# adapters that come later


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_on_the_head(options: dict, caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["q_proj"], **options})

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        return peft.get_peft_model(model, config)

    model, stock = map(adapted, pair())
    assert_same_step(model, stock, tolerance=1e-5)
    assert "PEFT has wrapped its head since" in caplog.text
    # the copies as well, which PEFT has made of what was fused
    ds_fused.restore(model)
    assert classes(model) == classes(stock)
    assert_same_step(model, stock, tolerance=1e-6)


def test_adapters_merged_and_unloaded() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "gate_proj"], modules_to_save=["input_layernorm"], init_lora_weights=False
    )
    models = []
    for model in pair():
        torch.manual_seed(3)
        models.append(peft.get_peft_model(model, config).merge_and_unload().requires_grad_())
    assert_same_step(*models, tolerance=1e-5)
    ds_fused.restore(models[0])
    assert classes(models[0]) == classes(models[1])


def test_generation_between_steps() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    models, optimizers = [], []
    for model in pair():
        torch.manual_seed(3)
        models.append(peft.get_peft_model(model, config))
        optimizers.append(torch.optim.SGD(models[-1].parameters(), lr=0.1))
    for _ in range(2):
        said = []
        for model, optimizer in zip(models, optimizers, strict=True):
            model.train()(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            said.append(model.eval().generate(**prompt(), max_new_tokens=4, do_sample=False))
            with model.disable_adapter(), torch.no_grad():
                said.append(model(**batch()).loss)
        assert torch.equal(said[0], said[2])
        torch.testing.assert_close(said[1], said[3])


def test_a_backward_that_keeps_its_graph(kernels: torch.device) -> None:
    model, stock = pair()
    found = []
    for each in (model, stock):
        hidden = each.to(kernels).model(batch()["input_ids"].to(kernels))[0]
        weight = each.model.layers[0].mlp.gate_proj.weight
        found.append([torch.autograd.grad(hidden[0, i].sum(), weight, retain_graph=True)[0] for i in (0, 1)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_adapters_that_begin_at_a_token() -> None:
    """aLoRA: its layers are handed where a sequence's tokens begin to count, which tiles of tokens would not know."""
    peft = pytest.importorskip("peft")
    model, stock = twins(LLAMA)
    tokens = batch()["input_ids"]
    invoked = [int(token) for token in tokens[0, 2:4]]
    tokens[:, 2:4] = tokens[0, 2:4]
    config = peft.LoraConfig(target_modules=["gate_proj", "down_proj"], alora_invocation_tokens=invoked)
    losses = []
    for each, tiles in ((stock, None), (model, 3)):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(each, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        if tiles is not None:
            ds_fused.apply(adapted, tiles=tiles)
        losses.append(adapted(input_ids=tokens, labels=tokens).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_dropout_that_is_turned_on() -> None:
    """T5Gemma's MLPs have one between the product and the last projection."""
    config = transformers.T5GemmaConfig(
        encoder=(sizes := dict(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, dropout_rate=0.0, attention_dropout=0.0,
        )),
        decoder=sizes, dropout_rate=0.0, attention_dropout=0.0, vocab_size=VOCAB,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = transformers.T5GemmaForConditionalGeneration(config)
    model = copy.deepcopy(stock)
    assert counts(ds_fused.apply(model))["geglu"] == 2
    losses = []
    for each in (stock, model):
        for name, layer in each.named_modules():
            if name.endswith("mlp.dropout"):
                layer.p = 0.5
        torch.manual_seed(1)
        losses.append(each.train()(**batch()).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_angles_that_are_trained() -> None:
    """Their gradient comes from the original function."""

    def train(model: nn.Module) -> None:
        model.model.rotary_emb.shift = shift = nn.Parameter(torch.full((model.config.head_dim,), 0.1))
        model.model.rotary_emb.register_forward_hook(lambda _, args, angles: tuple(a + shift for a in angles))

    model, stock = pair()
    for each in (model, stock):
        train(each)
    assert_same_step(model, stock, tolerance=1e-5)
    assert step(model)[1]["model.rotary_emb.shift"].norm() > 0
