"""The implementations of the exchange by name."""

from collections.abc import Callable

from moe.layer import Exchange
from moe.parallel.collectives import Group
from moe.parallel.exchange.config import ExchangeConfig
from moe.parallel.exchange.deepep import DeepEPExchange
from moe.parallel.exchange.expert_parallel import ExpertParallelExchange

BACKENDS: dict[str, Callable[[Group, int, int, ExchangeConfig, str], Exchange]] = {
    "torch": ExpertParallelExchange,
    "deepep": DeepEPExchange,
}


def make_exchange(group: Group, rank: int, num_ranks: int, config: ExchangeConfig, layer: str) -> Exchange:
    """The exchange of one layer as the config asks for it; arguments as of `ExpertParallelExchange`.

    Raises:
        ValueError: an option does not fit the group, or the backend cannot run here.
    """
    return BACKENDS[config.backend](group, rank, num_ranks, config, layer)
