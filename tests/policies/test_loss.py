"""The loss of real causal LMs, tiny: fused against stock in loss and every gradient."""

from __future__ import annotations

import copy
import inspect
import logging

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.trainer_pt_utils import EvalLoopContainer, nested_detach

from ds_fused.modules.loss import head as head_file
from ds_fused.modules.loss.head import CausalLMLoss
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from ds_fused.policies.loss import LINEAR, REAL, claim_loss
from tests.policies.tiny_losses import BART, FAMILIES, SIZES, VOCAB, batch, build, compare, fuse, pair


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_stock(family: str) -> None:
    compare(*pair(family), **batch())


def test_what_a_trainer_passes() -> None:
    stock, fused = pair()
    inputs = batch()
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    for extra in (
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": shifted},
        {"shift_labels": shifted.reshape(-1), "num_items_in_batch": 5},
        {"attention_mask": torch.ones_like(inputs["input_ids"])},
        {"return_dict": False},
        {"use_cache": False},
    ):
        compare(stock, fused, **inputs, **extra)


def test_another_ignore_index() -> None:
    stock, fused = pair()
    ids = batch()["input_ids"]
    compare(stock, fused, input_ids=ids, labels=ids, ignore_index=int(ids[0, 4]))


def test_logits_to_keep() -> None:
    stock, fused = pair()
    inputs = batch()
    inputs["labels"] = inputs["labels"][:, -4:]
    compare(stock, fused, **inputs, logits_to_keep=4)


def test_all_labels_ignored() -> None:
    stock, fused = pair()
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert fused(**inputs).loss.isnan()
    compare(stock, fused, **inputs)
    compare(stock, fused, **inputs, num_items_in_batch=3)


def test_what_stock_refuses_is_refused() -> None:
    stock, fused = pair()
    inputs = batch()
    for bad in (inputs["labels"][:, :4], inputs["labels"].to(torch.int32)):
        inputs["labels"] = bad
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            stock(**inputs)
        with pytest.raises(theirs.type) as ours:
            fused(**inputs)
        assert str(ours.value) == str(theirs.value)


def test_labels_by_position() -> None:
    stock, fused = pair()
    inputs = batch()
    names = list(inspect.signature(type(stock).forward).parameters)[1:]
    names = names[: names.index("labels") + 1]
    arguments = [inputs.get(name) for name in names]
    out = fused(*arguments)
    assert isinstance(out.logits, LogitsOnDemand)
    torch.testing.assert_close(out.loss, stock(*arguments).loss)


def test_autocast() -> None:
    stock, fused = pair("Gemma2")
    inputs = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, got = stock(**inputs), fused(**inputs)
    assert isinstance(got.logits, LogitsOnDemand) and got.logits.dtype == wanted.logits.dtype
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got.logits.clone(), wanted.logits)


def test_auxiliary_loss_of_experts() -> None:
    stock, fused = pair(
        "Mixtral", num_local_experts=2, num_experts_per_tok=1, output_router_logits=True, router_aux_loss_coef=0.1
    )
    compare(stock, fused, **batch())


def test_eval_with_labels_and_without() -> None:
    stock, fused = pair()
    inputs = batch()
    with torch.inference_mode():
        compare(stock.eval(), fused.eval(), **inputs)
    with torch.no_grad():
        compare(stock.eval(), fused.eval(), **inputs)
        out = fused(input_ids=inputs["input_ids"])
    assert type(out.logits) is Tensor and torch.equal(out.logits, stock(input_ids=inputs["input_ids"]).logits)


def test_keep_and_stock() -> None:
    inputs = batch()
    compare(*pair(options={"logits": "keep"}), logits=Tensor, **inputs)
    stock, fused = pair(options={"eval": "stock"})
    assert isinstance(fused(**inputs).logits, LogitsOnDemand)
    out = fused.eval()(**inputs)
    assert type(out.logits) is Tensor and torch.equal(out.loss, stock.eval()(**inputs).loss)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_generate(mode: str) -> None:
    stock, fused = pair()
    ids = batch()["input_ids"]
    wanted, got = (getattr(m, mode)().generate(ids, max_new_tokens=3, do_sample=False) for m in (stock, fused))
    assert torch.equal(wanted, got)


def test_inputs_as_embeddings_and_a_frozen_head() -> None:
    stock, fused = pair()
    inputs = batch()
    embedded = stock.get_input_embeddings()(inputs["input_ids"]).detach()
    for model in (stock, fused):
        model.lm_head.weight.requires_grad_(False)
    compare(stock, fused, inputs_embeds=embedded, labels=inputs["labels"])


def test_a_frozen_trunk() -> None:
    stock, fused = pair(tie_word_embeddings=False)
    for model in (stock, fused):
        model.model.requires_grad_(False)
    compare(stock, fused, **batch())


# models that compute their loss themselves, and masked language models


BERT = {
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}


BART |= {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("layers", 1), ("ffn_dim", 24), ("attention_heads", 2))
}


PROPHETNET = {
    "hidden_size": 16,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_encoder_attention_heads": 2,
    "num_decoder_attention_heads": 2,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "ngram": 2,
}
FSMT = BART | {"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB, "activation_dropout": 0.0}
OWN_LOSSES = {
    "BertForMaskedLM": BERT,
    "ModernBertForMaskedLM": {"num_key_value_heads": 2, "global_attn_every_n_layers": 1},
    "T5ForConditionalGeneration": T5 | {"decoder_start_token_id": 0},
    "BartForConditionalGeneration": BART,
    "T5GemmaForConditionalGeneration": {},
    # log_softmax and nll_loss of several predictions, in a method of its own
    "ProphetNetForConditionalGeneration": PROPHETNET,
    "ProphetNetForCausalLM": PROPHETNET | {"add_cross_attention": False},
    # smoothed besides, which needs the probabilities
    "ProphetNetForConditionalGeneration smoothed": PROPHETNET | {"eps": 0.1},
    # names its table of words where others name their head
    "FSMTForConditionalGeneration": FSMT,
    "FSMTForConditionalGeneration tied": FSMT | {"tie_word_embeddings": True},
}


def build_own(name: str) -> nn.Module:
    cls = getattr(transformers, name.partition(" ")[0])
    sizes = dict(SIZES)
    if name.startswith("ProphetNet"):
        # it asks for those of encoder and decoder
        del sizes["num_hidden_layers"]
    settings = cls.config_class(**sizes | OWN_LOSSES[name])
    if name.startswith("T5Gemma"):
        part = transformers.T5GemmaModuleConfig(**SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8})
        settings = cls.config_class(encoder=part, decoder=copy.deepcopy(part), vocab_size=VOCAB, dropout_rate=0.0)
    settings._attn_implementation = "eager"
    torch.manual_seed(0)
    model = cls(settings).train()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name == "final_logits_bias":
            buffer.normal_()
    return model


@pytest.mark.parametrize("name", OWN_LOSSES)
def test_a_loss_of_the_models_own(name: str) -> None:
    stock = build_own(name)
    fused = copy.deepcopy(stock)
    claims, left = fuse(fused, (LINEAR,))
    assert left == [] and [claim.key for claim in claims] == [LINEAR]
    assert claims[0].site.scope.masked == name.endswith("ForMaskedLM")
    inputs = batch()
    if name.endswith("ForMaskedLM"):
        inputs["labels"][:, 4:] = -100
    for extra in ({}, {"return_dict": False}):
        compare(stock, fused, **inputs, **extra)
    claims[0].restore()
    compare(stock, fused, logits=Tensor, **inputs)


# real logits: cross_entropy


def test_cross_entropy_where_logits_exist() -> None:
    stock, fused = pair("Gemma2", keys=(REAL,))
    for extra in ({}, {"num_items_in_batch": 7}, {"return_dict": False}):
        compare(stock, fused, logits=Tensor, **batch(), **extra)


def test_both_keys_and_each_restored_alone() -> None:
    stock = build()
    fused = copy.deepcopy(stock)
    (linear, real), _ = fuse(fused, (LINEAR, REAL))
    compare(stock, fused, **batch())
    linear.restore()
    assert type(fused.lm_head) is nn.Linear and isinstance(fused.loss_function, CausalLMLoss) and real.in_place()
    compare(stock, fused, logits=Tensor, **batch())
    real.restore()
    assert fused.loss_function is stock.loss_function


# what a step allocates


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_options_reach_the_op(monkeypatch) -> None:
    seen = []

    def linear_cross_entropy(*tensors: Tensor, **options: object) -> Tensor:
        seen.append(options)
        return op(*tensors, **options)

    op = head_file.linear_cross_entropy
    given = {"chunk_mb": 1, "keep_mb": 0, "grad_in_forward": False, "accumulate": "native"}
    model = build()
    claims, _ = claim_loss(model, {LINEAR: given})
    claims[0].commit()
    monkeypatch.setattr(head_file, "linear_cross_entropy", linear_cross_entropy)
    model(**batch()).loss.backward()
    assert len(seen) == 1 and given.items() <= seen[0].items()


def test_no_logits_exist_in_a_step() -> None:
    vocab, shape = 4096, (4, 1024)
    model = build(vocab_size=vocab, tie_word_embeddings=True)
    inputs = batch(shape)
    claims, _ = claim_loss(model, {LINEAR: {"chunk_mb": 1, "keep_mb": 0}})
    claims[0].commit()
    model.model.layers = nn.ModuleList()  # attention's scores are large as well, and not the matter here
    with LargestTensor() as seen:
        out = model(**inputs)
        out.loss.backward()
        out.logits.float().detach(), out.logits.shape
    # the op's chunks are of at least 2048 tokens
    assert seen.elements <= 2048 * vocab < shape[0] * shape[1] * vocab
    with LargestTensor() as seen:
        out.logits.argmax(-1)
    assert seen.elements == shape[0] * shape[1] * vocab


# adapters


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_peft(target: str) -> None:
    peft = pytest.importorskip("peft")
    # the adapters' second matrices are zero at first, which would hide half of the gradients
    config = peft.LoraConfig(r=2, target_modules=[target, "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    stock = peft.get_peft_model(build(), config)
    fused = copy.deepcopy(stock)
    claims, left = fuse(fused)
    if target == "lm_head":
        assert claims == [] and "PEFT" in left[0].reason
        compare(stock, fused, logits=Tensor, **batch())
    else:
        assert left == [] and claims[0].paths == ("base_model.model.lm_head",)
        compare(stock, fused, **batch())
        with fused.disable_adapter():
            assert isinstance(fused(**batch()).logits, LogitsOnDemand)


def test_peft_keeps_a_trained_copy_of_the_head() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    stock = peft.get_peft_model(build(), config)
    fused = copy.deepcopy(stock)
    claims, left = fuse(fused)
    assert claims == [] and "PEFT" in left[0].reason
    compare(stock, fused, logits=Tensor, **batch())


# after the forward: what trainers do with the output


def test_prediction_step_of_the_trainer() -> None:
    """Trainer.prediction_step and evaluation_loop, with compute_metrics, in their own helpers."""
    stock, fused = pair()
    found = []
    for model in (stock, fused):
        gathered = EvalLoopContainer(do_nested_concat=True, padding_index=-100)
        for length in (9, 7):
            with torch.no_grad():
                out = model.eval()(**batch((2, length)))
            # as the Trainer leaves out what the model's config says; 5.24 calls it "cache"
            logits = tuple(v for k, v in out.items() if k not in ("loss", "past_key_values", "cache"))
            (logits,) = nested_detach(logits)
            gathered.add(logits)
        found.append(gathered.get_arrays())
    assert type(found[0]) is type(found[1]) and found[1].shape == (4, 9, VOCAB)
    torch.testing.assert_close(torch.from_numpy(found[1]), torch.from_numpy(found[0]))


def test_trainer_from_end_to_end(tmp_path) -> None:
    """Training and evaluation with compute_metrics: log history and weights as stock."""
    rows = [{key: value[0] for key, value in batch((1, length)).items()} for length in (9, 9, 9, 9)]
    seen = []
    for model in pair():
        arguments = transformers.TrainingArguments(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=rows,
            eval_dataset=rows,
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )
        trainer.train()
        metrics = trainer.evaluate()
        seen.append([metrics["eval_loss"], metrics["eval_accuracy"], *(p.detach().sum() for p in model.parameters())])
    torch.testing.assert_close(torch.tensor(seen[1]), torch.tensor(seen[0]), rtol=1e-4, atol=1e-5)


def test_accelerate_on_outputs() -> None:
    operations = pytest.importorskip("accelerate.utils.operations")
    stock, fused = pair()
    wanted = stock(**batch())
    for use in (
        lambda out: operations.convert_to_fp32(out),
        lambda out: operations.gather(out),
        lambda out: operations.pad_across_processes(out, dim=1),
        lambda out: operations.recursively_apply(lambda x: x, out, error_on_other_type=True),
        lambda out: operations.send_to_device(dict(out), torch.device("cpu")),
    ):
        got = use(fused(**batch(), use_cache=False))
        torch.testing.assert_close(got["logits"].detach().clone(), wanted.logits.detach())


def test_half_precision_outputs_are_converted_without_computing() -> None:
    operations = pytest.importorskip("accelerate.utils.operations")
    fused = build().bfloat16()
    fuse(fused)
    out = operations.convert_to_fp32(fused(**batch()))
    assert out["logits"].dtype == torch.float32 and isinstance(out["logits"], LogitsOnDemand)
    assert out["logits"]._source._values is None
    out["logits"].sum().backward()
    assert fused.lm_head.weight.grad is not None


# undoing, copying, saving


def test_restore_leaves_no_trace() -> None:
    model = build()
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    parameters = dict(model.named_parameters())
    loss, state = model.loss_function, set(model.state_dict())
    claims, _ = fuse(model, (LINEAR, REAL))
    assert set(model.state_dict()) == state
    assert all(p is parameters[name] for name, p in model.named_parameters())
    kept = model(**batch())
    for claim in reversed(claims):
        claim.restore()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert type(model.lm_head) is nn.Linear and model.loss_function is loss
    assert type(model(**batch()).logits) is Tensor
    # an output from before can still be read
    assert kept.logits.argmax(-1).shape == (2, 9)


def test_a_loss_function_of_the_instance_comes_back() -> None:
    model = build()
    own = type(model).loss_function.fget(model)
    model.loss_function = own
    claims, _ = fuse(model)
    claims[0].restore()
    assert vars(model)["_loss_function"] is own


def test_saving(tmp_path) -> None:
    stock, fused = pair()
    fused.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.lm_head) is nn.Linear and type(loaded) is type(stock)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, stock.get_parameter(name))


def test_a_claim_notices_that_it_was_undone() -> None:
    model = build()
    claims, _ = fuse(model)
    model.loss_function = lambda *args, **kwargs: None
    assert not claims[0].in_place()


@pytest.mark.all
def test_torch_compile() -> None:
    # 20 s; tests/modules/test_deferred.py compiles a smaller model
    stock, fused = pair("Gemma2")
    compiled = torch.compile(fused, backend="eager")
    inputs = batch()
    wanted, got = stock(**inputs), compiled(**inputs)
    torch.testing.assert_close(got.loss, wanted.loss)
    torch.testing.assert_close(got.logits.clone(), wanted.logits)
    got.loss.backward()
    wanted.loss.backward()
    for p, q in zip(fused.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)
    ids = inputs["input_ids"]
    torch.testing.assert_close(compiled(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_a_copy_is_fused_on_its_own() -> None:
    stock, fused = pair("Gemma2")
    twin = copy.deepcopy(fused)
    compare(stock, twin, **batch())
    assert twin.loss_function is not fused.loss_function
    compare(stock, fused, **batch())


def test_a_wrong_replacement_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_fused.modules.loss import head
    from ds_fused.policies import loss_proof

    claims, _ = claim_loss(build(), {LINEAR: {}, REAL: {}})
    for function in ("linear_cross_entropy", "cross_entropy"):
        right = getattr(head, function)
        monkeypatch.setattr(head, function, lambda *args, right=right, **kwargs: right(*args, **kwargs) * 1.001)
    for cached in (loss_proof.linear_differs, loss_proof.real_differs):
        cached.cache_clear()
    try:
        for claim in claims:
            for dtype in (torch.float32, torch.bfloat16):
                assert "differs" in claim.prove(torch.device("cpu"), dtype)
    finally:
        for cached in (loss_proof.linear_differs, loss_proof.real_differs):
            cached.cache_clear()


def test_the_proof_costs_no_random_numbers_and_runs_once() -> None:
    claims, _ = claim_loss(build(), {LINEAR: {}, REAL: {}})
    state = torch.get_rng_state()
    for claim in claims:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert claim.prove(torch.device("cpu"), dtype) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_reading_names_the_reader(caplog: pytest.LogCaptureFixture) -> None:
    _, fused = pair()
    with caplog.at_level(logging.WARNING, "ds_fused"):
        fused(**batch()).logits.sum()
    assert sum(__file__ in record.getMessage() for record in caplog.records) == 1
