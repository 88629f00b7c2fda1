"""Tasks of lm-evaluation-harness on a model that is loaded already: ours, or any causal language model of transformers.

A task is a YAML file of the harness, with its data beside it or on the hub. The harness asks for log-likelihoods and text
through its own model class, so the scores are its scores. Differences from its command: relative paths of data count from the
folder of the tasks, nothing is fetched unless the caller says so, and tasks that run foreign code are refused.

Python functions beside a YAML file (``!function``) run as in the harness: trust a folder of tasks as you trust its Python files.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task or group.

    Attributes:
        task: name of the task or group.
        metric: the harness's name of it, such as "acc".
        filter: of the answers, "none" unless the task defines some.
        value: in the metric's own unit.
        stderr: standard error of ``value`` over the documents, None where the harness has none.
        num_fewshot: examples before each question, None for a group.
        num_samples: documents scored, None for a group.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    num_fewshot: int | None
    num_samples: int | None


def load_tasks(root: Path, names: list[str], online: bool = False) -> list[Any]:
    """The harness's tasks of a YAML file, or of the YAML files below a folder.

    Args:
        root: the file or folder; the tasks' relative paths count from it, so it is the working directory meanwhile.
        names: of tasks, groups or tags to take from a folder; without any, all its tasks.
        online: whether a task may fetch its data from the hub.

    Raises:
        ValueError: the harness is not installed, a name or a file is wrong, a task runs foreign code, or its data are not here.
    """
    task_manager = _harness()
    root = root.expanduser().resolve()
    if not root.exists():
        raise ValueError(f"--tasks {str(root)!r} does not exist; give a YAML file or a folder with some")
    if root.is_file() and names:
        raise ValueError(f"--tasks: {str(root)!r} is one task and has none called {', '.join(names)}; give its folder")
    with contextlib.chdir(root if root.is_dir() else root.parent), _fetching(online):
        if root.is_file():
            return _load(task_manager(include_defaults=False), str(root), online)
        manager = task_manager(include_path=root, include_defaults=False)
        if not manager.all_subtasks:
            raise ValueError(f"--tasks {str(root)!r} has no YAML file with a task")
        for name in names:
            if name not in manager.all_tasks:
                raise ValueError(f"--tasks: {str(root)!r} has no {name!r}; it has {', '.join(manager.all_tasks)}")
        return [task for name in names or manager.all_subtasks for task in _load(manager, name, online)]


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    *,
    batch_size: int = 1,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> list[Score]:
    """Score a model on tasks.

    Args:
        model: in eval mode, on its device; probabilities are computed in fp32 whatever its dtype.
        tokenizer: the model's own.
        tasks: what `load_tasks` gave; the harness keeps its state in them, so they serve once.
        batch_size: requests at a time. From 2 on they are padded, and padding takes room where experts have a limited one.
        limit: use only this many documents of each task.
        num_fewshot: examples before each question, where the task does not set 0 itself; None keeps the task's own.

    Raises:
        ValueError: a task cannot be run on a causal language model.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    log = logging.getLogger("lm_eval.models.huggingface")
    log.setLevel(logging.ERROR)  # it warns of every model that is not a name
    harness_model = HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32"
    )
    log.setLevel(logging.NOTSET)
    with contextlib.redirect_stdout(sys.stderr):
        found = simple_evaluate(
            harness_model,
            tasks=tasks,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=1000,
            task_manager=_harness()(include_defaults=False),  # else it reads its 14,000 YAML files first
        )
    assert found is not None, "this is the only process"
    return list(_scores(found))


def _harness() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as problem:
        raise ValueError(
            f"--tasks needs lm-evaluation-harness ({problem}): pip install 'moe-framework[eval]'"
        ) from None
    return TaskManager


def _load(manager: Any, name: str, online: bool) -> list[Any]:
    try:
        found = manager.load(name)
    except Exception as problem:  # whatever is wrong in the user's YAML, Python and data surfaces here
        hint = "" if online else "; add --online if its data are to be fetched"
        raise ValueError(f"task {name!r} cannot be loaded{hint}: {type(problem).__name__}: {problem}") from problem
    for task in found["tasks"].values():
        _refuse_foreign_code(task)
    return list((found["groups"] or found["tasks"]).values())


def _refuse_foreign_code(task: Any) -> None:
    from lm_eval.api.registry import metric_registry

    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(f"task {task.task_name!r} executes code that the model writes, which is not supported")
    for metric in task.config.metric_list or []:
        name = metric["metric"]
        if metric.get("hf_evaluate") or (
            isinstance(name, str) and task.config.process_results is None and name not in metric_registry
        ):
            raise ValueError(
                f"task {task.task_name!r}: metric {name!r} is code from the hub, which is not run; use one of the harness's own, "
                f"such as {', '.join(sorted(metric_registry.keys())[:8])}"
            )


@contextlib.contextmanager
def _fetching(online: bool) -> Iterator[None]:
    """Let data sets be fetched or not; code of metrics never is."""
    import datasets
    from huggingface_hub import constants
    from lm_eval.api.task import ConfigurableTask

    os.environ["HF_EVALUATE_OFFLINE"] = "1"  # read when a metric makes the harness import `evaluate`
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    download = ConfigurableTask.download

    def download_from_here(task: Any, dataset_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        if "://" in f"{task.DATASET_PATH} {dataset_kwargs}":  # `datasets` goes to addresses outside the hub regardless
            raise ValueError(f"its data have an address: {dataset_kwargs}")
        download(task, dataset_kwargs, **options)

    if not online:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        ConfigurableTask.download = download_from_here
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
        ConfigurableTask.download = download


def _scores(found: dict[str, Any]) -> Iterator[Score]:
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            yield Score(
                task=task,
                metric=metric,
                filter=filter_name,
                value=value,
                stderr=stderr if isinstance(stderr, float) else None,
                num_fewshot=found["n-shot"].get(task),
                num_samples=found["n-samples"].get(task, {}).get("effective"),
            )
