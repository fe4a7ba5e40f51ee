"""The methods, by the name that `ZOTrainingArguments.zo_method` takes. A new method is one file and one line here."""

from __future__ import annotations

import inspect
from typing import Any

from .base import Estimate, Estimator, Oracle
from .bszo import BSZO
from .curvzo import CurvZO
from .kerzoo import KerZOO
from .lozo import LoZO
from .mezo import MeZO
from .zo_act import ZOAct

METHODS: dict[str, type[Estimator]] = {m.name: m for m in (MeZO, LoZO, KerZOO, CurvZO, BSZO, ZOAct)}

__all__ = ["METHODS", "Estimate", "Estimator", "Oracle", "hyperparameters"]


def hyperparameters(method: str) -> dict[str, Any]:
    """Keyword names and defaults that a method's constructor takes, the common ones included.

    Raises:
        ValueError: if the method does not exist; the message lists those that do.
    """
    if method not in METHODS:
        raise ValueError(f"zo_method={method!r} does not exist; choose one of {', '.join(METHODS)}.")
    found: dict[str, Any] = {}
    for cls in METHODS[method].__mro__:
        for name, parameter in inspect.signature(vars(cls).get("__init__", object.__init__)).parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                found.setdefault(name, parameter.default)
    return found
