"""The Triton kernel, run by the interpreter on CPU, gives the bits of the torch implementation; compiled, it fuses nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_zo import noise, noise_triton

WORD = st.integers(0, 2**64 - 1)
FACTOR = st.floats(-1e3, 1e3, width=32)


def load_interpreted() -> ModuleType:
    """The kernel's module once more, decorated for the interpreter."""
    spec = importlib.util.spec_from_file_location("hf_zo._interpreted", Path(noise_triton.__file__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


INTERPRETED = load_interpreted()


def by_triton(theta, keys, factors, kind="gaussian", decay=1.0, rounding_key=None, rows=None):
    out = torch.empty_like(theta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "_triton", lambda: INTERPRETED)
        noise._displace_triton(out, theta, keys, factors, kind, decay, rounding_key, rows)
    return out


def by_torch(theta, keys, factors, kind="gaussian", decay=1.0, rounding_key=None, rows=None):
    out = torch.empty_like(theta)
    noise._displace_torch(out, theta, keys, factors, kind, decay, rounding_key, rows)
    return out


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["gaussian", "rademacher"]),
    terms=st.lists(st.tuples(WORD, FACTOR), max_size=3),
    decay=st.sampled_from([1.0, 0.97]),
    rounding_key=st.one_of(st.none(), WORD),
)
def test_triton_equals_torch(n, dtype, kind, terms, decay, rounding_key):
    theta = (torch.randn(n, generator=torch.Generator().manual_seed(n)) * 0.02).to(dtype)
    if not noise_triton.usable(theta, theta, rounding_key is not None):
        assert dtype == torch.float16  # stochastic rounding to fp16 is torch's
        return
    arguments = (theta, [key for key, _ in terms], [factor for _, factor in terms], kind, decay, rounding_key)
    assert torch.equal(by_triton(*arguments), by_torch(*arguments))


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_rows(kind):
    theta = torch.randn(5, 37, generator=torch.Generator().manual_seed(0)).bfloat16()
    arguments = (theta, [3, 2**63 + 1], [0.1, -0.2], kind, 1.0, 7, torch.tensor([4, 900, 4, 0, 12]))
    assert torch.equal(by_triton(*arguments), by_torch(*arguments))


def test_cpu_tensors_do_not_take_it():
    x = torch.zeros(3)
    assert not noise._triton_usable(x, x, None)
    assert noise_triton.usable(x, x, None)
    assert not noise_triton.usable(x.double(), x.double(), False)
    assert not noise_triton.usable(torch.zeros(3, 3).t(), torch.zeros(3, 3).t(), False)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("gaussian", [True, False])
def test_compiled_for_a_gpu_no_product_is_fused_with_a_sum(bf16, gaussian):
    """Without a GPU the compiler still says what it would run: separate multiplications and additions."""
    pointer = "*i16" if bf16 else "*fp32"
    signature = {"out": pointer, "theta": pointer, "keys": "*i64", "factors": "*fp32", "rows": "*i64"}
    signature |= {"n": "i64", "size": "i64", "decay": "fp32"}
    constants = {"TERMS": 2, "GAUSSIAN": gaussian, "BF16": bf16, "STOCHASTIC": bf16, "BLOCK": noise_triton._BLOCK}
    source = ASTSource(noise_triton._displace, {**signature, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)

    def assembly(fused: bool) -> str:
        options = {"enable_fp_fusion": fused}
        return triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]

    assert "fma.rn.f32" not in assembly(False)
    assert "mul.f32" in assembly(False) or "mul.rn.f32" in assembly(False)
    assert "fma.rn.f32" in assembly(True)
