"""ToMoE: experts as learned masks on the neurons of a dense FFN (Gao et al., arXiv 2501.15316).

`tomoe_convert` is ``moe tomoe``: `training` learns scores of neurons and routers (`hypernet`, `gates`, `losses`), `experts`
makes experts of them and `convert` writes the folder.
"""

from moe.convert.tomoe.convert import ToMoEReport, report_lines, tomoe_convert
from moe.convert.tomoe.options import ToMoEOptions

__all__ = ["ToMoEOptions", "ToMoEReport", "report_lines", "tomoe_convert"]
