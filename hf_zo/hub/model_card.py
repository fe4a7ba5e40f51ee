"""Model cards: facts of a finished run, gathered where they were measured, put into `template.md`.

The facts are plain JSON, written to ``run_facts.json`` beside the card, so that `hf-zo card` can render them again. A number
that was not measured in the run does not appear; an optimizer is described by what it did, since there was no backward pass.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel

from .._version import __version__
from ..anatomy import base_of, label_number
from ..estimators import METHODS, hyperparameters
from ..trajectory import SEALED_NAME

if TYPE_CHECKING:
    from ..trainer import ZOTrainerMixin

logger = logging.getLogger(__name__)

FACTS_NAME = "run_facts.json"
FIGURE_NAME = "training_curve.png"
_TEMPLATE = Path(__file__).parent / "template.md"
_NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "samples", "shortened", "num_tokens")

_BIBTEX: dict[str, tuple[str, str, str, int]] = {
    "mezo": ("MeZO", "Fine-Tuning Language Models with Just Forward Passes", "2305.17333", 2023),
    "lozo": (
        "LoZO",
        "Enhancing Zeroth-Order Fine-Tuning for Language Models with Low-Rank Structures",
        "2410.07698",
        2024,
    ),
    "kerzoo": (
        "KerZOO",
        "KerZOO: Kernel Function Informed Zeroth-Order Optimization for Accurate and Accelerated LLM Fine-Tuning",
        "2505.18886",
        2025,
    ),
    "curvzo": (
        "CurvZO",
        "CurvZO: Adaptive Curvature-Guided Sparse Zeroth-Order Optimization for Efficient LLM Fine-Tuning",
        "2603.21725",
        2026,
    ),
    "bszo": ("BSZO", "Bayesian Subspace Gradient Estimation for Zeroth-Order Optimization of LLMs", "2601.01452", 2026),
    "zo_act": (
        "ZO-Act",
        "ZO-Act: Efficient Zeroth-Order Fine-Tuning via One-Shot Activation-Informed Low-Rank Subspaces",
        "2607.01125",
        2026,
    ),
}


def facts_of(trainer: ZOTrainerMixin, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a run can tell of itself: JSON types only.

    Args:
        trainer: during or after training.
        about: what the trainer cannot know or did not measure: ``model_name``, ``dataset`` (id on the Hub), ``dataset_name``,
            ``task_type``, ``license``, ``language``, ``tags``, ``peak_memory`` and ``inference_memory`` in MB.
    """
    args, history = trainer.args, trainer.state.log_history
    model, optimizer = trainer.model, trainer._zo_optimizer
    adapter = isinstance(model, PeftModel)
    base = base_of(model)
    method = args.zo_method
    inner = optimizer.inner
    rule = "the estimate itself (SGD), one tensor at a time"
    if inner is not None:
        kind = type(inner).__name__
        rule = "Adam's moments of the estimate, decoupled decay" if kind == "AdamW" else f"{kind} on the estimate"
    readers = args.world_size if args.zo_parallel == "data" else 1  # processes that read rows of their own
    settings = {
        **{key: value for key, value in {**hyperparameters(method), **args.estimator_kwargs()}.items() if value is not None},
        **(_basis_settings(trainer) if method == "zo_act" else {}),
        "learning rate": max(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups),
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "update": rule,
        "weight decay": max(group["weight_decay"] for group in optimizer.param_groups),
        "examples per step": trainer._train_batch_size * args.gradient_accumulation_steps * readers,
        "steps": trainer.state.global_step,
        "data seed": args.data_seed if args.data_seed is not None else args.seed,
        "dtype of the model": str(next(base.parameters()).dtype).removeprefix("torch."),
    }
    if args.zo_direction != "factorised":
        del settings["direction_rank"]  # nothing was made of it
    if args.zo_head_samples:
        settings |= trainer._fits or {}
    if args.zo_runtime != "torch":
        settings["runtime"] = args.zo_runtime
    kept = trainer._kept
    if kept is not None:
        settings["weights"] = f"those after step {kept}, the best evaluation"
    trained = next((e for e in reversed(history) if "train_runtime" in e), {})
    evaluated = next((e for e in reversed(history) if "eval_loss" in e and kept in (None, e["step"])), {})
    return {
        "method": method,
        "perturbs": METHODS[method].perturbs,
        "base": getattr(base.config, "_name_or_path", "") or "",
        "num_labels": label_number(base),
        "task_type": _TASK_TYPES.get(type(base).__name__.rpartition("For")[2], "text-generation"),
        "quantized": getattr(base.config, "quantization_config", None) is not None,
        "adapter": _adapter_facts(model) if adapter else None,
        "model_class": type(base).__name__,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": settings,
        "forward_passes": optimizer.forward_passes,
        "skipped_steps": optimizer.skipped_steps,
        "seconds": trained.get("train_runtime"),
        "device": args.device.type,
        "losses": [[e["step"], e["loss"]] for e in history if "loss" in e],
        "evaluations": [
            {key: value for key, value in e.items() if key == "step" or key.startswith("eval_")}
            for e in history
            if "eval_loss" in e
        ],
        "results": {
            key.removeprefix("eval_"): value
            for key, value in evaluated.items()
            if key.startswith("eval_") and not key.endswith(_NOT_METRICS) and isinstance(value, int | float)
        },
        "eval_samples": _rows_of(trainer.eval_dataset) if evaluated else None,
        "versions": {"hf_zo": __version__, **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}},
        **(about or {}),
    }


_TASK_TYPES = {
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MultipleChoice": "multiple-choice",
    "MaskedLM": "fill-mask",
    "ImageClassification": "image-classification",
    "AudioClassification": "audio-classification",
}


def _rows_of(data: Any) -> int | None:
    """How many rows a data set has; None if it does not know, or there are several sets."""
    return len(data) if hasattr(data, "__len__") and not isinstance(data, Mapping) else None


def _basis_settings(trainer: ZOTrainerMixin) -> dict[str, Any]:
    """What ZO-Act's adapter was made by; of one that was passed, its rank."""
    if trainer._brings_adapter:
        return {"rank": _adapter_facts(trainer.model)["rank"]}
    names = ("rank", "basis", "samples", "targets", "exclude_first_token")
    return {name: getattr(trainer.args, f"zo_act_{name}") for name in names}


def _adapter_facts(model: Any) -> dict[str, Any]:
    config = model.active_peft_config
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return {"type": kind, "rank": getattr(config, "r", None), "alpha": getattr(config, "lora_alpha", None)}


def write_card(facts: Mapping[str, Any], folder: str | Path) -> ModelCard:
    """Write card, figure and facts of a run into its folder.

    Args:
        facts: what `facts_of` gathered.
        folder: the run's; a ``trajectory.safetensors`` in it is mentioned.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS_NAME).write_text(json.dumps(facts, indent=1) + "\n")
    figure = FIGURE_NAME if facts["losses"] and _draw(facts, folder / FIGURE_NAME) else None
    card = render(facts, figure, SEALED_NAME if (folder / SEALED_NAME).is_file() else None)
    card.save(folder / "README.md")
    return card


def render(facts: Mapping[str, Any], figure: str | None, trajectory: str | None) -> ModelCard:
    """The card as an object; `write_card` saves it."""
    published = _BIBTEX.get(facts["method"])
    perturbs = facts.get("perturbs") or METHODS[facts["method"]].perturbs
    name = facts.get("model_name") or f"{Path(facts['base']).name or 'model'}-{facts['method'].replace('_', '-')}"
    on_hub = bool(facts["base"]) and not Path(facts["base"]).exists()
    shown = f"`{_shown(facts['base'])}`" if facts["base"] else f"A {facts['model_class']}"
    cost = [("forward passes of a batch", facts["forward_passes"]), ("steps skipped", facts["skipped_steps"] or None)]
    if facts["seconds"]:
        seconds = facts["seconds"]
        took = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"
        cost.append(("training", f"{took} on {facts['device']}"))
    if facts.get("peak_memory") and facts.get("inference_memory"):
        peak, alone = facts["peak_memory"], facts["inference_memory"]
        cost.append(
            ("peak memory of a step", f"{peak:,.0f} MB; one forward pass alone {alone:,.0f} MB ({peak / alone:.2f} times)")
        )
    adapter = facts["adapter"]
    trained = f"{facts['trained_parameters']:,} parameters were trained"
    everything = facts.get("parameters", facts["trained_parameters"])
    of_all = ", all that the model has." if facts["trained_parameters"] == everything else f" of {everything:,}."
    trained += f", a {adapter['type']} adapter." if adapter else of_all
    results = [(key, f"{value:.4g}") for key, value in facts["results"].items()]
    return ModelCard.from_template(
        _card_data(facts, name),
        template_path=str(_TEMPLATE),
        name=name,
        base_link=f"[{facts['base']}](https://huggingface.co/{facts['base']})" if on_hub else shown,
        dataset=facts.get("dataset_name") or facts.get("dataset"),
        method={
            "title": published[0] if published else facts["method"],
            "arxiv": published[2] if published else None,
            "perturbs": perturbs,
            "bibtex": _bibtex(facts["method"], *published[1:]) if published else None,
        },
        trained=trained,
        results=results,
        eval_samples=facts["eval_samples"],
        figure=figure,
        settings=[(key, _text(value)) for key, value in facts["settings"].items()],
        cost=[(what, value) for what, value in cost if value is not None],
        usage=_usage(facts, name),
        trajectory=trajectory,
        quantized=facts.get("quantized", False),
        replay_from="the base model" + (" and the adapter, which holds the basis," if facts["method"] == "zo_act" else ""),
        replay_base=_shown(facts["base"]) or "BASE",
        limits=(
            "One run with one seed: zeroth-order training varies from seed to seed. "
            + ("Evaluated on the data named above only; " if results else "Not evaluated; ")
            + "not tested for other tasks, languages or prompts, for safety, or for bias. What the base model is not fit for, "
            "this model is not fit for."
        ),
        versions=", ".join(f"{key} {value}" for key, value in facts["versions"].items()),
    )


def _card_data(facts: Mapping[str, Any], name: str) -> ModelCardData:
    dataset_name: str = facts.get("dataset_name") or facts.get("dataset") or ""
    evaluated = facts["results"] and dataset_name
    task_type, told = facts.get("task_type", "text-generation"), facts.get("tags") or []
    return ModelCardData(
        model_name=name if evaluated else None,
        library_name="peft" if facts["adapter"] else "transformers",
        base_model=facts["base"] if facts["base"] and not Path(facts["base"]).exists() else None,
        license=facts.get("license") or _license_of(facts["base"]),
        language=facts.get("language"),
        datasets=[facts["dataset"]] if facts.get("dataset") else None,
        tags=["zeroth-order", "forward-only", "hf_zo", facts["method"], *([told] if isinstance(told, str) else told)],
        pipeline_tag=task_type,
        eval_results=[
            EvalResult(
                task_type=task_type,
                dataset_type=facts.get("dataset") or "local",  # files that are on no Hub
                dataset_name=dataset_name,
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in facts["results"].items()
        ]
        if evaluated
        else None,
    )


def _license_of(base: str) -> str | None:
    """The licence that the base model's own card declares, None where it cannot be read."""
    try:
        if Path(base).is_dir():
            found = metadata_load(Path(base) / "README.md") if (Path(base) / "README.md").is_file() else None
            return (found or {}).get("license")
        return ModelCard.load(base).data.get("license") if base else None
    except (OSError, ValueError, HfHubHTTPError) as error:  # offline, private, no card
        logger.info("The licence of %s could not be read: %s", base, error)
        return None


def _usage(facts: Mapping[str, Any], name: str) -> str:
    cls, base = facts["model_class"], _shown(facts["base"]) or "BASE"
    if facts["adapter"]:
        labels = f", num_labels={facts['num_labels']}" if facts.get("num_labels") else ""
        return (
            f"from peft import PeftModel\nfrom transformers import {cls}\n\n"
            f'model = {cls}.from_pretrained("{base}"{labels})\nmodel = PeftModel.from_pretrained(model, "{name}")'
        )
    return f'from transformers import {cls}\n\nmodel = {cls}.from_pretrained("{name}")'


def _shown(base: str) -> str:
    """A Hub id as it is; of a local folder its name: paths of one machine mean nothing elsewhere."""
    return Path(base).name if Path(base).exists() or base.startswith(("/", ".")) else base


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "yes" if value is True else "no" if value is False else str(value)


def _bibtex(key: str, title: str, arxiv: str, year: int) -> str:
    return (
        f"@misc{{{key}{year},\n  title = {{{title}}},\n  year = {{{year}}},\n  eprint = {{{arxiv}}},\n"
        "  archivePrefix = {arXiv}\n}"
    )


def _draw(facts: Mapping[str, Any], file: Path) -> bool:
    """Loss of the probes, and every metric that was evaluated more than once; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("The card has no figure: pip install 'hf-zo[plot]'.")
        return False
    figure = Figure(figsize=(7, 3.6))
    axis = figure.subplots()
    axis.plot(*_columns(facts["losses"]), linewidth=1, label="loss of the probes")
    evaluations: Sequence[Mapping[str, float]] = facts["evaluations"]
    for key in facts["results"]:
        points = [(e["step"], e[f"eval_{key}"]) for e in evaluations if f"eval_{key}" in e]
        if points:
            axis.plot(*_columns(points), marker="o", label=f"evaluation {key}")
    axis.set_xlabel("step")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    return True


def _columns(points: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*points, strict=True)]
