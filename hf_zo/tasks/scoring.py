"""Option scoring: the length-normalised log-probability of every option, as loss and as prediction.

The loss of an example is the cross-entropy over its options' mean token log-probabilities, the prediction is the best option;
this is how MeZO and its successors train and evaluate classification (arXiv 2305.17333, appendix on implementation).
Everything goes through public hooks of the Trainer, so it works with a first-order Trainer just as well:

    ZOTrainer(model, args, data_collator=OptionCollator(tokenizer), compute_loss_func=option_loss,
              preprocess_logits_for_metrics=option_predictions, compute_metrics=...)

Where the options of a prompt differ in their last token alone (single tokens, or Yes and No on a new line) they are read from
one row; otherwise every option gets a row of its own. The same records describe a masked language model, whose position is that
of the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..anatomy import base_of, virtual_tokens


class OptionLabels(dict):
    """The labels of a batch of B examples as a mapping that the Trainer can gather.

    Keys: ``target`` [B], number of the right option; ``scored`` [B, N, 4], one record (row, position, token, option) for
    every token of every option, padded with -100. Positions count from the end of the row (1 is the last), which stays right
    when an adapter prepends virtual tokens; they name the place whose logits predict the token.
    """

    def __getitem__(self, key: Any) -> Any:
        # The Trainer counts label tokens by slicing and takes a TypeError for "cannot be counted".
        if not isinstance(key, str):
            raise TypeError(f"OptionLabels is indexed by name, not by {key!r}")
        return super().__getitem__(key)


class OptionCollator:
    """Pads encoded examples to a batch, on the tokenizer's padding side.

    Args:
        tokenizer: gives the padding token and side.
        model: adds ``position_ids`` when padding left, if its forward takes them; models with absolute positions would
            otherwise count the padding. With virtual tokens (prompt tuning), for which PEFT drops them, it pads right.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None) -> None:
        self.left = tokenizer.padding_side == "left" and not virtual_tokens(model)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad = 0 if pad is None else pad
        takes = inspect.signature(base_of(model).forward).parameters if model is not None else {}
        self.with_positions = self.left and "position_ids" in takes

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make the batch: `OptionLabels`, ``input_ids``, ``attention_mask`` and, where needed, ``position_ids``."""
        if not all("rows" in example for example in examples):
            raise ValueError(
                "OptionCollator reads the rows that encode_rows makes, and an example has none. A Trainer drops them unless "
                "its arguments have remove_unused_columns=False."
            )
        rows = [row for example in examples for row in example["rows"]]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(width - len(row), width) if self.left else slice(0, len(row))
            ids[i, where] = torch.tensor(row, dtype=torch.long)
            mask[i, where] = 1
        most = max(len(example["scored"]) for example in examples)
        scored = torch.full((len(examples), most, 4), -100, dtype=torch.long)
        first_row = 0
        for b, example in enumerate(examples):
            for n, (row, position, token, option) in enumerate(example["scored"]):
                from_end = (0 if self.left else width - len(example["rows"][row])) + len(example["rows"][row]) - position
                scored[b, n] = torch.tensor((first_row + row, from_end, token, option))
            first_row += len(example["rows"])
        target = torch.tensor([example["target"] for example in examples], dtype=torch.long)
        # Labels come first: the Trainer takes the first tensor's length for the number of examples.
        batch: dict[str, Any] = {
            "labels": OptionLabels(target=target, scored=scored),
            "input_ids": ids,
            "attention_mask": mask,
        }
        if self.with_positions:
            batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return batch


def option_scores(logits: torch.Tensor, labels: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean token log-probability of every option, fp32 [B, K]; -inf where an example has fewer than K options.

    K is the most tokens that an example's options have together: to know the most options, a GPU would have to be waited for.

    Args:
        logits: [rows, positions, vocabulary].
        labels: see `OptionLabels`.
    """
    row, from_end, token, option = labels["scored"].unbind(-1)
    valid = option >= 0
    examples = torch.arange(len(row), device=logits.device)[:, None].expand_as(row)[valid]
    option, token = option[valid], token[valid]
    picked = logits[row[valid], logits.shape[1] - from_end[valid]].float()
    log_prob = picked.gather(-1, token[:, None]).squeeze(-1) - picked.logsumexp(-1)
    k = labels["scored"].shape[1]  # an option has at least one token, so this is enough
    total = torch.zeros(len(row), k, device=logits.device).index_put((examples, option), log_prob, accumulate=True)
    length = torch.zeros_like(total).index_put((examples, option), torch.ones_like(log_prob), accumulate=True)
    return torch.where(length > 0, total / length.clamp(min=1), -torch.inf)


def option_loss(outputs: Any, labels: Mapping[str, torch.Tensor], num_items_in_batch: Any = None) -> torch.Tensor:
    """Mean cross-entropy over options; a ``compute_loss_func`` of the Trainer."""
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return nn.functional.cross_entropy(option_scores(logits, labels), labels["target"])


def option_predictions(logits: Any, labels: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Best option of every example [B]; a ``preprocess_logits_for_metrics`` of the Trainer."""
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    return option_scores(logits, labels).argmax(-1)
