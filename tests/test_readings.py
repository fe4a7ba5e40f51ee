"""What is read of the output layer: one row for an example or a token, from labels of three kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import VOCABULARY, tiny_llama
from test_head import Answered, answered_batches, batches, classifier, logits_of, options
from transformers import T5Config, T5ForConditionalGeneration

from hf_zo.adapters import attach
from hf_zo.head import fit_head, fittable, output_layer
from hf_zo.readings import read


def test_of_long_answers_some_tokens_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_zo.readings._PLACES", 40)
    model = attach(tiny_llama(), 4, with_head=True)
    seen = read(model, output_layer(model), answered_batches(), logits_of(model))
    assert len(seen.target) == len(seen.hidden) == 40
    assert len(set(seen.target.tolist())) > 3


@pytest.mark.parametrize("blank", [None, 0, 9], ids=["none", "first", "last"])
def test_free_answers_of_a_model_that_divides_its_scores(blank: int | None) -> None:
    model = attach(tiny_llama(), 4, with_head=True)
    logits, data = logits_of(model), answered_batches()
    if blank is not None:
        data[blank]["labels"].fill_(-100)
    plain, seen = (read(model, output_layer(model), data, said) for said in (logits, lambda batch: logits(batch) / 8))
    torch.testing.assert_close(seen.hidden, plain.hidden / 8)
    torch.testing.assert_close(seen.scores[:, :-1], plain.scores[:, :-1] / 8)


def test_tokens_are_told_by_their_answers() -> None:
    model = attach(tiny_llama(), 4, with_head=True)
    answer = read(model, output_layer(model), answered_batches(), logits_of(model)).answer
    assert answer is not None
    assert answer.unique(return_counts=True)[1].tolist() == [2] * len(Answered())


def of_classes() -> list[Any]:
    return [{**batch, "labels": batch["labels"]["target"]} for batch in batches()]


def test_a_classifier_that_divides_its_scores() -> None:
    model = classifier("bert")
    logits = logits_of(model)
    plain, seen = (read(model, output_layer(model), of_classes(), said) for said in (logits, lambda batch: logits(batch) / 8))
    torch.testing.assert_close(seen.hidden, plain.hidden / 8)
    torch.testing.assert_close(seen.scores, plain.scores / 8)


def test_scores_of_no_position_are_named() -> None:
    model = classifier("llama")
    logits = logits_of(model)
    with pytest.raises(ValueError, match="do not tell which position the model reads"):
        read(model, output_layer(model), of_classes(), lambda batch: 2 * logits(batch))


def test_labels_that_a_model_does_not_shift_are_named() -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    model = get_peft_model(
        T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)), LoraConfig(target_modules=["lm_head"])
    )
    assert fittable(model, None, Answered()) is None
    with pytest.raises(ValueError, match="token ids of a causal language model; set it to 0"):
        fit_head(model, answered_batches(), lambda batch: model(**batch).logits)


def test_options_that_vary_are_named() -> None:
    model = attach(tiny_llama(), 4, with_head=True)
    data = [*batches(), options([torch.tensor([1, 2, 3])], [7, 11, 5])]
    with pytest.raises(ValueError, match="differ in their last token alone and are the same for every row"):
        fit_head(model, data, logits_of(model))


def test_options_of_several_tokens_are_named() -> None:
    model = attach(tiny_llama(), 4, with_head=True)
    data = batches()
    data[0]["labels"]["scored"][0, 1, 3] = data[0]["labels"]["scored"][0, 0, 3]
    with pytest.raises(ValueError, match="differ in their last token alone and are the same for every row"):
        fit_head(model, data, logits_of(model))
