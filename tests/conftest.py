"""What all tests share: one thread, as tiny models gain nothing from several, and a tiny base with data on disk."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from runs import write_base, write_data

torch.set_num_threads(1)
# A shell lets its background jobs, and all that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
    setattr(torch.cpu, probe, lambda: False)  # --precision auto is fp32 here, whatever the processor


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """What a test wrote may hold what no text may, as fuzzed records do, and then no worker could send its report."""
    report = yield
    report.sections = [(name, _sendable(text)) for name, text in report.sections]
    if report.failed and _sendable(str(report.longrepr)) != str(report.longrepr):
        report.longrepr = _sendable(str(report.longrepr))
    return report


def _sendable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny base; a test module may have another of its own."""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of records."""
    return write_data(tmp_path_factory.mktemp("data") / "data.json")


@pytest.fixture
def fail(capsys):
    """Run a command line that must end with exit code 2, nothing on stdout and one sentence; returns it."""
    from llama_adapter.cli import main

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert ended.value.code == 2
        assert out == ""
        assert err.startswith("Error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        return err

    return run
