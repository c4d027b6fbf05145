"""What a run survives: kills, full disks, torn files, a second run, being started again, a clock that jumps."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from runs import recipe
from safetensors.torch import load_file, save

from llama_adapter.errors import NotWrittenError, TrainingError
from llama_adapter.files import Lock, append, is_leftover, whole_lines, write_atomically
from llama_adapter.formats.native import WEIGHTS_FILE
from llama_adapter.training import agreement, loop, owner
from llama_adapter.training.checkpoint import Progress, RunFolder
from llama_adapter.training.journal import JOURNAL_FILES, Journal
from llama_adapter.training.loop import Run, train

ROOT = Path(__file__).parents[1]


def content(step):
    return save({"a": torch.full((5,), float(step))}, {"progress": json.dumps(asdict(Progress(step)))})


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--kills", "4", "--full", "2", "--steps", "8"], id="one"),
        pytest.param(
            ["--kills", "3", "--full", "0", "--steps", "8", "--processes", "2"], marks=pytest.mark.slow, id="two"
        ),
        pytest.param(
            ["--kills", "6", "--full", "8", "--steps", "12", "--streaming"], marks=pytest.mark.slow, id="stream"
        ),
    ],
)
def test_random_kills_and_full_disks_cost_nothing(base, data, tmp_path, options):
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in json.loads(data.read_text())))
    command = [sys.executable, "-m", "benchmarks.survival", "--model", base, "--data", lines, *options]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for found in map(json.loads, done.stdout.splitlines()):
        (result,) = found.values()
        assert result["lost"] == 0
        assert result["unlike"] == result["damaged"] == []


def test_the_journal_keeps_the_newest_whole_state_wherever_a_write_is_torn(tmp_path):
    journal = Journal(tmp_path)
    assert journal.newest() is None
    for step in range(1, 4):
        journal.write(lambda: content(step))  # noqa: B023
        found = Journal(tmp_path).newest()
        assert (found.step, found.tensors["a"][0].item()) == (step, step)
    before, after = (tmp_path / JOURNAL_FILES[1]).read_bytes(), content(4)
    journal.write(lambda: after)
    whole = (tmp_path / JOURNAL_FILES[1]).read_bytes()
    assert Journal(tmp_path).newest().step == 4
    for cut in range(len(whole)):  # in place: what is behind the cut is still the older state's
        (tmp_path / JOURNAL_FILES[1]).write_bytes(whole[:cut] + before[cut:])
        expected = 4 if whole[:cut] + before[cut:] == whole else 3
        again = Journal(tmp_path)
        assert again.newest().step == expected
        (tmp_path / JOURNAL_FILES[1]).write_bytes(whole[:cut])
        assert again.newest().step == 3
    again.write(lambda: content(5))
    assert [Journal(tmp_path).newest().step, (tmp_path / JOURNAL_FILES[1]).read_bytes()[:8]] == [5, whole[:8]]


def test_a_journal_that_takes_too_long_is_written_now_and_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("llama_adapter.training.journal.time", type("", (), {"monotonic": lambda: now[0]}))

    def slow():
        now[0] += 0.2
        return content(1)

    journal, written = Journal(tmp_path), 0
    for _ in range(100):
        now[0] += 0.5  # a step
        if journal.is_due():
            journal.write(slow)
            written += 1
    assert journal.period == pytest.approx(2)
    assert 20 <= written <= 26


def test_a_run_with_a_slow_journal_says_once_what_a_kill_costs(base, data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Journal, "cost", 7.0)
    caplog.set_level("INFO")
    train(recipe(base, data, tmp_path / "out", save_every=100))
    assert caplog.text.count("saving takes 7.00 s: it is not done after every step, and a kill costs up to 70 s") == 1


def test_a_torn_checkpoint_gives_way_to_the_journal(base, data, tmp_path):
    train(recipe(base, data, tmp_path / "whole"))
    settings = recipe(base, data, tmp_path / "out")
    train(settings)
    state = tmp_path / "out" / "last" / "training_state.safetensors"
    state.write_bytes(state.read_bytes()[:-3])
    assert RunFolder(tmp_path / "out").finished_steps() == 5
    train(replace(settings, resume=True))
    for name in ("adapter_model.safetensors", "last/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_full_disk_says_how_to_go_on(base, data, tmp_path, monkeypatch):
    def full(run, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "write", full)
    with pytest.raises(
        NotWrittenError, match=r"No space left on device.*Go on with: llama-adapter train \S+ --resume$"
    ):
        train(recipe(base, data, tmp_path / "out"))


def test_a_lost_process_says_how_to_go_on(base, data, tmp_path, monkeypatch):
    def lost(run, *_):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4")

    monkeypatch.setattr(Run, "_step", lost)
    with pytest.raises(TrainingError, match=r"Another process of this run was lost .*\. Go on with: .*--resume$"):
        train(recipe(base, data, tmp_path / "out"))


def test_two_runs_in_one_folder_are_one_too_many(base, data, tmp_path):
    settings = recipe(base, data, tmp_path / "out", max_steps=1)
    train(settings)
    other = RunFolder(tmp_path / "out")
    other.lock()
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(TrainingError, match=f"is in use: process {os.getpid()} on .* trains there"):
            train(replace(settings, **options))
    other.release()
    train(replace(settings, overwrite=True))


def test_a_lock_dies_with_its_owner(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from llama_adapter.files import Lock\n"
        "lock = Lock(Path(sys.argv[1])); print(lock.take(), flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "l"], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "True\n"
        lock = Lock(tmp_path / "l")
        assert not lock.take()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert lock.take()
    assert lock.take()
    assert not Lock(tmp_path / "l").take()
    lock.release()


def test_what_a_kill_left_of_a_write_is_no_file_of_anybody(base, data, tmp_path):
    out = tmp_path / "out"
    (out / "last").mkdir(parents=True)
    left = [out / ".recipe.yaml.0123456789abcdef", out / "last" / ".training_state.safetensors.0123456789abcdef"]
    [path.write_text("half") for path in left]
    assert is_leftover(left[0])
    assert not is_leftover(out / ".recipe.yaml")
    (out / "last").rename(tmp_path / "last")
    train(recipe(base, data, out, max_steps=1))
    (tmp_path / "last" / left[1].name).rename(left[1])
    train(recipe(base, data, out, max_steps=2, resume=True))
    assert [path.name for path in out.rglob(".*")] == [".lock"]


def test_a_launcher_that_starts_again_goes_on_with_its_own_run_alone(base, data, tmp_path, monkeypatch):
    settings = recipe(base, data, tmp_path / "out", max_steps=2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    train(settings)
    with pytest.raises(TrainingError, match="already holds a run"):
        train(settings)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert owner.restarted(replace(settings, overwrite=True)) == replace(settings, resume=True)
    train(settings)
    assert [line["step"] for line in whole_lines(tmp_path / "out" / "metrics.jsonl")] == [0, 1, 2, 2]
    monkeypatch.setattr(os, "getppid", lambda: -1)  # another launcher
    assert owner.restarted(settings) == settings
    with pytest.raises(TrainingError, match="already holds a run"):
        train(settings)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert owner.restarted(settings) == settings


def test_a_launcher_on_another_machine_knows_its_run_by_its_name(tmp_path, monkeypatch):
    settings = recipe("base", "data", tmp_path, resume=False)
    (tmp_path / ".lock").write_text(json.dumps({"pid": "7", "host": "first", "launch": f"job {os.getppid() + 1}"}))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert not owner.restarted(settings).resume
    monkeypatch.setenv("GROUP_RANK", "1")
    assert owner.restarted(settings).resume
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    assert not owner.restarted(settings).resume


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_kill_before_any_file_of_the_last_step_leaves_nothing_old(base, data, tmp_path, monkeypatch):
    settings = recipe(base, data, tmp_path / "whole", max_steps=4, save_every=4)
    train(settings)
    wanted = load_file(tmp_path / "whole" / "last" / WEIGHTS_FILE)
    replace_file, places = os.replace, 0
    for left in range(1, 100):
        here, left_of = replace(settings, output_dir=str(tmp_path / "killed"), overwrite=True), [left]

        def killed(source, target, left_of=left_of):
            left_of[0] -= 1
            if not left_of[0]:
                raise Killed
            replace_file(source, target)

        monkeypatch.setattr(os, "replace", killed)
        with suppress(Killed):
            train(here)
            break
        monkeypatch.setattr(os, "replace", replace_file)
        places += 1
        if (tmp_path / "killed" / "recipe.yaml").exists():
            train(replace(here, overwrite=False, resume=True))
            found = load_file(tmp_path / "killed" / "last" / WEIGHTS_FILE)
            assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items()), left
    assert places > 8


DIFFERENT = {
    r"Process 1 of this run differs from process 0 in finished steps \(0, not 1\): give": {"finished steps": 0},
    r"in data \('x', not ": {"data": "x"},
    r"in lr \(0\.5, not 0\.02\), seed \(3, not 0\)": {"lr": 0.5, "seed": 3},
}


def test_processes_that_mean_different_runs_are_refused(base, data, tmp_path, monkeypatch):
    settings = recipe(base, data, tmp_path / "out", max_steps=1)
    train(settings)
    monkeypatch.setattr(loop, "load_base", lambda *_: 1 / 0)
    for message, other in DIFFERENT.items():
        monkeypatch.setattr(agreement, "gather_object", lambda facts: [*facts, facts[0] | other])  # noqa: B023
        with pytest.raises(TrainingError, match=message):
            train(replace(settings, resume=True))
    monkeypatch.setattr(agreement, "gather_object", lambda facts: [*facts, *facts])
    with pytest.raises(ZeroDivisionError):  # the weights are read
        train(replace(settings, resume=True))


def test_no_state_of_an_old_run_stays_when_it_is_written_over(base, data, tmp_path, monkeypatch):
    settings = recipe(base, data, tmp_path / "out", max_steps=3)
    train(settings)
    (tmp_path / "out" / "last").rename(tmp_path / "elsewhere")
    (tmp_path / "out" / "last").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(Run, "_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(replace(settings, overwrite=True))
    assert RunFolder(tmp_path / "out").finished_steps() == 0
    assert list((tmp_path / "elsewhere").iterdir())  # whose files are not ours to delete

    def forbidden(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "out" / "last").mkdir()
    monkeypatch.setattr("llama_adapter.training.checkpoint.shutil.rmtree", forbidden)
    with pytest.raises(NotWrittenError, match="Permission denied"):
        train(replace(settings, overwrite=True))
    assert RunFolder(tmp_path / "out").holds_run()


LOST = """
import os, signal, sys
from llama_adapter.training import loop
step = loop.Run._step
def lose(run, *args):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1"
    if run.experts[0].progress.step == 3 and first:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run, *args)
loop.Run._step = lose
from llama_adapter.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_lost_process_is_replaced_by_the_launcher(base, data, tmp_path):
    (tmp_path / "run.py").write_text(LOST.replace("step == 3 and", "step < 0 and"))
    (tmp_path / "lost.py").write_text(LOST)
    common = ["train", "--model", base, "--data", data, "--max-steps", 6, "--batch-size", 8, "--lr", 0.02]
    common += ["--val-size", 4, "--adapter-layers", 2, "--trackers", "none", "--precision", "fp32"]
    for name in ("run", "lost"):
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            2,
            "--max-restarts",
            2,
        ]
        command = [*launch, tmp_path / f"{name}.py", *common, "--output-dir", tmp_path / name]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert "after step 3" in done.stderr
    for file in ("adapter_model.safetensors", "last/adapter_model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "lost" / file).read_bytes()


def test_a_run_goes_on_from_its_own_journal_and_not_from_the_adapter_that_it_began_with(
    base, data, tmp_path, monkeypatch
):
    train(recipe(base, data, tmp_path / "first", max_steps=3))
    settings = recipe(base, data, tmp_path / "whole", max_steps=3, init_from=str(tmp_path / "first"), save_every=100)
    train(settings)
    stopped, step = replace(settings, output_dir=str(tmp_path / "out")), Run._step
    for at in (0, 2):

        def stopping(run, *args, at=at):
            return 1 / 0 if run.experts[0].progress.step == at else step(run, *args)

        monkeypatch.setattr(Run, "_step", stopping)
        with pytest.raises(ZeroDivisionError):
            train(replace(stopped, resume=at > 0))
    monkeypatch.undo()
    train(replace(stopped, resume=True))
    for name in ("adapter_model.safetensors", "last/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_clock_that_jumps_changes_nothing(base, data, tmp_path, monkeypatch):
    train(recipe(base, data, tmp_path / "whole"))
    true, jumps = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: true() + (-1) ** next(jumps) * 10**9)
    train(recipe(base, data, tmp_path / "out", max_steps=6))
    train(recipe(base, data, tmp_path / "out", max_steps=6, resume=True))
    for name in ("adapter_model.safetensors", "last/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_appending_to_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    append(path, b"one\n")
    write = os.write

    def full(handle, content):
        write(handle, content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        append(path, b"two\n")
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"three\n")
    assert path.read_bytes() == b"one\n"
    assert list(tmp_path.iterdir()) == [path]
