"""`llama-adapter serve` with what cannot be served: one sentence, exit code 2, and no weights are read."""

import builtins
import contextlib
import socket
import sys

import pytest
from runs import write_base
from servers import write_experts
from transformers import AutoConfig

from llama_adapter.cli import main
from llama_adapter.cli.serve import _keys
from llama_adapter.inference.session import SessionPlan


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, adapters of it and of another base, files of keys."""
    place = tmp_path_factory.mktemp("place")
    base = write_base(place / "base")
    write_experts(base, place / "experts", 2)
    other = AutoConfig.from_pretrained(base)
    other.hidden_size = 64
    other.save_pretrained(place / "wide")
    (place / "keys").write_text("one\n\ntwo\n")
    (place / "blank").write_text(" \n")
    return place


@pytest.fixture(autouse=True)
def weightless(monkeypatch):
    for name in ("LLAMA_ADAPTER_API_KEY", "LLAMA_ADAPTER_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(SessionPlan, "load", lambda *_, **__: pytest.fail("weights were read"))


def said(capsys, *words):
    """The one sentence that ends the command."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", *map(str, words)])
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) == 1
    return text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("-m base -a gone", "gone"),
        ("-m gone", "gone"),
        ("-m wide -a experts/expert-0", "hidden_size"),
        ("-m base --adapter-dir gone", "--adapter-dir gone is no folder"),
        ("-m base --backend turbo", "unknown --backend 'turbo'"),
        ("-m base --port 70000", "port"),
        ("-m base --port -1", "port"),
        ("-m base --max-rows 0", "max_rows"),
        ("-m base --deadline 0", "deadline"),
        ("-m base --host no.such.host.invalid", "choose another --port, or --host"),
        ("-m base --api-key-file gone", "Key file gone cannot be read"),
        ("-m base --api-key-file blank", "Key file blank is empty"),
        ("-m base --admin-key-file keys", "Admin key file keys has 2 keys"),
        ("-m base -a x=experts/expert-0 -a x=experts/expert-1", "Two adapters are called 'x'"),
        ("-m base -a a/b=experts/expert-0", "'a/b' is malformed"),
        ("-m base -a base=experts/expert-0", "Both an adapter and the bare base are called 'base'"),
        ("-m base --served-model-name x -a x=experts/expert-0", "Both an adapter and the bare base are called 'x'"),
        ("-m base -a expert-1=experts/expert-0 --adapter-dir experts", "called 'expert-1', experts/expert-0 and"),
        ("-m base --served-model-name expert-1 --adapter-dir experts", "are called 'expert-1'"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(place, monkeypatch, capsys, words, says):
    monkeypatch.chdir(place)
    port = [] if "--port" in words else ["--port", "0"]
    assert says in said(capsys, *words.split(), *port)


@pytest.mark.parametrize("variable", ["LLAMA_ADAPTER_API_KEY", "LLAMA_ADAPTER_ADMIN_KEY"])
def test_a_key_that_is_there_and_empty_opens_nothing(place, monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, " ")
    assert f"{variable} is set and empty" in said(capsys, "-m", place / "base", "--port", "0")


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path):
    (tmp_path / "keys").write_text("one\ntwo\n", encoding="utf-8-sig")
    assert _keys(str(tmp_path / "keys"), "NO_SUCH_VARIABLE") == ("one", "two")


def test_a_port_in_use_is_said(place, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened on" in said(capsys, "-m", place / "base", "--port", port)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_what_is_not_installed_is_said(place, monkeypatch, capsys, package):
    def found(name, *rest, **more):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *rest, **more)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", found)
    for name in [name for name in sys.modules if name.startswith("llama_adapter.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    text = said(capsys, "-m", place / "base", "--port", "0")
    assert package in text
    assert "pip install 'llama-adapter[serve]'" in text


def test_a_name_of_the_base_in_the_folder_of_adapters_that_is_no_adapter_does_no_harm(place, monkeypatch, capsys):
    (place / "experts" / "notes").mkdir(exist_ok=True)
    loaded = []
    monkeypatch.setattr(SessionPlan, "load", lambda *_, **__: loaded.append(True) or sys.exit(3))
    with contextlib.suppress(SystemExit):
        main(["serve", "-m", str(place / "base"), "--served-model-name", "notes", "--port", "0",
              "--adapter-dir", str(place / "experts")])  # fmt: skip
    assert loaded
