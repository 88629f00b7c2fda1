"""The `moe` command.

Results for people go to stderr, machine-readable ones (``--json``) to stdout and nothing else there.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="moe",
    help="Make, train, convert and ship Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def user_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Show a ValueError as one message and exit with status 2; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ValueError as problem:
            _say(f"error: {problem}")
            raise typer.Exit(2) from None

    return wrapper


@app.command()
@user_errors
def train(
    config: Annotated[Path, typer.Argument(help="YAML recipe, such as configs/tiny.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that is in its folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model on this machine's processes.

    Example: `moe train configs/tiny.yaml train.steps=100 moe.router.top_k=1 name=short`

    Under torchrun, the deepspeed launcher or srun, use `-m moe.launch.train` with the same arguments instead.
    """
    from moe.launch.env import choose_device, choose_processes
    from moe.launch.local import run_local
    from moe.train.config import load_config
    from moe.train.run_folder import SUMMARY_FILE, check_run_dir

    run = load_config(config, overrides)
    check_run_dir(run.run_dir, resume)
    processes = choose_processes(run.parallel)
    choose_device(run.parallel, processes)
    run.grad_accum(processes)
    _say(f"{run.name}: {processes} process{'es' if processes > 1 else ''}, run folder {run.run_dir}")
    arguments = [str(config), *(overrides or []), *(["--resume"] if resume else [])]
    status = run_local(arguments, processes, max_restarts=run.parallel.max_restarts)
    if status:
        raise typer.Exit(status)
    if as_json:
        print((run.run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))


@app.command()
@user_errors
def launch(
    config: Annotated[Path, typer.Argument(help="YAML recipe, such as configs/multi-node.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")] = None,
    nodes: Annotated[str | None, typer.Option(help="Machines as a,b,c; parallel.processes ranks on each.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="File with lines NAME slots=N.")] = None,
    launcher: Annotated[str, typer.Option(help="torchrun, ssh, deepspeed, slurm or kubernetes.")] = "ssh",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that is in its folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run where, and run nothing.")] = False,
    min_nodes: Annotated[int | None, typer.Option(min=1, help="Machines that are enough to go on.")] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Free on the first machine; the ranks meet there.")
    ] = 29500,
    environment: Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE for every process.")] = None,
    ssh_config: Annotated[Path | None, typer.Option(help="For ssh -F: users, keys, ports.")] = None,
    this_host: Annotated[str | None, typer.Option(help="Which of the hosts this machine is, for torchrun.")] = None,
    image: Annotated[str, typer.Option(help="Container image, for kubernetes.")] = "moe-framework:latest",
) -> None:
    """Train on several machines.

    `ssh` and `deepspeed` start all machines from here; `torchrun` runs this machine's part, to be repeated on each; `slurm`
    submits a job; `kubernetes` prints a manifest. Machines share the folder they run in.

    Example: `moe launch configs/multi-node.yaml --nodes node0,node1 --dry-run`
    """
    from moe.launch.commands import LaunchOptions, launch_job

    options = LaunchOptions(
        launcher=launcher,
        nodes=nodes,
        hostfile=hostfile,
        min_nodes=min_nodes,
        port=port,
        environment=environment or [],
        ssh_config=ssh_config,
        this_host=this_host,
        image=image,
        dry_run=dry_run,
    )
    if status := launch_job(config, overrides or [], resume, options):
        raise typer.Exit(status)


def _load(model: str, device: str) -> tuple[Any, Any]:
    """Model in eval mode and its tokenizer from a folder or hub name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    import moe.models  # noqa: F401  (registers our architecture)

    hf_logging.disable_progress_bar()
    if not (Path(model) / "config.json").is_file() and (Path(model).exists() or model.count("/") > 1):
        raise ValueError(
            f"model folder {model!r} has no config.json; give the folder that `moe train` wrote, RUN/model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    except OSError as problem:
        raise ValueError(f"model {model!r} cannot be loaded: {problem}") from None
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if chosen not in ("cpu", "cuda") or (chosen == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"--device {device!r} is not here; use cpu{', cuda' if torch.cuda.is_available() else ''} or auto"
        )
    return loaded.to(chosen).eval(), tokenizer


DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]


@app.command("eval")
@user_errors
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    text: Annotated[Path, typer.Option(help="Text file to evaluate on.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Use only the first windows.")] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a model on a text file, in consecutive windows.

    Example: `moe eval runs/tiny/model --text notes.txt --window 256 --json`
    """
    from rich.console import Console
    from rich.progress import Progress

    from moe.models.evaluate import cut_windows, perplexity

    if not text.is_file():
        raise ValueError(f"--text {str(text)!r} is not a file")
    loaded, tokenizer = _load(model, device)
    longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", window)
    if window > longest:
        raise ValueError(f"--window {window} is longer than the model's {longest} positions; lower it")
    ids = tokenizer(text.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False)["input_ids"]
    windows = cut_windows(ids, window, max_windows)
    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("evaluating", total=len(windows))
        result = perplexity(loaded, windows, lambda done, total: bar.update(task, completed=done))
    result = {"model": model, "text": str(text), "window": window, **result}
    if as_json:
        print(json.dumps(result))
    else:
        _say(f"perplexity {result['perplexity']:.3f}, loss {result['loss']:.4f} over {result['tokens']} tokens")


@app.command()
@user_errors
def generate(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt; the text goes to stdout.

    Example: `moe generate runs/tiny/model --prompt "def main(" --temperature 0.8`
    """
    import torch

    from moe.models.generate import sample_text

    loaded, tokenizer = _load(model, device)
    torch.manual_seed(seed)
    output = sample_text(loaded, tokenizer, prompt, max_new_tokens, temperature)
    print(json.dumps({"model": model, "prompt": prompt, "text": output}) if as_json else output)


@app.command()
@user_errors
def report(run: Annotated[Path, typer.Argument(help="Run folder.")], as_json: JsonOption = False) -> None:
    """Write a run's HTML page and pictures.

    Example: `moe report runs/tiny`
    """
    from moe.train.report import PICTURES_DIR, write_report

    page = write_report(run)
    if as_json:
        print(json.dumps({"report": str(page), "pictures": str(run / PICTURES_DIR)}))
    else:
        _say(f"wrote {page} and {run / PICTURES_DIR}")


@app.command()
@user_errors
def doctor(as_json: JsonOption = False) -> None:
    """Show devices, versions, kernels and collectives; run every router, and check expert-parallel gradients, on this machine.

    Example: `moe doctor`
    """
    from moe.launch.doctor import examine, render

    findings = examine()
    if as_json:
        print(json.dumps(findings))
    else:
        render(findings)
    if not findings["ok"]:
        raise typer.Exit(1)


checkpoint_app = typer.Typer(help="List, check and export training checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")


def _checkpoint_at(path: Path) -> Path:
    """A checkpoint's folder itself, or the newest valid one of a run's folder."""
    from moe.parallel.checkpoint import MANIFEST, newest_valid
    from moe.train.run_folder import CHECKPOINTS_DIR

    if (path / MANIFEST).is_file():
        return path
    newest, problems = newest_valid(path / CHECKPOINTS_DIR)
    for problem in problems:
        _say(f"refused: {problem}")
    if newest is None:
        raise ValueError(
            f"{str(path)!r} is no checkpoint and no run with a valid one; give RUN or RUN/checkpoints/step-..."
        )
    return newest


@checkpoint_app.command("list")
@user_errors
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
        _say(f"{row['path']}  {row['bytes'] / 1e6:.1f} MB  {layout}")


@checkpoint_app.command("verify")
@user_errors
def verify_checkpoint(
    path: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a run's for its newest.")],
    as_json: JsonOption = False,
) -> None:
    """Check every file against the manifest, and every weight, moment and expert against its checksum.

    Example: `moe checkpoint verify runs/tiny/checkpoints/step-00000200`
    """
    from moe.parallel.checkpoint import verify, verify_tensors

    checkpoint = _checkpoint_at(path)
    verify(checkpoint)
    number = verify_tensors(checkpoint)
    if as_json:
        print(json.dumps({"checkpoint": str(checkpoint), "tensors": number, "ok": True}))
    else:
        _say(f"{checkpoint}: files and {number} tensors are as they were written")


@checkpoint_app.command("export")
@user_errors
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
    checkpoint = _checkpoint_at(path)
    from_checkpoint.export_checkpoint(checkpoint, out, dtypes[dtype], int(shard_gb * 1e9))
    if as_json:
        print(json.dumps({"checkpoint": str(checkpoint), "model": str(out)}))
    else:
        _say(f"wrote {out} from {checkpoint}")


@app.command()
@user_errors
def plan(
    config: Annotated[Path, typer.Argument(help="YAML recipe, such as configs/pretrain.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the job.")] = 8,
    hardware: Annotated[str, typer.Option(help="a100, h100, h200, b200 or cpu.")] = "h100",
    memory: Annotated[str | None, typer.Option(help="Memory of a GPU, such as 80G.")] = None,
    interconnect: Annotated[
        str | None, typer.Option(help="Bytes per second and GPU within and between nodes, such as 450G/50G.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that share the fast link.")] = 8,
    ep: Annotated[str | None, typer.Option(help="Expert-parallel degrees to try, such as 8,16.")] = None,
    zero: Annotated[str | None, typer.Option(help="ZeRO stages to try, such as 1,2.")] = None,
    micro_batch: Annotated[str | None, typer.Option(help="Micro-batch sizes to try, such as 1,2.")] = None,
    assume: Annotated[list[str] | None, typer.Option(help="Another assumption, as matmul_efficiency=0.5.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 8,
    trace: Annotated[
        list[str] | None, typer.Option(help="Replay a routing: a file of `moe trace`, uniform or zipf:1.0.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG of the replayed routings.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict memory, traffic and speed of a job on GPUs that are not here, and choose its layout.

    The settings of the fastest layout that fits go to stdout, to be put behind `moe train CONFIG`.

    Example: `moe plan configs/pretrain.yaml model.decoder.vocab_size=49152 --gpus 64 --hardware h100 --trace zipf:1.0`
    """
    from rich.console import Console

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one, and says so on stdout
    from moe.scaling.planner import overrides as settings
    from moe.train import plan as planning
    from moe.train.config import load_config

    console = Console(stderr=True)
    options = planning.PlanOptions(
        gpus=gpus,
        hardware=hardware,
        memory=memory,
        interconnect=interconnect,
        gpus_per_node=gpus_per_node,
        ep=ep,
        zero=zero,
        micro_batch=micro_batch,
        assume=tuple(assume or ()),
    )
    if picture is not None and not trace:
        raise ValueError("--picture shows replayed routings; add --trace uniform, --trace zipf:1.0 or --trace FILE")
    planner = planning.make_planner(load_config(config, overrides), options, console)
    candidates = planner.search(planning.search_space(options))
    replays = planning.replays(planner, trace or [], candidates[0].layout) if trace else []
    if as_json:
        print(json.dumps(planning.as_json(planner, candidates, replays)))
    else:
        planning.render(planner, candidates, top, console)
        if replays:
            planning.render_replays(replays, console)
    if picture is not None:
        from moe.train.plan_pictures import draw_replays

        draw_replays(replays, f"{config.stem}, {planner.hardware.name.upper()}, {gpus_per_node} GPUs per node", picture)
    best = planning.chosen(candidates, planner.hardware)
    if not as_json:
        print(" ".join(settings(best.layout)))


@app.command()
@user_errors
def trace(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("trace.safetensors"),
    batches: Annotated[int, typer.Option(min=1, help="Micro-batches of held-out text.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Save which experts a run's model chooses on its held-out text, for `moe plan --trace`.

    Example: `moe trace runs/tiny --out tiny.safetensors`
    """
    import moe.models  # noqa: F401  (registers our architecture)
    from moe.train.trace_run import trace_run

    found = trace_run(run, batches)
    found.save(out)
    steps, layers, tokens, top_k = found.expert_ids_SYTK.shape
    if as_json:
        print(json.dumps({"trace": str(out), "batches": steps, "layers": layers, "tokens": tokens, "top_k": top_k}))
    else:
        _say(f"wrote {out}: {steps} batches of {tokens} tokens through {layers} MoE layers")


def main() -> None:
    """Entry point of the `moe` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    app()


if __name__ == "__main__":
    main()
