"""`hf-zo replay` and `hf-zo trajectory`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from support import Sentences, assert_same_weights, collate, load_base, trainer_of, weights_of
from transformers import LlamaConfig, LlamaForCausalLM

from hf_zo import Trajectory, ZOTrainer, cli
from hf_zo.adapters import draw_adapter
from hf_zo.trajectory import LOG_NAME, SEALED_NAME, Step


def test_replay_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(run / "base"), str(run / "out"), "-o", str(tmp_path / "new")]) == 0
    assert "9 steps replayed" in (out := capsys.readouterr().out)
    assert "bit for bit" in out
    assert_same_weights(
        weights_of(load_base(run).from_pretrained(tmp_path / "new")), weights_of(load_base(run).from_pretrained(run / "out"))
    )
    (tmp_path / "torn.log").write_bytes((run / "out" / LOG_NAME).read_bytes()[:-5])
    arguments = ["replay", str(run / "base"), str(tmp_path / "torn.log"), "-o", str(tmp_path / "part")]
    assert cli.main(arguments) == 2
    assert "8 good steps" in capsys.readouterr().err
    assert cli.main([*arguments, "--until", "8"]) == 0
    assert "bit for bit" not in capsys.readouterr().out


@pytest.mark.parametrize("case", ["mezo", "zo_act"])
def test_replay_command_for_adapters(case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_base(run)
    if case == "mezo":
        model = draw_adapter(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")), 42)
    args = trainer_of(tmp_path / "out", case).args
    trainer = ZOTrainer(model, args, train_dataset=Sentences(), data_collator=collate)
    trainer.train()
    trainer.save_model()
    assert cli.main(["replay", str(run / "base"), str(tmp_path / "out"), "-o", str(tmp_path / "new")]) == 0, (
        capsys.readouterr().err
    )
    for name in ("adapter_model.safetensors",):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    if case == "zo_act":
        other = LlamaForCausalLM(LlamaConfig(**{**load_base(run).config.to_dict(), "hidden_size": 32, "head_dim": None}))
        other.save_pretrained(tmp_path / "other")
        assert cli.main(["replay", str(tmp_path / "other"), str(tmp_path / "out"), "-o", str(tmp_path / "x")]) == 2
        assert "does not fit the base model" in capsys.readouterr().err


def test_replay_command_names_what_is_wrong(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["-o", str(tmp_path / "new")]
    assert cli.main(["replay", str(run / "base"), str(tmp_path / "nothing"), *output]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path / "nothing"), str(run / "out"), *output]) == 2
    assert "cannot be loaded as LlamaForCausalLM" in capsys.readouterr().err
    assert cli.main(["replay", str(run / "out"), str(run / "out"), *output]) == 2
    assert "not those the run started from" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_replay_and_show_refuse_what_cannot_be_done(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    replayed, output = ["replay", str(run / "base"), str(run / "out")], str(tmp_path / "new")
    for command, told in (
        ([*replayed, "-o", str(tmp_path / "file")], "file is a file; give a folder"),
        ([*replayed, "-o", output, "--until", "-1"], "--until -1 is no number of steps"),
        (["trajectory", "show", str(run / "out"), "--plot", str(tmp_path / "missing" / "x.png")], "x.png cannot be written"),
    ):
        assert cli.main(command) == 2
        assert told in capsys.readouterr().err.replace("\n", "")
    assert (tmp_path / "file").read_text() == "mine"
    assert not Path(output).exists()


@pytest.mark.parametrize(("base", "revision"), [("user/base", "abc123"), ("user/other", "main")])
def test_replay_takes_the_hubs_model_as_the_run_found_it(
    base: str, revision: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory = Trajectory.read(run / "out")
    trajectory.header["base"].update(name="user/base", revision="abc123")
    trajectory.write(tmp_path / SEALED_NAME)
    asked = []

    def ask(name: str, **more: Any) -> None:
        asked.append((name, more.get("revision")))
        raise OSError("not at hand")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", ask)
    assert cli.main(["replay", base, str(tmp_path), "-o", str(tmp_path / "new")]) == 2
    assert asked == [(base, revision)]


@pytest.mark.parametrize("beside_another", [False, True])
def test_replay_command_names_an_adapter_as_the_run_did(
    beside_another: bool, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters that are not active are read by no pass, and have no part in a replay."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    args = trainer_of(tmp_path / "out", "mezo").args
    model = get_peft_model(load_base(run), adapter, "first" if beside_another else "second")
    if beside_another:
        model.add_adapter("second", adapter)
        model.set_adapter("second")
    trainer = ZOTrainer(model, args, train_dataset=Sentences(), data_collator=collate)
    trainer.train()
    trainer.save_model()
    command = ["replay", str(run / "base"), str(tmp_path / "out"), "-o", str(tmp_path / "new")]
    assert cli.main(command) == 0, capsys.readouterr().err
    file = Path("second") / "adapter_model.safetensors"
    assert (tmp_path / "new" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_passes_that_measure_every_example_are_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(tmp_path, "mezo-per-example", "lora", max_steps=3)
    trainer.train()
    trainer.save_model()
    assert cli.main(["trajectory", "show", str(tmp_path)]) == 0
    assert f"3, {trainer._zo_optimizer.forward_passes} forward passes" in capsys.readouterr().out


def test_show_and_diff(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "run.png"
    assert cli.main(["trajectory", "show", str(run / "out"), "--plot", str(png)]) == 0
    out = capsys.readouterr().out
    assert all(
        word in out
        for word in ("lozo", "9, 18 forward passes in them, 0 skipped", "projected gradient", "learning rate", "▁", "█")
    )
    assert png.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["trajectory", "diff", str(run / "out"), str(run / "out" / LOG_NAME)]) == 0
    assert "equal in all 9 steps" in capsys.readouterr().out
    other = Trajectory.read(run / "out")
    other.steps[3] = Step((other.steps[3].losses[0], other.steps[3].losses[1] + 0.25), other.steps[3].learning_rates)
    other.write(tmp_path / SEALED_NAME)
    assert cli.main(["trajectory", "diff", str(run / "out"), str(tmp_path)]) == 1
    assert "step 3: losses differ by up to 0.25" in capsys.readouterr().out
    Trajectory(other.header, Trajectory.read(run / "out").steps[:5]).write(tmp_path / SEALED_NAME)
    assert cli.main(["trajectory", "diff", str(run / "out"), str(tmp_path)]) == 1
    assert "equal for 5 steps" in capsys.readouterr().out
    changed = {**other.header, "settings": {**other.header["settings"], "eps": 0.5}}
    Trajectory(changed, Trajectory.read(run / "out").steps).write(tmp_path / SEALED_NAME)
    assert cli.main(["trajectory", "diff", str(run / "out"), str(tmp_path)]) == 0
    assert "header: settings differs (eps: 0.01 and 0.5)" in capsys.readouterr().out
