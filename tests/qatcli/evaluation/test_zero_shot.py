"""Zero-shot accuracy: lm-eval's own requests, likelihoods and figures, from local files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pytest
import torch

from qatcli.errors import InputError, QatError, RecipeError
from qatcli.evaluation import zero_shot
from qatcli.evaluation.local_tasks import LOCAL_TASKS
from qatcli.evaluation.zero_shot import average, load_suite, run_suite
from qatcli.models.source import open_source
from qatcli.runlog import RunLog

FIVE = ("hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge")
ROWS: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [
        {
            "activity_label": "Roof repair",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "endings": ["is [title] using wrap.", "rips tiles off.", "holds a  cube.", "sings."],
            "label": "1",
            "ind": 24,
        }
    ],
    "piqa": [{"goal": "How do I open a jar?", "sol1": "Twist the lid.", "sol2": "Twist the floor.", "label": 0}],
    "winogrande": [
        {"sentence": "The cat saw the dog, so the _ ran away.", "option1": "cat", "option2": "dog", "answer": "2"}
    ],
    "arc_easy": [{"id": "1", "question": "What is wet?", "choices": ["a stone", "the sea", "fire"], "gold": 1}],
    "arc_challenge": [{"id": "2", "question": "Which bird sings?", "choices": ["none", "one bird"], "gold": 1}],
}
REQUESTS = {  # (context, continuation) as lm-eval 0.4.13 builds them from the hub's data
    "hellaswag": [
        ("Roof repair: A man is sitting on a roof. He", " is. using wrap."),
        ("Roof repair: A man is sitting on a roof. He", " rips tiles off."),
        ("Roof repair: A man is sitting on a roof. He", " holds a cube."),
        ("Roof repair: A man is sitting on a roof. He", " sings."),
    ],
    "piqa": [
        ("Question: How do I open a jar?\nAnswer:", " Twist the lid."),
        ("Question: How do I open a jar?\nAnswer:", " Twist the floor."),
    ],
    "winogrande": [
        ("The cat saw the dog, so the cat", " ran away."),
        ("The cat saw the dog, so the dog", " ran away."),
    ],
    "arc_easy": [
        ("Question: What is wet?\nAnswer:", " a stone"),
        ("Question: What is wet?\nAnswer:", " the sea"),
        ("Question: What is wet?\nAnswer:", " fire"),
    ],
    "arc_challenge": [
        ("Question: Which bird sings?\nAnswer:", " none"),
        ("Question: Which bird sings?\nAnswer:", " one bird"),
    ],
}
TARGETS = {"hellaswag": 1, "piqa": 0, "winogrande": 1, "arc_easy": 1, "arc_challenge": 1}


@pytest.fixture(scope="session", autouse=True)
def _lm_eval() -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of local files with one row each."""
    for name, task in LOCAL_TASKS.items():
        (tmp_path / task.file).write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]), encoding="utf-8")
    return tmp_path


def _requests(task: Any, limit: int | None = None) -> list[tuple[str, str]]:
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def _target(task: Any, doc: dict[str, Any]) -> int:
    """The index of the right choice, as lm-eval's metrics find it."""
    found = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return int(found)


@pytest.mark.parametrize("name", FIVE)
def test_requests_are_those_of_lm_eval(data: Path, name: str) -> None:
    task = load_suite([name], data=data, limit=None).loaded["tasks"][name]
    assert _requests(task) == REQUESTS[name]
    assert _target(task, task.eval_docs[0]) == TARGETS[name]
    assert "acc" in {metric["metric"] for metric in task.config.metric_list}
    assert task.config.num_fewshot == 0


def _as_on_the_hub(name: str, row: dict[str, Any]) -> dict[str, Any]:
    if not name.startswith("arc"):
        return row
    labels = list(ascii_uppercase[: len(row["choices"])])
    choices = {"text": row["choices"], "label": labels}
    return {"id": row["id"], "question": row["question"], "choices": choices, "answerKey": labels[row["gold"]]}


@pytest.mark.parametrize("name", FIVE)
def test_real_rows_give_the_requests_of_lm_evals_own_task(qat_data: Path, tmp_path: Path, name: str) -> None:
    """lm-eval's definition, loader and splits on a file in the hub's form, against ours on the raw rows."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    rows = (qat_data / "zeroshot" / LOCAL_TASKS[name].file).read_text(encoding="utf-8").splitlines()[:60]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / LOCAL_TASKS[name].file).write_text("\n".join(rows), encoding="utf-8")
    hub = tmp_path / "hub.jsonl"
    hub.write_text("\n".join(json.dumps(_as_on_the_hub(name, json.loads(row))) for row in rows), encoding="utf-8")
    folder = Path(lm_eval.tasks.__file__).parent / ("arc" if name.startswith("arc") else name)
    manager = TaskManager(include_defaults=False, include_path=[folder])
    files = {"data_files": {split: str(hub) for split in ("train", "validation", "test")}}
    member = {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
    theirs = manager.load([{"group": "hub", "task": [member]}])["tasks"][name]
    ours = load_suite([name], data=tmp_path / "raw", limit=None).loaded["tasks"][name]
    assert len(_requests(ours)) >= 120
    assert _requests(ours) == _requests(theirs)
    targets = [_target(ours, doc) for doc in ours.eval_docs]
    assert targets == [_target(theirs, doc) for doc in theirs.eval_docs]
    assert len(set(targets)) > 1
    assert ours.config.metric_list == theirs.config.metric_list
    assert ours.config.target_delimiter == theirs.config.target_delimiter


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> tuple[Any, Any]:
    source = open_source(str(tiny_llama))
    return source.load_model(torch.float32, torch.device("cpu")), source.tokenizer()


def _run(suite: Any, model: tuple[Any, Any]) -> dict[str, Any]:
    log = RunLog(verbosity=-1)
    return run_suite(suite, *model, batch_tokens=200, dtype=torch.float32, log=log, title="zero-shot")


def test_figures_are_those_of_lm_eval(qat_data: Path, tmp_path: Path, model: tuple[Any, Any]) -> None:
    """The same tasks through lm-eval's own model of transformers: likelihoods, accuracies, errors."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in LOCAL_TASKS.values():
        rows = (qat_data / "zeroshot" / task.file).read_text(encoding="utf-8").splitlines()[:20]
        (tmp_path / task.file).write_text("\n".join(rows), encoding="utf-8")
    suite = load_suite(FIVE, data=tmp_path, limit=12)
    ours = _run(suite, model)
    instances = {name: task.instances for name, task in suite.loaded["tasks"].items()}
    likelihoods = {name: [each.resps[0][0] for each in found] for name, found in instances.items()}
    theirs = evaluate(HFLM(pretrained=model[0], tokenizer=model[1]), suite.loaded, limit=12, bootstrap_iters=10)
    for name in FIVE:
        expected = theirs["results"][name]
        again = [each.resps[0][0] for each in suite.loaded["tasks"][name].instances]
        assert likelihoods[name] == pytest.approx(again, rel=1e-4)
        assert ours["tasks"][name]["value"] == expected["acc,none"]
        assert ours["tasks"][name]["stderr"] == pytest.approx(expected["acc_stderr,none"])
        assert ours["tasks"][name]["rows"] == 12
        assert ours["tasks"][name]["shots"] == 0
    values = [ours["tasks"][name]["value"] for name in FIVE]
    assert ours["average"]["value"] == pytest.approx(sum(values) / 5)
    assert any(0 < value < 1 for value in values)


def test_of_a_question_longer_than_the_context_the_beginning_goes(
    data: Path, model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in lm-eval: 53 tokens and 14 or 16 of an answer, in 24."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(model[0].config, "max_position_embeddings", 24)
    suite = load_suite(["piqa"], data=data, limit=None)
    _run(suite, model)
    instances = suite.loaded["tasks"]["piqa"].instances
    ours = [each.resps[0][0] for each in instances]
    evaluate(HFLM(pretrained=model[0], tokenizer=model[1]), suite.loaded, bootstrap_iters=10)
    assert ours == pytest.approx([each.resps[0][0] for each in suite.loaded["tasks"]["piqa"].instances], rel=1e-4)


def test_a_choice_longer_than_the_context_is_refused(
    data: Path, model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored would be tokens of which the beginning is cut off."""
    monkeypatch.setattr(model[0].config, "max_position_embeddings", 12)
    with pytest.raises(InputError, match=r"a choice has \d+ tokens, the model a context of 12"):
        _run(load_suite(["piqa"], data=data, limit=None), model)


def test_one_row_has_no_error(data: Path, model: tuple[Any, Any]) -> None:
    found = _run(load_suite(["piqa"], data=data, limit=None), model)
    assert found["tasks"]["piqa"]["stderr"] is None
    assert found["average"] is None
    json.dumps(found, allow_nan=False)


def test_every_model_gets_the_same_examples(data: Path, model: tuple[Any, Any]) -> None:
    rows = [{**ROWS["piqa"][0], "goal": f"goal {number}"} for number in range(12)]
    (data / LOCAL_TASKS["piqa"].file).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    suite = load_suite(["piqa"], data=data, limit=3)
    task = suite.loaded["tasks"]["piqa"]
    task.set_config(key="num_fewshot", value=2)
    asked = []
    for _ in range(2):
        _run(suite, model)
        asked.append([instance.args for instance in task.instances])
    assert asked[0] == asked[1]
    assert "goal" in asked[0][0][0].split("\n\n")[0]


def test_a_head_of_its_own_stays(tiny_llama: Path, data: Path) -> None:
    """Though the config ties it, by which lm-eval goes."""
    source = open_source(str(tiny_llama))
    untied, tokenizer = source.load_model(torch.float32, torch.device("cpu")), source.tokenizer()
    untied.config.tie_word_embeddings = True
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach() + 1)
    before = untied.lm_head.weight.clone()
    _run(load_suite(["piqa"], data=data, limit=None), (untied, tokenizer))
    assert torch.equal(untied.lm_head.weight, before)
    assert "tie_weights" not in vars(untied)


def test_the_error_of_the_average() -> None:
    figures = [{"metric": "acc", "value": 0.5, "stderr": 0.03}, {"metric": "acc", "value": 0.7, "stderr": 0.04}]
    assert average(figures) == {"value": pytest.approx(0.6), "stderr": pytest.approx(0.05 / 2), "tasks": 2}
    assert (average([*figures, {"metric": "acc", "value": 0.6, "stderr": None}]) or {})["stderr"] is None
    assert (average(figures * 2) or {})["stderr"] == pytest.approx(0.05 * math.sqrt(2) / 4)


def test_the_average_is_of_accuracies_that_are_numbers() -> None:
    figures = [{"metric": metric, "value": 0.5, "stderr": 0.03} for metric in ("acc", "exact_match")]
    others: list[dict[str, Any]] = [
        {"metric": "word_perplexity", "value": 25.31, "stderr": None},
        {"metric": "acc", "value": None, "stderr": None},
        {"metric": "", "value": None, "stderr": None},  # a group that lm-eval does not sum up
    ]
    assert average([*figures, *others]) == average(figures)
    assert average([figures[0], *others]) is None


def test_the_protocol_names_rows_and_versions(data: Path) -> None:
    before = load_suite(["piqa", "arc_easy"], data=data, limit=3).protocol
    assert before["tasks"] == ["piqa", "arc_easy"]
    assert before["limit"] == 3
    assert before["lm_eval"]
    with open(data / LOCAL_TASKS["piqa"].file, "a", encoding="utf-8") as file:
        file.write(json.dumps(ROWS["piqa"][0]) + "\n")
    after = load_suite(["piqa", "arc_easy"], data=data, limit=3).protocol
    assert after["rows"]["piqa"] != before["rows"]["piqa"]
    assert after["rows"]["arc_easy"] == before["rows"]["arc_easy"]


def _without_a_key(data: Path) -> None:
    (data / LOCAL_TASKS["piqa"].file).write_text('{"goal": "a", "sol1": "b", "label": 0}\n')


def _without_the_file(data: Path) -> None:
    (data / LOCAL_TASKS["piqa"].file).unlink()


def _without_rows(data: Path) -> None:
    (data / LOCAL_TASKS["piqa"].file).write_text("")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_a_key, "line 1: has no `sol2`"),
        (_without_the_file, "does not exist"),
        (_without_rows, "piqa_val.jsonl has no rows"),
    ],
)
def test_wrong_data(data: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(data)
    with pytest.raises(InputError, match=message):
        load_suite(["piqa"], data=data, limit=None)


def test_without_a_network_the_hint_is_local_data() -> None:
    with pytest.raises(InputError, match="could not be read") as caught:
        load_suite(["piqa"], data=None, limit=None)
    assert "eval.zero_shot.data" in str(caught.value.hint)


@pytest.mark.slow
def test_an_unknown_task(data: Path) -> None:
    with pytest.raises(RecipeError, match="lm-eval has no task piqua"):
        load_suite(["piqua"], data=data, limit=None)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QatError, match="lm-eval") as caught:
        load_suite(["piqa"], data=None, limit=None)
    assert "qatcli[eval]" in str(caught.value.hint)


def test_figures_that_count() -> None:
    """Of several filters the first, of several figures the plain accuracy."""
    several = {"alias": "gsm8k", "exact_match,strict-match": 0.4, "exact_match,flexible-extract": 0.6}
    assert zero_shot._figures(several)["value"] == 0.4
    both = {"acc_norm,none": 0.5, "acc_norm_stderr,none": 0.2, "acc,none": 0.3, "acc_stderr,none": 0.1}
    found = zero_shot._figures(both)
    assert (found["metric"], found["value"], found["stderr"]) == ("acc", 0.3, 0.1)
