"""Greedy answers to prompts, for evaluation by `Trainer.evaluate` and for the F1 objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 32


def _prompts(inputs: Mapping[str, Any], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of every row before its first label, padded on the left."""
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"].bool(), inputs["labels"]
    rows = []
    for row, kept, label in zip(ids, mask, labels, strict=True):
        answered = (label != -100).nonzero()
        end = int(answered[0]) if len(answered) else len(row)
        rows.append(row[:end][kept[:end]])
    width = max(map(len, rows))
    out = ids.new_full((len(rows), width), pad)
    out_mask = torch.zeros_like(out)
    for i, row in enumerate(rows):
        out[i, width - len(row) :] = row
        out_mask[i, width - len(row) :] = 1
    return out, out_mask


def generate(
    model: nn.Module, inputs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = MAX_NEW_TOKENS
) -> torch.Tensor:
    """Greedy continuations of the prompts of a labelled batch, up to the first new line, [B, new tokens]."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    prompts, mask = _prompts(inputs, pad)
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning and adapter.peft_type != "PREFIX_TUNING" and not mask.all():
        # PEFT drops the positions of such prompts, so padding between virtual tokens and text would count.
        rows = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(len(prompts))]
        answers = [generate(model, row, tokenizer, max_new_tokens)[0] for row in rows]
        return nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=pad)
    new_line = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    stops = [i for i in (tokenizer.eos_token_id, *new_line) if i is not None]
    out = model.generate(
        input_ids=prompts,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=stops,
        use_cache=True,
    )
    return out[:, prompts.shape[1] :]


def decode_answers(ids: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Text of the first line of each row; -100 is dropped."""
    rows = [[int(i) for i in row if i >= 0] for row in ids]
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip().split("\n")[0].strip() for row in rows]


def greedy_answers(model: nn.Module, inputs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the model answers to the prompts of a labelled batch."""
    return decode_answers(generate(model, inputs, tokenizer), tokenizer)


def reference_answers(inputs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The answers that the labels of a batch spell."""
    return decode_answers(inputs["labels"], tokenizer)


class GenerateToEvaluate:
    """Mixin for a Trainer whose predictions are generated answers: ``class T(GenerateToEvaluate, ZOTrainer)``.

    ``predictions`` of ``compute_metrics`` are then token ids, padded with -100; the loss is that of the reference answer.
    """

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss of the reference answers, generated token ids, labels."""
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)  # type: ignore[misc]
        if prediction_loss_only:
            return loss, None, None
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
            unwrapped = self.accelerator.unwrap_model(model)  # type: ignore[attr-defined]
            return loss, generate(unwrapped, inputs, self.processing_class), inputs["labels"]  # type: ignore[attr-defined]
