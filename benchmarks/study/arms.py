"""The arms of the study as data: one row each, with where its learning rate comes from.

A rate is the one that is published or, where none is, what this package recommends; a grid multiplies every arm's by the
same factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_zo.training_args import RECOMMENDED

FORMS: dict[str, dict[str, Any]] = {
    "base": {"peft": "none"},
    "lora": {"peft": "lora"},
    "lora-all": {"peft": "lora", "lora_target_modules": ["all-linear"]},
    "full": {"peft": "none"},
}
"""What of the model is trained, as fields of `ModelArguments`. ``base`` is for arms that train nothing, or that bring an
adapter of their own; their results stand in the table of every other form."""

FORWARDS_PER_FIRST_ORDER_STEP = 3
"""A forward and a backward pass, which costs two."""


@dataclass(frozen=True)
class Arm:
    """One row.

    Attributes:
        label: as in the tables.
        kind: ``zo`` trains by `ZOTrainer`, ``first-order`` by the transformers Trainer, ``probe`` fits the output layer (and
            middle blocks), ``prompt`` trains nothing.
        rates: learning rate by form; the forms that the arm has. 1 where nothing is trained.
        source: where the rates come from.
        settings: fields of `ZOTrainingArguments` (of `TrainingArguments` for a first-order arm). With ``zo_head_samples``, LoRA
            adapts the output layer of a language model too.
        demonstrations: worked examples in the prompt, at most.
        curvzo_share: ``curvzo_budget`` as a share of the trained tensors, whose number depends on the model.
    """

    label: str
    kind: Literal["zo", "first-order", "probe", "prompt"]
    rates: Mapping[str, float]
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    demonstrations: int = 0
    curvzo_share: float | None = None

    @property
    def fits_head(self) -> bool:
        """Whether it fits the output layer."""
        return bool(self.settings.get("zo_head_samples"))

    @property
    def needs_options(self) -> bool:
        """Whether it fits middle blocks, whose directions tell options apart; tasks with free answers have none."""
        return bool(self.settings.get("zo_fit_depth"))


WITHOUT_OPTIONS = {"depth-probe": "linear-probe", "auto": "zo-act-probe"}
"""What an arm that needs options is where a task has none."""

WITHOUT_STEPS = {"auto": "depth-probe"}
"""What an arm is where its budget ends before its first step."""


def _zo(
    label: str, method: str, source: str, rates_of: str | None = None, curvzo_share: float | None = None, **settings: Any
) -> Arm:
    known = RECOMMENDED[rates_of or method]
    rates = {"lora": known["lora"][0], "lora-all": known["lora"][0], "full": known["full"][0]}
    return Arm(label, "zo", rates, source, {"zo_method": method, **settings}, curvzo_share=curvzo_share)


def _zo_act(label: str, source: str, rate: float = RECOMMENDED["zo_act"]["lora"][0], **settings: Any) -> Arm:
    return Arm(label, "zo", {"base": rate}, source, {"zo_method": "zo_act", **settings})


_MEZO = "published for OPT (MeZO's README: the larger of each grid)"
_AS_MEZO = "not published: MeZO's"

_OF_ADAPTERS = dict.fromkeys(("lora", "lora-all"), RECOMMENDED["mezo"]["lora"][0])
_PROBE = {"zo_head_samples": 1000}

ARMS: dict[str, Arm] = {
    "zero-shot": Arm("zero-shot", "prompt", {"base": 1.0}, "nothing is trained"),
    "in-context": Arm("in-context, up to 8 examples", "prompt", {"base": 1.0}, "nothing is trained", demonstrations=8),
    # The adapter that ZO-Act attaches stays zero: its basis need not be calibrated.
    "linear-probe": Arm(
        "linear probe",
        "probe",
        {"base": 1.0},
        "the ridge is cross-validated",
        {"zo_method": "zo_act", "zo_act_basis": "random", **_PROBE},
    ),
    "depth-probe": Arm(
        "linear probe, and middle blocks",
        "probe",
        {"base": 1.0},
        "the ridges are cross-validated",
        {"zo_method": "zo_act", "zo_act_basis": "random", "zo_fit_depth": True, **_PROBE},
    ),
    "first-order": Arm(
        "first-order AdamW",
        "first-order",
        {"lora": 3e-4, "lora-all": 3e-4, "full": 2e-5},
        "LoRA: between the 2e-4 and 5e-4 of its paper (arXiv 2106.09685); full: BERT's middle rate (arXiv 1810.04805)",
        {"optim": "adamw_torch"},
    ),
    "mezo": _zo("MeZO", "mezo", _MEZO),
    "lozo": _zo("LoZO", "lozo", "full: the authors' 1e-6 times r; LoRA not published: MeZO's"),
    "lozo-m": _zo("LoZO-M", "lozo", "as LoZO; momentum of the authors' RoBERTa code", lozo_momentum=0.7),
    "kerzoo": _zo("KerZOO", "kerzoo", "not published: MeZO's over C, the same effective rate"),
    "mezo-per-example": Arm(
        "MeZO, directions of examples",
        "zo",
        _OF_ADAPTERS,
        _MEZO,
        {"zo_per_example": True},
    ),
    "mezo-probe": Arm("MeZO after a linear probe", "zo", _OF_ADAPTERS, _MEZO, _PROBE),
    "mezo-n3": _zo("KerZOO without kernel (MeZO n=3)", "mezo", _MEZO, zo_num_directions=3),
    "richardson": _zo("Richardson", "kerzoo", _AS_MEZO, rates_of="mezo", kerzoo_order="richardson", zo_num_directions=1),
    "curvzo": _zo("CurvZO", "curvzo", _AS_MEZO),
    "curvzo-no-reweighting": _zo("CurvZO, no reweighting", "curvzo", _AS_MEZO, curvzo_reweight="none"),
    # Equal scores would give the adaptive budget N, dense MeZO, so this arm fixes it: half of the tensors.
    "curvzo-uniform": _zo("CurvZO, uniform, half", "curvzo", _AS_MEZO, curvzo_share=0.5, curvzo_ema=0.0),
    "bszo": _zo("BSZO", "bszo", "MeZO's over k; the authors' 1e-7 belongs to OPT-1.3B"),
    "bszo-fixed-noise": _zo("BSZO, non-adaptive", "bszo", "as BSZO", bszo_adaptive=False),
    "zo-act": _zo_act("ZO-Act", "not published: this package's own for Adam"),
    "zo-act-random": _zo_act("ZO-Act, random basis", "as ZO-Act", zo_act_basis="random"),
    "zo-act-per-example": _zo_act("ZO-Act, directions of examples", "as ZO-Act", zo_per_example=True),
    "zo-act-one-block": _zo_act(
        "ZO-Act, one vector on one block, directions of examples",
        "of a single run: 2e-2",
        rate=2e-2,
        zo_act_targets="one-block",
        zo_act_rank=1,
        zo_per_example=True,
    ),
    "zo-act-probe": _zo_act(
        "ZO-Act after a linear probe", "of this package, a tenth of ZO-Act's: it starts near a minimum", rate=1e-4, **_PROBE
    ),
    # What zo_method="auto" is where it can fit both: written out, as a cell's passes depend on it.
    "auto": _zo_act("the recipe, zo_method=auto", "as ZO-Act after a linear probe", rate=1e-4, zo_fit_depth=True, **_PROBE),
    "zo-act-sgd": _zo_act("ZO-Act, SGD", "not published: MeZO's for LoRA", rate=RECOMMENDED["mezo"]["lora"][0], optim="sgd"),
}
