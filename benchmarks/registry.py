"""The benchmarks by name. Adding one: a module with a `BENCHMARK`, and one line in `BENCHMARKS`."""

import importlib
from collections.abc import Callable
from functools import partial

from benchmarks.spec import Benchmark


def _load(module: str) -> Benchmark:
    return importlib.import_module(f"benchmarks.{module}").BENCHMARK


# Loaded when asked for: a GPU machine may lack what the others need.
BENCHMARKS: dict[str, Callable[[], Benchmark]] = {
    "cpu-train": partial(_load, "cpu_train"),
    "learning": partial(_load, "learning"),
    "estimators": partial(_load, "estimators"),
    "routers": partial(_load, "routers"),
    "router-overhead": partial(_load, "router_overhead"),
    "kernel-resources": partial(_load, "kernel_resources"),
    "checkpoint": partial(_load, "checkpoint"),
    "tune-kernels": partial(_load, "kernel_tuning"),
    "gpu-layer": partial(_load, "gpu_layer.benchmark"),
    "autoep": partial(_load, "autoep"),
    "faults": partial(_load, "faults"),
    "exchange": partial(_load, "exchange"),
    "scaling": partial(_load, "scaling"),
    "upcycle": partial(_load, "upcycle"),
    "carve": partial(_load, "carve.benchmark"),
    "recovery": partial(_load, "recovery"),
    "quantize": partial(_load, "quantize.benchmark"),
    "quantized-decode": partial(_load, "quantized_decode"),
    "coordinate-check": partial(_load, "coordinate_check"),
    "mup-transfer": partial(_load, "mup_transfer"),
}
