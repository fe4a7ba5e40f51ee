"""ZOTrainingArguments: `TrainingArguments` plus the settings of a forward-only run.

Settings that cannot work without a backward pass are refused here, at construction, with the way out; nothing is silently
ignored. Two defaults depend on the model and are resolved by `ZOTrainer` through `recommended`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from transformers import TrainingArguments

from .directions import Entries
from .estimators import METHODS, hyperparameters
from .runtimes import Restore

Trained = Literal["full", "lora", "prefix"]
"""What is trained: the model's own weights, adapter matrices, or virtual tokens (prefix, prompt and p-tuning)."""

# Learning rate and smoothing radius by method and by what is trained. MeZO: the larger rate of each grid that the
# paper's authors publish for OPT models (large_models/README of their repository). LoRA at 135M parameters bears 30 times
# these for some hundred steps (benchmarks/LEARNING.md).
RECOMMENDED: dict[str, dict[Trained, tuple[float, float]]] = {
    "mezo": {"full": (1e-6, 1e-3), "lora": (1e-4, 1e-2), "prefix": (1e-2, 1e-1)},
    # The authors' 1e-6 times r = 2, for the estimate over r; adapters are not published: MeZO's.
    "lozo": {"full": (2e-6, 1e-3), "lora": (1e-4, 1e-2), "prefix": (1e-2, 1e-1)},
    # Not published: MeZO's rate over C = 4, which is the same effective rate.
    "kerzoo": {"full": (2.5e-7, 1e-3), "lora": (2.5e-5, 1e-2), "prefix": (2.5e-3, 1e-1)},
    # Not published: MeZO's, which the first step of the method is.
    "curvzo": {"full": (1e-6, 1e-3), "lora": (1e-4, 1e-2), "prefix": (1e-2, 1e-1)},
    # The authors' 1e-7 belongs to OPT-1.3B and eps = 1e-4, which bf16 does not resolve; here MeZO's rate over k = 2.
    "bszo": {"full": (5e-7, 1e-3), "lora": (5e-5, 1e-2), "prefix": (5e-3, 1e-1)},
    # Not published: Adam's rate from benchmarks/results/sst2-zo-act.json.
    "zo_act": {"lora": (1e-3, 1e-2)},
}

# A run that starts at the minimum of its output layer starts near a minimum: of 3, 10, 30 and 100 times 1e-4, the 3 ends
# with the least development loss on SST-2 (tuning cells of zo-act-probe in benchmarks/results/learning/encoder/).
AFTER_HEAD = {"zo_act": 0.3}

AUTO_HEAD_SAMPLES = 1000  # hidden states of a training row are a few kilobytes, the fit takes seconds
AUTO_DEPTH_OPTIONS = 5  # the fit of middle blocks takes up to a pass over these rows for each block and option

# Layer-wise optimizers update inside the backward pass, which does not exist here.
_NEEDS_BACKWARD = ("lomo", "adalomo", "layerwise")
# Evaluates, and saves, at other weights than those it trains, which neither probes nor trajectories know.
_TWO_WEIGHTS = "schedule_free"


def recommended(method: str, trained: Trained, after_head: bool = False) -> tuple[float, float]:
    """``(learning_rate, zo_eps)`` for a method and for what it trains, with ``zo_head_samples`` or without."""
    learning_rate, eps = RECOMMENDED[method][trained]
    return learning_rate * (AFTER_HEAD.get(method, 1.0) if after_head else 1.0), eps


def default_optim(method: str) -> str:
    """``optim`` that the recommended rate of a method is for."""
    return "adamw_torch" if method == "zo_act" else "sgd"


def _number(name: str, told: str) -> float:
    try:
        return float(told)
    except ValueError:
        raise ValueError(f"{name}={told!r} is no number.") from None


@dataclass
class ZOTrainingArguments(TrainingArguments):
    """Arguments of `ZOTrainer`; everything `TrainingArguments` has, with these additions and changed defaults.

    Args:
        zo_method (`str`, defaults to `"mezo"`):
            Gradient estimator, a key of `hf_zo.estimators.METHODS`; or `"auto"`: ZO-Act, after the output layer and, for up to
            5 options, middle blocks are fitted (`zo_head_samples`, here 1,000 rows; `zo_fit_depth`) where that can be:
            for classifiers, prompts whose options differ in their last token alone, and (the output layer) rows whose
            ``labels`` are token ids. Either can be turned off: `zo_head_samples=0`, `zo_fit_depth=False`.
        zo_eps (`float`, *optional*):
            Smoothing radius. Default: 1e-3 for full-parameter runs, 1e-2 for LoRA, 1e-1 for prefix and prompt tuning, the
            values of MeZO's published runs. Smaller is less biased and noisier; bf16 weights do not resolve 1e-4.
        learning_rate (`float`, *optional*):
            Default: by method and by what is trained (`hf_zo.training_args.RECOMMENDED`), because the Trainer's own 5e-5
            suits no zeroth-order run. The resolved value stands in the trainer's `args` and its logs.
        optim (`str`, *optional*):
            Default: `"adamw_torch"` for ZO-Act, else `"sgd"`, which streams one tensor at a time and needs no gradient
            memory. Any other optimizer of the Trainer gets `.grad` filled first, which costs a gradient and the
            optimizer's moments: meant for adapters.
        zo_num_directions (`int`, *optional*):
            Directions per step. Default: the method's own (MeZO 1).
        zo_direction (`str`, defaults to `"gaussian"`):
            Entries of a direction: `"gaussian"`, `"rademacher"` (signs; slightly less variance, cheaper to draw), or
            `"factorised"`: matrices along `U Vᵀ / sqrt(zo_direction_rank)`, fresh in every step, other tensors densely (not
            for lozo, whose factors are its own, nor for curvzo).
        zo_direction_rank (`int`, defaults to 16):
            Rank of factorised directions; 16 to 64 is usual. Clipped to a tensor's smaller dimension.
        zo_head_samples (`int`, *optional*):
            Training rows that the output layer is fitted to before the first step, from one forward pass over them; 0, the
            default but of `"auto"`, for none. For classifiers, for language models that choose among options that differ in
            their last token alone, and for causal ones that answer freely, see `hf_zo.head`.
        zo_fit_depth (`bool`, *optional*):
            After the output layer, fit one direction in every second block from a third to three quarters of the depth: for C
            options up to as many forward passes over the `zo_head_samples` rows for each of these blocks, see `hf_zo.depth`.
            With `zo_act` only. Default: `False` but of `"auto"`.
        zo_per_example (`bool`, defaults to `False`):
            Displace every example of a batch along a direction of its own, for mezo and zo_act on adapters of linear layers.
            As many forward passes, and up to as many times less variance as the batch has examples. No weight is written,
            whatever `zo_restore` says.
        zo_seed (`int`, *optional*):
            Key of all directions. Default: `seed`.
        zo_clip (`float`, *optional*):
            Bound on the absolute projected gradient. It replaces `max_grad_norm`, which has no gradient to act on.
        zo_nonfinite (`str`, defaults to `"raise"`):
            What a NaN or infinite loss does: `"raise"`, or `"skip"` the step and count it.
        zo_objective (`str`, defaults to `"loss"`):
            What a probe measures: the training loss, or a registered score (`"accuracy"`, `"f1"`), see
            `hf_zo.objectives`. Scores are step functions of the weights: use a large `zo_eps` and large batches.
        zo_runtime (`str`, defaults to `"torch"`):
            Who computes the forward passes of the training and of evaluation losses: `"torch"`, or `"vllm"`, an engine in this
            process that reads the model's own weights (`hf_zo.runtimes.vllm`; causal language models).
        zo_server (`str`, *optional*):
            Address of a running `hf-zo vllm-serve`, such as `"http://127.0.0.1:8123"`, which then measures the losses of the
            training instead of an engine in this process; only with `zo_runtime="vllm"` (`hf_zo.runtimes.remote`).
        zo_restore (`str`, defaults to `"auto"`):
            How the weights survive the probes: `"copy"`, `"transient"` or `"in_place"`, see `hf_zo.runtimes.torch`.
            With `torch_compile`, `"auto"` means `"copy"` and `"transient"` is refused: a compiled model calls no hooks.
        zo_packing (`bool`, defaults to `True`):
            Spend nothing on padding and compute logits only where a label or an option is read (`hf_zo.packing`). The first
            batch is measured both ways; where its loss would not be the same, batches stay as they come.
        zo_trajectory (`bool`, defaults to `True`):
            Log the losses of every step (`hf_zo.trajectory`) in the output folder, and seal the log in every checkpoint.
        zo_save_weights (`bool`, defaults to `True`):
            `False` makes checkpoints without weights: they hold the trajectory, and resuming replays it from the base model.
            `save_model` at the end still writes the weights.
        zo_parallel (`str`, defaults to `"data"`):
            Work of several processes: `"data"` measures all probes on different data, `"directions"` shares the probes out
            over processes that see the same data. Either way only losses are exchanged.
        lozo_rank (`int`, defaults to 2), lozo_interval (`int`, defaults to 50), lozo_momentum (`float`, defaults to 0.0),
        lozo_scale_by_rank (`bool`, defaults to `True`):
            See `hf_zo.estimators.lozo.LoZO`.
        kerzoo_order (`str`, defaults to `"3"`), kerzoo_constant (`float`, defaults to 4.0), kerzoo_range (`float`, defaults to
        1.0), kerzoo_half_life (`int`, defaults to 1000), kerzoo_rescale (`bool`, defaults to `True`):
            See `hf_zo.estimators.kerzoo.KerZOO`.
        curvzo_ema (`float`, defaults to 0.1), curvzo_mix (`float`, defaults to 0.5), curvzo_reweight (`str`, defaults to
        `"ht"`), curvzo_budget (`float`, *optional*), curvzo_granularity (`str`, defaults to `"block"`), curvzo_floor (`float`,
        defaults to 0.02), curvzo_debias (`bool`, defaults to `False`):
            See `hf_zo.estimators.curvzo.CurvZO`.
        bszo_samples (`int`, defaults to 3), bszo_prior, bszo_noise (`str` or `float`, default to `"auto"`), bszo_adaptive
        (`bool`, defaults to `True`), bszo_cache (`bool`, defaults to `True`), bszo_two_sided (`bool`, defaults to `False`):
            See `hf_zo.estimators.bszo.BSZO`.
        zo_act_rank (`int`, defaults to 8), zo_act_samples (`int`, defaults to 64), zo_act_targets (`str`, defaults to
        `"all-linear"`), zo_act_exclude_first_token (`bool`, defaults to `False`):
            See `hf_zo.adapters.activation_adapter`.
        zo_act_basis (`str`, defaults to `"activations"`):
            What the frozen factor of ZO-Act's adapter is made from: `"activations"` of training rows (the method), or
            `"random"`, an orthonormal basis drawn by `zo_seed`: the control that tells what the activations contribute.

    Raises:
        ValueError: for a setting that cannot work, naming the field and what to do instead.
    """

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Initial learning rate. Default: recommended for the method and for what is trained."},
    )
    optim: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "'sgd' streams the update tensor by tensor; any other optimizer gets `.grad` filled first. Default: "
            "adamw_torch for zo_act, else sgd."
        },
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Must stay 0: there is no gradient. Use zo_clip."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: a non-finite loss raises or is counted, see zo_nonfinite."}
    )

    zo_method: str = field(default="mezo", metadata={"help": f"Gradient estimator: {', '.join(METHODS)}, or auto."})
    zo_eps: float | None = field(default=None, metadata={"help": "Smoothing radius. Default: by what is trained."})
    zo_num_directions: int | None = field(default=None, metadata={"help": "Directions per step. Default: the method's."})
    zo_direction: Entries = field(default="gaussian", metadata={"help": "'gaussian', 'rademacher' or 'factorised'."})
    zo_direction_rank: int = field(default=16, metadata={"help": "Rank of factorised directions."})
    zo_head_samples: int | None = field(
        default=None,
        metadata={"help": "Training rows that the output layer is fitted to first. Default: 0; auto: 1000 if it can."},
    )
    zo_fit_depth: bool | None = field(
        default=None,
        metadata={"help": "After the output layer, fit a direction in middle blocks. Default: no; auto: if it can."},
    )
    zo_per_example: bool = field(default=False, metadata={"help": "A direction of its own for every example of a batch."})
    zo_seed: int | None = field(default=None, metadata={"help": "Key of all directions. Default: seed."})
    zo_clip: float | None = field(default=None, metadata={"help": "Bound on the absolute projected gradient."})
    zo_nonfinite: str = field(default="raise", metadata={"help": "On a non-finite loss: 'raise' or 'skip'."})
    zo_objective: str = field(default="loss", metadata={"help": "What a probe measures: 'loss', 'accuracy', 'f1'."})
    zo_runtime: str = field(default="torch", metadata={"help": "Who computes the forward passes: 'torch' or 'vllm'."})
    zo_server: str | None = field(default=None, metadata={"help": "Address of a running `hf-zo vllm-serve`."})
    zo_restore: Restore = field(default="auto", metadata={"help": "'auto', 'copy', 'transient' or 'in_place'."})
    zo_packing: bool = field(default=True, metadata={"help": "No padding and no unread logits, where losses stay the same."})
    zo_trajectory: bool = field(default=True, metadata={"help": "Write trajectory.safetensors beside the checkpoints."})
    zo_save_weights: bool = field(
        default=True, metadata={"help": "False: checkpoints hold the trajectory instead of weights and optimizer state."}
    )
    zo_parallel: str = field(default="data", metadata={"help": "Over processes: 'data' or 'directions'."})

    lozo_rank: int = field(default=2, metadata={"help": "Rank of the perturbation."})
    lozo_interval: int = field(default=50, metadata={"help": "Steps that share the right factor."})
    lozo_momentum: float = field(default=0.0, metadata={"help": "Momentum in the subspace; 0 for none."})
    lozo_scale_by_rank: bool = field(default=True, metadata={"help": "Estimate over the rank, as in the paper."})

    kerzoo_order: str = field(default="3", metadata={"help": "Kernel: '1', '3', '5', or 'richardson'."})
    kerzoo_constant: float = field(default=4.0, metadata={"help": "C, which multiplies the effective learning rate."})
    kerzoo_range: float = field(default=1.0, metadata={"help": "Range of radii that the schedule approaches from 1."})
    kerzoo_half_life: int = field(default=1000, metadata={"help": "Steps in which the distance to the range halves."})
    kerzoo_rescale: bool = field(default=True, metadata={"help": "Stretch the kernel with the range."})

    curvzo_ema: float = field(default=0.1, metadata={"help": "Share of a new score in its average; 0 draws uniformly."})
    curvzo_mix: float = field(default=0.5, metadata={"help": "Adaptive budget: effective support (1) or entropy (0)."})
    curvzo_reweight: str = field(default="ht", metadata={"help": "'ht' divides by the probability; or 'partial', 'none'."})
    curvzo_budget: float | None = field(default=None, metadata={"help": "Expected number selected. Default: adaptive."})
    curvzo_granularity: str = field(default="block", metadata={"help": "'block' (a tensor) or 'coordinate'."})
    curvzo_floor: float = field(default=0.02, metadata={"help": "Least probability of being selected."})
    curvzo_debias: bool = field(default=False, metadata={"help": "Take the probability out of the scores."})

    bszo_samples: int = field(default=3, metadata={"help": "Observations per step, at least zo_num_directions."})
    bszo_prior: str = field(default="auto", metadata={"help": "Prior standard deviation, or 'auto': sqrt(parameters/1e6)."})
    bszo_noise: str = field(default="auto", metadata={"help": "Initial noise standard deviation, or 'auto': the prior's."})
    bszo_adaptive: bool = field(default=True, metadata={"help": "Learn the noise."})
    bszo_cache: bool = field(default=True, metadata={"help": "Reuse the loss of an axis that is observed again."})
    bszo_two_sided: bool = field(default=False, metadata={"help": "Central instead of forward differences."})

    zo_act_rank: int = field(default=8, metadata={"help": "Rank of the adapter."})
    zo_act_samples: int = field(default=64, metadata={"help": "Training sequences that the basis is made from."})
    zo_act_targets: str = field(
        default="all-linear", metadata={"help": "'all-linear', 'one-block', or module names with commas between them."}
    )
    zo_act_exclude_first_token: bool = field(default=False, metadata={"help": "Leave the first token out of the basis."})
    zo_act_basis: str = field(default="activations", metadata={"help": "'activations', or 'random' as a control."})

    def __post_init__(self) -> None:
        self.zo_auto = self.zo_method == "auto"  # the trainer decides on the fits
        if not self.zo_auto and self.zo_method not in METHODS:
            raise ValueError(f"zo_method={self.zo_method!r} does not exist; choose one of auto, {', '.join(METHODS)}.")
        for name in ("learning_rate", "zo_eps", "zo_clip"):
            if isinstance(getattr(self, name), str):  # YAML reads 1e-4 as a text
                setattr(self, name, _number(name, getattr(self, name)))
        if self.zo_auto:
            self.zo_method = "zo_act"
        else:
            self.zo_head_samples, self.zo_fit_depth = self.zo_head_samples or 0, bool(self.zo_fit_depth)
        if self.optim is None:
            self.optim = default_optim(self.zo_method)
        self._check_domains()
        self._check_methods()
        self._check_backward_only()
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            if getattr(self, name, None):
                warnings.warn(f"{name} only serves a backward pass and is turned off.", stacklevel=3)
                setattr(self, name, False)
        super().__post_init__()
        if self.zo_auto:  # until a trainer decides, so that copies of the arguments stay what they are
            self.zo_method = "auto"
        if self.device.type == "mps":
            raise ValueError("The device is mps, which has no fp64, in which losses are pooled; set use_cpu=True.")
        if self.n_gpu > 1:
            raise ValueError(
                f"n_gpu={self.n_gpu}: DataParallel copies the model in every forward. Start one process per GPU with "
                "`torchrun` or `accelerate launch`, or choose one GPU with CUDA_VISIBLE_DEVICES."
            )

    def _check_domains(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "zo_nonfinite": ("raise", "skip"),
            "zo_restore": get_args(Restore),
            "zo_parallel": ("data", "directions"),
            "zo_runtime": ("torch", "vllm"),
            "zo_act_basis": ("activations", "random"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} does not exist; choose one of {', '.join(allowed)}.")
        if self.zo_restore == "transient" and (self.torch_compile or self.torch_compile_backend or self.torch_compile_mode):
            raise ValueError(
                "zo_restore='transient' works by hooks, which a compiled model does not call; with torch_compile use 'auto' or "
                "'copy', which mutate the weights in place and put them back."
            )
        if self.zo_runtime == "vllm":
            self._check_vllm()
        elif self.zo_server is not None:
            raise ValueError(
                f"zo_server={self.zo_server!r} measures losses only with zo_runtime='vllm'; set it, or unset this."
            )
        if not self.zo_save_weights:
            self._check_weightless()
        if self.learning_rate is not None and not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be a finite number, not negative.")
        for name, least in (("zo_act_rank", 1), ("zo_act_samples", 1), ("zo_head_samples", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.zo_act_basis == "random" and (self.zo_act_samples != 64 or self.zo_act_exclude_first_token):
            raise ValueError(
                "zo_act_basis='random' looks at no sequence: zo_act_samples and zo_act_exclude_first_token would be ignored; "
                "leave them at their defaults."
            )
        if self.zo_fit_depth and (self.zo_method != "zo_act" or not (self.zo_head_samples or self.zo_auto)):
            raise ValueError(
                f"zo_fit_depth=True goes on from the fit of the output layer, in ZO-Act's adapter: it wants zo_method='zo_act' "
                f"(it is {self.zo_method!r}) and zo_head_samples above 0 (it is {self.zo_head_samples})."
            )
        if self.zo_seed is not None and not -(2**63) <= self.zo_seed < 2**63:
            raise ValueError(f"zo_seed={self.zo_seed} does not fit into 64 bits.")

    def _check_weightless(self) -> None:
        if not self.zo_trajectory:
            raise ValueError("zo_save_weights=False keeps the trajectory instead of weights; leave zo_trajectory at True.")
        if self.save_only_model:
            raise ValueError("zo_save_weights=False leaves out what save_only_model=True keeps alone; unset one of them.")

    def _check_vllm(self) -> None:
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            raise ValueError("torch_compile=True compiles the model, whose layers zo_runtime='vllm' calls singly; unset it.")
        if self.bf16:
            raise ValueError(
                "bf16=True autocasts around the model, which zo_runtime='vllm' does not follow; load the model in bfloat16."
            )
        if self.zo_head_samples:
            raise ValueError(
                "zo_head_samples puts an adapter on the output layer, which zo_runtime='vllm' has not; set it to 0."
            )
        if self.zo_server is None:
            return
        if not self.zo_trajectory:
            raise ValueError("zo_server follows the run by its trajectory; leave zo_trajectory at True.")
        if self.zo_restore == "in_place":
            raise ValueError("zo_restore='in_place' drifts, so that a zo_server would part from the trainer; use 'auto'.")

    def _check_methods(self) -> None:
        known = hyperparameters(self.zo_method)
        if self.zo_num_directions is not None and "num_directions" not in known:
            raise ValueError(f"zo_num_directions does nothing for zo_method={self.zo_method!r}; leave it unset.")
        if self.zo_per_example:
            self._check_per_example(known)
        if self.zo_direction_rank != 16 and self.zo_direction != "factorised":
            raise ValueError(
                f"zo_direction_rank={self.zo_direction_rank} does nothing for zo_direction={self.zo_direction!r}; set "
                "zo_direction='factorised' or leave it at 16."
            )
        METHODS[self.zo_method]({}, **self.estimator_kwargs())  # each method knows the domains of its settings
        for f in fields(self):
            owner = next((m for m in METHODS if f.name.startswith(f"{m}_")), self.zo_method)
            foreign = owner != self.zo_method and f.default is not MISSING
            if foreign and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"{f.name}={getattr(self, f.name)!r} belongs to zo_method={owner!r}, but zo_method is "
                    f"{self.zo_method!r}; leave it at its default or change zo_method."
                )

    def _check_per_example(self, known: Mapping[str, Any]) -> None:
        for wrong, what in (
            ("per_example" not in known, f"zo_method={self.zo_method!r}: mezo and zo_act have it"),
            (self.zo_runtime != "torch", "zo_runtime='vllm', whose layers see sequences in an order of the engine's"),
            (self.torch_compile, "torch_compile=True: a compiled model calls no hooks"),
            (self.zo_objective not in ("loss", "accuracy"), f"zo_objective={self.zo_objective!r}, a score of whole batches"),
        ):
            if wrong:
                raise ValueError(f"zo_per_example=True does not go with {what}. Unset one of them.")

    def _check_backward_only(self) -> None:
        optim = str(getattr(self.optim, "value", self.optim))
        if self.fp16:
            raise ValueError("fp16=True scales losses for a backward pass; use bf16=True, or load the model in float16.")
        if self.deepspeed:
            raise ValueError("deepspeed replaces optimizer.step, so no update would happen; start with `accelerate launch`.")
        if self.fsdp:
            raise ValueError("fsdp shards the weights that directions address; use plain data parallel.")
        if self.neftune_noise_alpha is not None:
            raise ValueError("neftune_noise_alpha adds noise in training mode only, and probes run in eval mode; unset it.")
        if self.max_grad_norm:
            raise ValueError(f"max_grad_norm={self.max_grad_norm}: there is no gradient to clip; set it to 0 and use zo_clip.")
        if any(part in optim for part in _NEEDS_BACKWARD):
            raise ValueError(f"optim={self.optim!r} updates inside the backward pass; use 'sgd' or 'adamw_torch'.")
        if optim.startswith(_TWO_WEIGHTS):
            raise ValueError(
                f"optim={optim!r} saves other weights than it trains, so that no trajectory leads to them; use a schedule."
            )
        if self.optim_args and optim == "sgd":
            raise ValueError(
                f"optim_args={self.optim_args!r} has no effect on the streamed 'sgd'. For momentum pass "
                "optimizer_cls_and_kwargs=(torch.optim.SGD, {...}) to the trainer."
            )

    @property
    def direction_seed(self) -> int:
        """Key of all directions: `zo_seed`, or `seed` as it stands, which a search over hyperparameters may change."""
        return self.seed if self.zo_seed is None else self.zo_seed

    def estimator_kwargs(self) -> dict[str, Any]:
        """The method's keyword arguments: common fields without ``zo_``, the method's own without its prefix.

        Fields that are unset are left to the method's default.
        """
        kwargs: dict[str, Any] = {}
        method = "zo_act" if self.zo_auto else self.zo_method
        for name in hyperparameters(method):
            for prefix in ("zo", method):
                value = getattr(self, f"{prefix}_{name}", None)
                if value is not None:
                    kwargs[name] = value
        return {**kwargs, "seed": self.direction_seed}
