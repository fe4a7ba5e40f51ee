"""What is read of the output layer: one row for an example or a token, from labels of three kinds."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import VOCABULARY, tiny_llama
from test_head import Answered, answered_batches, batches, logits_of, options
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
