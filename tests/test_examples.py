"""The example scripts that are not command lines of a task: what they print, on tiny models."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from tasks.tiny import make_bpe, tiny

from hf_zo import Trajectory

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, monkeypatch: pytest.MonkeyPatch, steps: int) -> ModuleType:
    """A script as a module, which pickles its classes as when it is run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STEPS", steps)
    return module


@pytest.fixture
def tiny_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny language model with its tokenizer, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    tiny("llama", make_bpe()).save_pretrained(tmp_path / "model")
    make_bpe().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_plain_pytorch_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert example("plain_pytorch", monkeypatch, 200).main() < 0.1
    first, last = capsys.readouterr().out.splitlines()
    assert first == "step 0: 1.0116"
    assert last.startswith("step 200: 0.0")


@pytest.mark.slow
def test_own_classes_fits_then_steps(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = example("own_classes", monkeypatch, 3).main(str(tiny_folder))
    assert after > before + 0.05
    assert f"accuracy on 200 rows: {before:.1%} before, {after:.1%} after" in capsys.readouterr().out
    out = Path("runs/own_classes")
    assert len(Trajectory.read(out).steps) == 3
    model = PeftModel.from_pretrained(tiny("llama", make_bpe()), out)
    assert any("lm_head" in name and p.any() for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.slow
def test_sft_trains_and_saves(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = example("sft", monkeypatch, 3).main(str(tiny_folder))
    assert before != after
    out = Path("runs/sft")
    assert len(Trajectory.read(out).steps) == 3
    model = PeftModel.from_pretrained(tiny("llama", make_bpe()), out)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
