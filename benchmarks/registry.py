"""The benchmarks by name. Adding one: a module with its gate and its run function, and one line in `BENCHMARKS`."""

from benchmarks import cpu_train, learning
from benchmarks.spec import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    "cpu-train": cpu_train.BENCHMARK,
    "learning": learning.BENCHMARK,
}
