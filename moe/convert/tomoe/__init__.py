"""ToMoE: experts as learned masks on the neurons of a dense FFN (Gao et al., arXiv 2501.15316).

Interface for ``moe carve --method tomoe``::

    from moe.convert.tomoe import ToMoEOptions, report_lines, tomoe_convert
    options = ToMoEOptions(num_experts=8, active_share=0.5, steps=2000, lr=1e-3, bf16=False, seed=0)
    report = tomoe_convert(source, out, windows_BL, options, to="moe", device="cpu", shared=False, progress=show)
"""

from moe.convert.tomoe.convert import ToMoEReport, report_lines, tomoe_convert
from moe.convert.tomoe.options import ToMoEOptions

__all__ = ["ToMoEOptions", "ToMoEReport", "report_lines", "tomoe_convert"]
