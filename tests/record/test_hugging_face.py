"""Models of Hugging Face, built from their configurations, one example at a time."""

from __future__ import annotations

import pytest
import torch

from pkexplain.gradients.capture import Capture
from pkexplain.gradients.layers import find_layers

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EXAMPLES, LENGTH = 3, 5
TINY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 19}


def bert():
    config = transformers.BertConfig(**TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).double()


def inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 19, (EXAMPLES, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(model, given):
    return model(**given).logits


def loss_of_model(model, given):
    """The model's own loss, a mean over tokens: its share of a batch is a third of that of one example alone."""
    return model(**given, labels=given["input_ids"]).loss


def check(model, given, loss, examples=EXAMPLES, atol=1e-10):
    """Compare what is captured with the gradient and with that of each example alone."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers, blocks = find_layers(model, dict.fromkeys(trained, 0))
    found = torch.zeros(examples, sum(block.numel for block in blocks), dtype=torch.float64)

    def add(position, gradients):
        found[:, blocks[position].span] += gradients.dense()

    with Capture(layers, blocks).during_backward(examples, add):
        loss(model, given).backward()
    parameters = [trained[name] for block in blocks for name in block.parameters]
    whole = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    torch.testing.assert_close(found.sum(0), whole, rtol=1e-10, atol=1e-10)
    for i in range(examples):
        alone = loss(model, {name: value[i : i + 1] for name, value in given.items()})
        parts = torch.autograd.grad(alone, parameters, allow_unused=True, materialize_grads=True)
        one = torch.cat([part.flatten() for part in parts])
        torch.testing.assert_close(found[i] * loss.scale, one, rtol=1e-9, atol=atol)
    return blocks


def test_a_bert_classifier_with_a_mask_and_token_types():
    def loss(model, given):
        return logits_of(model, given).square().sum()

    loss.scale = 1
    check(bert(), {**inputs(), "token_type_ids": torch.tensor([[0, 0, 1, 1, 1]] * EXAMPLES)}, loss)


def test_a_gpt2_with_tied_weights_and_the_models_own_loss():
    config = transformers.GPT2Config(
        n_embd=8,
        n_layer=2,
        n_head=2,
        vocab_size=19,
        n_positions=8,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double()
    loss_of_model.scale = EXAMPLES
    # the model computes its own loss in single precision
    blocks = check(model, {"input_ids": inputs()["input_ids"]}, loss_of_model, atol=1e-7)
    assert ("transformer.wte.weight",) in [block.parameters for block in blocks]
    assert all(block.matrix for block in blocks if block.parameters[0].endswith(("c_attn.weight", "wte.weight")))


def test_lora_records_the_adapters_alone():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.0))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_()

    def loss(model, given):
        return logits_of(model, given).square().sum()

    loss.scale = 1
    blocks = check(model.double(), inputs(), loss)
    assert len(blocks) == 8
    assert all("lora_" in name for block in blocks for name in block.parameters)
