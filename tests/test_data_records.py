import json
import sys
from pathlib import Path

import datasets
import pytest

from llama_adapter.data import read_records, records
from llama_adapter.errors import DataError, MissingExtraError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return str(path)


def error_of(source: str) -> str:
    with pytest.raises(DataError) as caught:
        read_records(source)
    return str(caught.value)


def test_json_list_is_numbered_from_one(tmp_path):
    assert read_records(write(tmp_path / "a.json", '[{"a": 1}, 2]')) == [(1, {"a": 1}), (2, 2)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL"])
def test_json_lines_keep_their_line_numbers_and_skip_blank_lines(tmp_path, name):
    source = write(tmp_path / name, '{"a": 1}\n\n  \r\n{"a": 2}\r\n{"a": 3}')
    assert read_records(source) == [(1, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_byte_order_mark_is_optional(tmp_path, suffix):
    text = "[1]" if suffix == ".json" else "1\n"
    assert read_records(write(tmp_path / f"a{suffix}", "\ufeff" + text)) == [(1, 1)]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_unicode_line_separators_inside_a_value_do_not_end_a_line(tmp_path, separator):
    text = f"one{separator}two"
    line = json.dumps({"a": text}, ensure_ascii=False)
    assert read_records(write(tmp_path / "a.jsonl", line)) == [(1, {"a": text})]


def test_missing_file_suggests_close_names(tmp_path):
    write(tmp_path / "alpaca_train.json", "[1]")
    message = error_of(str(tmp_path / "alpaca_trian.json"))
    assert message == f"{tmp_path}/alpaca_trian.json does not exist: did you mean alpaca_train.json?"


def test_missing_file_without_close_names(tmp_path):
    assert error_of(str(tmp_path / "a.json")) == f"{tmp_path}/a.json does not exist: check the path."


def test_missing_folder(tmp_path):
    message = error_of(str(tmp_path / "no" / "a.json"))
    assert "no/a.json does not exist or cannot be reached: check the path and its permissions." in message


def test_folder(tmp_path):
    assert error_of(str(tmp_path)) == f"{tmp_path} is a folder: give the path of a file."


def test_unknown_suffix(tmp_path):
    source = write(tmp_path / "a.xlsx", "a,b")
    kinds = ".json, .jsonl, .ndjson, .csv, .tsv, .parquet, or in these and .gz or .zst."
    assert error_of(source) == f"{source} ends in '.xlsx': data files end in {kinds}"


def test_no_suffix(tmp_path):
    assert "has no suffix: data files end in .json" in error_of(write(tmp_path / "a", "x"))


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    source = write(tmp_path / "a.json", "[1]")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert error_of(source) == f"{source} cannot be read (Permission denied): check the path and its permissions."


@pytest.mark.parametrize(("content", "offset"), [(b'["caf\xe9"]', 5), (b"\xe9", 0)])
def test_not_utf8_names_the_byte(tmp_path, content, offset):
    source = write(tmp_path / "a.json", content)
    assert error_of(source) == f"{source} is not UTF-8 (byte offset {offset}): save it as UTF-8."


def test_not_json_names_line_and_column(tmp_path):
    source = write(tmp_path / "a.json", '[\n  {"a": 1},\n  {"a" 2}\n]')
    assert f"{source} is not JSON (line 3, column 8: Expecting ':' delimiter): " in error_of(source)


def test_not_json_in_a_line_names_the_line_of_the_file(tmp_path):
    source = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": }\n')
    assert f"{source} is not JSON (line 3, column 7: Expecting value): write one" in error_of(source)


def test_json_lines_in_a_json_file_are_read(tmp_path):
    assert read_records(write(tmp_path / "a.json", '{"a": 1}\n\n{"a": 2}\n')) == [(1, {"a": 1}), (3, {"a": 2})]
    assert "line 2, column 7" in error_of(write(tmp_path / "a.json", '{"a": 1}\n{"a": }\n'))


def test_too_deep(tmp_path):
    assert "is not JSON (line 2: nested too deeply)" in error_of(write(tmp_path / "a.jsonl", "1\n" + "[" * 100_000))


@pytest.mark.parametrize(("text", "found"), [('{"data": []}', "an object"), ('"text"', "a single value")])
def test_json_that_is_no_list(tmp_path, text, found):
    assert f"holds {found}, not a list of records" in error_of(write(tmp_path / "a.json", text))


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", ""), ("a.json", "[]"), ("a.jsonl", "\n \n"), ("a.jsonl", "\ufeff")]
)
def test_no_records(tmp_path, name, text):
    source = write(tmp_path / name, text)
    assert error_of(source) == f"{source} holds no records: give a source with at least one."


def test_bundled_is_the_file_of_the_package(tmp_path, monkeypatch):
    assert records.BUNDLED_INSTRUCTIONS.parts[-3:] == ("llama_adapter", "bundled", "instructions.json")
    monkeypatch.setattr(records, "BUNDLED_INSTRUCTIONS", Path(write(tmp_path / "own.json", '["own"]')))
    assert read_records("bundled") == [(1, "own")]


@pytest.mark.parametrize(
    ("source", "split"), [("owner/name-1.5", "train"), ("owner/name-1.5:test[:10%]", "test[:10%]")]
)
def test_hub_name(monkeypatch, source, split):
    calls = []

    def load(name, split):
        calls.append((name, split))
        return datasets.Dataset.from_list([{"a": 1}, {"a": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_records(source) == [(1, {"a": 1}), (2, {"a": 2})]
    assert calls == [("owner/name-1.5", split)]


def test_hub_failure_is_one_sentence(monkeypatch):
    def load(name, split):
        raise ConnectionError("Couldn't reach the hub.\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = error_of("owner/name:test")
    assert message.startswith("owner/name is no local file, and its split 'test' could not be loaded")
    assert "(Couldn't reach the hub): check the name" in message
    assert "\n" not in message


def test_hub_failure_without_a_message_names_the_type(monkeypatch):
    def load(name, split):
        raise TimeoutError

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert "(TimeoutError)" in error_of("owner/name")


def test_hub_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"loading 'owner/name' from the hub needs 'datasets'.*\[datasets\]"):
        read_records("owner/name")


def test_existing_path_that_looks_like_a_hub_name_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "owner/name is a folder" in error_of("owner/name")


def test_missing_json_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in error_of("folder/file.json")
