"""What the papers claim, as comparisons of two arms: data for the claims table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One line of the table.

    Attributes:
        text: what is claimed.
        source: where, with the published numbers.
        better, worse: the arms it compares; empty where it cannot be tested here.
        margin: points by which ``better`` must be above ``worse``; negative allows it to be below.
        reason: what theory says of it, or why it cannot be tested.
    """

    text: str
    source: str
    better: str = ""
    worse: str = ""
    margin: float = 0.0
    reason: str = ""


CLAIMS = (
    Claim(
        "MeZO comes within 1 point of first-order training",
        "arXiv 2305.17333: 7 of 11 tasks, OPT-13B",
        "mezo",
        "first-order",
        margin=-1.0,
        reason="20,000 steps there; the budget here is smaller, and so is the model",
    ),
    Claim(
        "LoZO is better than MeZO",
        "arXiv 2410.07698: RTE 70.4 against 66.1, OPT-13B",
        "lozo",
        "mezo",
        reason="the same mean as of dense directions, and no less variance; V saves memory, not forward passes",
    ),
    Claim(
        "Momentum in the subspace helps LoZO",
        "arXiv 2410.07698, RoBERTa-large",
        "lozo-m",
        "lozo",
        reason="of the momentum, a share of about sqrt(r / n) survives a new subspace",
    ),
    Claim(
        "KerZOO is better than MeZO",
        "arXiv 2505.18886: +2.9 on WSC, +2.6 on MultiRC, OPT-2.7B",
        "kerzoo",
        "mezo",
        reason="the kernel multiplies the variance by 6.25 at equal forward passes",
    ),
    Claim(
        "The kernel, not the three directions, is what helps",
        "arXiv 2505.18886: n = 3 without kernel is marginal",
        "kerzoo",
        "mezo-n3",
        reason="without the kernel, three directions have a third of one's variance; with it, more than one's",
    ),
    Claim(
        "Cancelling the third-order bias helps",
        "arXiv 2505.18886; Richardson extrapolation cancels the same term",
        "richardson",
        "mezo",
        reason="the bias, of order eps^2, is far below the noise of one direction; half as many steps fit the budget",
    ),
    Claim(
        "CurvZO is better than MeZO",
        "arXiv 2603.21725: mean 66.8 against 64.2, OPT-2.7B; LoRA 65.1 against 62.1",
        "curvzo",
        "mezo",
        reason="reweighting raises the variance over dense probing",
    ),
    Claim(
        "Selection by curvature is better than uniform selection",
        "arXiv 2603.21725: mean 66.8 against 62.5 with uniform masks",
        "curvzo",
        "curvzo-uniform",
        reason="uniform masks always add variance: (1/p - 1) times that of a dense estimate",
    ),
    Claim(
        "Dividing by the probabilities helps",
        "arXiv 2603.21725, equations 12 and 13",
        "curvzo",
        "curvzo-no-reweighting",
        reason="without it the estimate is biased towards what is selected, and has less variance",
    ),
    Claim(
        "BSZO is better than MeZO",
        "arXiv 2601.01452: up to +6.67 on average, OPT-13B",
        "bszo",
        "mezo",
        reason="1.5 forward passes a direction instead of 2; else a smooth clip",
    ),
    Claim(
        "Learning the noise helps BSZO",
        "arXiv 2601.01452",
        "bszo",
        "bszo-fixed-noise",
        reason="learnt, it shrinks projected gradients that exceed the prior: a smooth clip",
    ),
    Claim(
        "ZO-Act is better than MeZO",
        "arXiv 2607.01125",
        "zo-act",
        "mezo",
        reason="the variance grows with the dimension of B, and the basis keeps most of the gradient",
    ),
    Claim(
        "Directions of their own for examples help ZO-Act",
        "this package",
        "zo-act-per-example",
        "zo-act",
        reason="the dimension multiplies the sum of the examples' squared gradients, not the square of their sum",
    ),
    Claim(
        "A linear probe before the first step helps ZO-Act",
        "this package; of first-order training, arXiv 2202.10054",
        "zo-act-probe",
        "zo-act",
        reason="the output layer's share of the gradient is exact",
    ),
    Claim(
        "ZO-Act adds to a linear probe",
        "this package",
        "zo-act-probe",
        "linear-probe",
        reason="near the probe's minimum the noise of a batch exceeds the gradient many times",
    ),
    Claim(
        "The recipe's fit comes within 3 points of first-order training",
        "this package",
        "depth-probe",
        "first-order",
        margin=-3.0,
        reason="a model that is linear in directions fixed at the start; first-order training changes them as it goes",
    ),
    Claim(
        "The middle blocks add to a linear probe",
        "this package",
        "depth-probe",
        "linear-probe",
        reason="what they write moves the scores along one direction, which few passes find",
    ),
    Claim(
        "The recipe is better than MeZO", "this package", "auto", "mezo", reason="fits find what directions would be drawn for"
    ),
    Claim(
        "Steps add to what the recipe has fitted",
        "this package",
        "auto",
        "depth-probe",
        reason="as for a linear probe",
    ),
    Claim(
        "The basis from activations is what helps",
        "arXiv 2607.01125",
        "zo-act",
        "zo-act-random",
        reason="activations keep most of the gradient, and of the curvature, which bounds the rate",
    ),
    Claim(
        "Adam in the subspace is what helps",
        "arXiv 2607.01125",
        "zo-act",
        "zo-act-sgd",
        reason="one rate for all layers is bounded by those with the largest inputs",
    ),
    Claim(
        "KerZOO and CurvZO reach MeZO's accuracy in 44 to 74 % and 51 to 59 % less GPU time",
        "arXiv 2505.18886, arXiv 2603.21725",
        reason="measured on GPUs; here budgets are forward passes",
    ),
    Claim("A serving engine makes a step 8 times faster", "arXiv 2605.28760, OPT-13B", reason="needs a GPU"),
)
