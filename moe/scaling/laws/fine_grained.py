"""Fine-grained Mixture-of-Experts (Krajewski, Ludziejewski et al., arXiv 2402.07871): loss over N, D and granularity G.

L = c + (g / G^gamma + a) / N^alpha + b / D^beta (eq. 9), for one expansion rate each: E = 64 and dense (table 1), E = 16
(table 8). N is all parameters of the blocks without embeddings and routers, N = (8 E + 4) d^2 n. The paper writes models as
"64 x 100M" with 100M = 12 d^2 n active parameters; N is then 43 times that and not 64. Constants are printed with two or three
digits, so losses come out 0.01-0.02 below the paper's table 2.

C4, GPT-2's tokenizer, expert choice among 256 sequences by position, batches of 0.5M tokens, training loss.
"""

from moe.scaling.laws.forms import FORMS
from moe.scaling.laws.law import Law, Range

FINE_GRAINED = Law(
    name="fine-grained",
    source="arXiv 2402.07871 table 1 (E = 64)",
    form=FORMS["fine-grained"],
    constants={"a": 18.1, "alpha": 0.115, "b": 30.8, "beta": 0.147, "g": 2.1, "gamma": 0.58, "c": 0.47},
    counted="total_blocks",
    flops="routing",
    ffn=8,
    expansions=(64.0,),
    fitted={  # table 3: 64 x 3M (d 256, n 4) to 64 x 85M (d 768, n 12)
        "active_blocks": Range(low=12 * 256**2 * 4, high=12 * 768**2 * 12),
        "tokens": Range(low=16e9, high=130e9),
        "granularity": Range(low=1, high=16),
        "tokens per active parameter": Range(low=16e9 / (12 * 640**2 * 10), high=66e9 / (12 * 256**2 * 4)),
        "FLOPs": Range(low=3.1e17, high=2.1e19),  # 64 x 3M, 16B tokens, G = 1 and 64 x 49M, 66B tokens, G = 4
    },
    rmse=0.015,
)

FINE_GRAINED_16 = Law(
    name="fine-grained-16",
    source="arXiv 2402.07871 table 8 (E = 16)",
    form=FORMS["fine-grained"],
    constants={"a": 19.64, "alpha": 0.124, "b": 57.07, "beta": 0.169, "g": 1.18, "gamma": 0.986, "c": 0.472},
    counted="total_blocks",
    flops="routing",
    ffn=8,
    expansions=(16.0,),
    fitted={  # table 7: d 256, n 4 to d 640, n 10
        "active_blocks": Range(low=12 * 256**2 * 4, high=12 * 640**2 * 10),
        "tokens": Range(low=8e9, high=66e9),
        "granularity": Range(low=1, high=16),
        "tokens per active parameter": Range(low=8e9 / (12 * 640**2 * 10), high=33e9 / (12 * 256**2 * 4)),
    },
)

FINE_GRAINED_DENSE = Law(
    name="fine-grained-dense",
    source="arXiv 2402.07871 table 1 (dense)",
    form=FORMS["chinchilla"],
    constants={"a": 16.3, "alpha": 0.126, "b": 26.7, "beta": 0.127, "c": 0.47},
    counted="total_blocks",
    flops="routing",
    ffn=8,
    expansions=(1.0,),
    granularities=(1.0,),
    fitted={  # table 4
        "active_blocks": Range(low=12 * 256**2 * 4, high=12 * 768**2 * 12),
        "tokens": Range(low=16e9, high=66e9),
        "tokens per active parameter": Range(low=16e9 / (12 * 768**2 * 12), high=66e9 / (12 * 256**2 * 4)),
    },
)
