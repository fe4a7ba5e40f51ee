"""Models and adapters of many kinds, what their losses at probes are by hand, and how to look for traces."""

from __future__ import annotations

import peft
import torch
import transformers
from torch import nn

from hf_zo.directions import DenseDirection, Probe, space_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT = ("copy", "transient")
EPS = 1e-2

TEXT = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
ROTARY = dict(**TEXT, num_key_value_heads=2, head_dim=8, max_position_embeddings=32)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**ROTARY),
    "qwen3": lambda: transformers.Qwen3Config(**ROTARY),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **ROTARY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**ROTARY, sliding_window=4),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "mamba": lambda: transformers.MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4),
    "bert": lambda: transformers.BertConfig(**TEXT, max_position_embeddings=32),
    "roberta": lambda: transformers.RobertaConfig(**TEXT, max_position_embeddings=40, pad_token_id=1),
    "t5": lambda: transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
}
MASKED, SEQ2SEQ = ("bert", "roberta"), ("t5",)
CAUSAL = [name for name in CONFIGS if name not in MASKED + SEQ2SEQ]


def build(name, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    if name in MASKED:
        model = transformers.AutoModelForMaskedLM.from_config(config)
    elif name in SEQ2SEQ:
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()


def adapted(config):
    torch.manual_seed(1)
    model = peft.get_peft_model(build("llama"), config).eval()
    with torch.no_grad():  # away from the point where half of an adapter has no effect
        for p in trainable(model).values():
            p.add_(torch.randn(p.shape) * 0.1)
    return model


LORA = dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "lora_embedding": lambda: peft.LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens"]}),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}

IDS = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(5))


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model):
    return lambda: model(input_ids=IDS, labels=IDS).loss


def probes_of(params, eps=EPS, n=2, kind="gaussian"):
    directions = [DenseDirection(space_of(params), 11, 0, i, kind) for i in range(n)]
    pairs = [Probe(((a, d),)) for d in directions for a in (eps, -eps)]
    mixed = Probe(((eps, directions[0]), (-2 * eps, directions[-1])))
    return [*pairs, Probe(), mixed]


@torch.no_grad()
def by_hand(params, probes, measure):
    """Losses after writing ``theta + sum a z`` over the weights, from clean copies, one probe after the other."""
    clean, losses = {name: p.clone() for name, p in params.items()}, []
    for probe in probes:
        for name, p in params.items():
            wide = clean[name].to(torch.promote_types(p.dtype, torch.float32))
            for a, direction in probe.terms:
                wide = wide + direction.sample(name) * a
            p.copy_(wide)
        losses.append(float(measure().double()))
    for name, p in params.items():
        p.copy_(clean[name])
    return losses


def bits(params):
    return {name: p.detach().clone().view(-1).view(torch.uint8) for name, p in params.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


class Small(nn.Module):
    """Linear, norm, and a parameter of its own at the root; ``fail`` makes the middle raise."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.fail = None
        self.to(dtype)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = self.norm(h)
        if self.fail is not None:
            raise self.fail
        return self.last(h) * self.scale


def small(dtype=torch.float32):
    model = Small(dtype)
    x = torch.linspace(-1, 1, 24).view(4, 6).to(dtype)
    return model, dict(model.named_parameters()), lambda: model(x).float().square().sum()
