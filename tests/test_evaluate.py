"""Scores counted by hand, and lm-evaluation-harness run for real on a local task."""

import json
from pathlib import Path

import pytest
import torch
from test_generate import write_adapter

from llama_adapter.cli import main
from llama_adapter.errors import DataError
from llama_adapter.evaluation.instructions import evaluate_instructions, normalise, read_tasks
from llama_adapter.inference.session import load_session

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return Path(write_adapter(base, tmp_path_factory.mktemp("adapter")))


@pytest.fixture(scope="module")
def session(base, adapter):
    return load_session(str(base), {"a": str(adapter)}, CPU)


@pytest.fixture
def tasks_file(session, tmp_path):
    """Three tasks; the right answer of the first and the last is what adapter "a" says."""
    path = tmp_path / "tasks.json"
    asked = [("sun", "one"), ("moon", "two"), ("cat", "two")]
    records = [{"instruction": word, "output": "no such answer", "family": family} for word, family in asked]
    path.write_text(json.dumps(records))
    _, answers = evaluate_instructions(session, "a", read_tasks(str(path)), max_new_tokens=4)
    for i in (0, 2):
        records[i]["output"] = f"  {answers[i].upper()}. " if answers[i].strip() else "x"
    path.write_text(json.dumps(records))
    return path


def test_scores_count_right_answers_per_family_and_over_all(session, tasks_file):
    tasks = read_tasks(str(tasks_file))
    scores, answers = evaluate_instructions(session, "a", tasks, max_new_tokens=4, batch_size=2)
    right = [normalise(task.answer) == normalise(answer) for task, answer in zip(tasks, answers, strict=True)]
    assert right == [True, False, True]
    assert [(s.family, s.count, s.exact_match) for s in scores] == [("one", 1, 1), ("two", 2, 0.5), ("all", 3, 2 / 3)]
    by_tokens = [(s.loss, s.count) for s in scores]
    assert min(by_tokens[0][0], by_tokens[1][0]) < by_tokens[2][0] < max(by_tokens[0][0], by_tokens[1][0])


def test_the_bare_base_and_the_adapter_are_told_apart(session, tasks_file):
    tasks = read_tasks(str(tasks_file))
    bare = evaluate_instructions(session, None, tasks, max_new_tokens=4)[0][-1]
    adapted = evaluate_instructions(session, "a", tasks, max_new_tokens=4)[0][-1]
    assert abs(bare.loss - adapted.loss) > 1e-4


def test_answers_are_compared_without_case_blanks_and_full_stop():
    assert normalise("  PARIS.\n") == normalise("Paris")
    assert normalise("New  York") != normalise("Newyork")
    assert normalise("3.5") != normalise("35")


def test_a_record_without_an_answer_is_named(tmp_path):
    (tmp_path / "t.json").write_text('[{"instruction": "x"}]')
    with pytest.raises(DataError, match=r"t.json, record 1"):
        read_tasks(str(tmp_path / "t.json"))


def test_command_prints_models_side_by_side(adapter, tasks_file, tmp_path, capsys):
    arguments = ["evaluate", "instructions", "--data", str(tasks_file), "-a", str(adapter), "--max-new-tokens", "4"]
    main([*arguments, "--json", "--plot", str(tmp_path / "scores.png")])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["base", adapter.name]
    assert found[adapter.name][-1]["exact_match"] == pytest.approx(2 / 3)
    assert (tmp_path / "scores.png").stat().st_size > 1000
    main(arguments)
    assert "66.7%" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--limit", "0"])
    assert ended.value.code == 2
    assert "--limit is 0" in capsys.readouterr().err


HARNESS_TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_lm_evaluation_harness_scores_a_local_task_as_a_sum_by_hand(base, adapter, session, tmp_path: Path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from llama_adapter import use_adapter
    from llama_adapter.evaluation.lm_eval import LlamaAdapterLM

    docs = [{"question": f"{w} is", "choices": ["sun", "moon"], "answer": i % 2} for i, w in enumerate("abcd")]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "words.yaml").write_text(HARNESS_TASK.format(file=tmp_path / "words.jsonl"))
    model = LlamaAdapterLM(adapter=str(adapter), device="cpu", batch_size=2)
    assert model.written_as == "alpaca"
    found = lm_eval.simple_evaluate(
        model=model, tasks=["words"], task_manager=TaskManager(include_path=str(tmp_path)), bootstrap_iters=0
    )

    def likelihood(question, choice):
        start, ids = session.tokenizer(question).input_ids, session.tokenizer(f"{question} {choice}").input_ids
        with torch.no_grad(), use_adapter(session.model, "a"):
            scores = session.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(scores[i - 1, ids[i]]) for i in range(len(start), len(ids)))

    right = [
        max(range(2), key=lambda c, doc=doc: likelihood(doc["question"], doc["choices"][c])) == doc["answer"]
        for doc in docs
    ]
    assert found["results"]["words"]["acc,none"] == pytest.approx(sum(right) / len(right))
    samples = found["samples"]["words"]
    for sample in samples:
        for choice, (score, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            assert float(score) == pytest.approx(likelihood(sample["doc"]["question"], choice), abs=1e-3)
    prompt = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("### Instruction:\nHi\n\n### Response:")
