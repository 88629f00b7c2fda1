"""What a benchmark is made of."""

from collections.abc import Callable
from dataclasses import dataclass

Cell = str | int | float | None
Row = dict[str, Cell]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run.

    Attributes:
        quick: tiny sizes and two repeats, to see that it works; the numbers mean nothing and are not recorded.
        repeats: measured repeats of each implementation, after one that is not counted.
        wait_s: before each repeat, wait up to this long for other processes to leave the processor alone.
        part: the only part to run, of a benchmark that has ``parts``; ``None`` runs all.
        report: receives one line per step.
    """

    quick: bool = False
    repeats: int = 9
    wait_s: float = 0.0
    part: str | None = None
    report: Callable[[str], None] = lambda line: None


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison of the gate.

    Attributes:
        name: what was compared.
        error: the error found, in the unit of ``limit``.
        limit: the largest error accepted.
    """

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.limit


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One entry of the registry.

    Attributes:
        name: as on the command line; also the name of its CSV.
        description: one line for ``--list``.
        columns: the columns after those of the environment, in the order of the CSV.
        table: the columns of its markdown table.
        gate: compares our results and gradients with those of what we measure against; runs before anything is timed.
        run: measures; rows have the keys of ``columns`` and may leave some out.
        parts: values of the column ``part`` that ``--part`` may ask for alone.
    """

    name: str
    description: str
    columns: tuple[str, ...]
    table: tuple[str, ...]
    gate: Callable[[Options], list[Check]]
    run: Callable[[Options], list[Row]]
    parts: tuple[str, ...] = ()
