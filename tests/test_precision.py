"""Differences of losses are not quantised by 16-bit logits, and slow 16-bit products are told."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from hf_zo.precision import LossesSeen, fp32_losses, warn_of_slow_products


def bert(dtype, labels=2, problem=None):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=labels,
        problem_type=problem,
    )
    return BertForSequenceClassification(config).to(dtype).eval()


IDS = torch.arange(24).view(3, 8)
PROBLEMS = {
    "single_label_classification": (3, torch.tensor([0, 2, 1])),
    "regression": (1, torch.tensor([0.3, -0.2, 1.1])),
    "multi_label_classification": (3, torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])),
}
FORMULA = {
    "single_label_classification": functional.cross_entropy,
    "regression": lambda logits, labels: functional.mse_loss(logits.squeeze(), labels),
    "multi_label_classification": functional.binary_cross_entropy_with_logits,
}


def on_grid(x, dtype):
    """Whether a number is one of the 16-bit numbers."""
    return bool((x.float() == x.to(dtype).float()).all())


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_loss_of_a_16_bit_classifier_is_fp32(problem, dtype):
    count, labels = PROBLEMS[problem]
    model = bert(dtype, count, problem)
    labels = labels if labels.dtype == torch.int64 else labels.to(dtype)
    coarse = model(input_ids=IDS, labels=labels).loss
    assert coarse.dtype == dtype  # this is why
    with fp32_losses(model):
        found = model(input_ids=IDS, labels=labels)
    assert found.logits.dtype == dtype
    assert found.loss.dtype == torch.float32
    wide = labels if labels.dtype == torch.int64 else labels.float()
    assert torch.equal(found.loss, FORMULA[problem](found.logits.float(), wide))
    assert not on_grid(found.loss, dtype)


@torch.no_grad()
def test_small_displacements_are_resolved():
    """Of fifty shifts of the logits by less than a bf16 ulp of the loss, every one is seen in fp32, and few in bf16."""
    model = bert(torch.bfloat16)
    labels = torch.tensor([0, 1, 1])
    fine, coarse = [], []
    for i in range(50):
        model.classifier.bias.copy_(torch.tensor([i * 2.0**-12, 0.0]))
        coarse.append(float(model(input_ids=IDS, labels=labels).loss))
        with fp32_losses(model):
            fine.append(float(model(input_ids=IDS, labels=labels).loss))
    assert len(set(fine)) > 3 * len(set(coarse))
    assert max(abs(a - b) for a, b in zip(fine, coarse, strict=True)) < 2.0**-7


@torch.no_grad()
def test_an_fp32_model_is_left_alone():
    model = bert(torch.float32)
    labels = torch.tensor([0, 1, 1])
    plain = model(input_ids=IDS, labels=labels).loss
    with fp32_losses(model):
        assert torch.equal(model(input_ids=IDS, labels=labels).loss, plain)
        # a 16-bit loss that the model's owner computes is meant that way
        assert functional.cross_entropy(torch.ones(2, 3).bfloat16(), torch.tensor([0, 1])).dtype == torch.bfloat16


X, CLASSES = torch.linspace(-2, 2, 12).view(4, 3), torch.tensor([0, 1, 2, 0])
CALLS = {
    "functional.cross_entropy": lambda x: functional.cross_entropy(x, CLASSES),
    "CrossEntropyLoss": lambda x: nn.CrossEntropyLoss()(x, CLASSES),
    "cross_entropy by keyword": lambda x: functional.cross_entropy(input=x, target=CLASSES),
    "log_softmax by keyword": lambda x: torch.log_softmax(input=x, dim=-1),
    "functional.nll_loss": lambda x: functional.nll_loss(x, CLASSES),
    "functional.log_softmax": lambda x: functional.log_softmax(x, dim=-1),
    "LogSoftmax": nn.LogSoftmax(dim=-1),
    "torch.log_softmax": lambda x: torch.log_softmax(x, dim=-1),
    "Tensor.log_softmax": lambda x: x.log_softmax(-1),
    "mse_loss": lambda x: functional.mse_loss(x, torch.zeros_like(x)),
    "binary_cross_entropy_with_logits": lambda x: functional.binary_cross_entropy_with_logits(x, torch.ones_like(x)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_loss_is_widened(call, dtype):
    x = X.to(dtype)
    with fp32_losses(nn.Linear(1, 1).to(dtype)):
        found = CALLS[call](x)
    assert found.dtype == torch.float32
    assert torch.equal(found, CALLS[call](x.float()))


def test_other_functions_stay_in_16_bits():
    x = X.bfloat16()
    with fp32_losses(nn.Linear(1, 1).bfloat16()):
        assert (x @ x.T).dtype == torch.bfloat16
        assert x.softmax(-1).dtype == torch.bfloat16
        assert functional.layer_norm(x, (3,)).dtype == torch.bfloat16


@torch.no_grad()
def test_forward_is_the_same_inside():
    model = bert(torch.bfloat16)
    plain = model(input_ids=IDS).logits
    with fp32_losses(model):
        assert torch.equal(model(input_ids=IDS).logits, plain)


def test_it_ends_with_the_block():
    model = nn.Linear(1, 1).bfloat16()
    with pytest.raises(ZeroDivisionError), fp32_losses(model):
        raise ZeroDivisionError
    assert functional.log_softmax(X.bfloat16(), -1).dtype == torch.bfloat16


def test_a_model_that_takes_its_losses_in_fp32_is_watched_once():
    """A causal language model upcasts by itself; a classifier is watched for good."""

    def watched(loss, seen):
        with fp32_losses(nn.Linear(1, 1).bfloat16(), seen):
            loss()
            return torch.overrides._get_current_function_mode() is not None

    logits, labels = torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 0])
    seen = LossesSeen()
    assert watched(lambda: None, seen)
    assert watched(lambda: functional.cross_entropy(logits.float(), labels), seen)
    assert not watched(lambda: None, seen)
    seen = LossesSeen()
    for _ in range(3):
        assert watched(lambda: functional.cross_entropy(logits, labels), seen)
    assert seen.narrow == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_16_bit_weights_on_a_processor_without_16_bit_products_are_told(monkeypatch, caplog, capability, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    warn_of_slow_products(bert(dtype))
    told = dtype != torch.float32 and capability == "AVX2"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * told
    assert ("dtype=torch.float32" in caplog.text) == told
