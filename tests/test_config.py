"""Settings: their rules, where they come from, and what is said about a wrong one."""

import dataclasses
import re

import pytest

from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.core.config import AdapterConfig
from llama_adapter.errors import ConfigError, LlamaAdapterError
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.settings import parse
from llama_adapter.training.config import TrainConfig, load_recipe

NAN, INF = float("nan"), float("inf")


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# rules


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("adapter_len", 0, "adapter_len is 0; it must be at least 1"),
        ("adapter_len", -3, "adapter_len is -3; it must be at least 1"),
        ("adapter_layers", -1, "adapter_layers is -1; it must be at least 0"),
        (
            "adapter_layers",
            0,
            "adapter_layers is 0; it must be at least 1 without norms, linear_bias and lora_rank",
        ),
        ("gate_activation", "relu", "gate_activation is 'relu'; it must be one of tanh, identity"),
        ("template", "vicuna", "template is 'vicuna'; it must be one of alpaca, chat, raw"),
    ],
)
def test_rules_of_adapter_config(field, value, rule):
    with pytest.raises(ConfigError, match=f"^{re.escape(rule)}$"):
        AdapterConfig(**{field: value})


RULES = [
    ("adapter_len", 0, "must be at least 1"),
    ("adapter_layers", 0, "must be at least 1"),
    ("batch_size", 0, "must be at least 1"),
    ("micro_batch_size", 0, "must be at least 1"),
    ("max_steps", 0, "must be at least 1"),
    ("eval_every", 0, "must be at least 1"),
    ("save_every", -1, "must be at least 1"),
    ("max_length", 7, "must be at least 8"),
    ("epochs", 0.0, "must be above 0"),
    ("epochs", NAN, "must be a finite number"),
    ("base_lr", 0.0, "must be above 0"),
    ("lr", -0.1, "must be above 0"),
    ("lr", NAN, "must be a finite number"),
    ("max_grad_norm", 0.0, "must be above 0"),
    ("warmup_epochs", -1.0, "must be at least 0"),
    ("min_lr", -1e-9, "must be at least 0"),
    ("weight_decay", -0.1, "must be at least 0"),
    ("weight_decay", NAN, "must be a finite number"),
    ("val_size", -0.5, "must be at least 0"),
    ("seed", -1, "must be at least 0"),
    ("gate_activation", "relu", "must be one of tanh, identity"),
    ("template", "vicuna", "must be one of alpaca, chat"),
    ("precision", "fp16", "must be one of auto, bf16, fp32"),
    ("base_precision", "fp4", "must be one of auto, fp8, int8"),
]


@pytest.mark.parametrize(("field", "value", "rule"), RULES)
def test_rules_of_train_config(field, value, rule):
    with pytest.raises(ConfigError, match=rf"(^|; ){field} is {re.escape(repr(value))}; it {rule}"):
        TrainConfig(**{field: value})


def test_every_tracker_must_be_known():
    assert TrainConfig(trackers=("tensorboard", "wandb", "trackio")).trackers[1] == "wandb"
    with pytest.raises(ConfigError, match=r"trackers\.1 is 'mlflow'; it must be one of tensorboard, wandb, trackio"):
        TrainConfig(trackers=("tensorboard", "mlflow"))


@pytest.mark.parametrize("field", ["epochs", "lr", "base_lr", "val_size", "weight_decay", "min_lr", "warmup_epochs"])
def test_infinite_numbers_are_refused(field):
    with pytest.raises(ConfigError, match=f"{field} is inf"):
        TrainConfig(**{field: INF})


@pytest.mark.parametrize("config", [TrainConfig, GenerateConfig])
def test_a_seed_that_torch_cannot_take_is_refused(config):
    with pytest.raises(ConfigError, match=f"seed is {10**20}"):
        config(seed=10**20)


def test_every_allowed_seed_gives_an_order_of_the_data():
    from llama_adapter.data.batches import global_batch

    for seed in (2**32 - 1, 2**63 - 1, 2**64 - 1):
        try:
            TrainConfig(seed=seed)
        except ConfigError as error:
            assert f"seed is {seed}" in str(error)  # noqa: PT017
        else:
            assert sorted(global_batch(5, 5, 12, seed)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": ()}, "data names no file: pass --data FILE"),
        ({"output_dir": ""}, "output_dir is empty: pass --output-dir FOLDER"),
        ({"epochs": 1.0, "warmup_epochs": 1.5}, "warmup_epochs is 1.5, more than the 1.0 epochs of the run: lower it"),
        ({"min_lr": 0.01}, "min_lr is 0.01, above the peak learning rate 0.00225: lower it, or pass --lr"),
        ({"val_size": 1.5}, "val_size is 1.5; it must be a fraction below 1 or a whole number of records"),
        ({"trackers": ("none", "wandb")}, "trackers are none, wandb: pass 'none' or the others"),
        ({"tower": "bundled"}, "tower has no effect without a condition: pass --condition image, or leave it out"),
        ({"condition_lr": 0.1}, "condition_lr has no effect without a condition"),
        ({"parts_lr": 0.1}, "parts_lr has no effect without norms, linear_scale, linear_bias and lora_rank"),
        ({"feature_cache": "x"}, "feature_cache has no effect without a condition"),
        ({"condition": "image", "visual_width": 8}, "visual_width has no effect with condition image: leave it out"),
        (
            {"condition": "visual_prompt", "condition_width": 8},
            "condition_width has no effect with condition vis",
        ),
        ({"scienceqa_style": "QCM-A"}, "scienceqa_style has no effect without --data scienceqa:FOLDER"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
        ({"base_precision": "fp8", "load_in_4bit": True}, "base_precision fp8 and load_in_4bit exclude each other"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit exclude each other"),
    ],
)
def test_rules_between_settings(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"adapter_len": 1, "adapter_layers": 1, "batch_size": 1, "micro_batch_size": 1, "max_steps": 1},
        {"eval_every": 1, "save_every": 1, "max_length": 8},
        {"epochs": 0.1, "warmup_epochs": 0.1},
        {"min_lr": 0.0, "weight_decay": 0.0, "warmup_epochs": 0.0, "val_size": 0.0, "seed": 0},
    ],
)
def test_the_bounds_themselves_are_allowed(values):
    config = TrainConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_new_tokens", 0, "max_new_tokens is 0; it must be at least 1"),
        ("temperature", -0.1, "temperature is -0.1; it must be at least 0"),
        ("temperature", NAN, "temperature is nan"),
        ("top_p", 0.0, "top_p is 0.0; it must be above 0"),
        ("top_p", 1.01, "top_p is 1.01; it must be at most 1"),
        ("top_p", NAN, "top_p is nan"),
    ],
)
def test_rules_of_generate_config(field, value, message):
    with pytest.raises(ConfigError, match=message):
        GenerateConfig(**{field: value})


def test_bounds_of_generate_config_are_allowed():
    config = GenerateConfig(max_new_tokens=1, temperature=0.0, top_p=1.0, seed=0)
    assert (config.max_new_tokens, config.temperature, config.top_p, config.seed) == (1, 0.0, 1.0, 0)


def test_the_paper_s_values_are_the_defaults():
    train, generate = TrainConfig(), GenerateConfig()
    adapter = train.adapter_config()
    assert (adapter.adapter_len, adapter.adapter_layers, adapter.gate_activation) == (10, None, "tanh")
    assert (train.epochs, train.value("warmup_epochs"), train.batch_size) == (5, 2, 64)
    assert (train.base_lr, train.weight_decay, train.value("max_length")) == (9e-3, 0.02, 512)
    assert (generate.temperature, generate.top_p) == (0.1, 0.75)


def test_several_problems_stand_in_one_message():
    with pytest.raises(ConfigError) as error:
        TrainConfig(adapter_len=0, lr=-1.0, template="x", data=())
    for part in ("adapter_len is 0", "lr is -1.0", "template is 'x'", "data names no file"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_error_is_ours_and_a_value_error():
    assert issubclass(ConfigError, LlamaAdapterError)
    assert issubclass(ConfigError, ValueError)


def test_configs_are_frozen():
    for config in (AdapterConfig(), TrainConfig(), GenerateConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, 1)


@pytest.mark.parametrize(
    ("values", "peak"),
    [
        ({}, 9e-3 * 64 / 256),
        ({"batch_size": 256}, 9e-3),
        ({"base_lr": 1e-3, "batch_size": 128}, 5e-4),
        ({"lr": 0.02}, 0.02),
        ({"lr": 0.02, "base_lr": 5.0, "batch_size": 8}, 0.02),
    ],
)
def test_peak_lr_is_lr_or_base_lr_scaled_by_the_batch(values, peak):
    assert TrainConfig(**values).peak_lr == pytest.approx(peak)


def test_the_adapter_of_a_recipe_has_its_settings():
    recipe = TrainConfig(model="base", adapter_len=3, adapter_layers=7, gate_activation="identity", template="chat")
    assert recipe.adapter_config() == AdapterConfig(3, 7, "identity", "chat", "base")


STRICT = [
    (TrainConfig, "epochs", True, "epochs is True; it must be a valid number"),
    (TrainConfig, "epochs", "5", "epochs is '5'; it must be a valid number"),
    (TrainConfig, "adapter_len", False, "adapter_len is False; it must be a valid integer"),
    (TrainConfig, "adapter_len", 2.0, "adapter_len is 2.0; it must be a valid integer"),
    (TrainConfig, "packing", 1, "packing is 1; it must be true or false"),
    (TrainConfig, "data", 3, "data is 3; it must be a list"),
    (TrainConfig, "tower_depths", [1, True], "tower_depths.1 is True; it must be a valid integer"),
    (AdapterConfig, "adapter_len", "10", "adapter_len is '10'; it must be a valid integer"),
    (AdapterConfig, "adapter_len", 10**5000 * -1, "adapter_len is a number of thousands of digits; it must be"),
    (AdapterConfig, "base_shape", {"head_dim": True}, "base_shape.head_dim is True; it must be a valid integer"),
    (AdapterConfig, "base_shape", [1], "base_shape is [1]; it must be a valid dictionary"),
    (AdapterConfig, "condition", {"kind": "image"}, "condition is {'kind': 'image'}; it must be"),
    (GenerateConfig, "seed", True, "seed is True; it must be a valid integer"),
    (GenerateConfig, "temperature", "0.1", "temperature is '0.1'; it must be a valid number"),
]


@pytest.mark.parametrize(
    ("config", "field", "value", "rule"), STRICT, ids=[case[3].partition(";")[0] for case in STRICT]
)
def test_types_are_strict_in_python_and_in_json(config, field, value, rule):
    for build in (lambda: config(**{field: value}), lambda: parse(config, {field: value}, "x.json")):
        with pytest.raises(ConfigError, match=rf"^(x.json: )?{re.escape(rule)}") as error:
            build()
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(("field", "value"), [("adapter_len", True), ("epochs", False), ("tower_depths", [True])])
def test_yaml_s_booleans_are_no_numbers_either(field, value):
    with pytest.raises(ConfigError, match=f"{field}.* is (True|False); it must be a valid"):
        parse(TrainConfig, {field: value}, "x.yaml", text=True)


def test_lists_become_tuples_and_whole_numbers_floats():
    config = TrainConfig(data=["a.json", "b.json"], epochs=3, condition="image", tower_depths=[1, -1])
    assert (config.data, config.tower_depths) == (("a.json", "b.json"), (1, -1))
    assert isinstance(config.epochs, float)
    same = TrainConfig(data=("a.json", "b.json"), epochs=3.0, condition="image", tower_depths=(1, -1))
    assert hash(config) == hash(same)


def test_one_file_needs_no_list():
    assert TrainConfig(data="a.json", trackers="none") == TrainConfig(data=("a.json",), trackers=("none",))


def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = ("model", "output_dir", "tower", "feature_cache")
    config = TrainConfig(condition="image", **dict.fromkeys(paths, "~/x"), data=["~/a", "b"], val_data="~/c")
    assert {getattr(config, name) for name in paths} == {"/home/me/x"}
    assert (config.data, config.val_data) == (("/home/me/a", "b"), ("/home/me/c",))
    with pytest.raises(ConfigError, match=r"output_dir is 'a\\x00b'; it must be a path without the character 0"):
        TrainConfig(output_dir="a\0b")


def test_rules_between_settings_stand_beside_those_of_one_setting():
    with pytest.raises(ConfigError) as error:
        TrainConfig(adapter_len=0, warmup_epochs=9.0, resume=True, overwrite=True)
    for part in ("adapter_len is 0", "warmup_epochs is 9.0, more than", "resume and overwrite exclude"):
        assert part in str(error.value)


def test_a_rule_between_settings_waits_for_sound_ones():
    with pytest.raises(ConfigError, match=r"^epochs is 'many'; it must be a valid number$"):
        TrainConfig(epochs="many")


def test_a_setting_without_a_default_must_be_given():
    with pytest.raises(ConfigError, match=r"^x: kind is missing: give one; x: tower_width is missing: give one$"):
        parse(ConditionConfig, {"tower": "t"}, "x")


# parse


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("base_lr", "9e-3", 9e-3),
        ("lr", "1E-2", 1e-2),
        ("adapter_len", "12", 12),
        ("max_steps", "200", 200),
        ("epochs", "3", 3.0),
        ("resume", "true", True),
    ],
)
def test_values_given_as_text_are_read(key, text, value):
    got = getattr(parse(TrainConfig, {key: text}, "flags", text=True), key)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("key", ["data", "val_data", "trackers"])
def test_a_single_string_is_a_list_of_one(key):
    assert getattr(parse(TrainConfig, {key: "none"}, "flags", text=True), key) == ("none",)
    assert getattr(parse(TrainConfig, {key: ["trackio", "wandb"]}, "flags", text=True), key) == ("trackio", "wandb")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter_len": "ten"}, "x.yaml: adapter_len is 'ten'; it must be a valid integer"),
        ({"adapter_len": 2.5}, "x.yaml: adapter_len is 2.5; it must be a valid integer"),
        ({"lr": "fast"}, "x.yaml: lr is 'fast'; it must be a valid number"),
        ({"lr": [1]}, r"x.yaml: lr is \[1\]"),
        ({"data": 3}, "x.yaml: data is 3"),
        ({"data": ["a", 3]}, "x.yaml: data.1 is 3"),
        ({"data": None}, "x.yaml: data is None"),
        ({"resume": "perhaps"}, "x.yaml: resume is 'perhaps'"),
        ({"precision": "fp16"}, "x.yaml: precision is 'fp16'"),
        ({"adapter_len": 0}, "x.yaml: adapter_len is 0; it must be at least 1"),
        ({"lr": "nan"}, "x.yaml: lr is nan"),
    ],
)
def test_a_wrong_value_is_named_with_its_source_and_key(values, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        parse(TrainConfig, values, "x.yaml", text=True)
    assert "\n" not in str(error.value)
    assert "pydantic" not in str(error.value)


def test_all_wrong_types_stand_in_one_message():
    with pytest.raises(ConfigError) as error:
        parse(TrainConfig, {"adapter_len": "ten", "lr": "fast", "epochs": 9}, "x.yaml", text=True)
    assert "adapter_len is 'ten'" in str(error.value)
    assert "lr is 'fast'" in str(error.value)
    assert "epochs" not in str(error.value)


def test_unknown_keys_are_all_named_with_suggestions():
    with pytest.raises(ConfigError) as error:
        parse(TrainConfig, {"adaptor_len": 4, "epoch": 1, "lr": 1.0}, "x.yaml")
    assert "x.yaml: unknown key 'adaptor_len'; did you mean 'adapter_len'?" in str(error.value)
    assert "x.yaml: unknown key 'epoch'; did you mean 'epochs'?" in str(error.value)


def test_an_unknown_key_like_no_other_lists_the_known_ones():
    with pytest.raises(ConfigError, match="unknown key 'zzzzzz'; known: adapter_len, adapter_layers"):
        parse(AdapterConfig, {"zzzzzz": 1}, "x")


# recipes


def test_no_recipe_is_the_defaults():
    assert load_recipe(None, {}) == TrainConfig()


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "---\n"])
def test_an_empty_recipe_is_the_defaults(tmp_path, text):
    assert load_recipe(write(tmp_path, text), {}) == TrainConfig()


def test_a_recipe_sets_what_it_names(tmp_path):
    path = write(tmp_path, "model: base\ndata: [a.json, b.jsonl]\nlr: 9e-3\nmax_steps: 20\nskip_bad_records: yes\n")
    wanted = TrainConfig(model="base", data=("a.json", "b.jsonl"), lr=9e-3, max_steps=20, skip_bad_records=True)
    assert load_recipe(path, {}) == wanted


def test_overrides_win_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path):
    path = write(tmp_path, "lr: 0.5\nadapter_len: 3\n")
    config = load_recipe(path, {"lr": "0.25", "data": ["mine.json"]})
    assert (config.lr, config.adapter_len, config.data) == (0.25, 3, ("mine.json",))
    assert config.epochs == TrainConfig().epochs


def test_an_override_replaces_a_wrong_value_of_the_recipe(tmp_path):
    assert load_recipe(write(tmp_path, "lr: -1\n"), {"lr": 0.5}).lr == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- lr: 1\n", "holds a list, not 'key: value' lines"),
        ("just words\n", "holds a str, not 'key: value' lines"),
        ("lr: [1\n", r"is not YAML: line 2, column 1: expected ',' or ']'"),
        ("lr: [1\nepochs: 3\n", r"is not YAML: line 2, column 7: expected ',' or ']', but got ':'"),
        ("lr: 1\n\tepochs: 2\n", r"is not YAML: line 2, column 1: a tab; indent with blanks\."),
        (
            "model: a: b\n",
            "is not YAML: line 1, column 9: a second ': ' in a line, .*; put a value with ': ' in quotes",
        ),
        ("r: 8\n", "unknown key 'r'; did you mean 'lora_rank'"),
        ("data:\n", "data is None; it must be a list"),
        ("? [a]\n: 1\n", "is not YAML: "),
        ("1: 2\n", "unknown key '1'"),
        ("learning_rate: 1\n", "unknown key 'learning_rate'"),
        ("lr: -1\n", "lr is -1; it must be above 0"),
        ("seed: 2020-01-01\n", "seed is "),
    ],
)
def test_a_recipe_that_cannot_be_used_is_named_in_one_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as error:
        load_recipe(path, {})
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_recipes_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml cannot be read \(No such file or directory\)"):
        load_recipe(str(tmp_path / "nowhere.yaml"), {})
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load_recipe(str(tmp_path), {})
    (tmp_path / "latin.yaml").write_bytes("model: caf\xe9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml cannot be read \(it is not UTF-8 text\)"):
        load_recipe(str(tmp_path / "latin.yaml"), {})


def test_yaml_cannot_run_code(tmp_path):
    path = write(tmp_path, f"model: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_recipe(path, {})
    assert not (tmp_path / "made").exists()


# every setting is documented and reachable


@pytest.fixture(scope="module")
def train_help():
    from llama_adapter.cli import build_parser

    parser = build_parser()
    return parser.parse_args(["train"]).parser.format_help()


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_every_setting_has_help_a_heading_and_a_flag(field, train_help):
    assert field.metadata["help"].endswith(".")
    assert f"{field.metadata['group'].lower()}:" in train_help
    assert re.search(rf"^  (-\w, )?--{field.name.replace('_', '-')}\b", train_help, re.MULTILINE)


def test_a_flag_sets_its_field_and_nothing_else():
    from llama_adapter.cli import build_parser
    from llama_adapter.cli.recipe import recipe_from

    examples = {
        "model": ("m", "m"),
        "data": ("a.json", ("a.json",)),
        "val_data": ("v.json", ("v.json",)),
        "val_size": ("0.5", 0.5),
        "output_dir": ("out", "out"),
        "template": ("chat", "chat"),
        "scienceqa_style": ("QCM-A", "QCM-A"),
        "max_length": ("99", 99),
        "condition": ("video", "video"),
        "tower": ("t", "t"),
        "tower_depths": ("3", (3,)),
        "condition_lr": ("0.01", 0.01),
        "parts_lr": ("0.01", 0.01),
        "condition_width": ("8", 8),
        "condition_activation": ("silu", "silu"),
        "absent": ("learnt", "learnt"),
        "visual_blocks": ("2", 2),
        "visual_width": ("64", 64),
        "visual_heads": ("4", 4),
        "condition_layers": ("2", 2),
        "visual_len": ("20", 20),
        "feature_cache": ("cache", "cache"),
        "shuffle_buffer": ("500", 500),
        "prompt_init_text": ("data", "data"),
        "method": ("dpo", "dpo"),
        "beta": ("0.2", 0.2),
        "init_from": ("runs/first", "runs/first"),
        "adapter_len": ("7", 7),
        "adapter_layers": ("3", 3),
        "gate_activation": ("identity", "identity"),
        "linear_scale": ("q_proj", ("q_proj",)),
        "linear_bias": ("o_proj", ("o_proj",)),
        "lora_rank": ("4", 4),
        "lora_alpha": ("8", 8.0),
        "lora_targets": ("up_proj", ("up_proj",)),
        "epochs": ("9", 9.0),
        "max_steps": ("11", 11),
        "warmup_epochs": ("0.25", 0.25),
        "batch_size": ("16", 16),
        "micro_batch_size": ("2", 2),
        "base_lr": ("1e-3", 1e-3),
        "lr": ("2e-3", 2e-3),
        "min_lr": ("1e-5", 1e-5),
        "weight_decay": ("0", 0.0),
        "max_grad_norm": ("1", 1.0),
        "seed": ("5", 5),
        "precision": ("fp32", "fp32"),
        "base_precision": ("fp8", "fp8"),
        "eval_every": ("4", 4),
        "save_every": ("6", 6),
        "push_to_hub": ("me/adapter", "me/adapter"),
        "trackers": ("wandb", ("wandb",)),
    }
    image, visual = ["--condition", "image"], ["--condition", "visual_prompt"]
    beside = {field.name: image for field in dataclasses.fields(TrainConfig) if field.metadata["group"] == "Condition"}
    beside |= {"beta": ["--method", "dpo"], "condition": [], "scienceqa_style": ["--data", "scienceqa:x"]}
    beside |= {"streaming": ["--max-steps", "3"], "shuffle_buffer": ["--streaming", "--max-steps", "3"]}
    lora = ["--lora-rank", "1", "--lora-targets", "k_proj"]
    beside |= {"parts_lr": lora, "lora_alpha": lora, "lora_rank": lora, "lora_targets": lora[:2]}
    beside |= {"visual_len": visual, "visual_blocks": visual, "visual_width": visual, "visual_heads": visual}
    parser = build_parser()
    for field in dataclasses.fields(TrainConfig):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            arguments, value = [f"--no{flag[1:]}" if field.default else flag], not field.default
        else:
            text, value = examples[field.name]
            arguments = [flag, text]
        context = beside.get(field.name, [])
        alone = lora if field.name == "lora_targets" else context
        default = recipe_from(parser.parse_args(["train", *alone])) if alone else TrainConfig()
        got = recipe_from(parser.parse_args(["train", *context, *arguments]))
        assert got == dataclasses.replace(default, **{field.name: value}), field.name
        assert got != default, field.name


def test_a_switch_can_be_turned_off_again(tmp_path):
    from llama_adapter.cli import build_parser
    from llama_adapter.cli.recipe import recipe_from

    path = write(tmp_path, "skip_bad_records: true\ndata: [a.json, b.json]\n")
    args = build_parser().parse_args(["train", path, "--no-skip-bad-records", "--data", "c.json", "--data", "d.json"])
    config = recipe_from(args)
    assert config.skip_bad_records is False
    assert config.data == ("c.json", "d.json")


# defaults that give way, and flags that exclude each other


@pytest.mark.parametrize(("epochs", "warmup"), [(0.1, 0.04), (1, 0.4), (2, 0.8), (5, 2), (30, 2)])
def test_the_default_warm_up_is_two_fifths_of_a_short_run(epochs, warmup):
    assert load_recipe(None, {"epochs": str(epochs)}).value("warmup_epochs") == pytest.approx(warmup)


def test_a_recipe_s_warm_up_gives_way_to_the_epochs_of_a_flag_and_not_to_a_flag(tmp_path):
    path = write(tmp_path, "epochs: 5\nwarmup_epochs: 2\n")
    assert load_recipe(path, {"epochs": "1"}).value("warmup_epochs") == pytest.approx(0.4)
    assert load_recipe(path, {"epochs": "3"}).warmup_epochs == 2
    with pytest.raises(ConfigError, match=r"warmup_epochs is 2.0, more than the 1.0 epochs"):
        load_recipe(path, {"epochs": "1", "warmup_epochs": "2"})


@pytest.mark.parametrize(
    ("text", "flags", "field", "value"),
    [
        ("max_steps: 7", {"epochs": "1"}, "max_steps", None),
        ("lr: 0.5", {"base_lr": "0.001"}, "lr", None),
        ("val_data: [a.json]", {"val_size": "3"}, "val_data", ()),
        ("val_size: 0.1", {"val_data": ["a.json"]}, "val_size", None),
        ("epochs: 7", {"max_steps": "3"}, "epochs", 7.0),
    ],
)
def test_a_flag_is_not_silenced_by_another_setting_of_the_recipe(tmp_path, text, flags, field, value):
    assert getattr(load_recipe(write(tmp_path, text), flags), field) == value


@pytest.mark.parametrize("flags", [{"lr": "1", "base_lr": "1"}, {"val_data": ["a.json"], "val_size": "3"}])
def test_flags_that_exclude_each_other_say_so(flags):
    with pytest.raises(ConfigError, match=f"{' and '.join(flags)} exclude each other: pass one of them"):
        load_recipe(None, flags)


def test_epochs_beside_max_steps_are_said_to_scale_the_warm_up(caplog):
    load_recipe(None, {"epochs": "1", "max_steps": "2"})
    assert "max_steps ends the run; epochs only scales its warm-up" in caplog.text


def test_a_recipe_that_names_every_setting_at_its_default_can_be_read(tmp_path, caplog):
    """As runs wrote it before defaults gave way."""
    path = write(tmp_path, "condition: null\ntower: bundled\ncondition_width: 64\nvisual_blocks: 8\nlr: 0.5\n")
    assert load_recipe(path, {}) == TrainConfig(lr=0.5)
    assert load_recipe(path, {"condition": "image"}).tower == "bundled"
    assert not caplog.text
    load_recipe(write(tmp_path, "tower: other\n"), {})
    assert "tower has no effect without a condition" in caplog.text
    with pytest.raises(ConfigError, match="tower has no effect without a condition"):
        load_recipe(path, {"tower": "bundled"})


@pytest.mark.parametrize("text", ['{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n', "[]"])
def test_data_in_place_of_a_recipe_says_how_to_pass_them(tmp_path, text):
    path = tmp_path / "caps.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))} holds data, not a recipe: pass it as --data"):
        load_recipe(str(path), {})


def test_a_run_in_place_of_its_recipe_names_it(tmp_path):
    (tmp_path / "recipe.yaml").write_text("lr: 0.1\n")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\): .*, such as .*recipe\.yaml"):
        load_recipe(str(tmp_path), {})
