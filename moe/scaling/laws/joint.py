"""Joint law of dense and MoE models (Ludziejewski et al., arXiv 2502.05172): loss over active parameters, tokens and experts.

L = a Eh^delta N^(alpha + gamma ln Eh) + b Eh^omega D^(beta + zeta ln Eh) + c (eq. 6, table 3), with Eh = E-hat(E) of eq. 4.
N is active parameters with embedding and head, N = 2 d V + 13 d^2 n, and FLOPs are 6 N D.

FineWeb-Edu, GPT-2's tokenizer, SwiGLU experts of width 3d, Switch routing with capacity 1, sequences of 512.
"""

import math

from moe.scaling.laws.forms import FORMS
from moe.scaling.laws.law import Law, Range

JOINT = Law(
    name="joint",
    source="arXiv 2502.05172 table 3",
    form=FORMS["joint"],
    constants={
        "a": 35.91,
        "alpha": -0.1889,
        "delta": -0.2285,
        "gamma": 0.0098,
        "b": 35.98,
        "beta": -0.1775,
        "omega": 0.5529,
        "zeta": -0.0259,
        "c": 1.3637,
    },
    counted="active",
    flops="parameters",
    ffn=9,
    granularities=(1.0,),
    fitted={  # appendix E
        "active": Range(low=79e6, high=2.7e9),
        "tokens": Range(low=0.5e9, high=80e9),
        "expansion": Range(low=1, high=32),
        "tokens per active parameter": Range(low=0.36, high=80 / 1.1),
        "FLOPs": Range(low=6 * 79e6 * 0.5e9, high=6 * 1.1e9 * 80e9),
    },
    rmse=0.0062,
)

# Defaults of the authors' code (llm-random, research/conditional/utils/argparse.py). Eq. 8 prints 8.39, -0.81 and -0.25.
_LEARNING_RATE = (8.391640956234012, -0.8121798244457074, -0.25)


def learning_rate(active: float, expansion: float) -> float:
    """Peak learning rate exp(8.39 - 0.81 ln N - 0.25 ln E) of AdamW (arXiv 2502.05172 eq. 8), found on E = 1 and 8.

    The text of the paper calls N the active parameters *without* embeddings; the code that trained its models adds embedding
    and head (``calculate_auto_lr``). The constants belong to the code, so N is what the code takes. Without embeddings the
    rate would be 1.37 times higher at 321M active parameters and 1.08 times at 2.7B.

    Args:
        active: active parameters with embedding and head.
        expansion: E.
    """
    constant, of_params, of_expansion = _LEARNING_RATE
    return math.exp(constant + of_params * math.log(active) + of_expansion * math.log(expansion))
