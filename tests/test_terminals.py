"""Manners towards terminals, pipes, disks and shells: what commands print, how they end, how they take paths."""

import io
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_cli import COMMANDS, Output
from test_generate import write_adapter

from llama_adapter import progress
from llama_adapter.cli import _interruptible, build_parser, main, output
from llama_adapter.cli.options import name_adapters
from llama_adapter.cli.recipe import recipe_from
from llama_adapter.errors import ConfigError, ModelError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return Path(write_adapter(base, tmp_path_factory.mktemp("home") / "runs" / "poet"))


@pytest.fixture(autouse=True)
def home(adapter, monkeypatch):
    """The working folder and the home folder are the one that holds runs/poet."""
    monkeypatch.chdir(adapter.parent.parent)
    monkeypatch.setenv("HOME", str(adapter.parent.parent))
    return adapter.parent.parent


@pytest.fixture
def streams(monkeypatch):
    """Run a command with standard output in an encoding; returns what it printed as bytes, and stderr."""

    def run(*arguments, encoding="utf-8"):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        err = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        try:
            main([str(argument) for argument in arguments])
        finally:
            out.flush()
            err.flush()
        return Output(out.buffer.getvalue(), err.buffer.getvalue())

    return run


def config_of(*arguments):
    return recipe_from(build_parser().parse_args(["train", *arguments]))


# encodings


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_inspect_draws_with_what_the_output_has(streams, adapter, encoding):
    printed = streams("inspect", adapter, encoding=encoding).out.decode(encoding)
    assert "\\u" not in printed
    assert ("│" in printed) == (encoding == "utf-8")
    shades = set(printed) & set(output.PLAIN_SHADES[1:])
    assert shades > {"."} if encoding != "utf-8" else set(printed) & set(output.SHADES[1:])


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_an_answer_that_the_output_cannot_take_is_escaped(streams, adapter, monkeypatch, encoding, as_json):
    from llama_adapter.inference.session import Answer, Session

    def answer(self, prompts, adapter, config, on_text=None):
        if on_text:
            on_text("\U0001f600 \u0151")
        return [Answer("\U0001f600 \u0151", 1, 2, 0.1, "stop")]

    monkeypatch.setattr(Session, "answer", answer)
    printed = streams("generate", "-a", adapter, *as_json, "hi", encoding=encoding).out.decode(encoding)
    text = json.loads(printed)["text"] if as_json else printed.strip().encode().decode("unicode-escape")
    assert text == "\U0001f600 \u0151"


def test_json_keeps_its_letters_where_the_output_has_them(streams):
    assert streams("inspect", "runs/poet", "--json").out.startswith(b"{")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    assert not output.is_narrow(stream)
    assert output.is_narrow(SimpleNamespace(encoding="cp1252"))
    assert output.is_narrow(SimpleNamespace())


def test_tables_in_a_file_are_not_cut_short(streams, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert output.console().width == 200
    monkeypatch.setenv("COLUMNS", "50")
    assert output.console().width == 50


# help


@pytest.mark.parametrize("command", [*COMMANDS, ["evaluate", "scienceqa"], []], ids=" ".join)
@pytest.mark.parametrize("columns", [60, 160])
def test_help_is_as_wide_as_the_terminal(command, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    _, _, text = capsys.readouterr().out.partition("\n\n")
    lines = text.partition("examples:" if command else "start with:")[0].splitlines()
    wide = [line for line in lines if len(line) > columns]
    assert [line for line in wide if " " in line.strip()] == []  # one long word has nowhere to break
    if columns == 160 and command == ["train"]:
        assert max(map(len, lines)) > 115


@pytest.mark.slow
def test_help_is_quick():
    def seconds(*words):
        """Of the processor's time: what runs beside it takes none of that."""
        before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before

    taken = [(seconds("-m", "llama_adapter", "train", "--help"), seconds("-c", "import typer, rich")) for _ in range(5)]
    ours, theirs = (min(column) for column in zip(*taken, strict=True))
    assert ours < 1.5 * theirs


# paths


def test_a_tilde_behind_a_flag_is_the_home_folder(streams, adapter, home):
    assert name_adapters(["poet=~/runs/x", "~/runs/y"]) == {"poet": f"{home}/runs/x", "y": f"{home}/runs/y"}
    assert config_of("--output-dir=~/x").output_dir == f"{home}/x"
    assert json.loads(streams("inspect", "~/runs/poet", "--json").out)["folder"] == str(adapter)
    (home / "asked.txt").write_text("\ufeffhi\n", encoding="utf-8")
    done = streams("generate", "--adapter=~/runs/poet", "--file=~/asked.txt", "--json", "--max-new-tokens", "1")
    assert json.loads(done.out)["prompt"] == "hi"
    assert streams("inspect", "runs/poet", "--plot=~/gates.png").err.decode() == f"wrote {home}/gates.png\n"


def test_a_tilde_in_a_recipe_is_the_home_folder(home):
    (home / "r.yaml").write_text(
        "output_dir: ~/x\ndata: ~/d.json\ncondition: image\nfeature_cache: ~/f\n", encoding="utf-8"
    )
    config = config_of("~/r.yaml")
    assert (config.output_dir, config.data, config.feature_cache) == (f"{home}/x", (f"{home}/d.json",), f"{home}/f")


def test_a_base_of_git_lfs_pointers_is_named(base, tmp_path):
    import shutil

    from llama_adapter.base import load_base, load_config, load_tokenizer

    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        folder = shutil.copytree(base, tmp_path / name)
        (folder / name).write_text(POINTER)
        for load in (load_config, load_tokenizer, lambda name: load_base(name, "cpu")):
            with pytest.raises(ModelError, match=f"{name} is a Git LFS pointer, not the file: run 'git lfs pull'"):
                load(str(folder))


# several data files


def test_several_files_may_follow_one_data_flag():
    assert config_of("--data", "a.json", "b.json").data == ("a.json", "b.json")
    assert config_of("--data", "a.json", "--data", "b.json", "c.json").data == ("a.json", "b.json", "c.json")
    assert config_of("--data", "a.json", "--val-data", "b.json", "c.json").val_data == ("b.json", "c.json")


@pytest.mark.parametrize(
    "arguments",
    [["r.yaml", "--data", "a.json", "b.json"], ["--data", "a.json", "b.json", "r.yaml"],
     ["--data", "a.json", "b.json", "--seed", "3", "r.yaml"]],
)  # fmt: skip
def test_the_recipe_may_stand_before_or_behind_the_data(arguments, home):
    (home / "r.yaml").write_text("seed: 3\n", encoding="utf-8")
    config = config_of(*arguments)
    assert (config.data, config.seed) == (("a.json", "b.json"), 3)


def test_a_word_that_may_be_data_or_recipe_is_refused():
    with pytest.raises(ConfigError, match="may be data or the RECIPE"):
        config_of("--data", "a.json", "bundled")
    with pytest.raises(ConfigError, match=r"r\.yaml is no data file, and the RECIPE is bundled already"):
        config_of("bundled", "--data", "a.json", "r.yaml")
    assert config_of("--data", "bundled").data == ("bundled",)
    assert config_of("bundled", "--data", "a.json", "bundled").data == ("a.json", "bundled")


# commands to copy


def test_commands_to_copy_are_quoted():
    assert shlex.split(output.copyable("generate", "--adapter", "my runs/it's")) == [
        "generate", "--adapter", "my runs/it's",
    ]  # fmt: skip


def test_a_run_says_what_to_type_next_and_draws_no_bar_in_a_file(streams, base, data, tmp_path, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    where = tmp_path / "my runs"
    flags = ["--max-steps", 3, "--val-size", 2, "--trackers", "none", "--output-dir", where, "--adapter-layers", 1]
    err = streams("train", "--model", base, "--data", data, *flags).err.decode()
    assert f"ask it: llama-adapter generate --adapter '{where}' \"...\"" in err
    assert "\r" not in err
    assert len([line for line in err.splitlines() if "3/3" in line]) == 1


def test_progress_in_a_file_is_a_line_now_and_then(monkeypatch):
    err, now = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with progress.progress_bar(1000, "step", "here") as bar:
        for _ in range(1000):
            now[0] += 0.1
            bar.update()
            bar.refresh()
    lines = err.getvalue().splitlines()
    assert 4 <= len(lines) <= 5
    assert lines[-1].startswith("here: 100%")
    assert "\r" not in err.getvalue()


def test_progress_can_be_turned_off(monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    with progress.progress_bar(10, "step", disable=True) as bar:
        bar.update(10)
    assert err.getvalue() == ""


# how commands end


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_are_for_terminals_that_want_them(monkeypatch, variables, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(SystemExit):
        main(["inspect", "nowhere"])
    assert ("\033" in sys.stderr.getvalue()) == coloured


def program(*words, **options):
    command = [sys.executable, "-m", "llama_adapter", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(words):
    reader, writer = os.pipe()
    os.close(reader)
    done = program(*words, stdout=writer)
    os.close(writer)
    assert done.communicate(timeout=60)[1] == ""
    assert done.returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_one_sentence():
    with open("/dev/full", "w") as full:
        done = program("--version", stdout=full)
        err = done.communicate(timeout=60)[1]
    assert (done.returncode, err) == (
        2, "Error: The output: No space left on device: free space or choose another place.\n",
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_closed_streams_are_no_traceback():
    command = f"{shlex.quote(sys.executable)} -m llama_adapter train --help >&- <&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=60, check=False).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_that_was_made_an_error_of_ours_is_ctrl_c():
    def read(error):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            try:
                raise error
            except ImportError:
                raise ModelError("the base cannot be read") from None

    with pytest.raises(KeyboardInterrupt), _interruptible():
        read(ImportError("numpy was interrupted"))
    with pytest.raises(ModelError), _interruptible():
        raise ModelError("the base cannot be read")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_while_packages_are_read_ends_with_130(adapter):
    done = program("generate", "--adapter", adapter, stdin=subprocess.PIPE)
    maps, until = Path(f"/proc/{done.pid}/maps"), time.monotonic() + 60
    while maps.exists() and "libtorch" not in maps.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2 if maps.exists() else 1.5)
    done.send_signal(signal.SIGINT)
    said = done.communicate(timeout=120)[1]
    assert "Traceback" not in said
    # Where C code was interrupted, Python ends itself by the signal, which a shell shows as 130 too.
    assert done.returncode in (130, -signal.SIGINT), said


# numbers

HUGE = "9" * 5000


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("flag", "value"),
    [(flag, value) for flag in ("--max-new-tokens", "--seed", "--temperature", "--top-p")
     for value in ("-1", "nan", "inf", "-inf", "1e400", HUGE, "99999999999999")],
)  # fmt: skip
def test_numbers_that_decoding_cannot_use(fail, command, flag, value):
    err = fail(command, "--model", "bundled", f"{flag}={value}")
    assert flag.strip("-").replace("-", "_") in err.replace("-", "_")
    assert len(err) < 600


@pytest.mark.parametrize("flag", ["--batch-size", "--max-new-tokens", "--limit"])
@pytest.mark.parametrize("value", ["-1", "0", "nan", "1e3", HUGE, "-" + "9" * 4000])
@pytest.mark.parametrize("words", [["instructions", "--data", "d"], ["scienceqa", "--data", "d", "--model", "bundled"]])
def test_numbers_that_an_evaluation_cannot_use(fail, words, flag, value):
    assert len(fail("evaluate", *words, f"{flag}={value}")) < 600


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-320, 0.5), (0.5, 1e-300), (1e-300, 1.0)])
def test_the_smallest_numbers_take_the_likeliest_token(temperature, top_p):
    import torch

    from llama_adapter.inference.choice import Row, choose

    row = Row(tokens=[1], max_new_tokens=1, temperature=temperature, top_p=top_p, generator=torch.Generator())
    assert [choice.token for choice in choose(torch.tensor([[0.0, 2.0, 1.0]]), [row], [[]])] == [1]


@pytest.mark.parametrize(
    ("error", "caught"),
    [(MemoryError(), True), (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
     (RuntimeError("CUDA out of memory. Tried"), True), (RuntimeError("index -1 is out of bounds"), False)],
)  # fmt: skip
def test_too_little_memory_is_one_sentence(fail, monkeypatch, error, caught):
    from llama_adapter.formats import inspect

    def run(folder):
        raise error

    monkeypatch.setattr(inspect, "describe_adapter", run)
    if caught:
        assert "There is not enough memory" in fail("inspect", "x")
    else:
        with pytest.raises(RuntimeError):
            main(["inspect", "x"])


NUMBERS = [
    "adapter_len", "adapter_layers", "max_length", "batch_size", "micro_batch_size", "epochs", "max_steps", "lr",
    "warmup_epochs", "base_lr", "min_lr", "weight_decay", "max_grad_norm", "seed", "val_size", "eval_every",
    "save_every", "condition_width", "condition_lr", "parts_lr", "visual_blocks", "visual_width", "visual_heads",
]  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "-1e400", HUGE])
def test_numbers_that_a_recipe_cannot_use(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        config_of(f"--{name.replace('_', '-')}={value}")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["0", "1", "2147483647", "1e11", "1e-300", "1e308", "9" * 400])
def test_no_number_of_a_recipe_is_a_traceback(name, value, base, data, capsys):
    arguments = ["validate", "--model", str(base), "--data", str(data), f"--{name.replace('_', '-')}={value}"]
    ended = 0
    try:
        main(arguments)
    except SystemExit as error:
        ended = error.code
    assert ended in (0, 2)
    assert ended == 0 or capsys.readouterr().err.splitlines()[-1].startswith("Error: ")


def test_what_moves_the_cursor_is_escaped(fail):
    assert "\\x1b[2J\\nx" in fail("inspect", "\033[2J\nx")
