"""Data larger than memory: read in windows, in one order for all, and gone on with at the exact record."""

import gzip
import json
import os
import threading
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from runs import WORDS, recipe, tiny_tokenizer

from llama_adapter.data.stream import Stream, StreamPart, first_records, parts_of
from llama_adapter.data.unchanged import fingerprint
from llama_adapter.errors import ConfigError, DataError, TrainingError
from llama_adapter.training import feed as feeds
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.loop import Run, train
from llama_adapter.training.plan import plan_run
from llama_adapter.training.prepare import prepare

load_dataset = datasets.load_dataset


def records(first, last):
    return [{"instruction": f"Say {i}", "output": WORDS[i % 8]} for i in range(first, last)]


def lines(entries) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """250 records in four files, one of each kind."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(records(0, 70)).replace(b"\n", b"\n\n", 3))
    (folder / "b.json.gz").write_bytes(gzip.compress(lines(records(70, 130))))
    parquet.write_table(pyarrow.Table.from_pylist(records(130, 200)), folder / "c.parquet", row_group_size=15)
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(lines(records(200, 250))))
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(records(0, 40)))
    return path


def config(data, **changes) -> TrainConfig:
    values = {"streaming": True, "max_steps": 6, "val_size": 0, "shuffle_buffer": 16, "batch_size": 8}
    return recipe("unused", data, "unused", **{**values, **changes})


def said(raws):
    return [raw.example().messages[0].content for raw in raws]


def one_pass(stream, count=7):
    taken = []
    while found := stream.take(count):
        taken += said(found)
    return taken


def test_a_pass_reads_every_record_of_every_kind_once_and_the_next_in_another_order(folder):
    stream = Stream(parts_of([str(folder)]), window=16, seed=3)
    passes = [one_pass(stream) for _ in range(3)]
    for found in passes:
        assert sorted(found) == sorted(f"Say {i}" for i in range(250))
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] == one_pass(Stream(parts_of([str(folder / "*")]), 16, 3))
    assert passes[0] != one_pass(Stream(parts_of([str(folder)]), 16, 4))


@pytest.mark.parametrize("window", [1, 16, 1000])
def test_the_order_goes_on_at_the_exact_record(folder, window):
    parts = parts_of([str(folder)])
    whole, places, stream = [], [], Stream(parts, window, 0)
    for count in [5, 1, 16, 2, 30, 11] * 12:
        places.append((json.dumps(stream.position), len(whole), count))
        whole.append(said(stream.take(count)))
    assert ([] in whole) == (window > 1)  # it went on to a second pass
    for place, at, count in places[::5]:
        again = Stream(parts, window, 0)
        again.seek(json.loads(place))
        assert [said(again.take(n)) for _, _, n in places[at:]] == whole[at:], count


def test_no_more_than_a_window_is_read_ahead(rows):
    stream = Stream([StreamPart(str(rows))], window=10, seed=0)
    seen = said(stream.take(1)) + said(stream.take(100))
    assert sorted(seen) == sorted(f"Say {i}" for i in range(10))
    assert stream._reader.number == 10


def test_records_held_out_are_the_first_and_are_not_trained_on(folder):
    parts = parts_of([str(folder)])
    first = first_records(parts)
    held = [next(first) for _ in range(150)]
    assert said(raw for raw, _ in held) == [f"Say {i}" for i in range(150)]
    stream = Stream(parts, 16, 0, held[-1][1])
    for _ in range(2):
        assert sorted(one_pass(stream)) == sorted(f"Say {i}" for i in range(150, 250))


def test_batches_go_on_with_their_counts(folder):
    (folder / "e.jsonl").write_bytes(b'{torn\n{"instruction": 1}\n')
    settings = config(folder, val_size=20, skip_bad_records=True)
    feed = prepare(settings, tiny_tokenizer()).feed(settings)
    places, whole = [], []
    for step in range(40):
        places.append(json.dumps(feed.position))
        whole.append(feed.batch(step))
    assert {len(batch) for batch in whole} == {8, 6}  # 230 records a pass
    assert (feed.records, feed.skipped) == (8 * 40 - 2 + 2 * feed.epoch(40), 2 * feed.epoch(40))
    other = prepare(settings, tiny_tokenizer()).feed(settings)
    other.seek(json.loads(places[33]))
    assert [other.batch(step) for step in range(33, 40)] == whole[33:]
    assert other.position == feed.position
    (folder / "e.jsonl").unlink()


def in_processes(monkeypatch, work, count=3):
    """What `work` returns or raises in each of several processes, which share what they gather; its parts, encoded."""
    state, meet, shared, encoded = threading.local(), threading.Barrier(count), {}, [0] * count

    def gather(found):
        encoded[state.process_index] += sum(len(part.found) for part in found)
        meet.wait(60)
        shared[state.process_index] = found
        meet.wait(60)
        return [entry for rank in range(count) for entry in shared[rank]]

    def process(rank):
        state.process_index, state.num_processes, state.is_main_process = rank, count, rank == 0
        try:
            results[rank] = work(rank)
        except DataError as error:
            results[rank] = str(error)

    monkeypatch.setattr(feeds, "PartialState", lambda: state)
    monkeypatch.setattr(feeds, "gather_object", gather)
    results: dict = {}
    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    return [results.get(rank) for rank in range(count)], encoded


def test_processes_encode_a_part_each_and_see_the_same_batches(folder, monkeypatch):
    alone = prepare(config(folder), tiny_tokenizer()).feed(config(folder))
    expected = [alone.batch(step) for step in range(36)]

    def work(rank):
        feed = prepare(config(folder), tiny_tokenizer()).feed(config(folder))
        return [feed.batch(step) for step in range(36)]

    results, encoded = in_processes(monkeypatch, work)
    assert [found == expected for found in results] == [True] * 3
    assert max(encoded) < 0.45 * sum(encoded)


def test_what_one_process_cannot_read_ends_all_with_the_same_sentence(rows, monkeypatch):
    def work(rank):
        feed = prepare(config(rows), tiny_tokenizer()).feed(config(rows))
        take, taken = feed.stream.take, []

        def failing(count):
            taken.append(count)
            if rank == 1 and len(taken) == 3:
                raise DataError("rows.jsonl cannot be read (Input/output error): take another copy.")
            return take(count)

        feed.stream.take = failing
        return [feed.batch(step) for step in range(6)]

    results, _ = in_processes(monkeypatch, work)
    assert results == ["rows.jsonl cannot be read (Input/output error): take another copy."] * 3


@pytest.mark.parametrize("ahead", [1, 16, 40])
def test_processes_that_read_other_records_are_told_so(rows, monkeypatch, ahead):
    def work(rank):
        feed = prepare(config(rows), tiny_tokenizer()).feed(config(rows))
        if rank == 2:
            one_pass(feed.stream, 16) if ahead == 40 else feed.stream.take(ahead)
        return [feed.batch(step) for step in range(6)]

    results, _ = in_processes(monkeypatch, work)
    assert len(set(results)) == 1
    assert "Process 2 reads other records than process 0 (from " in results[0]


def test_a_stopped_run_goes_on_to_the_same_bits(base, folder, tmp_path, monkeypatch):
    settings = replace(config(folder, val_size=5, save_every=4), model=str(base))
    whole = train(replace(settings, output_dir=str(tmp_path / "whole")))
    step = Run._step

    def killed(run, *args):
        if run.experts[0].progress.step == 3:
            raise KeyboardInterrupt
        return step(run, *args)

    stopped = replace(settings, output_dir=str(tmp_path / "stopped"))
    monkeypatch.setattr(Run, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.setattr(Run, "_step", step)
    assert train(replace(stopped, resume=True)) == replace(whole, output_dir=tmp_path / "stopped")
    for name in ("adapter_model.safetensors", "last/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    card = (tmp_path / "stopped" / "README.md").read_text()
    assert "a stream, of which 48 records were read (0 skipped), 5 to validate" in card


def test_changed_files_are_seen_before_a_run_goes_on(base, rows, tmp_path):
    settings = replace(config(rows, max_steps=1), model=str(base), output_dir=str(tmp_path / "out"))
    train(settings)
    rows.write_bytes(lines(records(1, 41)))
    with pytest.raises(TrainingError, match="data has changed"):
        train(replace(settings, resume=True, max_steps=2))


@pytest.mark.parametrize("megabytes", [1, 100])
def test_a_change_within_a_file_of_the_same_size_is_seen(tmp_path, megabytes):
    file = tmp_path / "rows.jsonl"
    file.touch()
    os.truncate(file, megabytes * 2**20)  # zeros that take no place
    seen = set()
    for place in (None, 0, megabytes * 2**19, megabytes * 2**20 - 1):
        if place is not None:
            with file.open("r+b") as opened:
                opened.seek(place)
                opened.write(b"x")
        seen.add(fingerprint(file, blocks=17))
        os.utime(file, (1, 1))
        seen.add(fingerprint(file, blocks=17))
    assert len(seen) == 4
    assert fingerprint(file, 1) == fingerprint(file, 2), "the first and the last block are always read"


def test_a_plan_counts_what_it_has_looked_at(base, folder):
    plan = plan_run(replace(config(folder, val_size=5), model=str(base)))
    assert (plan["streamed_sources"], plan["examples_looked_at"], plan["val_examples"]) == (4, 245, 5)
    assert plan["steps"] == 6
    assert "steps_per_epoch" not in plan


def test_a_hub_dataset_is_streamed_and_gone_on_with(folder, rows, monkeypatch):
    def local(name, split, **options):
        assert (name, split, options) == ("owner/name", "train", {"streaming": True})
        return load_dataset("json", data_files=str(rows), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)
    parts = parts_of(["owner/name", str(folder / "a.jsonl")])
    whole, places, stream = [], [], Stream(parts, 16, 0)
    for _ in range(30):
        places.append(json.dumps(stream.position))
        whole.append(said(stream.take(6)))
    assert len({text for taken in whole for text in taken}) == 70
    for at in range(0, 30, 3):
        again = Stream(parts, 16, 0)
        again.seek(json.loads(places[at]))
        assert [said(again.take(6)) for _ in range(at, 30)] == whole[at:]


def test_text_without_a_template_stays_so(rows):
    plain = [{"prompt": f"{i} ", "completion": "sun"} for i in range(300)]
    rows.write_bytes(lines(plain + records(0, 5)))
    feed = prepare(config(rows), tiny_tokenizer()).feed(config(rows))
    with pytest.raises(DataError, match=r"record 30\d: it takes a template, and the first records are text without"):
        [feed.batch(step) for step in range(40)]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none-*.jsonl", None, "matches no file: check the pattern"),
        ("a.csv", b"instruction,output\na,b\n", "is read as a whole: for --streaming write it as .jsonl"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "is read as a whole"),
        ("a.json", b'[{"instruction": "a", "output": "b"}]', "is one JSON list, which is read as a whole"),
        ("a.jsonl", b"\n\n", "holds no records"),
        ("a.jsonl", b"\xff\xfea\0", "is UTF-16, not UTF-8"),
        ("a.jsonl", b'{"instruction": "\xff", "output": "b"}\n', "record 1: line 1: bytes that are not UTF-8"),
        ("a.jsonl", b'{"instruction": "a"\n', "record 1: line 1, column 20: Expecting ',' delimiter; fix it or pass"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 9, mtime=0)[:-12],
            "is cut off: take a whole copy",
        ),
        ("a.jsonl.gz", b"{}", "is no .gz file"),
        ("a.parquet", b"PAR1 and nothing behind", "cannot be read"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_what_cannot_be_streamed_is_one_sentence(fail, tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    arguments = ["--data", tmp_path / name, "--output-dir", tmp_path / "out", "--max-steps", 2, "--streaming"]
    assert sentence in fail("train", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "-"], "- is read as a whole"),
        (["--data", "bundled"], "bundled is read as a whole"),
        (["--data", "coco:a.json"], "coco:a.json is read as a whole"),
        (["--val-size", "0.1"], "val_size is 0.1, a share of what nobody knows"),
        (["--condition", "image"], "streaming knows no condition"),
        (["--val-size", "40"], "takes the first 40 records and leaves none of 40 to train on"),
        ([], "takes the first 256 records and leaves none of 40 to train on"),
        (["--max-length", "4000", "--val-size", "1"], "up to 4000 tokens and the base takes 1024"),
    ],
)
def test_settings_that_streaming_cannot_keep_are_one_sentence(fail, base, rows, arguments, sentence):
    arguments = ["--model", base, *(["--data", rows] if "--data" not in arguments else []), *arguments]
    assert sentence in fail("validate", "--streaming", "--max-steps", 2, *arguments)


def test_streaming_needs_its_length(fail, rows):
    assert "streaming needs max_steps, as nobody knows" in fail("validate", "--streaming", "--data", rows)
    assert "shuffle_buffer has no effect without streaming" in fail("validate", "--shuffle-buffer", 5, "--data", rows)


def test_a_hub_name_without_datasets_says_what_to_install(fail, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    arguments = ["--streaming", "--max-steps", 2, "--data", "owner/name"]
    assert "pip install 'llama-adapter[datasets]'" in fail("validate", *arguments)


def test_preference_pairs_are_streamed_too(rows):
    pairs = [{"prompt": f"Say {i}", "chosen": "sun", "rejected": "moon"} for i in range(30)]
    rows.write_bytes(lines(pairs) + lines(records(0, 1)))
    settings = config(rows, method="dpo", skip_bad_records=True)
    feed = prepare(settings, tiny_tokenizer()).feed(settings)
    batches = [feed.batch(step) for step in range(4)]
    assert [len(batch) for batch in batches] == [8, 8, 8, 6]
    assert all(example.rejected for batch in batches for example in batch)
    assert feed.skipped == 1


def test_a_line_without_end_is_refused(rows, monkeypatch):
    monkeypatch.setattr("llama_adapter.data.stream.LONGEST_LINE", 1000)
    rows.write_bytes(lines(records(0, 3)) + b"0" * 1001)
    with pytest.raises(DataError, match="line 4 is longer than 1,000 bytes"):
        one_pass(Stream([StreamPart(str(rows))], 16, 0))


@pytest.fixture
def hub(rows, monkeypatch):
    """The records as a dataset on the hub, where nobody can know that it has changed."""

    def local(name, split, **options):
        return load_dataset("json", data_files=str(rows), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)
    return "owner/name"


def test_when_all_records_are_bad_a_run_does_not_go_round_for_ever(rows, hub):
    settings = config(hub, skip_bad_records=True)
    feed = prepare(settings, tiny_tokenizer()).feed(settings)
    rows.write_bytes(b'{"a": 1}\n' * 20)
    with pytest.raises(DataError, match=r"No record is left to use \(20 skipped\)"):
        feed.batch(0)


def test_when_data_lose_their_good_records_during_a_run_it_ends_too(rows, hub):
    settings = config(hub, skip_bad_records=True)
    feed = prepare(settings, tiny_tokenizer()).feed(settings)
    assert [len(feed.batch(step)) for step in range(5)] == [8] * 5
    rows.write_bytes(b'{"a": 1}\n' * 20)
    with pytest.raises(DataError, match=r"No record is left to use \(20 skipped\)"):
        feed.batch(5)


def cut(file):
    os.truncate(file, file.read_bytes().index(b"\n", file.stat().st_size // 2) + 1)


def append(file):
    with file.open("ab") as opened:
        opened.write(lines(records(40, 41)))


def replace_by(content):
    def change(file):
        (file.parent / "new").write_bytes(content(file.read_bytes()))
        (file.parent / "new").replace(file)

    return change


CHANGES = {
    "cut in place": cut,
    "shorter": replace_by(lambda content: lines(records(0, 9))),
    "longer": replace_by(lambda content: content + lines(records(40, 41))),
    "as long": replace_by(lambda content: content.replace(b"sun", b"nus")),
    "appended to": append,
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_file_that_changes_while_it_is_read_is_refused_before_its_next_window(rows, change, at):
    settings = config(rows, skip_bad_records=True)
    feed = prepare(settings, tiny_tokenizer()).feed(settings)
    expected = [feed.batch(step) for step in range(12)]
    feed = prepare(settings, tiny_tokenizer()).feed(settings)
    found = [feed.batch(step) for step in range(at)]
    CHANGES[change](rows)
    with pytest.raises(DataError, match=r"rows.jsonl (has changed|cannot be read)"):
        found.extend(feed.batch(step) for step in range(at, 12))
    assert found == expected[: len(found)]
    assert len(found) <= at + 2


def test_a_run_whose_file_was_cut_goes_on_to_the_same_bits_once_it_is_back(base, rows, tmp_path, monkeypatch):
    settings = replace(config(rows, max_steps=12), model=str(base))
    train(replace(settings, output_dir=str(tmp_path / "whole")))
    content, step = rows.read_bytes(), Run._step

    def cutting(run, *args):
        if run.experts[0].progress.step == 3:
            cut(rows)
        return step(run, *args)

    stopped = replace(settings, output_dir=str(tmp_path / "stopped"))
    monkeypatch.setattr(Run, "_step", cutting)
    with pytest.raises(DataError, match="put the old file back and go on with --resume"):
        train(stopped)
    monkeypatch.setattr(Run, "_step", step)
    with pytest.raises(TrainingError, match="data has changed"):
        train(replace(stopped, resume=True))
    rows.write_bytes(content)
    train(replace(stopped, resume=True))
    for name in ("adapter_model.safetensors", "last/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_a_packed_file_and_a_table_are_watched_too(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(records(0, 40))) + gzip.compress(lines(records(40, 80))))
    parquet.write_table(pyarrow.Table.from_pylist(records(0, 80)), tmp_path / "b.parquet", row_group_size=15)
    shorter = {
        "a.jsonl.gz": gzip.compress(lines(records(0, 40))),  # whole, and less
        "b.parquet": (tmp_path / "b.parquet").read_bytes() + b"x",
    }
    for name, content in shorter.items():
        stream = Stream(parts_of([str(tmp_path / name)]), 16, 0)
        stream.take(16)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} has changed while it was in use"):
            one_pass(stream)


def test_a_file_that_is_copied_or_touched_is_the_same(rows):
    stream = Stream(parts_of([str(rows)]), 16, 0)
    stream.take(16)
    replace_by(lambda content: content)(rows)
    os.utime(rows, (1, 1))
    assert len(one_pass(stream)) == 24
    assert len(one_pass(stream)) == 40


def test_a_later_key_or_kind_does_not_end_the_reading(rows):
    odd = [{"instruction": "a", "output": "b", "id": "x"}, {"instruction": "a", "output": "b", "input": "c", "id": [1]}]
    rows.write_bytes(lines([{**entry, "id": 1} for entry in records(0, 40)] + odd))
    assert len(one_pass(Stream([StreamPart(str(rows))], 16, 0))) == 42


def test_settings_are_checked_in_python_too():
    with pytest.raises(ConfigError, match="streaming needs max_steps"):
        TrainConfig(streaming=True)
    assert SimpleNamespace(**vars(TrainConfig(streaming=True, max_steps=3))).shuffle_buffer is None
