"""One fine-tuning run on one prompted task, as the example scripts start it."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    TorchAoConfig,
    set_seed,
)

from ..adapters import draw_adapter, start_prefix
from ..anatomy import virtual_tokens
from ..checkpoints import last_complete_checkpoint
from ..hub import ModelCardCallback
from ..precision import cpu_multiplies_16_bit
from ..trainer import ZOTrainer
from ..training_args import ZOTrainingArguments
from .data import load_rows
from .encoding import EncodedRows, Form, encode_rows
from .generation import MAX_NEW_TOKENS, GenerateToEvaluate
from .metrics import metrics_for
from .scoring import OptionCollator, option_loss, option_predictions
from .templates import Task, get_task

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Which model, and what of it is trained."""

    model_name_or_path: str = field(metadata={"help": "Model on the Hub or folder written by save_pretrained."})
    head: str = field(
        default="lm",
        metadata={
            "help": "'lm': causal LM, options or answers after a prompt; 'mlm': masked LM, verbalizer at a mask; "
            "'classification': AutoModelForSequenceClassification."
        },
    )
    peft: str = field(default="none", metadata={"help": "'lora', 'prefix', or 'none' for full-parameter training."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter, alpha / r."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Module names that get an adapter, or all-linear."}
    )
    num_virtual_tokens: int = field(default=5, metadata={"help": "Length of the prefix."})
    quantization: str = field(
        default="none", metadata={"help": "Of the frozen base: 'nf4' or 'int8' (bitsandbytes), 'torchao-int8', or 'none'."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the model's weights: 'bfloat16', 'float32', 'float16', or 'auto': bfloat16 where hardware multiplies "
            "in it, else float16 on a GPU and float32 on a CPU."
        },
    )


@dataclass
class DataArguments:
    """Which task, and how much of it."""

    task_name: str = field(metadata={"help": "Name of the task."})
    dataset_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with train.jsonl[.gz] and validation.jsonl[.gz]; default: the Hub's data set."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Rows to train on, drawn by data_seed or seed."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Rows to evaluate on."})
    max_seq_length: int = field(default=512, metadata={"help": "Longer prompts lose the end of their context."})


class _GeneratingTrainer(GenerateToEvaluate, ZOTrainer):
    """Evaluates by greedy answers."""


def load_model(arguments: ModelArguments, task: Task, seed: int = 0) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model with its adapter, drawn by ``seed``, and tokenizer.

    Raises:
        ValueError: for an unknown ``head``, ``peft``, ``dtype`` or ``quantization``.
    """
    classes: dict[str, Any] = {
        "lm": AutoModelForCausalLM,
        "mlm": AutoModelForMaskedLM,
        "classification": AutoModelForSequenceClassification,
    }
    if arguments.peft not in ("none", "lora", "prefix"):
        raise ValueError(f"peft={arguments.peft!r} does not exist; choose 'lora', 'prefix' or 'none'.")
    if arguments.head not in classes:
        raise ValueError(f"head={arguments.head!r} does not exist; choose one of {', '.join(classes)}.")
    dtype = _dtype_of(arguments)
    kwargs: dict[str, Any] = {"dtype": dtype}
    if arguments.head == "classification":
        if task.options is None or not task.texts:
            raise ValueError(f"{task.name} has no plain text form for head='classification'; use head='lm'.")
        kwargs["num_labels"] = len(task.options({}))
    if arguments.head == "mlm" and (task.options is None or arguments.peft == "prefix"):
        raise ValueError(
            f"head='mlm' with task {task.name} and peft={arguments.peft!r}: a masked LM generates no answers and PEFT has no "
            "prefix for it; use head='lm'."
        )
    if arguments.quantization != "none":
        kwargs["quantization_config"] = _quantization(arguments.quantization, dtype)
    model = classes[arguments.head].from_pretrained(arguments.model_name_or_path, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.config.get_text_config()):  # most models have one for both
        config.pad_token_id = tokenizer.pad_token_id  # by which a classifier finds the last token of a padded row
    model.config.use_cache = False
    if arguments.peft == "none":
        return model, tokenizer
    task_type = {"lm": "CAUSAL_LM", "mlm": None, "classification": "SEQ_CLS"}[arguments.head]
    if arguments.peft == "lora":
        config = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            # PEFT knows this one word outside of a list only.
            target_modules="all-linear" if arguments.lora_target_modules == ["all-linear"] else arguments.lora_target_modules,
            task_type=task_type,
        )
        return draw_adapter(get_peft_model(model, config), seed), tokenizer
    prefix = PrefixTuningConfig(num_virtual_tokens=arguments.num_virtual_tokens, task_type=task_type)
    return start_prefix(get_peft_model(model, prefix), seed), tokenizer


def _dtype_of(arguments: ModelArguments) -> torch.dtype:
    if arguments.dtype == "auto":
        chosen = torch.bfloat16
        if torch.cuda.is_available():
            chosen = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        elif not cpu_multiplies_16_bit():
            chosen = torch.float32
        logger.info("Weights are loaded as %s.", str(chosen).removeprefix("torch."))
        return chosen
    if arguments.dtype not in ("bfloat16", "float32", "float16"):
        raise ValueError(f"dtype={arguments.dtype!r} does not exist; choose bfloat16, float32, float16 or auto.")
    return getattr(torch, arguments.dtype)


def _quantization(name: str, compute: torch.dtype) -> Any:
    """The configuration that transformers loads a quantised base with."""
    if name == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    raise ValueError(f"quantization={name!r} does not exist; choose 'nf4', 'int8', 'torchao-int8' or 'none'.")


def _encode(task: Task, split: str, rows: list[Any], tokenizer: Any, form: Form, limit: int) -> EncodedRows:
    encoded = encode_rows(task, rows, tokenizer, limit, form)
    if encoded.shortened:
        logger.warning(
            "%d of %d %s rows of %s were shortened to %d tokens by cutting their %s.",
            encoded.shortened,
            len(encoded),
            split,
            task.name,
            limit,
            task.context,
        )
    return encoded


def _context_length(model: Any, tokenizer: PreTrainedTokenizerBase, task: Task) -> int:
    """Most tokens of a row that model and tokenizer take, less those of a prefix and of the answer to be generated."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    numbered_from = (  # RoBERTa counts its positions from the one after padding's
        m.padding_idx + 1
        for name, m in model.named_modules()
        if isinstance(m, nn.Embedding) and "position" in name and m.padding_idx is not None and m.num_embeddings == positions
    )
    positions -= next(numbered_from, 0)
    return min(positions, tokenizer.model_max_length) - virtual_tokens(model) - (MAX_NEW_TOKENS if task.options is None else 0)


def _by_length(rows: list[Any], encoded: EncodedRows) -> tuple[list[Any], EncodedRows]:
    """Evaluation rows in order of length: batches of equal lengths waste little on padding."""

    def length(i: int) -> int:
        example = encoded[i]
        return max(map(len, example["rows"])) if "rows" in example else len(example["input_ids"])

    order = sorted(range(len(rows)), key=length)
    return [rows[i] for i in order], EncodedRows([encoded[i] for i in order], encoded.shortened)


def build_trainer(model_arguments: ModelArguments, data: DataArguments, training: ZOTrainingArguments, task: Task) -> ZOTrainer:
    """Load data and model and put them into a trainer.

    Raises:
        ValueError: for settings or data that cannot work, naming the field, or file and line.
        FileNotFoundError: if ``dataset_dir`` lacks a split.
    """
    if training.do_predict:
        raise ValueError("do_predict=True wants a test split, and these tasks are scored on validation; use do_eval.")
    set_seed(training.seed)
    seed = training.data_seed if training.data_seed is not None else training.seed
    # Bad data speaks up before a model is loaded.
    train_rows = load_rows(task, "train", data.dataset_dir, data.max_train_samples, seed) if training.do_train else []
    eval_wanted = training.do_eval or training.eval_strategy != "no"
    eval_rows = load_rows(task, "validation", data.dataset_dir, data.max_eval_samples, seed) if eval_wanted else []

    parts = trainer_parts(model_arguments, task, train_rows, eval_rows, data.max_seq_length, training.direction_seed)
    training.remove_unused_columns = False  # encoded rows carry what the collator needs
    return (ZOTrainer if task.options is not None else _GeneratingTrainer)(
        args=training, callbacks=[_card(task, data.dataset_dir)] if training.do_train else None, **parts
    )


def trainer_parts(
    model_arguments: ModelArguments,
    task: Task,
    train_rows: list[Any],
    eval_rows: list[Any],
    max_seq_length: int = 512,
    seed: int = 0,
) -> dict[str, Any]:
    """What a Trainer, first-order or not, is made from besides its arguments: model, encoded rows, loss and metrics.

    For a task without options the trainer must also be a `GenerateToEvaluate`. The training arguments need
    ``remove_unused_columns=False``.

    Args:
        model_arguments: which model, and what of it is trained.
        task: how rows become prompts.
        train_rows: as `load_rows` gives them; empty for no training.
        eval_rows: likewise; they are put in order of length.
        max_seq_length: most tokens of a row.
        seed: of the adapter's first values.

    Raises:
        ValueError: for settings or rows that cannot work.
    """
    model, tokenizer = load_model(model_arguments, task, seed)
    limit = min(max_seq_length, _context_length(model, tokenizer, task))
    form: Form = "answers" if task.options is None else {"lm": "options", "mlm": "mask"}.get(model_arguments.head, "classes")  # type: ignore[assignment]
    train_set = _encode(task, "training", train_rows, tokenizer, form, limit)
    eval_rows, eval_set = _by_length(eval_rows, _encode(task, "evaluation", eval_rows, tokenizer, form, limit))
    hooks: dict[str, Any] = {}
    if form in ("options", "mask"):
        hooks = {
            "data_collator": OptionCollator(tokenizer, model),
            "compute_loss_func": option_loss,
            "preprocess_logits_for_metrics": option_predictions,
        }
    elif form == "answers":
        tokenizer.padding_side = "right"  # labelled batches; generation pads its prompts itself
        hooks = {"data_collator": DataCollatorForSeq2Seq(tokenizer)}
    else:
        hooks = {"data_collator": DataCollatorWithPadding(tokenizer)}
    return {
        "model": model,
        "train_dataset": train_set if train_rows else None,
        "eval_dataset": eval_set if eval_rows else None,
        "processing_class": tokenizer,
        "compute_metrics": metrics_for(task, eval_rows, tokenizer),
        **hooks,
    }


def _card(task: Task, dataset_dir: str | None) -> ModelCardCallback:
    kind = "text-classification" if task.options is not None else "question-answering"
    if dataset_dir is not None:  # what lies in a folder need not be what the Hub has under the task's name
        return ModelCardCallback(dataset_name=f"{Path(dataset_dir).name} (prompts of {task.name})", task_type=kind)
    name = f"{task.family} {task.name}" if task.config else task.name
    return ModelCardCallback(dataset=task.dataset, dataset_name=name, task_type=kind)


_LAST = ("True", "true")  # of --resume_from_checkpoint: the last checkpoint of the output folder


def run_trainer(trainer: ZOTrainer) -> dict[str, Any]:
    """Train, evaluate and write the metrics as the Trainer's own examples do; returns the evaluation's metrics."""
    training: Any = trainer.args
    train_set: Any = trainer.train_dataset
    eval_set: Any = trainer.eval_dataset
    if training.do_train:
        resume = training.resume_from_checkpoint
        result = trainer.train(resume_from_checkpoint=True if resume in _LAST else resume)
        metrics = {**result.metrics, "train_samples": len(train_set), "train_shortened": train_set.shortened}
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    metrics = {}
    if training.do_eval:
        metrics = trainer.evaluate()
        metrics |= {"eval_samples": len(eval_set), "eval_shortened": eval_set.shortened}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training.do_train:
        trainer.create_model_card()  # again, with the evaluation
    return metrics


def main(family: str) -> dict[str, Any]:
    """Parse the command line of an example script and run it; errors of usage end with their message and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    transformers.utils.logging.set_verbosity_warning()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        parser = HfArgumentParser((ModelArguments, DataArguments, ZOTrainingArguments))  # type: ignore[arg-type]
        model_arguments, data, training = parser.parse_args_into_dataclasses()
        task = get_task(data.task_name, family)
        if not (training.do_train or training.do_eval):
            raise ValueError("nothing to do: give --do_train, --do_eval or both.")
        if training.resume_from_checkpoint in _LAST and last_complete_checkpoint(training.output_dir) is None:
            raise ValueError(f"resume_from_checkpoint=True: {training.output_dir} has no checkpoint; leave it out to begin.")
        trainer = build_trainer(model_arguments, data, training, task)
    except (ValueError, OSError, ImportError) as error:  # OSError: a model or data set that is not to be had
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return run_trainer(trainer)
