"""What a model consists of, with PEFT's wrapper around it or without: base, blocks, heads, adapted layers, virtual tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def base_of(model: nn.Module) -> Any:
    """The model itself, without the wrapper that PEFT puts around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by name, from front to back: its longest list of modules of one kind; empty if it has none."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len({type(b) for b in m}) == 1]
    name, blocks = max(lists, key=lambda found: len(found[1]), default=("", ()))
    return {f"{name}.{i}".lstrip("."): block for i, block in enumerate(blocks)}


def lm_head_of(model: nn.Module) -> nn.Module | None:
    """The output layer of a language model, under PEFT too; None if the model has none."""
    return getattr(base_of(model), "get_output_embeddings", lambda: None)()


def lm_head_name(model: nn.Module) -> str | None:
    """Name of a language model's output layer; None if the model has none."""
    head = lm_head_of(model)
    return None if head is None else next(name for name, module in model.named_modules() if module is head)


def new_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Heads of a classifier, by name: modules that pre-training has not seen. A language model has none.

    Of a model of transformers it is all beside its body, such as DeBERTa's pooler or the `qa_outputs` of question answering.
    """
    if lm_head_of(model) is not None:
        return {}
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if isinstance(body, nn.Module) and body is not model:
        beside = {name: module for name, module in model.named_children() if module is not body}
        return {name: module for name, module in beside.items() if next(module.parameters(), None) is not None}
    named = {name: getattr(model, name, None) for name in ("classifier", "score")}
    return {name: module for name, module in named.items() if isinstance(module, nn.Module)}


def label_number(base: nn.Module) -> int | None:
    """How many labels a classifier was made for, which a base model alone does not tell; None for other models."""
    return getattr(getattr(base, "config", None), "num_labels", None) if new_heads(base) else None


def shifts_labels(model: nn.Module) -> bool:
    """Whether position i of the logits predicts label i + 1, as in causal language models, with images or without."""
    base = base_of(model)
    if {cls.__name__ for cls in type(base).__mro__} & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return True
    shifts = LOSS_MAPPING.get(getattr(base, "loss_type", "")) is ForCausalLMLoss
    return shifts and not getattr(getattr(base, "config", None), "is_encoder_decoder", False)


def virtual_tokens(model: nn.Module | None) -> int:
    """How many virtual tokens an adapter puts before every text (prefix, prompt and p-tuning); 0 without such an adapter."""
    return getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0


def active_adapter(model: nn.Module) -> str | None:
    """Name of the adapter that passes read, the first where there are several; None without any."""
    if not getattr(model, "peft_config", None):
        return None
    active: Any = model.active_adapters
    return (active() if callable(active) else active)[0]  # of a model that transformers put the adapter on, a method


def adapted_layers(model: nn.Module) -> Iterable[tuple[str, LoraLayer]]:
    """Names and layers that carry the active adapter."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and module.active_adapters[0] in module.lora_A
    ]


def adapted_lm_head(model: nn.Module) -> LoraLayer | None:
    """The LoRA layer on a language model's output layer, if there is one."""
    head = lm_head_of(model)
    return head if isinstance(head, LoraLayer) else None


def factors_of(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """A, r x d_in, and B, d_out x r, of a layer."""
    name = layer.active_adapters[0]
    return cast(torch.Tensor, layer.lora_A[name].weight), cast(torch.Tensor, layer.lora_B[name].weight)
