"""Tasks of lm-evaluation-harness on our model and on a stock one: scores computed by hand, no network, no foreign code."""

import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.model_folder import write_mixtral, write_model

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'moe-framework[eval]'")

from moe.models.lm_eval_tasks import Score, load_tasks, score_tasks

QUESTIONS = [
    {"question": f"the {animal} sat {where}", "choices": ["on the mat", "cat", "the dog sat"], "answer": index % 3}
    for index, (animal, where) in enumerate((a, w) for a in ("cat", "dog", "mat", "猫") for w in ("on", "and", "the"))
]
CHOICE = {
    "task": "animals",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "animals.jsonl"}},
    "test_split": "test",
    "fewshot_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
LIKELIHOOD = CHOICE | {
    "task": "likelihood",
    "output_type": "loglikelihood",
    "doc_to_target": " {{choices[answer]}}",  # the harness adds no space here
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
}
del LIKELIHOOD["doc_to_choice"]


def write_tasks(path: Path, *configs: dict[str, Any], questions: list[dict] = QUESTIONS) -> Path:
    path.mkdir(exist_ok=True)
    (path / "animals.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    for config in configs:
        (path / f"{config.get('task', 'x') if 'group' not in config else config['group']}.yaml").write_text(
            yaml.safe_dump(config)
        )
    return path


@pytest.fixture(autouse=True)
def no_connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Nothing may even try to connect, though the environment lets it."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> None:
        tried.append(arguments)
        raise RuntimeError("no network here")  # an OSError would be tried again, for half a minute

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    yield tried
    assert tried == []


def load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load(write_model(tmp_path_factory.mktemp("ours") / "model"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load(write_mixtral(tmp_path_factory.mktemp("mixtral") / "model"))


@torch.no_grad()
def log_likelihood(loaded: tuple[Any, Any], before: str, continuation: str) -> float:
    """Of a continuation, one sequence at a time."""
    model, tokenizer = loaded
    whole = tokenizer(f"{before} {continuation}")["input_ids"]
    length = len(tokenizer(before)["input_ids"])
    log_probs_LV = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs_LV[i - 1, whole[i]]) for i in range(length, len(whole)))


def by_name(scores: list[Score]) -> dict[str, Score]:
    return {score.task: score for score in scores}


@pytest.mark.parametrize(("kind", "batch_size"), [("loaded", 1), ("mixtral", 5)])
def test_scores_are_those_computed_by_hand(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, batch_size: int
) -> None:
    loaded = request.getfixturevalue(kind)
    tasks = load_tasks(write_tasks(tmp_path / "tasks", CHOICE, LIKELIHOOD), [])
    scores = by_name(score_tasks(*loaded, tasks, batch_size=batch_size))
    found = [[log_likelihood(loaded, q["question"], choice) for choice in q["choices"]] for q in QUESTIONS]
    right = [row.index(max(row)) == q["answer"] for row, q in zip(found, QUESTIONS, strict=True)]
    assert 0 < sum(right) < len(right), "a score of 0 or 1 would show little"
    assert scores["animals"].value == sum(right) / len(right)
    assert (scores["animals"].metric, scores["animals"].filter) == ("acc", "none")
    assert (scores["animals"].num_samples, scores["animals"].num_fewshot) == (12, 0)
    mean, count = sum(right) / len(right), len(right)
    assert scores["animals"].stderr == pytest.approx(math.sqrt(mean * (1 - mean) / (count - 1)))
    chosen = [row[q["answer"]] for row, q in zip(found, QUESTIONS, strict=True)]
    assert scores["likelihood"].value == pytest.approx(math.exp(-sum(chosen) / count), rel=1e-4)


def test_bf16_scores_are_normalised_in_fp32(tmp_path: Path) -> None:
    """The harness would take the softmax in the model's dtype."""
    loaded = load(write_model(tmp_path / "model"), torch.bfloat16)
    scores = by_name(score_tasks(*loaded, load_tasks(write_tasks(tmp_path / "tasks", LIKELIHOOD), [])))
    chosen = [log_likelihood(loaded, q["question"], q["choices"][q["answer"]]) for q in QUESTIONS]
    assert scores["likelihood"].value == pytest.approx(math.exp(-sum(chosen) / len(chosen)), rel=1e-4)


def test_limit_few_shots_and_a_name(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", CHOICE, LIKELIHOOD)
    (score,) = score_tasks(*loaded, load_tasks(folder, ["likelihood"]), limit=4, num_fewshot=1)
    assert (score.task, score.num_samples, score.num_fewshot) == ("likelihood", 4, 1)
    (zero_shot,) = score_tasks(*loaded, load_tasks(folder, ["likelihood"]), limit=4)
    assert score.value != zero_shot.value
    chosen = [log_likelihood(loaded, q["question"], q["choices"][q["answer"]]) for q in QUESTIONS[:4]]
    assert zero_shot.value == pytest.approx(math.exp(-sum(chosen) / 4), rel=1e-4)


def test_a_group_has_its_mean(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    group = {"group": "both", "task": ["animals", "again"], "aggregate_metric_list": [{"metric": "acc"}]}
    folder = write_tasks(tmp_path / "tasks", CHOICE, CHOICE | {"task": "again"}, group)
    scores = by_name(score_tasks(*loaded, load_tasks(folder, ["both"])))
    assert scores.keys() == {"animals", "again", "both"}
    assert scores["both"].value == scores["animals"].value
    assert scores["both"].num_samples is None


def test_relative_data_belong_to_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders whose files have the same names, from a third one that has such a file as well."""
    here = write_tasks(tmp_path / "here", questions=[])
    monkeypatch.chdir(here)
    for name, questions in (("a", QUESTIONS[:2]), ("b", QUESTIONS[3:])):
        folder = write_tasks(tmp_path / name, CHOICE, questions=questions)
        for root in (folder, folder / "animals.yaml", Path("..") / name):
            (task,) = load_tasks(root, [])
            assert [doc["question"] for doc in task.eval_docs] == [q["question"] for q in questions]
    assert Path.cwd() == here


def test_python_beside_the_file(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", CHOICE)
    (folder / "own.py").write_text("def first(docs):\n    return docs.select([0])\n")
    with (folder / "animals.yaml").open("a") as file:
        file.write("process_docs: !function own.first\n")
    (task,) = load_tasks(folder, [])
    assert len(list(task.eval_docs)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_path": "some/where", "dataset_kwargs": None}, "--online if its data are to be fetched"),
        ({"dataset_kwargs": {"data_files": {"test": "https://somewhere.org/a.jsonl"}}}, "--online"),
        ({"dataset_kwargs": {"data_files": {"test": "absent.jsonl"}}}, "absent.jsonl"),
        ({"unsafe_code": True}, "executes code that the model writes"),
        (
            {"metric_list": [{"metric": "rouge", "aggregation": "mean", "higher_is_better": True}]},
            "'rouge' is code from",
        ),
        (
            {"metric_list": [{"metric": "acc", "hf_evaluate": True, "aggregation": "mean", "higher_is_better": True}]},
            "'acc' is code from the hub",
        ),
        ({"doc_to_txt": "x"}, "doc_to_txt"),
        ({"output_type": "multiple"}, "'multiple'"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_tasks(tmp_path / "tasks", CHOICE | change)
    for root in (folder, folder / "animals.yaml"):
        with pytest.raises(ValueError, match="animals") as problem:
            load_tasks(root, [])
        assert message in str(problem.value)


def test_online_tries_to_fetch(tmp_path: Path, no_connection: list[Any]) -> None:
    folder = write_tasks(tmp_path / "tasks", CHOICE | {"dataset_path": "some/where", "dataset_kwargs": None})
    with pytest.raises(ValueError, match="'animals' cannot be loaded: "):
        load_tasks(folder, [], online=True)
    assert no_connection
    no_connection.clear()


def test_names_and_paths_that_are_wrong(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", CHOICE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("task: [")
    for root, names, message in (
        (tmp_path / "none", [], "none' does not exist"),
        (folder, ["dogs"], "has no 'dogs'; it has animals"),
        (folder / "animals.yaml", ["dogs"], "is one task and has none called dogs"),
        (tmp_path / "empty", [], "no YAML file with a task"),
        (tmp_path / "bad.yaml", [], "cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tasks(root, names)


def test_the_shipped_example() -> None:
    (task,) = load_tasks(Path(__file__).parents[2] / "configs" / "eval" / "capitals.yaml", [])
    docs = list(task.eval_docs)
    assert len(docs) == 40
    assert all(len(set(doc["choices"])) == 4 for doc in docs)
    assert {doc["country"]: doc["choices"][doc["answer"]] for doc in docs}["Brazil"] == "Brasilia"
    assert task.doc_to_text(docs[0]) == "The capital of France is"
