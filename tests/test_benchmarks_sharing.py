"""Benchmarks of what experts and processes share: steps side by side, what a process holds. Nothing is timed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import many, memory, preferences, shapes, sharding  # noqa: E402
from benchmarks.harness import BenchmarkError, Setting  # noqa: E402
from benchmarks.lengths import draw  # noqa: E402

CPU = torch.device("cpu")
SMOKE = ["--shape", "smoke", "--device", "cpu", "--turns", "1", "--warmup", "0"]
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux")


class TestSharding:
    def test_steps_of_a_whole_and_a_sharded_base(self, tmp_path, capsys):
        sharding.main([*SMOKE, "--batch-size", "4", "--micro-batch", "2", "--json", str(tmp_path / "x.json")])
        found = json.loads((tmp_path / "x.json").read_text())["sharding"]
        assert [row["name"] for row in found["rows"]] == [sharding.WHOLE, sharding.SHARDED]
        assert all(len(row["seconds"]) == 1 for row in found["rows"])
        assert max(found["parity"].values()) < 1e-5
        assert not torch.distributed.is_initialized()
        assert "| sharded, one process | " in capsys.readouterr().out

    def test_it_is_sharded_in_the_groups_of_transformers_plan(self):
        base = shapes.build(shapes.SHAPES["smoke"], CPU, torch.float32)
        layers = range(base.config.num_hidden_layers)
        planned = {name.replace("*", str(i)) for name in base.fsdp_plan for i in layers}
        kept = {name for name, how in base.fsdp_plan.items() if how == "keep_full_weight"}
        assert kept == {"model.norm", "lm_head"}
        with sharding.alone(CPU):
            sharded = sharding.shard(base)
            assert {name for name, module in sharded.named_modules() if isinstance(module, FSDPModule)} == {
                "",
                *planned,
            }

    def test_what_computes_something_else_is_not_timed(self, monkeypatch):
        add = shapes.with_gates_open
        monkeypatch.setattr(shapes, "with_gates_open", lambda model, shape, like=None: add(model, shape))
        options = sharding.parse([*SMOKE, "--batch-size", "4", "--micro-batch", "2"])
        with pytest.raises(BenchmarkError, match="'sharded, one process' does not compute what 'whole base' does"):
            sharding.steps(Setting.of(options))
        assert not torch.distributed.is_initialized()

    @linux
    @pytest.mark.slow
    def test_memory_of_one_and_two_processes(self, tmp_path, capsys):
        file = tmp_path / "x.json"
        sharding.main(["--shape", "tiny", "--memory", "1", "2", "--steps", "1", "--json", str(file)])
        rows = json.loads(file.read_text())["memory of a sharded base"]["rows"]
        assert [row["processes"] for row in rows] == [1, 2]
        whole, half = (row["weights"] for row in rows)
        assert half == pytest.approx(whole / 2, rel=0.01)
        assert all(row["loading"]["private"] - row["before"]["private"] < row["weights"] + 8 for row in rows)
        assert "| 2 " in capsys.readouterr().out


class TestMany:
    OPTIONS = (*SMOKE, "--batch", "8", "--micro-batch", "4", "--experts", "2")

    def test_steps_together_and_one_after_the_other(self, tmp_path, capsys):
        many.main([*self.OPTIONS, "--json", str(tmp_path / "x.json")])
        rows = json.loads((tmp_path / "x.json").read_text())["steps, alpaca"]["rows"]
        names = ["1 expert", "2 experts", "2 single steps"]
        assert [(row["name"], row["each"]) for row in rows] == list(zip(names, (8, 4, 4), strict=True))
        assert [row["against_single_steps"] and row["against_single_steps"]["n"] for row in rows] == [None, 1, 1]
        assert rows[2]["against_single_steps"]["median"] == 1
        assert 0 < rows[1]["gradients_apart"] < 1e-5
        assert rows[0]["tokens_of_one"] == 1
        assert all(row["tokens_of_one"] > 1 for row in rows[1:]), "each has a prefix of its own"
        assert "against single steps" in capsys.readouterr().out

    def test_steps_that_compute_something_else_are_not_timed(self, monkeypatch):
        options = many.parse(self.OPTIONS)
        base, data = many.base_and_data(options, CPU)
        run = many.run_of(2, options, data, base)
        singles = many.single_runs(run)
        assert 0 < many.check_parity(run, singles, data.train) < 1e-5
        before = singles[1]._gradients
        monkeypatch.setattr(
            singles[1], "_gradients", lambda shares, stop: before([(shares[0][0], draw(4, 97, 1))], stop)
        )
        with pytest.raises(BenchmarkError, match="A step of 2 experts does not compute what a step of each does"):
            many.check_parity(run, singles, data.train)

    def test_models_of_a_run_share_the_base_and_nothing_else(self):
        options = many.parse(self.OPTIONS)
        base, data = many.base_and_data(options, CPU)
        runs = [many.run_of(count, options, data, base) for count in (1, 2)]
        heads = {run.model.lm_head.weight.data_ptr() for run in runs}
        assert heads == {base.lm_head.weight.data_ptr()}
        assert [len(run.experts) for run in runs] == [1, 2]
        assert not any(hasattr(module, "zero_init") for module in base.modules())

    def test_whole_runs_are_of_the_bundled_base(self):
        assert many.parse([]).whole == [8]
        assert many.parse(["--shape", "tiny"]).whole == []
        with pytest.raises(BenchmarkError, match="Whole runs are of the bundled base"):
            many.parse(["--shape", "tiny", "--whole", "2"])
        with pytest.raises(BenchmarkError, match="cannot be shared by 3 experts"):
            many.parse(["--experts", "3"])


@linux
def test_what_was_held_at_most_is_seen_after_it_was_given_back():
    before = memory.held()["private"]
    with memory.watched() as most:
        block = torch.ones(2**25)  # 128 MB
        del block
    assert most["private"] > before + 120
    assert most["resident"] >= most["private"]


@linux
@pytest.mark.slow
def test_a_second_model_is_in_the_memory_of_preferences(tmp_path, capsys):
    pytest.importorskip("trl")
    # what TRL's imports and the allocator hold differs by some 30 MB from run to run: the base has 510
    preferences.main(["--shape", "small", "--steps", "1", "--json", str(tmp_path / "x.json")])
    ours, second, same = json.loads((tmp_path / "x.json").read_text())["preferences"]["rows"]
    assert (ours["name"], second["name"], same["name"]) == tuple(preferences.ROWS)
    assert second["of_the_base"] > same["of_the_base"] + 0.7
    assert second["of_the_base"] > ours["of_the_base"] + 0.7
    assert "against the first" in capsys.readouterr().out
