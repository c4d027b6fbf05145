"""The benchmarks run, compare like with like, refuse what is not alike, and write what they found. Nothing is timed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from runs import write_base, write_data
from tiny import tiny_llama

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import __main__ as suites  # noqa: E402
from benchmarks import adapters, decode, harness, many, precision, profile, shapes, sharding, train  # noqa: E402
from benchmarks.batching import end_to_end, in_order, padded_to_longest, regroup, unshared_rows  # noqa: E402
from benchmarks.harness import BenchmarkError, Budget, Contender, Setting  # noqa: E402
from benchmarks.lengths import PREFIX, Lengths, draw, global_batches, real_tokens  # noqa: E402
from benchmarks.methods import OURS_COMPILED_FP8, OURS_FP8, PEFT_COMPILED  # noqa: E402
from llama_adapter.data import IGNORE  # noqa: E402
from llama_adapter.data.batches import response_tokens  # noqa: E402
from llama_adapter.inference.steps import QuickSteps  # noqa: E402
from llama_adapter.training.fp8 import FP8, Fp8Linear  # noqa: E402
from llama_adapter.training.packing import packed_rows  # noqa: E402

CPU = torch.device("cpu")
SMOKE = ["--shape", "smoke", "--device", "cpu", "--turns", "2", "--warmup", "1"]
SIZES = ["--batch-size", "6", "--packed-micro-batch", "6", "--padded-micro-batch", "3", "--grouped-micro-batch", "2"]


def setting(*options: str) -> Setting:
    return Setting.of(train.parse([*SMOKE, *SIZES, *options]))


def parts_of(row) -> tuple:
    return getattr(row.segments, "parts", (row.segments,))


def rows_of(file: Path, section: str) -> dict[str, dict]:
    content = json.loads(file.read_text(encoding="utf-8"))[section]
    assert content["machine"]["torch"] == torch.__version__
    assert content["options"]["shape"] == "smoke"
    return {f"{row['name']} {row.get('batch', '')}".strip(): row for row in content["rows"]}


class TestLengths:
    def test_examples_are_as_long_as_real_ones(self):
        examples, real = draw(4000, 4096), Lengths.read()
        totals = torch.tensor([float(len(example.input_ids)) for example in examples])
        assert abs(float(totals.mean()) - real.total.clip(max=512).mean()) < 5
        prompts = [sum(label == IGNORE for label in example.labels) for example in examples]
        assert abs(sum(prompts) / len(prompts) - real.prompt.mean()) < 3
        assert all(min(example.input_ids) >= 3 for example in examples)
        assert draw(5, 97) == draw(5, 97) != draw(5, 97, seed=1)

    def test_examples_of_a_kind_share_their_template_and_no_more(self):
        rows = list(packed_rows(draw(64, 4096), 64))
        assert sorted(part.prefix for row in rows for part in parts_of(row)) == sorted(PREFIX.values())

    def test_a_short_limit_leaves_something_to_learn(self):
        examples = draw(200, 97, max_length=20)
        assert max(len(example.input_ids) for example in examples) == 20
        assert min(response_tokens([example]) for example in examples) >= 1

    def test_global_batches_repeat_nothing(self):
        first, second = global_batches(2, 3, 4096)
        assert not any(example in second for example in first)


class TestBatching:
    def test_a_row_without_sharing_holds_every_token(self):
        examples = draw(5, 97)
        row = end_to_end(examples)
        assert row.segments.prefix == 0
        assert row.input_ids[0].tolist() == [token for example in examples for token in example.input_ids]
        assert [row.input_ids[0, position + 1] for position in row.predicting] == row.targets.tolist()
        assert sum(len(row.targets) for row in unshared_rows(examples, 2)) == response_tokens(examples)

    def test_regrouping_keeps_every_example_and_all_but_ends_padding(self):
        batches = global_batches(30, 10, 97)
        arranged = regroup(batches, 4)
        assert [len(batch) for batch in arranged] == [10] * 30
        pool = [example for batch in batches for example in batch]
        assert sorted(map(id, pool)) == sorted(id(example) for batch in arranged for example in batch)
        computed = sum(micro.input_ids.numel() for batch in arranged for micro in in_order(batch, 4))
        assert computed < 1.1 * sum(real_tokens(batches))
        totals = list(real_tokens(arranged))
        assert max(totals) < 3 * min(totals)

    def test_padding_reaches_512(self):
        batches = list(padded_to_longest(draw(5, 97), 2))
        assert [tuple(batch.labels.shape) for batch in batches] == [(2, 512), (2, 512), (1, 512)]


class TestHarness:
    def test_contenders_take_turns(self):
        seen = []
        takers = [Contender(name, lambda turn, name=name: seen.append((name, turn))) for name in "AB"]
        timings = harness.interleave(takers, 2, 1, CPU, Budget(None))
        assert seen == [("A", 0), ("B", 0), ("A", 0), ("B", 0), ("A", 1), ("B", 1)]
        assert [len(timings[name].seconds) for name in "AB"] == [2, 2]

    def test_a_spent_budget_leaves_one_turn(self, capsys):
        timings = harness.interleave([Contender("A", lambda _: None)], 5, 0, CPU, Budget(0.0))
        assert len(timings["A"].seconds) == 1
        assert "1 of 5 turns" in capsys.readouterr().err

    def test_only_an_optional_row_may_fail(self):
        def fail(_):
            raise ValueError("no compiler\nmore")

        timings = harness.interleave([Contender("A", fail, optional=True)], 1, 1, CPU, Budget(None))
        assert timings["A"].failure == "ValueError: no compiler"
        with pytest.raises(ValueError, match="no compiler"):
            harness.interleave([Contender("A", fail)], 1, 0, CPU, Budget(None))

    def test_ratios_are_taken_turn_by_turn(self):
        found = harness.ratios(harness.Timing([2.0, 30.0, 4.0]), harness.Timing([1.0, 10.0, 4.0]))
        assert (found["median"], found["min"], found["max"], found["n"]) == (2.0, 1.0, 3.0, 3)
        assert harness.ratios(harness.Timing(), harness.Timing([1.0])) is None

    def test_sections_stand_side_by_side(self, tmp_path):
        file = tmp_path / "deep" / "found.json"
        harness.write_section(file, "a", {"x": [1 / 3]})
        harness.write_section(file, "b", {})
        assert json.loads(file.read_text(encoding="utf-8")) == {"a": {"x": [0.333333]}, "b": {}}

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
    @pytest.mark.parametrize("script", [train, decode, adapters, profile, sharding, many])
    def test_without_a_gpu_the_gpu_is_refused_in_one_sentence(self, script, capsys):
        with pytest.raises(SystemExit) as stopped:
            harness.run(lambda: script.main(["--device", "cuda"]))
        assert stopped.value.code == 2
        assert capsys.readouterr().err.strip() == harness.NO_CUDA


class TestModels:
    def test_copies_share_their_weights_and_nothing_else(self):
        base = shapes.build(shapes.SHAPES["smoke"], CPU, torch.float32)
        pointers = {parameter.data_ptr() for parameter in base.parameters()}
        model, adapter = shapes.with_ours(base, shapes.SHAPES["smoke"])
        assert pointers == {parameter.data_ptr() for parameter in model.parameters()} - {
            parameter.data_ptr() for parameter in adapter.parameters()
        }
        assert not any(hasattr(module, "zero_init") for module in base.modules())

    def test_a_7b_base_has_the_size_of_llama(self):
        model = shapes.build(shapes.SHAPES["7b"], torch.device("meta"), torch.bfloat16)
        assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616

    def test_fp8_rows_share_one_quantised_copy_and_leave_the_base_alone(self):
        found = {row.name: row.model for row in train.methods(setting("--fp8", "--compile"))}
        plain, near, compiled = (found[name] for name in (train.OURS, OURS_FP8, OURS_COMPILED_FP8))
        assert not any(isinstance(module, Fp8Linear) for module in plain.modules())
        pointers = [{p.data_ptr() for p in model.parameters() if p.dtype == FP8} for model in (near, compiled)]
        assert pointers[0] == pointers[1]
        assert len(pointers[0]) == 2 * 7 * 3
        assert near.lm_head.weight.data_ptr() == plain.lm_head.weight.data_ptr()
        assert compiled.model.layers[0]._compiled_call_impl is not None

    def test_gates_are_open(self):
        _, adapter = shapes.with_ours(shapes.build(shapes.SHAPES["smoke"], CPU, torch.float32), shapes.SHAPES["smoke"])
        assert all(layer.strength().abs().min() > 0.2 for layer in adapter.layers.values())


@pytest.fixture(scope="module")
def rows():
    return train.methods(setting())


class TestParity:
    def test_every_zero_init_row_computes_the_same(self, rows):
        found = train.check_parity(rows, draw(6, 97), setting())
        assert list(found) == [row.name for row in rows if row.gradients]
        assert len(found) == 10

    def test_a_row_that_computes_something_else_stops_everything(self, rows):
        gate = shapes.adapted_attentions(next(row for row in rows if row.name == train.PEFT_BEST).model)[
            0
        ].adaption_gate
        with torch.no_grad():
            gate.mul_(1.001)
        with pytest.raises(BenchmarkError, match=r"'PEFT, as shipped' does not compute .* nothing was timed"):
            train.check_parity(rows, draw(6, 97), setting())
        with torch.no_grad():
            gate.div_(1.001)

    def test_a_base_in_fp8_comes_near_and_is_not_refused(self, rows):
        near = next(row for row in train.methods(setting("--fp8")) if row.name == OURS_FP8)
        found = train.check_parity([*rows, near], draw(6, 97), setting())
        assert 0.95 < found[OURS_FP8]["prompts_cosine"] < 0.99999
        assert found[OURS_FP8]["loss"] < 0.01
        assert found[OURS_FP8]["prompts"] > 0.01  # which would be refused of any other row
        assert OURS_FP8 not in train.exact_only(found)
        assert len(train.exact_only(found)) == 10
        lines = train.footnotes(found)
        assert len(lines) == 2
        assert lines[1].startswith(f"'{OURS_FP8}' only comes near them: gradient cosine 0.9")

    def test_closed_gates_are_no_parity(self):
        rows = train.methods(setting())
        with torch.no_grad():
            for row in rows:
                for name, parameter in row.model.named_parameters():
                    if "gate" in name.split(".")[-1]:
                        parameter.zero_()
        with pytest.raises(BenchmarkError, match="gates are closed"):
            train.check_parity(rows, draw(6, 97), setting())

    def test_decoding_with_another_prompt_is_refused(self):
        found = decode.models(Setting.of(decode.parse(SMOKE)))
        ids = torch.randint(3, 97, (2, 9))
        assert decode.check_parity(found, ids, torch.float32) < 1e-6
        with torch.no_grad():
            shapes.adapted_attentions(found[decode.PEFT])[1].adaption_prompt.add_(0.1)
        with pytest.raises(BenchmarkError, match="logits differ from PEFT's"):
            decode.check_parity(found, ids, torch.float32)


class TestScripts:
    def test_train(self, tmp_path, capsys):
        train.main([*SMOKE, *SIZES, "--json", str(tmp_path / "x.json")])
        rows = rows_of(tmp_path / "x.json", "train")
        assert len(rows) == 11
        assert all(len(row["seconds"]) == 2 and row["failure"] is None for row in rows.values())
        assert rows[train.OURS]["tokens_computed_per_real"] < 1 < rows["PEFT, as shipped"]["tokens_computed_per_real"]
        assert rows["ours, packing alone"]["tokens_computed_per_real"] == 1
        assert rows[train.OURS]["ours_faster_by"]["median"] == 1
        out = capsys.readouterr().out
        assert "| PEFT, padded to 512 " in out
        assert "agree to" in out

    def test_train_in_fp8(self, tmp_path, capsys):
        options = ["--fp8", "--only", "fp8", "as shipped", "--json", str(tmp_path / "x.json")]
        train.main([*SMOKE, *SIZES, *options])
        rows = rows_of(tmp_path / "x.json", "train")
        assert list(rows) == ["PEFT, as shipped", OURS_FP8]
        parity = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["train"]["parity"]
        assert [name for name, differences in parity.items() if "prompts_cosine" in differences] == [OURS_FP8]
        assert "(prompts), loss off by" in capsys.readouterr().out

    def test_the_length_of_the_paper_s_run_is_extrapolated_at_its_shape(self, rows):
        own, timing = [row for row in rows if row.name in (train.OURS, "PEFT, as shipped")], harness.Timing([3.0, 3.0])
        for row in own:
            row.micro_batch = row.micro_batch or 6
        found = train.results(own, {row.name: timing for row in own}, [draw(6, 97), draw(6, 97, seed=1)])
        assert [row["minutes_of_alpaca"] for row in found] == [52002 * 5 / 2 / 60, None]
        parity = {train.OURS: {"loss": 0.0}}
        wide = train.show(found, setting("--shape", "7b"), parity)
        assert "minutes for 52K x 5" in wide
        assert "| 2,167 " in wide
        assert "52,002 examples x 5 epochs at this rate (extrapolated)" in wide
        assert "minutes" not in train.show(found, setting(), parity).lower()

    def test_train_finds_its_own_sizes_and_some_rows_only(self, tmp_path):
        train.main([*SMOKE, "--batch-size", "9", "--only", "ours, packed", "LoRA", "--json", str(tmp_path / "x.json")])
        rows = rows_of(tmp_path / "x.json", "train")
        assert list(rows)[-1] == "LoRA, grouped by length"
        assert len(rows) == 4
        assert {row["micro_batch"] for row in rows.values()} <= {4, 8, 9}

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # the compiler's own
    def test_train_compiled(self, tmp_path, monkeypatch):
        monkeypatch.setattr("llama_adapter.compiler.BACKEND", "aot_eager")  # traced all the same; C++ takes minutes
        options = ["--compile", "--fp8", "--only", "compiled", "ours", "--json", str(tmp_path / "x.json")]
        train.main([*SMOKE, *SIZES, *options])
        rows = rows_of(tmp_path / "x.json", "train")
        for name in ("ours, packed, compiled", OURS_COMPILED_FP8, PEFT_COMPILED):
            assert rows[name]["failure"] is None
            assert len(rows[name]["seconds"]) == 2

    def test_decode(self, tmp_path, capsys):
        options = ["--batches", "1", "3", "--prompt-tokens", "8", "--new-tokens", "4"]
        decode.main([*SMOKE, *options, "--json", str(tmp_path / "x.json")])
        rows = rows_of(tmp_path / "x.json", "decode")
        assert len(rows) == 12
        assert all(len(row["seconds"]) == 2 for row in rows.values())
        assert "| PEFT adaption prompt " in capsys.readouterr().out

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # the compiler's own
    def test_decode_compiled(self, tmp_path, monkeypatch):
        monkeypatch.setattr("llama_adapter.compiler.BACKEND", "aot_eager")
        options = ["--batches", "2", "1", "--prompt-tokens", "8", "--new-tokens", "4", "--compile"]
        decode.main([*SMOKE, *options, "--json", str(tmp_path / "x.json")])
        rows = rows_of(tmp_path / "x.json", "decode")
        assert [name for name, row in rows.items() if row["failure"]] == []
        assert len(rows) == 12 + 3
        assert "ours, compiled 2" in rows

    @pytest.mark.parametrize("name", [decode.OURS, decode.STOCK_OURS, decode.QUICK_BASE, decode.PEFT])
    def test_generation_has_the_length_that_was_asked_for(self, name):
        model = decode.models(Setting.of(decode.parse(SMOKE)))[name]
        assert decode.generate(model, torch.full((2, 5), 7), 6).shape == (2, 11)

    def test_rows_go_by_the_steps_in_their_names(self, monkeypatch):
        found, steps = decode.models(Setting.of(decode.parse(SMOKE))), []
        before = QuickSteps.__call__
        monkeypatch.setattr(QuickSteps, "__call__", lambda self, *args: steps.append(1) or before(self, *args))
        taken = {}
        for name, model in found.items():
            decode.generate(model, torch.full((2, 5), 7), 6)
            taken[name] = len(steps)
            steps.clear()
        quick = {name for name, count in taken.items() if count}
        assert quick == {decode.OURS, decode.QUICK_BASE}
        assert taken[decode.OURS] == 5

    def test_adapters(self, tmp_path, capsys):
        options = ["--rows", "4", "--adapters", "2", "4", "--prompt-tokens", "8", "--new-tokens", "4"]
        adapters.main([*SMOKE, *options, "--json", str(tmp_path / "x.json")])
        rows = rows_of(tmp_path / "x.json", "adapters")
        assert list(rows) == [
            "bare base", "1 adapter", "2 adapters", "4 adapters",
            f"1 adapter, {adapters.CHANGING}", f"4 adapters, {adapters.CHANGING}",
        ]  # fmt: skip
        assert rows["1 adapter"]["time_against_one"]["median"] == 1
        assert "Mixed and separate batches agree" in capsys.readouterr().out

    def test_adapters_refuse_more_than_rows(self):
        with pytest.raises(BenchmarkError, match="--adapters 8 needs as many --rows, which is 4"):
            adapters.main([*SMOKE, "--rows", "4", "--adapters", "8"])

    def test_profile(self, tmp_path, capsys):
        profile.main([*SMOKE, "--batch-size", "4", "--packed-micro-batch", "4", "--json", str(tmp_path / "x.json")])
        found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["profile"]
        assert found["flops"] > 1e6
        assert all(found["parts"][part]["calls"] for part in profile.PARTS)
        assert "Roofline" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("name", "shapes_", "part"),
        [
            ("aten::mm", [[10, 32], [32, 97]], profile.HEAD),
            ("aten::mm", [[10, 32], [32, 64]], profile.MATMUL),
            ("aten::bmm", [[4, 10, 8], [4, 8, 10]], profile.ATTENTION),
            ("aten::_scaled_dot_product_flash_attention", [[1, 4, 10, 8]], profile.ATTENTION),
            ("aten::_softmax", [[1, 4, 10, 4]], profile.ATTENTION),
            ("aten::_log_softmax", [[10, 97]], profile.HEAD),
            ("aten::silu", [[10, 64]], profile.ELEMENTWISE),
            ("aten::embedding", [[97, 32], [1, 10]], profile.OTHER),
            ("aten::copy_", [[10, 32]], profile.OTHER),
        ],
    )
    def test_operators_fall_into_parts(self, name, shapes_, part):
        assert profile.group_of(name, shapes_, 97) == part


class TestMicroBatches:
    def test_a_row_that_runs_out_of_memory_takes_less_at_once(self, monkeypatch, rows):
        row = next(row for row in rows if row.name == train.OURS)
        whole = row.loss

        def loss(model, batch, *rest):
            if len(batch.counts) > 3:
                raise torch.OutOfMemoryError
            return whole(model, batch, *rest)

        monkeypatch.setattr(row, "loss", loss)
        monkeypatch.setattr(row, "micro_batch", 12)
        train.shrink_to_fit(row, [draw(12, 97)], CPU)
        assert row.micro_batch == 3

    def test_the_worst_batch_has_most_tokens_or_the_longest_example(self, rows):
        packed, padded = (next(r for r in rows if r.name == name) for name in (train.OURS, train.PEFT_LIKE))
        long, many = draw(1, 97, seed=1), draw(9, 97, seed=2, max_length=50)
        assert len(long[0].input_ids) > 50
        assert train.worst_batch(packed, [long, many]) is many
        assert train.worst_batch(padded, [long, many]) is long


class TestSuites:
    def test_every_suite_s_options_are_known(self, tmp_path):
        scripts = {script.__name__.removeprefix("benchmarks."): script for script in
                   (train, decode, adapters, profile, sharding, many)}  # fmt: skip
        for suite in suites.SUITES:
            for command in suites.commands(suite, tmp_path):
                options = scripts[command[2].removeprefix("benchmarks.")].parse(command[3:])
                assert options.json == tmp_path / f"{suite}.json"

    def test_the_gpu_suite_stays_below_nine_minutes(self):
        budgets = [
            float(option.split("=")[1]) for line in suites.SUITES["gpu"] for option in line if "--budget" in option
        ]
        assert len(budgets) == len(suites.SUITES["gpu"])
        assert sum(budgets) + 25 * len(budgets) <= 540  # and what each takes to start

    def test_an_unknown_suite_is_refused(self, capsys):
        assert suites.main(["tpu"]) == 2
        assert "cpu|gpu" in capsys.readouterr().err


class TestPrecision:
    def test_weights_are_counted_once_and_as_they_are_stored(self, tmp_path):
        model = tiny_llama(tie_word_embeddings=True)
        numbers = sum(parameter.numel() for parameter in model.parameters())
        assert precision.weight_bytes(model) == 4 * numbers
        assert precision.weight_bytes(model.bfloat16()) == 2 * numbers

    def test_rounded_weights_take_a_byte_and_their_scales(self):
        torchao = pytest.importorskip("torchao.quantization")
        linear = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
        torchao.quantize_(linear, torchao.Int8WeightOnlyConfig(version=2))
        assert 64 * 32 < precision.weight_bytes(linear) <= 64 * 32 + 4 * 32 + 64

    def test_the_table_compares_with_its_first_row(self, tmp_path, capsys):
        base, data = write_base(tmp_path / "base"), write_data(tmp_path / "data.json")
        options = ["--steps=2", "--batch-size=4", "--val-size=4", f"--json={tmp_path / 'figures.json'}"]
        precision.main([f"--model={base}", f"--data={data}", *options, "--rows", "fp32", "bf16"])
        rows = json.loads((tmp_path / "figures.json").read_text())["precision"]["rows"]
        assert rows[0]["weight_bytes"] == 2 * rows[1]["weight_bytes"]
        assert rows[0]["loss_after"] < rows[0]["loss_before"]
        shown = capsys.readouterr().out
        assert f"| {rows[0]['loss_before']:.4f} | +0.0000 |" in shown
        assert f"{rows[1]['loss_after'] - rows[0]['loss_after']:+.4f}" in shown

    def test_what_cannot_be_measured_is_one_sentence(self, tmp_path):
        with pytest.raises(BenchmarkError, match="does not exist: give a folder"):
            precision.main([f"--model={tmp_path / 'nothing'}"])
