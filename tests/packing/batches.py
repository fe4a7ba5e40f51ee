"""Tiny causal models of many kinds, and batches for them."""

from __future__ import annotations

import torch
import transformers
from tasks.tiny import ROWS
from torch import nn

from hf_zo.packing import Packing
from hf_zo.tasks import TASKS, OptionCollator, encode_rows, option_loss, option_predictions
from hf_zo.tasks.scoring import option_scores

SHAPE = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
ROTARY = dict(**SHAPE, num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3)
CAUSAL = {
    "llama": lambda: transformers.LlamaConfig(**ROTARY),
    "tied": lambda: transformers.LlamaConfig(**ROTARY, tie_word_embeddings=True),
    "capped": lambda: transformers.Gemma2Config(**ROTARY, final_logit_softcapping=3.0, sliding_window=4096),
    "sliding": lambda: transformers.Gemma3TextConfig(**ROTARY, sliding_window=16),
    "scaled": lambda: transformers.GraniteConfig(**ROTARY, logits_scaling=5.0),
    "multiplied": lambda: transformers.CohereConfig(**ROTARY, logit_scale=0.3),
    "experts": lambda: transformers.Qwen3MoeConfig(
        **ROTARY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    ),
    "absolute": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
    "learned": lambda: transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=32,
        init_std=0.3,
    ),
    "recurrent": lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def causal(name: str, **more) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CAUSAL[name](), **more).eval()


def token_batch(lengths=(3, 11, 6, 2, 9), left=False, seed=0) -> dict[str, torch.Tensor]:
    """Padded rows of which the first tokens, and some others, carry no label."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, n in enumerate(lengths):
        where = slice(width - n, width) if left else slice(0, n)
        ids[i, where] = torch.randint(3, 64, (n,), generator=generator)
        mask[i, where] = 1
        labels[i, where] = torch.where(torch.rand(n, generator=generator) < 0.7, ids[i, where], -100)
        labels[i, where.start] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_by(model: nn.Module, packing: Packing, **extra):
    def loss(batch):
        with torch.no_grad(), packing.reading(batch) as inputs:
            return model(**inputs, **extra).loss

    return loss


def option_batch(name: str, tokenizer, model) -> dict:
    task, row = TASKS[name], dict(ROWS[name][0])
    longer = {**row, task.context: str(row[task.context]) + " It was very long and it rained for days."}
    if name == "record":
        longer["entities"] = [*row["entities"], "Eve"]
    form = "mask" if tokenizer.mask_token_id is not None else "options"
    return OptionCollator(tokenizer, model)(encode_rows(task, [row, longer, row], tokenizer, 256, form).examples)


def option_losses(model, packing, scores=None):
    def loss(batch):
        with torch.no_grad(), packing.reading(dict(batch)) as inputs:
            labels = inputs["labels"]
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        if scores is not None:
            scores.append((option_scores(outputs.logits, labels), option_predictions(outputs.logits, labels), outputs.logits))
        return option_loss(outputs, labels)

    return loss
