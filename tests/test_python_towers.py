"""Towers that a Python function makes: what they give, how they are stored, and that no file runs their code."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import recipe
from safetensors.torch import load_file

from llama_adapter import load_session
from llama_adapter.cli import main
from llama_adapter.cli.train import tower_flag
from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.conditions.perception import Perception, condition_config
from llama_adapter.conditions.python_towers import load_named_towers, load_python_tower, named_tower
from llama_adapter.errors import AdapterError, ConfigError, DataError, ModelError
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.writing import Prompt
from llama_adapter.training.config import load_recipe
from llama_adapter.training.loop import train
from llama_adapter.training.plan import plan_run

CPU = torch.device("cpu")
CODE = """
from pathlib import Path

import numpy as np
import torch
from torch import nn

with Path(__file__).with_name("ran").open("a") as file:
    file.write("x")


class Eye(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 6, 2, 2)

    def forward(self, x):
        low = self.first(x)
        return [low, self.second(low)]


class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x):
        return self.linear(x.mean((2, 3)) if x.dim() == 4 else x[:, :3])


def preprocess(picture):
    return torch.from_numpy(np.array(picture.resize((16, 16)))).permute(2, 0, 1).float() / 255


def eye(seed=0):
    torch.manual_seed(seed)
    return Eye(), preprocess


def other():
    return eye(1)


def darker():
    return eye()[0], lambda picture: preprocess(picture) / 2


def vector():
    return Vector(), preprocess


def tokens():
    return nn.Sequential(nn.Conv2d(3, 7, 8, 8), nn.Flatten(2), Swap()), preprocess


class Swap(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def ear():
    return Vector(), lambda samples: torch.from_numpy(samples[:100].copy())


def wide():
    return Eye(), lambda picture: preprocess(picture)[:, :8]


def only_a_module():
    return Eye()


def no_tensor():
    return Eye(), lambda picture: picture


def sizes():
    return Eye(), lambda picture: preprocess(picture)[:, : picture.size[0] // 8]


def chance():
    return Eye(), lambda picture: preprocess(picture) + torch.rand(1)


def flat():
    return nn.Flatten(0), preprocess


class After(Eye):
    def __init__(self, then):
        super().__init__()
        self.then = then

    def forward(self, x):
        return self.then(super().forward(x)[1])


def dropped():
    return After(lambda found: nn.functional.dropout(found, 0.1)), preprocess


def normed():
    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4, track_running_stats=False)), preprocess


def counting():
    return After(lambda found: found - found.mean(0)), preprocess


def nothing_at_all():
    return After(lambda found: found[:, :0]), preprocess


def no_number():
    return After(lambda found: found / 0), preprocess


def fragile():
    return After(lambda found: found), lambda picture: preprocess(picture) / (picture.size[0] != 13)


def helped():
    torch.manual_seed(0)
    import helper
    return After(helper.then), preprocess


def grows():
    return Eye(), lambda picture: preprocess(picture).repeat(1, 1, 1 + (picture.size[0] == 13))


def text():
    class Text(nn.Module):
        def forward(self, x):
            return "no"
    return Text(), preprocess


def broken():
    raise RuntimeError("No weights. Fetch them.")


number = 3
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    file = tmp_path_factory.mktemp("code") / "eyes.py"
    file.write_text(CODE, encoding="utf-8")
    return file


@pytest.fixture
def ran(code):
    """Whether the code has run since the test began, or since this was last asked."""
    mark = code.with_name("ran")
    mark.unlink(missing_ok=True)

    def asked():
        found = mark.exists()
        mark.unlink(missing_ok=True)
        return found

    return asked


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    records = []
    for number in range(8):
        Image.new("RGB", (20, 12), ((200, 20, 20), (20, 20, 200))[number % 2]).save(folder / f"{number}.png")
        records.append({"instruction": "colour?", "output": ("red", "blue")[number % 2], "image": f"{number}.png"})
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(base, code, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = {"condition": "image", "tower": f"python:{code}:eye", "max_steps": 2, "val_size": 0}
    train(recipe(base, pictures / "data.json", folder, **settings))
    return folder


def photo(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), np.uint8))


def load(code, function, kind="image"):
    return load_python_tower(f"python:{code}:{function}", kind)


def answers(session, files):
    asked = [Prompt.of("colour?", media=(str(file),)) for file in files]
    return session.answer(asked, "run", GenerateConfig(max_new_tokens=2, temperature=0))


# features


def test_feature_maps_become_means_and_tokens(code):
    tower = load(code, "eye")
    assert (tower.width, tower.depths, tower.sense) == (6, 2, "picture")
    given = [photo(), photo(1), photo(2)]
    tower.batch_size = 2
    values = torch.stack([tower.preprocess(picture) for picture in given])
    low, high = tower.model(values)
    found = tower.features(given, (0, -1))
    torch.testing.assert_close(found[:, 0, :4], low.mean((2, 3)))
    torch.testing.assert_close(found[:, 1], high.mean((2, 3)))
    assert not found[:, 0, 4:].any()
    torch.testing.assert_close(tower.tokens(given)[:, 1], high[:, :, 0, 1])  # the second place of the first line
    torch.testing.assert_close(tower.features([given])[0], found[:, 1:].mean(0))  # a video of three frames
    assert not any(parameter.requires_grad for parameter in tower.model.parameters())


def test_tokens_and_vectors(code):
    tower = load(code, "tokens")
    values = tower.model(tower.preprocess(photo())[None])
    torch.testing.assert_close(tower.tokens([photo()]), values)
    torch.testing.assert_close(tower.features([photo()])[:, 0], values.mean(1))
    tower = load(code, "vector")
    torch.testing.assert_close(tower.features([photo()])[:, 0], tower.model(tower.preprocess(photo())[None]))
    with pytest.raises(
        AdapterError, match=r"condition visual_prompt reads a picture's tokens, and .* gives one vector"
    ):
        condition_config("visual_prompt", tower)
    with pytest.raises(AdapterError, match="is no square: let preprocess give square pictures"):
        condition_config("patches", load(code, "wide"))


def test_recordings(code):
    tower = load(code, "ear", "audio")
    sound = np.random.default_rng(0).normal(size=400).astype(np.float32)
    torch.testing.assert_close(tower.features([sound])[:, 0], tower.model(torch.from_numpy(sound[None])))
    with pytest.raises(DataError, match="takes recordings, not this Image"):
        tower.features([photo()])
    with pytest.raises(DataError, match="takes pictures or lists of frames, not this ndarray"):
        load(code, "eye").features([sound])


def test_a_module_by_its_name(code, monkeypatch):
    monkeypatch.syspath_prepend(code.parent)
    named = load_python_tower("python:eyes:eye", "image")
    assert named.digest == load(code, "eye").digest


def test_features_are_keyed_by_weights_preprocessing_and_code(code, tmp_path):
    key = load(code, "eye").key((-1,))
    assert key == load(code, "eye").key((1,))
    moved = tmp_path / "moved.py"
    moved.write_text(CODE, encoding="utf-8")
    assert load(moved, "eye").key((-1,)) == key
    moved.write_text(CODE.replace("return [low", "return [2 * low"), encoding="utf-8")
    others = [load(code, "other"), load(code, "darker"), load(moved, "eye")]
    keys = {key, *(tower.key((-1,)) for tower in others), load(code, "eye").key((0,)), load(code, "eye").key()}
    assert len(keys) == 6
    assert [tower.digest == load(code, "eye").digest for tower in others] == [False, True, True]  # of weights alone


def test_features_are_keyed_by_code_of_other_files_too(code, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for then in ("found", "-found", "found.relu()", "found", "found.flip(1)"):
        monkeypatch.delitem(sys.modules, "helper", raising=False)
        (tmp_path / "helper.py").write_text(f"def then(found):\n    return {then}\n", encoding="utf-8")
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        keys.append(load(code, "helped").key())
    assert keys[0] == keys[3]
    assert len(set(keys)) == 4


def test_what_only_one_picture_shows_is_said_too(code, tmp_path):
    files = [str(tmp_path / name) for name in ("good.png", "odd.png")]
    for file, width in zip(files, (12, 13), strict=True):
        Image.new("RGB", (width, 12), "red").save(file)
    tower = load(code, "fragile")
    eye = Perception(condition_config("image", tower), CPU, tmp_path / "kept", towers=[tower])
    with pytest.raises(DataError, match=r"gives features of .*odd\.png that are not finite"):
        eye.features(files)
    with pytest.raises(DataError, match=r"gives features of a file of \d+ bytes that are not finite"):
        eye.features([Path(files[1]).read_bytes()])
    assert not list((tmp_path / "kept").rglob("*.safetensors"))
    with pytest.raises(ModelError, match=r"inputs of unlike shapes, \[3, 16, 16\] and \[3, 16, 32\]: resize to one"):
        load(code, "grows").tokens([Image.open(file) for file in files])


def test_depths_are_spread_or_chosen(code):
    tower = load(code, "eye")
    config = condition_config("image", tower, width=8)
    assert (config.depths, config.tower_width, config.width, config.tower_digest) == ((0, 1), 6, 8, tower.digest)
    assert condition_config("visual_prompt", tower).depths == (-1,)
    with pytest.raises(AdapterError, match=r"has hidden states 0 to 1, not \[2\]"):
        condition_config("image", tower, (2,))
    assert ConditionConfig.from_dict(config.to_dict()) == config
    assert "tower_digest" not in ConditionConfig("image", "bundled", 6).to_dict()  # older releases read such files


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        ("{}:only_a_module", ModelError, "returns a Eye: return a pair, module and preprocess"),
        ("{}:no_tensor", ModelError, "gives a Image: return a tensor"),
        ("{}:sizes", ModelError, r"inputs of unlike shapes, \[3, 10, 16\] and \[3, 5, 16\]: resize to one"),
        ("{}:chance", ModelError, "two results for one input: take random crops and flips out"),
        ("{}:flat", ModelError, r"gives \[768\] for 1 inputs: return \[N, W\]"),
        ("{}:dropped", ModelError, "two results for one input, in evaluation mode, too: take dropout"),
        ("{}:normed", ModelError, "gives an input other features beside another one in its batch: normalise"),
        ("{}:counting", ModelError, "gives an input other features beside another one in its batch: normalise"),
        ("{}:nothing_at_all", ModelError, r"gives \[1, 0, 2, 2\] for 1 inputs: return \[N, W\]"),
        ("{}:no_number", ModelError, "gives numbers that are not finite for noise"),
        ("{}:text", ModelError, "gives a str: return a tensor or a list"),
        ("{}:broken", ModelError, r"failed \(RuntimeError\): No weights\.$"),
        ("{}:number", ConfigError, "has no function 'number'"),
        ("{}:nothing", ConfigError, "has no function 'nothing'"),
        ("{}.py:eye", ConfigError, "there is no file .*: check the path"),
        ("no_such_package.eyes:eye", ModelError, r"cannot be imported \(ModuleNotFoundError\)"),
        ("eyes", ConfigError, "is malformed: write python:FILE.py:FUNCTION"),
        ("{}:", ConfigError, "is malformed"),
        (":eye", ConfigError, "is malformed"),
    ],
)
def test_what_is_no_factory_is_said_in_a_sentence(code, name, error, sentence):
    with pytest.raises(error, match=sentence) as found:
        load_python_tower("python:" + name.format(code), "image")
    assert "\n" not in str(found.value)


# adapters


def test_an_adapter_keeps_the_tower_and_asks_for_it(trained, code, pictures, ran):
    stored = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))["condition"]
    assert stored["tower"] == f"python:{code}:eye"
    assert stored["tower_digest"] == load(code, "eye").digest
    assert ran()
    asks = f"Adapter 'run': The tower 'python:{code}:eye' is Python code, which runs only if you name it yourself: "
    with pytest.raises(AdapterError, match=re.escape(asks + f"pass --tower python:{code}:eye.")):
        load_session(None, {"run": str(trained)}, CPU)
    with pytest.raises(AdapterError, match="runs only if you name it yourself"):
        Perception(ConditionConfig.from_dict(stored), CPU)
    assert not ran()
    session = load_session(None, {"run": str(trained)}, CPU, towers=[f"python:{code}:eye"])
    assert len(answers(session, [pictures / "0.png", pictures / "1.png"])) == 2
    assert ran()


def test_other_weights_are_refused(trained, code, tmp_path):
    with pytest.raises(AdapterError, match=r"eyes.py:other' has other weights: pass --tower with the one that it was"):
        load_session(None, {"run": str(trained)}, CPU, towers=[f"python:{code}:other"])
    moved = tmp_path / "moved.py"
    moved.write_text(CODE, encoding="utf-8")
    towers = [f"python:{code}:other", f"python:{moved}:eye"]  # the second one is meant, wherever it lies
    session = load_session(None, {"run": str(trained)}, CPU, towers=towers)
    assert session.perceptions["run"].tower.name == towers[1]


def test_an_adapter_that_is_added_later_runs_no_code(trained, base, code, ran):
    session = load_session(str(base), {}, CPU)
    with pytest.raises(AdapterError, match="runs only if you name it yourself"):
        session.add("late", str(trained))
    assert session.adapters == []
    assert not ran()
    session = load_session(str(base), {}, CPU, towers=[f"python:{code}:eye"])
    session.add("late", str(trained))
    assert session.adapters == ["late"]


def test_towers_are_made_for_what_their_adapters_take(code):
    hears = ConditionConfig("audio", "python:x:y", 5)
    sees = ConditionConfig("image", "python:x:y", 5)
    assert [tower.sense for tower in load_named_towers([f"python:{code}:ear"], [hears], CPU)] == ["audio"]
    assert [tower.sense for tower in load_named_towers([f"python:{code}:eye"], [sees], CPU)] == ["picture"]


def test_towers_of_the_same_weights_are_told_apart_by_name(code, tmp_path):
    moved = tmp_path / "moved.py"
    moved.write_text(CODE, encoding="utf-8")
    eye, darker = load(code, "eye"), load(code, "darker")
    assert eye.digest == darker.digest
    for given in ([eye, darker], [darker, eye]):
        assert named_tower(condition_config("image", eye), given) is eye
        assert named_tower(condition_config("image", darker), given) is darker
        assert named_tower(condition_config("image", load(moved, "darker")), given) is darker
    assert named_tower(condition_config("image", eye), [darker]) is darker  # named by whoever asks: it is taken


def test_the_end_of_a_run_says_how_to_ask_it():
    assert tower_flag("python:a.py:f") == ["--tower", "python:a.py:f"]
    assert tower_flag(None) == tower_flag("bundled") == []


def test_the_commands_ask_for_it(trained, base, code, pictures, fail, ran, capsys):
    picture = ["colour?", "--image", pictures / "0.png", "--max-new-tokens", "2"]
    for command in (["generate", *picture], ["chat"], ["serve"], ["evaluate", "instructions", "--data", "no.json"]):
        assert "pass --tower python:" in fail(*command, "--adapter", trained)
    assert "no python:FILE.py:FUNCTION" in fail("generate", *picture, "-a", trained, "--tower", "bundled")
    assert "--tower has no effect" in fail("generate", "a", "--model", base, "--tower", f"python:{code}:eye")
    assert not ran()
    main([str(word) for word in ("generate", *picture, "-a", trained, "--tower", f"python:{code}:eye", "--json")])
    assert json.loads(capsys.readouterr().out)["adapter"] == "run"


# recipes


def test_a_recipe_s_file_runs_no_code(base, code, pictures, tmp_path, fail, ran):
    file = tmp_path / "recipe.yaml"
    lines = {"model": base, "data": pictures / "data.json", "condition": "image", "tower": f"python:{code}:eye"}
    file.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()), encoding="utf-8")
    assert f"pass --tower python:{code}:eye." in fail("train", file)
    assert not ran()
    config = load_recipe(str(file), {"tower": f"python:{code}:eye"})
    assert plan_run(config)["adapter_parameters"] > 0
    assert ran()


def test_a_run_goes_on_from_an_adapter_with_the_same_weights(trained, base, code, pictures, tmp_path, ran):
    settings = {"init_from": str(trained), "max_steps": 1, "val_size": 0, "adapter_layers": None, "adapter_len": None}
    config = recipe(base, pictures / "data.json", tmp_path / "run", **settings)
    with pytest.raises(ConfigError, match="runs only if you name it yourself"):
        train(config)
    assert not ran()
    moved = tmp_path / "moved.py"
    moved.write_text(CODE, encoding="utf-8")
    config = recipe(base, pictures / "data.json", tmp_path / "run", **settings, tower=f"python:{moved}:other")
    with pytest.raises(AdapterError, match="has other weights"):
        train(config)
    config = recipe(base, pictures / "data.json", tmp_path / "run", **settings, tower=f"python:{moved}:eye")
    train(config)
    stored = json.loads((tmp_path / "run" / "adapter_config.json").read_text(encoding="utf-8"))["condition"]
    assert stored["tower"] == f"python:{moved}:eye"


def test_a_stopped_run_resumes_with_it(base, code, pictures, tmp_path, ran):
    settings = {"condition": "image", "tower": f"python:{code}:eye", "val_size": 0, "save_every": 1}
    train(recipe(base, pictures / "data.json", tmp_path / "run", max_steps=2, **settings))
    ran()
    overrides = {"output_dir": str(tmp_path / "run"), "resume": True, "max_steps": 3}
    with pytest.raises(ConfigError, match="runs only if you name it yourself"):
        load_recipe(None, overrides)
    assert not ran()
    train(load_recipe(None, {**overrides, "tower": settings["tower"]}))
    assert load_file(tmp_path / "run" / "last" / "training_state.safetensors")
