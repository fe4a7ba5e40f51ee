"""What the pages in docs show as code: it runs, and keeps the promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support import CASES, assert_same_weights, tiny_llama, trainer_of, weights_of

from hf_zo import Trajectory, estimate_gradient, replay
from hf_zo.estimators import METHODS
from hf_zo.training_args import RECOMMENDED

DOCS = Path(__file__).parents[1] / "docs"


def test_a_method_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for register in (METHODS, RECOMMENDED):  # put back afterwards
        monkeypatch.setitem(register, "one_sided", None)  # type: ignore[arg-type]
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "new_method.md").read_text(), re.DOTALL)
    exec(code, {})
    monkeypatch.setitem(CASES, "one_sided", {})
    trainer = trainer_of(tmp_path, "one_sided", zo_num_directions=8, learning_rate=None)
    assert trainer.args.learning_rate == 1e-6
    trainer.train()
    trainer.save_model()
    trajectory = Trajectory.read(tmp_path)
    assert [len(step.losses) for step in trajectory.steps] == [9] * len(trajectory.steps)
    assert_same_weights(weights_of(replay(tiny_llama(), trajectory)), weights_of(trainer.model))

    w = torch.tensor([1.0, -2.0])

    def loss() -> torch.Tensor:
        return (w * torch.tensor([3.0, 1.0])).sum()

    found = estimate_gradient(loss, {"w": w}, method="one_sided", num_directions=4000, eps=1e-3)["w"]
    torch.testing.assert_close(found, torch.tensor([3.0, 1.0]), atol=0.3, rtol=0)
