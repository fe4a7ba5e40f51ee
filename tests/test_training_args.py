"""ZOTrainingArguments: what cannot work is refused at construction, by name and with the way out."""

import warnings
from dataclasses import dataclass, field, fields, replace

import pytest
from transformers import HfArgumentParser

from hf_zo import ZOTrainingArguments
from hf_zo.estimators import METHODS
from hf_zo.estimators.base import Estimator
from hf_zo.estimators.mezo import MeZO
from hf_zo.training_args import RECOMMENDED, recommended


@pytest.fixture
def make(tmp_path):
    def build(cls=ZOTrainingArguments, **settings):
        return cls(output_dir=str(tmp_path), use_cpu=True, **settings)

    return build


NAN = float("nan")


@pytest.mark.parametrize(
    ("settings", "field_name", "advice"),
    [
        # no backward pass to act on
        ({"fp16": True}, "fp16", "bf16=True"),
        ({"deepspeed": "ds.json"}, "deepspeed", "accelerate launch"),
        ({"fsdp": "full_shard"}, "fsdp", "data parallel"),
        ({"fsdp": True}, "fsdp", "data parallel"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha", "unset"),
        ({"neftune_noise_alpha": 0.0}, "neftune_noise_alpha", "unset"),
        ({"max_grad_norm": 1.0}, "max_grad_norm", "zo_clip"),
        ({"optim": "lomo"}, "optim", "sgd"),
        ({"optim": "adalomo"}, "optim", "sgd"),
        ({"optim": "galore_adamw_layerwise"}, "optim", "sgd"),
        ({"optim": "schedule_free_adamw"}, "optim", "use a schedule"),
        ({"optim_args": "momentum=0.9"}, "optim_args", "optimizer_cls_and_kwargs"),
        # outside the domain
        ({"zo_direction": "cauchy"}, "zo_direction", "rademacher"),
        ({"zo_direction_rank": 8}, "zo_direction_rank", "factorised"),
        ({"zo_direction_rank": 0, "zo_direction": "factorised"}, "zo_direction_rank", "at least 1"),
        ({"zo_method": "lozo", "zo_direction": "factorised"}, "zo_direction", "'gaussian'"),
        ({"zo_method": "curvzo", "zo_direction": "factorised"}, "zo_direction", "'gaussian'"),
        ({"zo_server": "http://127.0.0.1:8123"}, "zo_server", "zo_runtime='vllm'"),
        ({"zo_server": "http://127.0.0.1:8123", "zo_runtime": "vllm", "zo_trajectory": False}, "zo_server", "zo_trajectory"),
        ({"zo_server": "http://127.0.0.1:8123", "zo_runtime": "vllm", "zo_restore": "in_place"}, "zo_restore", "auto"),
        ({"zo_save_weights": False, "save_only_model": True}, "zo_save_weights", "save_only_model"),
        ({"zo_nonfinite": "ignore"}, "zo_nonfinite", "skip"),
        ({"zo_restore": "undo"}, "zo_restore", "transient"),
        ({"zo_restore": "transient", "torch_compile": True}, "zo_restore", "copy"),
        ({"zo_parallel": "model"}, "zo_parallel", "directions"),
        ({"zo_runtime": "sglang"}, "zo_runtime", "vllm"),
        ({"zo_runtime": "vllm", "torch_compile": True}, "torch_compile", "zo_runtime='vllm'"),
        ({"zo_runtime": "vllm", "bf16": True}, "bf16", "bfloat16"),
        ({"zo_method": "adam"}, "zo_method", "mezo"),
        ({"zo_method": "adam", "zo_num_directions": 2}, "zo_method", "mezo"),
        ({"zo_eps": 0.0}, "zo_eps", "positive"),
        ({"zo_eps": -1e-3}, "zo_eps", "positive"),
        ({"zo_eps": NAN}, "zo_eps", "positive"),
        ({"zo_clip": 0.0}, "zo_clip", "positive"),
        ({"zo_clip": -1.0}, "zo_clip", "positive"),
        ({"zo_clip": NAN}, "zo_clip", "positive"),
        ({"lozo_rank": 4}, "lozo_rank", "zo_method is 'mezo'"),
        ({"zo_method": "lozo", "kerzoo_order": "5"}, "kerzoo_order", "zo_method is 'lozo'"),
        ({"zo_method": "lozo", "zo_num_directions": 2}, "zo_num_directions", "leave it unset"),
        ({"zo_method": "lozo", "lozo_rank": 0}, "lozo_rank", "at least 1"),
        ({"zo_method": "curvzo", "curvzo_budget": 0.5}, "curvzo_budget", "at least 1"),
        ({"zo_method": "bszo", "zo_num_directions": 4}, "bszo_samples", "one per axis"),
        ({"zo_method": "bszo", "bszo_prior": "wide"}, "bszo_prior", "'auto'"),
        ({"zo_method": "zo_act", "zo_act_rank": 0}, "zo_act_rank", "at least 1"),
        ({"zo_method": "zo_act", "zo_act_samples": 0}, "zo_act_samples", "at least 1"),
        ({"zo_act_rank": 4}, "zo_act_rank", "zo_method is 'mezo'"),
        ({"zo_head_samples": -1}, "zo_head_samples", "at least 0"),
        ({"zo_head_samples": 8, "zo_runtime": "vllm"}, "zo_head_samples", "set it to 0"),
        ({"zo_method": "zo_act", "zo_act_basis": "pca"}, "zo_act_basis", "random"),
        ({"zo_method": "zo_act", "zo_act_basis": "random", "zo_act_samples": 8}, "zo_act_basis", "zo_act_samples"),
        ({"zo_act_basis": "random"}, "zo_act_basis", "zo_method is 'mezo'"),
        ({"zo_eps": float("inf")}, "zo_eps", "positive"),
        ({"zo_num_directions": 0}, "zo_num_directions", "at least 1"),
        ({"zo_seed": 2**63}, "zo_seed", "64 bits"),
        ({"learning_rate": float("inf")}, "learning_rate", "finite"),
        ({"learning_rate": -1e-6}, "learning_rate", "negative"),
        ({"zo_clip": "much"}, "zo_clip", "is no number"),
        ({"zo_method": "mzo"}, "zo_method", "choose one of auto, mezo"),
        ({"learning_rate": NAN}, "learning_rate", "negative"),
    ],
)
def test_what_cannot_work_is_refused(make, settings, field_name, advice):
    with pytest.raises(ValueError, match=rf"^{field_name}.*{advice}"):
        make(**settings)


class OneSided(Estimator):
    """A method without ``num_directions``."""

    name = "onesided"
    forwards = 2

    def estimate(self, step, oracle):
        raise NotImplementedError


@dataclass
class WithSecondMethod(ZOTrainingArguments):
    second_rank: int = field(default=2)
    second_list: list = field(default_factory=list)


def test_directions_of_a_method_that_has_none_are_refused(make, monkeypatch):
    monkeypatch.setitem(METHODS, "onesided", OneSided)
    make(zo_method="onesided")
    with pytest.raises(ValueError, match=r"zo_num_directions.*'onesided'"):
        make(zo_method="onesided", zo_num_directions=2)


def test_a_hyperparameter_of_another_method_is_refused(make, monkeypatch):
    monkeypatch.setitem(METHODS, "second", MeZO)
    make(WithSecondMethod)
    make(WithSecondMethod, zo_method="second", second_rank=4)
    with pytest.raises(ValueError, match=r"^second_rank=4 belongs to zo_method='second', but zo_method is 'mezo'"):
        make(WithSecondMethod, second_rank=4)


def test_several_devices_in_one_process_are_refused(make, monkeypatch):
    monkeypatch.setattr(ZOTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"n_gpu=2.*torchrun"):
        make()


@pytest.mark.parametrize("setting", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_turned_off_with_a_warning(make, setting):
    with pytest.warns(UserWarning, match=rf"{setting}.*turned off"):
        args = make(**{setting: True})
    assert getattr(args, setting) is False


def test_numbers_that_yaml_reads_as_texts(make):
    arguments = make(learning_rate="1e-4", zo_eps="1e-3", zo_clip="1e0")
    assert (arguments.learning_rate, arguments.zo_eps, arguments.zo_clip) == (1e-4, 1e-3, 1.0)


def test_defaults(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        args = make()
    assert args.learning_rate is None  # resolved by the trainer, which knows the model
    assert args.zo_eps is None
    assert args.optim == "sgd"
    assert make(zo_method="zo_act").optim == "adamw_torch"
    assert make(zo_method="zo_act", optim="sgd").optim == "sgd"
    assert args.max_grad_norm == 0.0
    assert args.lr_scheduler_type == "linear"
    assert args.gradient_checkpointing is False
    assert args.logging_nan_inf_filter is False
    assert args.zo_seed is None
    assert args.direction_seed == args.seed == 42
    assert (args.zo_method, args.zo_direction, args.zo_objective) == ("mezo", "gaussian", "loss")
    assert (args.zo_nonfinite, args.zo_restore, args.zo_parallel) == ("raise", "auto", "data")
    assert args.zo_num_directions is None
    assert args.zo_clip is None


def test_seed_of_the_directions(make):
    assert make(seed=7).direction_seed == make(seed=7).estimator_kwargs()["seed"] == 7
    assert make(seed=7, zo_seed=0).direction_seed == 0
    assert make(seed=7, zo_seed=9).direction_seed == 9
    auto = replace(make(zo_method="auto"), seed=8)
    assert (auto.zo_method, auto.zo_auto) == ("auto", True)
    assert auto.to_dict()["zo_method"] == "auto"
    again = replace(make(seed=7), seed=8)  # as a sweep makes them
    assert again.direction_seed == again.estimator_kwargs()["seed"] == 8


@pytest.mark.parametrize("learning_rate", [0, 0.0, 1e-3])
def test_learning_rates_that_are_allowed(make, learning_rate):
    assert make(learning_rate=learning_rate).learning_rate == learning_rate


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "rmsprop"])
def test_optimizers_that_are_allowed(make, optim):
    assert make(optim=optim).optim == optim


def test_optim_args_reach_other_optimizers(make):
    assert make(optim="adamw_torch", optim_args="weight_decay=0.1").optim_args == "weight_decay=0.1"


def test_command_line():
    line = """--output_dir out --use_cpu true --learning_rate 2e-6 --zo_method mezo --zo_eps 1e-2 --zo_num_directions 4
    --zo_direction rademacher --zo_seed 11 --zo_clip 3.5 --zo_nonfinite skip --zo_objective accuracy --zo_restore copy
    --zo_parallel directions --optim adamw_torch"""
    (args,) = HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(line.split())
    assert args.learning_rate == 2e-6
    assert (args.zo_method, args.zo_eps, args.zo_num_directions) == ("mezo", 1e-2, 4)
    assert (args.zo_direction, args.zo_seed, args.zo_clip) == ("rademacher", 11, 3.5)
    assert (args.zo_nonfinite, args.zo_objective) == ("skip", "accuracy")
    assert (args.zo_restore, args.zo_parallel) == ("copy", "directions")
    assert args.optim == "adamw_torch"


def test_command_line_defaults_equal_those_of_the_constructor(make):
    (parsed,) = HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", "true"])
    built = make()
    for f in fields(ZOTrainingArguments):
        if f.name.startswith("zo_") or f.name in ("learning_rate", "optim", "max_grad_norm", "logging_nan_inf_filter"):
            assert getattr(parsed, f.name) == getattr(built, f.name), f.name


def test_command_line_lists_every_field_with_help(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(ZOTrainingArguments).parse_args(["--help"])
    text = capsys.readouterr().out
    for f in fields(ZOTrainingArguments):
        if f.name.startswith("zo_"):
            assert f"--{f.name}" in text
            assert f.metadata["help"]


def test_estimator_kwargs(make):
    args = make(zo_eps=0.5, zo_num_directions=3, zo_clip=2.0, zo_direction="rademacher", zo_seed=9)
    expected = {"num_directions": 3, "seed": 9, "eps": 0.5, "clip": 2.0, "direction": "rademacher", "direction_rank": 16}
    expected["per_example"] = False
    assert args.estimator_kwargs() == expected


def test_unset_directions_leave_the_default_of_the_method(make):
    assert "num_directions" not in make(zo_eps=0.5).estimator_kwargs()


def test_own_hyperparameters_lose_their_prefix(make, monkeypatch):
    class Second(MeZO):
        def __init__(self, *args, rank: int = 2, **common):
            super().__init__(*args, **common)

    monkeypatch.setitem(METHODS, "second", Second)
    args = make(WithSecondMethod, zo_method="second", second_rank=4, zo_eps=1.0)
    assert args.estimator_kwargs()["rank"] == 4


def test_recommended_settings_cover_every_method():
    assert set(RECOMMENDED) == set(METHODS)
    for method in METHODS:
        for trained in ("lora",) if method == "zo_act" else ("full", "lora", "prefix"):
            lr, eps = recommended(method, trained)
            assert 0 < lr < 1
            assert 0 < eps < 1
    # the radii of MeZO's published runs
    assert [recommended("mezo", t)[1] for t in ("full", "lora", "prefix")] == [1e-3, 1e-2, 1e-1]


def test_arguments_survive_serialisation(make):
    args = make(zo_eps=1e-2, zo_clip=1.0)
    found = args.to_dict()
    assert found["zo_eps"] == 1e-2
    assert (found["seed"], found["zo_seed"]) == (42, None)
    assert "zo_eps" in args.to_json_string()
