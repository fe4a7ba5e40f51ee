"""No wasted tokens, no logits that nobody reads: another form of a batch with the same loss.

A padded batch of short sequences computes two to three times the tokens it holds, and a language model's head computes a row
of logits for every one of them, though a label stands at few. `Packing` rewrites a batch of a causal language model once per
window, before its probes are measured:

- sequences are put end to end into few rows, with position ids that start again and a mask that keeps them apart. The number
  of rows weighs attention, which grows with the width, against padding;
- options that share a prompt fork from one copy of it: every option sees the prompt and itself;
- the head runs where a label or an option is read: its input is cut down by a hook, so soft caps and scales that a model
  applies to logits stay its own;
- where rows stay rows (encoders, recurrent models, virtual tokens), a batch is computed in groups of rows of nearly one
  length.

Nothing about the model is taken for granted. The first batch is measured in every form: a form is used if its loss is that
of the batch as it came, and if no sequence notices when another one is changed. Otherwise the next plainer form is tried:
``packed``, ``labelled`` (padded as it came, head cut down), ``plain``.
"""

from .batch import EXAMPLES, KEPT, example_of_items, numbered
from .forms import Packing

__all__ = ["EXAMPLES", "KEPT", "Packing", "example_of_items", "numbered"]
