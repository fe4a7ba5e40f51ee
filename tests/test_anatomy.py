"""What a model consists of is found under PEFT's wrapper as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tasks.tiny import make_bpe, make_wordpiece, tiny
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_zo.anatomy import (
    adapted_layers,
    adapted_lm_head,
    base_of,
    blocks_of,
    factors_of,
    label_number,
    lm_head_name,
    lm_head_of,
    new_heads,
    shifts_labels,
    virtual_tokens,
)
from hf_zo.trainer import trained_kind

CAUSAL = ("llama", "gpt2", "opt")


def model_of(kind: str) -> Any:
    return tiny(kind, make_bpe() if kind in CAUSAL else make_wordpiece())


def with_lora(*targets: str) -> Any:
    return get_peft_model(model_of("llama"), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=list(targets)))


class Renamed(LlamaForCausalLM):
    """A language model by its parent's name."""


def test_which_models_shift_their_labels() -> None:
    assert all(shifts_labels(model_of(kind)) for kind in CAUSAL)
    assert not shifts_labels(model_of("mlm"))
    assert not shifts_labels(model_of("classes"))
    assert shifts_labels(with_lora("q_proj"))
    assert shifts_labels(Renamed(model_of("llama").config))
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    seeing, talking = CLIPVisionConfig(**shape, image_size=8, patch_size=4), LlamaConfig(**shape, vocab_size=8)
    assert shifts_labels(LlavaForConditionalGeneration(LlavaConfig(vision_config=seeing, text_config=talking)))
    two_texts = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    assert not shifts_labels(T5ForConditionalGeneration(two_texts))


def test_base_and_blocks() -> None:
    plain = model_of("llama")
    assert base_of(plain) is plain
    adapted = with_lora("q_proj")
    assert type(base_of(adapted)) is type(plain)
    assert list(blocks_of(plain)) == ["model.layers.0", "model.layers.1"]
    assert list(blocks_of(adapted)) == ["base_model.model.model.layers.0", "base_model.model.model.layers.1"]
    assert list(blocks_of(model_of("gpt2"))) == ["transformer.h.0", "transformer.h.1"]
    assert blocks_of(torch.nn.Linear(2, 2)) == {}


def test_output_layers_and_new_heads() -> None:
    plain = model_of("llama")
    assert lm_head_of(plain) is plain.lm_head
    assert lm_head_name(plain) == "lm_head"
    assert lm_head_name(with_lora("q_proj")) == "base_model.model.lm_head"
    assert (new_heads(plain), label_number(plain)) == ({}, None)
    classifier = model_of("classes")
    assert (lm_head_of(classifier), lm_head_name(classifier)) == (None, None)
    assert list(new_heads(classifier)) == ["classifier"]
    assert label_number(classifier) == classifier.config.num_labels == 2


def test_adapted_layers_and_their_factors() -> None:
    model = with_lora("q_proj", "lm_head")
    layers = dict(adapted_layers(model))
    assert [name.rsplit(".", 1)[-1] for name in layers] == ["q_proj", "q_proj", "lm_head"]
    assert adapted_lm_head(model) is layers["base_model.model.lm_head"]
    assert adapted_lm_head(with_lora("q_proj")) is None
    a, b = factors_of(layers["base_model.model.lm_head"])
    assert (a.shape, b.shape) == ((2, 16), (model.config.vocab_size, 2))
    assert not b.any()


@pytest.mark.parametrize(
    ("config", "tokens", "kind"),
    [
        (None, 0, "full"),
        (LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), 0, "lora"),
        (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), 3, "prefix"),
        (PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), 5, "prefix"),
    ],
)
def test_virtual_tokens_decide_what_is_trained(config: Any, tokens: int, kind: str) -> None:
    model = model_of("llama") if config is None else get_peft_model(model_of("llama"), config)
    assert (virtual_tokens(model), trained_kind(model)) == (tokens, kind)
    assert virtual_tokens(None) == 0
