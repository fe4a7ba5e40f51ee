"""Tiny tokenizers and models, made on the spot, and one row of every task: no network, no data folder."""

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SENTENCES = [
    "The film was great and the acting was great.",
    "The film was terrible and the story was terrible. It was great. It was terrible.",
    "Does this mean that it is true? Yes or No? Yes, No, or Maybe?\nYes\nNo\nMaybe",
    "Title: Paris\nContext: Paris is the capital of France.\nQuestion: What is the capital of France?\nAnswer: Paris\n",
    "This is correct. This is incorrect. Do these two sentences mean the same?",
]

VERBALIZERS = ["Yes", "No", "Maybe", "great", "terrible", "correct", "incorrect"]

# One valid row of every task: (row, number of the right option or the reference answers).
ROWS = {
    "sst2": ({"sentence": "a fine film ", "label": 1}, 1),
    "cola": ({"sentence": "The cat sat.", "label": 0}, 0),
    "mrpc": ({"sentence1": "He ran.", "sentence2": "He walked.", "label": 0}, 0),
    "qqp": ({"question1": "Who is it?", "question2": "Who was it?", "label": 1}, 1),
    "mnli": ({"premise": "He ran.", "hypothesis": "He moved.", "label": 2}, 2),
    "qnli": ({"question": "Where is it?", "sentence": "It is here.", "label": 0}, 0),
    "rte": ({"sentence1": "He ran.", "sentence2": "He moved.", "label": 1}, 1),
    "sst5": ({"text": " a fine film ", "label": 3}, 3),
    "cb": ({"premise": "He ran.", "hypothesis": "he moved", "label": 2}, 2),
    "boolq": ({"question": "is water wet", "passage": "Water is wet.", "label": 1}, 1),
    "wsc": ({"text": "Ann told Eve that she won.", "span1_text": "Ann", "span2_text": "She", "label": 1}, 1),
    "wic": ({"word": "bank", "sentence1": "A river bank.", "sentence2": "A rich bank.", "label": 0}, 0),
    "copa": ({"premise": "It rained.", "choice1": "It dried.", "choice2": "It got wet.", "question": "effect", "label": 1}, 1),
    "multirc": (
        {
            "paragraph": "It rained.",
            "question": "Did it rain?",
            "answer": "yes",
            "idx": {"paragraph": 0, "question": 0, "answer": 0},
            "label": 1,
        },
        1,
    ),
    "record": (
        {
            "passage": "Ann met Bob.\n@highlight\nThey met.",
            "query": "@placeholder met Ann.",
            "entities": ["Ann", "Bob"],
            "answers": ["Bob"],
        },
        1,
    ),
    "squad": (
        {
            "title": "Paris",
            "context": "Paris is the capital of France.",
            "question": "What is the capital? ",
            "answers": {"text": ["Paris", "the city of Paris"], "answer_start": [0, 0]},
        },
        ["Paris", "the city of Paris"],
    ),
    "drop": (
        {
            "passage": "Two plus two is 4.",
            "question": "How much?",
            "answers_spans": {"spans": ["4", "four"], "types": ["number"]},
        },
        ["4", "four"],
    ),
}


@functools.cache
def make_bpe(starts: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE: as GPT-2's, or with a token of its own at the start, as OPT's and Llama's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if starts:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@functools.cache
def make_wordpiece() -> PreTrainedTokenizerFast:
    """WordPiece as BERT's; the verbalizers are whole words, "impossible" is not."""
    pieces = [chr(c) for c in range(33, 127)]
    words = sorted({w for row, _ in ROWS.values() for w in str(row).replace("'", " ").split() if w.isalpha()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *("##" + p for p in pieces), *VERBALIZERS, *words]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny(kind: str, tokenizer: PreTrainedTokenizerFast, positions: int = 512, **config) -> PreTrainedModel:
    """A random model of two layers, always the same; weights large enough that positions and tokens matter."""
    build, settings = {
        "llama": (LlamaForCausalLM, LlamaConfig(**_SHAPE, intermediate_size=32, initializer_range=0.3)),
        "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)),
        "opt": (OPTForCausalLM, OPTConfig(**_SHAPE, ffn_dim=32, word_embed_proj_dim=16, init_std=0.3)),
        "mlm": (BertForMaskedLM, BertConfig(**_SHAPE, intermediate_size=32, initializer_range=0.3)),
        "classes": (BertForSequenceClassification, BertConfig(**_SHAPE, intermediate_size=32, initializer_range=0.3)),
    }[kind]
    settings.update({"vocab_size": len(tokenizer), "max_position_embeddings": positions, **config})
    for special in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(settings, special, getattr(tokenizer, special))
    torch.manual_seed(0)
    return build(settings).eval()
