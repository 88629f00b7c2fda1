"""`moe checkpoint list`, `verify` and `export`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moe.commands.common import JsonOption, say


def checkpoint_at(path: Path) -> Path:
    """A checkpoint's folder itself, or the newest valid one of a run's folder."""
    from moe.parallel.checkpoint import MANIFEST, newest_valid
    from moe.train.run_folder import CHECKPOINTS_DIR

    if (path / MANIFEST).is_file():
        return path
    newest, problems = newest_valid(path / CHECKPOINTS_DIR)
    for problem in problems:
        say(f"refused: {problem}")
    if newest is None:
        raise ValueError(
            f"{str(path)!r} is no checkpoint and no run with a valid one; give RUN or RUN/checkpoints/step-..."
        )
    return newest


def list_checkpoints(run: Annotated[Path, typer.Argument(help="Run folder.")], as_json: JsonOption = False) -> None:
    """List a run's checkpoints with their sizes and the layouts that wrote them; checks no content.

    Example: `moe checkpoint list runs/tiny`
    """
    from moe.parallel import checkpoint
    from moe.train.run_folder import CHECKPOINTS_DIR

    root = run / CHECKPOINTS_DIR
    if not root.is_dir():
        raise ValueError(f"{str(run)!r} has no folder {CHECKPOINTS_DIR}; give the folder of a run")
    found: list[dict[str, Any]] = []
    for path in checkpoint.list_checkpoints(root):
        state = checkpoint.read_state(path)
        size = sum(file.stat().st_size for file in path.iterdir())
        written = {key: state.get(key) for key in ("step", "world_size", "ep_size", "zero_stage")}
        found.append({"path": str(path), "bytes": size, **written})
    if as_json:
        print(json.dumps(found))
        return
    for row in found:
        layout = f"{row['world_size']} processes, ep_size {row['ep_size']}, ZeRO {row['zero_stage']}"
        say(f"{row['path']}  {row['bytes'] / 1e6:.1f} MB  {layout}")


def verify_checkpoint(
    path: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a run's for its newest.")],
    as_json: JsonOption = False,
) -> None:
    """Check every file against the manifest, and every weight, moment and expert against its checksum.

    Example: `moe checkpoint verify runs/tiny/checkpoints/step-00000200`
    """
    from moe.parallel.checkpoint import verify, verify_tensors

    checkpoint = checkpoint_at(path)
    verify(checkpoint)
    number = verify_tensors(checkpoint)
    if as_json:
        print(json.dumps({"checkpoint": str(checkpoint), "tensors": number, "ok": True}))
    else:
        say(f"{checkpoint}: files and {number} tensors are as they were written")


def export_checkpoint(
    path: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a run's for its newest.")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to make.")],
    dtype: Annotated[str, typer.Option(help="fp32, as training holds weights, or bf16.")] = "fp32",
    shard_gb: Annotated[float, typer.Option(min=1e-6, help="Largest weights file in GB.")] = 5.0,
    as_json: JsonOption = False,
) -> None:
    """Write the Hugging Face folder of a training checkpoint of any layout; on CPU, one tensor in memory at a time.

    Example: `moe checkpoint export runs/tiny model-at-100 --dtype bf16`
    """
    import torch

    from moe.models import from_checkpoint

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"--dtype {dtype!r} is unknown; use {' or '.join(dtypes)}")
    checkpoint = checkpoint_at(path)
    from_checkpoint.export_checkpoint(checkpoint, out, dtypes[dtype], int(shard_gb * 1e9))
    if as_json:
        print(json.dumps({"checkpoint": str(checkpoint), "model": str(out)}))
    else:
        say(f"wrote {out} from {checkpoint}")
