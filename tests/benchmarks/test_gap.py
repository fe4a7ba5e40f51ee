"""What `benchmarks/gap.py` measures exists in the study."""

from pathlib import Path

import gap
import pytest
from study.grid import Cell


@pytest.mark.parametrize("name", gap.SETS)
def test_the_sets_are_cells_of_the_study(name):
    form, arm, _ = gap.SETS[name]
    cell = Cell("final", "sst2", form, arm, 1.0, seed=1)
    assert gap.GRID.model_arguments(cell, Path("model")).peft == ("lora" if form == "lora" else "none")
    assert gap.GRID.cost(cell).steps > 0
