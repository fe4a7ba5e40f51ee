"""A finished run over a saved base model, for all tests of trajectories."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import Sentences, collate, tiny_llama, trainer_of

from hf_zo import ZOTrainer


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished full-parameter run over a saved base model: folder with ``base``, ``out``."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_llama()
    model.save_pretrained(folder / "base")
    trainer = ZOTrainer(
        type(model).from_pretrained(folder / "base"),
        trainer_of(folder / "out", "lozo-momentum", max_steps=9, warmup_steps=2).args,
        train_dataset=Sentences(),
        data_collator=collate,
    )
    trainer.train()
    trainer.save_model()
    return folder
