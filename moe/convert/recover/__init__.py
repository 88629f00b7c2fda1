"""Recovery training: a short training of a carved or upcycled model in one process, with LoRA or in full.

For more processes there is the trainer: ``moe train CONFIG model.init_from=FOLDER``.
"""

from moe.convert.recover.folder import Recovered, recover_folder
from moe.convert.recover.options import RecoverOptions
from moe.convert.recover.training import Point, Recovery

__all__ = ["Point", "RecoverOptions", "Recovered", "Recovery", "recover_folder"]
