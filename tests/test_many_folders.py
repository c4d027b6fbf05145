"""Many experts in one run: each has a lock, a journal, a stream and prompts of its own."""

import errno
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from runs import assert_same_run, recipe, write_data

from llama_adapter.errors import NotWrittenError, TrainingError
from llama_adapter.training.checkpoint import RunFolder
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.journal import Journal
from llama_adapter.training.loop import Run, train
from llama_adapter.training.many import Runs, train_many
from llama_adapter.training.owner import launch


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_loss", "plot_gates"):
            patch.setattr(f"llama_adapter.training.learner.{name}", lambda content, path, *_: path.touch())
        yield


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """A plain file, a packed one, and one whose last record is bad."""
    folder = tmp_path_factory.mktemp("streams")
    lines = [json.dumps({"instruction": f"Say {i}", "output": "sun moon"[: 3 + i % 5]}) for i in range(40)]
    (folder / "plain.jsonl").write_text("\n".join(lines))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress("\n".join(reversed(lines)).encode()))
    (folder / "bad.jsonl").write_text("\n".join([*lines, *lines, *lines, *lines, *lines, *lines, *lines, "{}"]))
    return folder


def experts(base: Path, streams: Path, folder: Path) -> dict[str, TrainConfig]:
    streaming = {"streaming": True, "max_steps": 6, "val_size": 3, "shuffle_buffer": 8, "save_every": 4}
    return {
        "plain": recipe(base, streams / "plain.jsonl", folder / "plain", **streaming, batch_size=7),
        "packed": recipe(base, streams / "packed.jsonl.gz", folder / "packed", **streaming, seed=5),
        "memory": recipe(
            base, write_data(folder / "memory.json"), folder / "memory",
            prompt_init_text="data", adapter_layers=3, save_every=100,
        ),
    }  # fmt: skip


def stop_at(monkeypatch, rounds, error=KeyboardInterrupt):
    """Die without a word in a step of the run."""
    step, done = Run._step, []

    def stopping(run, *args):
        done.append(1)
        if len(done) == rounds:
            raise error
        return step(run, *args)

    monkeypatch.setattr(Run, "_step", stopping)


def test_streams_and_prompts_of_a_text_among_many_go_on_from_their_journals(base, streams, tmp_path, monkeypatch):
    (tmp_path / "alone").mkdir()
    (tmp_path / "many").mkdir()
    for config in experts(base, streams, tmp_path / "alone").values():
        train(config)
    recipes = experts(base, streams, tmp_path / "many")
    stop_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train_many(Runs(recipes))
    monkeypatch.undo()
    for name, config in recipes.items():
        assert RunFolder(config.output_dir).finished_steps() == 3
        assert (tmp_path / "many" / name / "last" / "journal.0").exists()
    train_many(Runs({name: replace(config, resume=True) for name, config in recipes.items()}))
    for name in recipes:
        assert_same_run(tmp_path / "many" / name, tmp_path / "alone" / name)
    card = (tmp_path / "many" / "plain" / "README.md").read_text()
    assert "a stream, of which " in card


def test_a_bad_record_of_a_stream_stops_its_own_run_alone(base, streams, tmp_path):
    plain = experts(base, streams, tmp_path)["plain"]
    changes = {"data": (str(streams / "bad.jsonl"),), "shuffle_buffer": 1, "batch_size": 64}
    bad = replace(plain, output_dir=str(tmp_path / "bad"), **changes)
    with pytest.raises(TrainingError, match=r"1 of 2 runs failed, all others are finished. bad: \S+, record 281: "):
        train_many(Runs({"bad": bad, "plain": plain}))
    assert RunFolder(tmp_path / "bad").finished_steps() == 4
    assert RunFolder(tmp_path / "plain").finished_steps() == 6


def test_each_folder_is_locked_and_let_go(base, data, tmp_path, monkeypatch):
    recipes = {name: recipe(base, data, tmp_path / name, max_steps=1) for name in "ab"}
    seen, step = [], Run._step

    def watched(run, *args):
        for name in "ab":
            with pytest.raises(TrainingError, match="is in use: process"):
                RunFolder(tmp_path / name).lock()
            seen.append(name)
        return step(run, *args)

    monkeypatch.setattr(Run, "_step", watched)
    train_many(Runs(recipes))
    assert seen == ["a", "b"]
    again = {name: replace(config, overwrite=True) for name, config in recipes.items()}
    other = RunFolder(tmp_path / "b")
    other.lock()
    with pytest.raises(TrainingError, match=r"^b: .* is in use: process"):
        train_many(Runs(again))
    other.release()
    seen.clear()
    train_many(Runs(again))
    assert seen == ["a", "b"]


def test_no_old_run_is_deleted_where_another_cannot_begin(base, data, tmp_path):
    old = recipe(base, data, tmp_path / "a", max_steps=1)
    train(old)
    before = (tmp_path / "a" / "last" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "file").write_text("no folder")
    other = replace(old, output_dir=str(tmp_path / "file" / "b"), overwrite=True)
    with pytest.raises(NotWrittenError, match=r"^b: .* cannot be written"):
        train_many(Runs({"a": replace(old, overwrite=True), "b": other}))
    assert (tmp_path / "a" / "last" / "adapter_model.safetensors").read_bytes() == before
    assert RunFolder(tmp_path / "a").finished_steps() == 1


def test_a_full_disk_says_how_to_go_on_with_all(base, data, tmp_path, monkeypatch):
    recipes = {name: recipe(base, data, tmp_path / name) for name in "ab"}
    full = OSError(errno.ENOSPC, "No space left on device")  # a tracker's: it does not say where
    for error in (full, NotWrittenError("a/last cannot be written.")):
        stop_at(monkeypatch, 2, error)
        with pytest.raises(
            NotWrittenError, match=r"cannot be written.* Go on with: llama-adapter train-many x --resume"
        ):
            train_many(Runs({name: replace(config, overwrite=True) for name, config in recipes.items()}, "x"))
        monkeypatch.undo()


def test_journals_of_one_run_share_their_part_of_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "cost", 0.02)
    assert RunFolder(tmp_path).journal.period == 0
    assert RunFolder(tmp_path, together=32).journal.period == pytest.approx(6.4)


def test_a_launcher_that_starts_many_again_goes_on_with_them(base, data, tmp_path, monkeypatch):
    recipes = {name: recipe(base, data, tmp_path / name, save_every=100) for name in "ab"}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert launch()
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train_many(Runs(recipes))
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert {result.steps for result in train_many(Runs(recipes)).values()} == {6}


def test_many_experts_on_a_base_in_parts_are_refused(base, data, tmp_path, monkeypatch):
    recipes = {name: recipe(base, data, tmp_path / name) for name in "ab"}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("llama_adapter.training.loop.load_base", None)
    with pytest.raises(TrainingError, match="A sharded base trains one adapter a run, and these are 2"):
        train_many(Runs(recipes))
    assert not (tmp_path / "a").exists()
