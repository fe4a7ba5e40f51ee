"""What every benchmark result says of where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions, processor, threads and revision of the code: to be asked before a measurement, which may outlive a commit."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine()
    )
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "avx512_bf16": "avx512_bf16" in flags,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate", "peft", "numba")},
        "revision": _revision(),
    }


def _revision() -> str:
    """Short hash of HEAD, "-dirty" if code or grids differ from it; empty where there is no git or no clone."""
    try:
        head = _git("rev-parse", "--short", "HEAD").stdout.strip()
    except FileNotFoundError:
        return ""
    changed = head and _git("diff", "--quiet", "HEAD", "--", ":(top)*.py", ":(top)*.yaml").returncode
    return f"{head}-dirty" if changed else head


def _git(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *command], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
