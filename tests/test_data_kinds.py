"""The files people have: tables, packed files, folders, patterns, pipes, and what is no file at all."""

import bz2
import gzip
import io
import json
import os
import sys
import threading
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from llama_adapter.data import data_files, kinds, load_examples, read_records
from llama_adapter.data.kinds import load_json
from llama_adapter.errors import DataError, MissingExtraError

RECORD = {"instruction": "Name a tree.", "output": "Oak."}


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return str(path)


def error_of(source: str) -> str:
    with pytest.raises(DataError) as caught:
        [read_records(file) for file in data_files(source)]
    assert str(caught.value).count("\n") == 0
    return str(caught.value)


# tables


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "instruction,output\nName a tree.,Oak.\n"),
        ("a.CSV", '\ufeff"instruction","output"\r\n"Name a tree.","Oak."\r\n'),
        ("semicolons.csv", "instruction;output\nName a tree.;Oak.\n"),
        ("tabs.csv", "instruction\toutput\nName a tree.\tOak.\n"),
        ("a.tsv", "instruction\toutput\r\nName a tree.\tOak."),
        ("blanks.csv", "\n instruction , output\n\nName a tree.,Oak.\n\n"),
    ],
)
def test_tables_have_a_row_of_names(tmp_path, name, text):
    assert [record for _, record in read_records(write(tmp_path / name, text))] == [RECORD]


def test_a_row_is_known_by_the_line_it_begins_in(tmp_path):
    text = 'a,b\n"two\nlines, ""quoted""",1\n\nx,\n'
    assert read_records(write(tmp_path / "a.csv", text)) == [
        (2, {"a": 'two\nlines, "quoted"', "b": "1"}),
        (5, {"a": "x", "b": ""}),
    ]


def test_a_long_value_of_a_table_is_read(tmp_path):
    source = write(tmp_path / "a.csv", f"a\n{'x' * 200_000}\n")
    assert read_records(source) == [(2, {"a": "x" * 200_000})]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2,3\n", "is not CSV (line 2: 3 values and 2 columns)"),
        ("a,b\n1\n", "is not CSV (line 2: 1 values and 2 columns)"),
        ("a,a\n1,2\n", "has two columns 'a'"),
        ('a,b\n"cut off,2\n3,4\n', "is not CSV (line 3: unexpected end of data)"),
        ('a,b\n"x" y,2\n', "is not CSV (line 2"),
        ("a,b\n", "holds no records"),
        ("", "holds no records"),
    ],
)
def test_a_broken_table_names_its_line(tmp_path, text, words):
    assert words in error_of(write(tmp_path / "a.csv", text))


def test_parquet(tmp_path):
    table = pyarrow.Table.from_pylist([RECORD, {"instruction": "Again?", "output": "Elm."}])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_records(str(tmp_path / "a.parquet")) == [(1, RECORD), (2, {"instruction": "Again?", "output": "Elm."})]


def test_objects_of_a_column_do_not_get_each_other_s_keys_as_null(tmp_path):
    tools = [[{"name": "f", "parameters": {"town": {"type": "string"}}}], [{"name": "g", "parameters": {"day": {}}}]]
    rows = [{**RECORD, "tools": tool} for tool in tools]
    rows[1]["tools"][0]["parameters"]["day"] = {"type": "number"}
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [record for _, record in read_records(str(tmp_path / "a.parquet"))] == rows


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    source = write(tmp_path / "a.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        MissingExtraError, match=r"needs 'pyarrow', which is not installed: pip install 'llama-adapter\[datasets\]'"
    ):
        read_records(source)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"[1]"])
def test_a_damaged_parquet_file(tmp_path, content):
    assert "is damaged or no parquet file" in error_of(write(tmp_path / "a.parquet", content))


# packed


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.JSONL.GZ", "misnamed.jsonl"])
def test_gzip(tmp_path, name):
    packed = gzip.compress(json.dumps(RECORD).encode() + b"\n" + json.dumps(RECORD).encode())
    assert read_records(write(tmp_path / name, packed)) == [(1, RECORD), (2, RECORD)]


def test_gzip_in_parts_and_with_zeros_behind_it(tmp_path):
    packed = gzip.compress(b"1\n") + gzip.compress(b"2\n") + bytes(600)
    assert read_records(write(tmp_path / "a.jsonl.gz", packed)) == [(1, 1), (2, 2)]


def test_a_packed_table(tmp_path):
    packed = gzip.compress(b"instruction,output\nName a tree.,Oak.\n")
    assert read_records(write(tmp_path / "a.csv.gz", packed)) == [(2, RECORD)]


def test_what_gzip_cannot_read(tmp_path):
    packed = gzip.compress(json.dumps([RECORD] * 99).encode())
    assert "is cut off" in error_of(write(tmp_path / "a.json.gz", packed[:-9]))
    assert "is damaged" in error_of(write(tmp_path / "a.json.gz", packed[:20] + b"\xff" * 20 + packed[40:]))
    assert "is no .gz file" in error_of(write(tmp_path / "a.json.gz", b""))
    assert "is no .gz file" in error_of(write(tmp_path / "a.json.gz", bz2.compress(b"[1]")))


def test_a_packed_file_that_grows_beyond_reason_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "SMALL", 2**20)
    source = write(tmp_path / "a.jsonl.gz", gzip.compress(bytes(2**24)))
    assert "unpacks to more than 1,6" in error_of(source)


def test_zstd(tmp_path):
    zstandard = pytest.importorskip("zstandard" if sys.version_info < (3, 14) else "compression.zstd")
    pack = zstandard.ZstdCompressor().compress if sys.version_info < (3, 14) else zstandard.compress
    text = (json.dumps(RECORD) + "\n").encode() * 3
    packed = pack(text)
    assert [record for _, record in read_records(write(tmp_path / "a.jsonl.zst", packed + packed))] == [RECORD] * 6
    assert "is cut off" in error_of(write(tmp_path / "b.jsonl.zst", packed[:-4]))
    assert "unpacks to more than" in error_of(write(tmp_path / "c.jsonl.zst", pack(bytes(2**27))))


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python has its own")
def test_zstd_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    source = write(tmp_path / "a.jsonl.zst", b"\x28\xb5\x2f\xfd")
    with pytest.raises(
        MissingExtraError, match=r"needs 'zstandard', which is not installed: pip install 'llama-adapter\[zstd\]'"
    ):
        read_records(source)


# JSON of either form


def test_a_list_in_a_file_of_lines_is_read(tmp_path):
    assert read_records(write(tmp_path / "a.jsonl", '[\n {"a": 1},\n {"a": 2}\n]\n')) == [(1, {"a": 1}), (2, {"a": 2})]


def test_lines_that_are_lists_stay_lines(tmp_path):
    assert read_records(write(tmp_path / "a.jsonl", "[1]\n[2]\n")) == [(1, [1]), (2, [2])]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [("a.jsonl", '{"a": 1}\n{"id": %s}\n', 2), ("a.json", '[\n{"a": 1},\n{"id": %s}]', 3), ("a.json", "[1, -%s]", 1)],
)
def test_a_number_that_python_does_not_read_is_named_with_its_line(tmp_path, name, text, line):
    source = write(tmp_path / name, text % ("7" * 5000))
    assert error_of(source).startswith(f"{source} is not JSON (line {line}: a number of more than 4,300 digits): ")


def test_such_a_number_in_a_file_that_is_one_value(tmp_path):
    path = tmp_path / "c.json"
    write(path, '{"images": [],\n"x": ' + "7" * 5000 + "}")
    with pytest.raises(DataError, match=r"c\.json is not JSON \(line 2: a number of more than 4,300 digits\)"):
        load_json(path)


def test_both_halves_are_one_character(tmp_path):
    assert read_records(write(tmp_path / "a.jsonl", '{"a": "\\ud83d\\ude00"}')) == [(1, {"a": "\U0001f600"})]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.jsonl.gz"])
def test_utf16_is_named(tmp_path, name, encoding):
    content = "\ufeff".encode(encoding) * (encoding != "utf-16") + "[1]".encode(encoding)
    source = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert error_of(source) == f"{source} is UTF-16, not UTF-8: save it as UTF-8."


@pytest.mark.parametrize(
    ("name", "text", "line"), [("a.jsonl", "%s\n{oops\n%s\n", 2), ("a.csv", "instruction,output\n%s\n1,2,3\n%s\n", 3)]
)
def test_a_broken_line_is_one_bad_record(tmp_path, name, text, line):
    good = json.dumps(RECORD) if name == "a.jsonl" else "Name a tree.,Oak."
    source = write(tmp_path / name, text % (good, good))
    loaded = load_examples([source], skip_bad_records=True)
    assert len(loaded.examples) == 2
    assert len(loaded.skipped) == 1
    assert f"line {line}" in loaded.skipped[0]
    with pytest.raises(DataError, match=f"line {line}"):
        load_examples([source])


def test_a_file_of_broken_lines_leaves_no_record(tmp_path):
    with pytest.raises(DataError, match=r"No record is left to use \(2 skipped\)\. The first: .*line 1"):
        load_examples([write(tmp_path / "a.jsonl", "{\n}\n")], skip_bad_records=True)


# folders, patterns, pipes


def test_a_folder_stands_for_its_data_files(tmp_path):
    (tmp_path / "deeper").mkdir()
    for name in ("b.jsonl", "a.json.gz", ".hidden.json", "README.md", "deeper/c.jsonl"):
        write(tmp_path / name, "1")
    assert data_files(str(tmp_path)) == [str(tmp_path / "a.json.gz"), str(tmp_path / "b.jsonl")]


def test_a_folder_without_data_says_so(tmp_path):
    assert f"{tmp_path} is a folder without data files: they end in .json" in error_of(str(tmp_path))


def test_a_pattern_stands_for_what_it_matches(tmp_path):
    for name in ("a1.jsonl", "a2.jsonl", "b1.jsonl"):
        write(tmp_path / name, json.dumps(RECORD))
    both = [str(tmp_path / "a1.jsonl"), str(tmp_path / "a2.jsonl")]
    assert data_files(f"{tmp_path}/a*.jsonl") == data_files(f"{tmp_path}/a[12].jsonl") == both
    assert data_files(f"{tmp_path}/**/?1.jsonl") == [both[0], str(tmp_path / "b1.jsonl")]
    assert "matches no file" in error_of(f"{tmp_path}/c*.jsonl")


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    source = write(tmp_path / "a[1].jsonl", "1")
    assert data_files(source) == [source]
    assert data_files("owner/name:train[:10%]") == ["owner/name:train[:10%]"]


def test_home_in_front_of_a_pattern(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", "1")
    assert data_files("~/*.jsonl") == data_files("~") == [str(tmp_path / "a.jsonl")]
    assert read_records("~/a.jsonl") == [(1, 1)]


@pytest.mark.parametrize("source", ["", "/*.*"])
def test_prompts_and_tasks_come_from_the_same_kinds(tmp_path, source):
    from llama_adapter.evaluation.instructions import read_tasks
    from llama_adapter.inference.writing import read_prompts

    write(tmp_path / "a.csv", "instruction,output\nName a tree.,Oak.\n")
    write(tmp_path / "b.jsonl.gz", gzip.compress(json.dumps(RECORD).encode()))
    found = f"{tmp_path}{source}"
    assert [prompt.messages[-1].content for prompt in read_prompts(found)] == ["Name a tree."] * 2
    assert [task.answer for task in read_tasks(found)] == ["Oak."] * 2
    write(tmp_path / "a.csv", "question,output\nName a tree.,Oak.\n")
    for read in (read_prompts, read_tasks):
        with pytest.raises(DataError, match=r"a\.csv, record 2: "):
            read(found)


def test_several_files_keep_the_names_of_their_records(tmp_path):
    write(tmp_path / "a.jsonl", json.dumps(RECORD))
    write(tmp_path / "b.csv", "instruction,output\nName a tree.,Elm.\n")
    origins = [example.origin for example in load_examples([str(tmp_path)]).examples]
    assert origins == [f"{tmp_path}/a.jsonl, record 1", f"{tmp_path}/b.csv, record 2"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("text", [b"1\n2\n", b"[1, 2]"])
def test_standard_input(monkeypatch, text, pack):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pack(text))))
    assert read_records("-") == [(1, 1), (2, 2)]


def test_standard_input_has_an_end(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert error_of("-").startswith("- holds no records")


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no /dev/fd")
def test_what_a_shell_makes_of_a_command(tmp_path):
    reader, writer = os.pipe()
    threading.Thread(target=lambda: (os.write(writer, b"1\n2\n"), os.close(writer))).start()
    assert read_records(f"/dev/fd/{reader}") == [(1, 1), (2, 2)]
    os.close(reader)


# what is no file


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_that_nobody_writes_into_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is a device or a pipe, not a file" in error_of(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="is a device or a pipe"):
        load_json(Path("/dev/zero"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    source = write(tmp_path / name, pointer)
    assert error_of(source) == f"{source} is a Git LFS pointer, not the file: run 'git lfs pull' in its folder."


def test_a_picture_that_is_a_pointer_is_named(tmp_path):
    write(tmp_path / "a.png", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    source = write(tmp_path / "a.jsonl", json.dumps({**RECORD, "image": "a.png"}))
    with pytest.raises(DataError, match=r"record 1: .*a\.png is a Git LFS pointer"):
        load_examples([source])


def test_a_folder_that_is_called_like_a_file(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    assert "is a folder" in error_of(str(tmp_path / "a.jsonl"))


def test_files_between_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, "1")
    assert "repeat --data" in error_of("a.jsonl,b.jsonl")
