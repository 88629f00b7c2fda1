"""Distance to a teacher (Hinton et al., arXiv 1503.02531)."""

from torch import Tensor
from torch.nn import functional as F


def distillation(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student) in nats, () fp32, from logits (T, V) of any floating dtype."""
    student_TV, teacher_TV = student_TV.float().log_softmax(-1), teacher_TV.float().log_softmax(-1)
    return F.kl_div(student_TV, teacher_TV, log_target=True, reduction="batchmean")
