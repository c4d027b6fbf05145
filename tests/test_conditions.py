"""Conditions: their settings, their learnable part against the authors' outputs, and the cache of features."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llama_adapter.conditions.cache import LONG_WORK, FeatureCache, content_digest
from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.conditions.modules import ImageBindCondition, ImageCondition, VisualPromptCondition, grid
from llama_adapter.conditions.official import official_condition
from llama_adapter.conditions.perception import condition_config
from llama_adapter.conditions.tower_families import check_tower
from llama_adapter.errors import AdapterError, ConfigError, DataError

FIXTURE = Path(__file__).parent / "fixtures" / "official_v2_bias_a.safetensors"
IMAGE = {"kind": "image", "tower": "t", "tower_width": 6}
VISUAL = {**IMAGE, "kind": "visual_prompt", "blocks": 2, "block_width": 8, "block_heads": 2}
PATCHES = {**IMAGE, "kind": "patches"}


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# settings


@pytest.mark.parametrize(
    "values", [{**IMAGE, "depths": (0, 2, -1), "absent": "learnt", "bias": False}, VISUAL, PATCHES]
)
def test_a_config_survives_json(values):
    config = ConditionConfig(**values)
    assert ConditionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict() == json.loads(json.dumps(config.to_dict()))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("kind", "smell", "kind is 'smell'; it must be one of image, patches, visual_prompt, audio, video, image_bind"),
        ("kind", None, "kind is None; it must be one of image, patches, visual_prompt, audio, video, image_bind"),
        ("tower", "", "tower is empty: give a folder, a hub name or 'bundled'"),
        ("tower_width", 0, "tower_width is 0; it must be at least 1"),
        ("depths", (), "depths names no hidden state: give at least one, such as -1"),
        ("depths", (1, 2, 1), "depths are [1, 2, 1]: each hidden state may be named once"),
        ("width", -1, "width is -1; it must be at least 1"),
        ("activation", "tanh", "activation is 'tanh'; it must be one of silu, gelu, relu, identity"),
        ("absent", "mean", "absent is 'mean'; it must be one of zero, learnt"),
        ("blocks", 0, "blocks is 0; it must be at least 1"),
        ("block_heads", 5, "block_heads is 5; it must divide block_width, which is 768"),
        ("block_heads", 0, "block_heads is 0; it must be at least 1"),
    ],
)
def test_rules(field, value, rule):
    with pytest.raises(ConfigError, match=f"^{re.escape(rule)}$"):
        ConditionConfig(**{**IMAGE, field: value})


@pytest.mark.parametrize("values", [VISUAL, PATCHES])
def test_tokens_are_those_of_the_last_hidden_state_only(values):
    with pytest.raises(ConfigError, match=rf"depths are \[-2\]; kind {values['kind']} reads the tower's last"):
        ConditionConfig(**{**values, "depths": (-2,)})


def test_all_problems_in_one_error():
    with pytest.raises(ConfigError) as caught:
        ConditionConfig(kind="smell", tower="", tower_width=0, width=0)
    assert [part.split()[0] for part in str(caught.value).split("; ") if not part.startswith("it must")] == [
        "kind",
        "tower_width",
        "width",
        "tower",
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"widht": 3}, "adapter_config.json: unknown key 'widht'; did you mean 'width'?"),
        ({"width": "wide"}, "adapter_config.json: width is 'wide'"),
        ({"depths": [1.5]}, "adapter_config.json: depths.0 is 1.5"),
    ],
)
def test_foreign_values_name_their_source(change, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        ConditionConfig.from_dict({**IMAGE, **change}, "adapter_config.json")


# the bottleneck


def test_parameters_at_7b_shape_are_the_paper_s():
    """Its table 4: 0.97M, 1.37M and 1.79M for 10, 20 and 30 layers with 10 prompts and 32 gates each."""
    with torch.device("meta"):
        condition = ImageCondition(4096)
    assert count(condition) == 561_216
    totals = [count(condition) + layers * (10 * 4096 + 32) for layers in (10, 20, 30)]
    assert [round(total / 1e6, 3) for total in totals] == [0.971, 1.381, 1.791]


@pytest.mark.parametrize(
    ("values", "expected"), [({}, 561_216), ({"bias": False}, 557_056), ({"absent": "learnt"}, 561_216 + 4096)]
)
def test_without_biases_and_with_a_learnt_absence(values, expected):
    config = ConditionConfig("image", "clip", 768, depths=(4, 8, 12, 16, 20, 24), **values)
    with torch.device("meta"):
        assert count(config.build(4096, 10)) == expected


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        ("relu", lambda x: x.clamp(min=0)),
        ("identity", lambda x: x),
    ],
)
def test_the_bottleneck_is_the_formula(activation, function):
    torch.manual_seed(0)
    condition = ConditionConfig(**IMAGE, depths=(0, 1, 2), width=4, activation=activation).build(
        hidden_size=7, adapter_len=5
    )
    features = torch.randn(3, 3, 6)
    p = {key: value.double() for key, value in condition.state_dict().items()}
    joined = torch.cat([features[:, m] for m in range(3)], -1).double()
    expected = function(joined @ p["down.weight"].T + p["down.bias"]) @ p["up.weight"].T + p["up.bias"]
    torch.testing.assert_close(condition(features).double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(condition(features.flatten(1)), condition(features))


# the visual prompt


def official(file=FIXTURE):
    """The condition that a checkpoint of the authors holds, under the settings that its shapes say."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        shape = json.loads(opened.metadata()["params"])
    theirs = {key.removeprefix("adapter."): tensor for key, tensor in tensors.items() if key.startswith("adapter.")}
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    config = official_condition(shapes, block_heads=shape["v_num_heads"])
    assert (config.blocks, config.block_width, config.tower_width) == (shape["v_depth"], 48, 24)
    condition = config.build(shape["dim"], shape["adapter_len"])
    condition.load_state_dict({key: theirs[key] for key in condition.state_dict()})
    return condition, tensors


@pytest.mark.parametrize("file", [FIXTURE, FIXTURE.with_name("official_v2_lora_a.safetensors")])
def test_the_visual_prompt_equals_the_authors(file):
    condition, tensors = official(file)
    with torch.no_grad():
        found = condition(tensors["clip_features"])
    assert tensors["visual_query"].std() > 0.5
    torch.testing.assert_close(found, tensors["visual_query"], atol=5e-6, rtol=0)


def test_the_authors_epsilon_is_torch_s():
    """The bound above is tight enough to tell: timm's 1e-6, which its whole models use, would miss it."""
    condition, tensors = official()
    for block in condition.visual_blocks:
        block.norm1.eps = block.norm2.eps = 1e-6
    with torch.no_grad():
        assert (condition(tensors["clip_features"]) - tensors["visual_query"]).abs().max() > 1e-5


def test_parameters_of_the_official_projector():
    """Queries 10 x 768; 768 -> 768 and norm; 8 blocks of 7,087,872; 768 -> 4096 and norm."""
    with torch.device("meta"):
        condition = VisualPromptCondition(4096, 10)
    block = 4 * 768 + (3 * 768 * 768 + 3 * 768) + (768 * 768 + 768) + 2 * 4 * 768 * 768 + 4 * 768 + 768
    expected = 7680 + (768 * 768 + 768) + 2 * 768 + 8 * block + (4096 * 768 + 4096) + 2 * 4096
    assert block == 7_087_872
    assert count(condition) == expected == 60_460_800
    prompts, gates = 31 * 10 * 4096, 31 * 32
    assert round((count(condition) + prompts + gates) / 1e6, 2) == 61.73  # what the authors train first


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"visual_proj.weight": None}, "incomplete: 'visual_proj.weight' is not there"),
        ({"visual_blocks.1.norm1.bias": None}, "visual_blocks.1.norm1.bias is missing, not (48,)"),
        ({"visual_blocks.0.norm1.bias": (47,)}, "visual_blocks.0.norm1.bias is (47,), not (48,)"),
        ({"visual_blocks.0.ls1.gamma": (48,)}, "visual_blocks.0.ls1.gamma is (48,), not part of it"),
    ],
)
def test_a_damaged_projector_of_the_authors_is_refused(change, sentence):
    condition, _ = official()
    shapes = {key: tuple(tensor.shape) for key, tensor in condition.state_dict().items()}
    shapes = {key: shape for key, shape in {**shapes, **change}.items() if shape}
    with pytest.raises(AdapterError, match=re.escape(sentence)):
        official_condition(shapes, block_heads=4)
    assert official_condition({"adapter_query.weight": (15, 64)}) is None


# ImageBind's bridge


@pytest.mark.parametrize("legacy", [False, True])
def test_the_bridge_is_the_formula(legacy):
    torch.manual_seed(0)
    config = ConditionConfig("image_bind", "imagebind_huge", tower_width=6, legacy_bridge=legacy)
    condition = config.build(hidden_size=8, adapter_len=1)
    with torch.no_grad():
        for parameter in condition.parameters():
            parameter.normal_()
    p = {key.removeprefix("image_bind_"): value.double() for key, value in condition.state_dict().items()}
    features = torch.randn(3, 6)
    x = features.double() @ p["proj.weight"].T + p["proj.bias"]
    for i in "123":
        if legacy:
            normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            normed = normed * p[f"norm_{i}.weight"] + p[f"norm_{i}.bias"]
        else:
            normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"norm_{i}.weight"]
        f1, f3 = (normed @ p[f"{f}_{i}.weight"].T + p.get(f"{f}_{i}.bias", 0) for f in ("f1", "f3"))
        x = x + (f1 * torch.sigmoid(f1) * f3) @ p[f"f2_{i}.weight"].T + p.get(f"f2_{i}.bias", 0)
    torch.testing.assert_close(condition(features).double(), x, atol=1e-3, rtol=1e-5)
    shapes = {key: tuple(tensor.shape) for key, tensor in condition.state_dict().items()}
    assert official_condition(shapes) == config
    assert shapes == config.shapes(8, 1)


def test_parameters_of_the_official_bridge():
    with torch.device("meta"):
        assert count(ImageBindCondition(4096)) == 4096 * 1024 + 4096 + 3 * (4096 + 3 * 4096 * 16384) == 608_190_464


def test_no_tower_gives_imagebind_s_embeddings():
    config = ConditionConfig("image_bind", "bundled", tower_width=64)
    with pytest.raises(AdapterError, match="No tower gives ImageBind's embeddings"):
        check_tower(config, None, "bundled")
    with pytest.raises(AdapterError, match="No tower gives ImageBind's embeddings"):
        condition_config("image_bind", "bundled", (-1,))


@pytest.mark.parametrize("in_front", [0, 1, 5])
def test_patches_are_parts_of_the_picture_through_one_bottleneck(in_front):
    condition = ConditionConfig(**PATCHES, width=4).build(16, 2)  # left and right
    tokens = torch.randn(3, in_front + 16, 6)
    picture = tokens[:, in_front:].unflatten(1, (4, 4))
    halves = torch.stack([picture[:, :, :2].mean((1, 2)), picture[:, :, 2:].mean((1, 2))], 1)
    expected = condition.up(torch.nn.functional.gelu(condition.down(halves)))
    torch.testing.assert_close(condition(tokens), expected)
    assert count(condition) == count(ImageCondition(16, 1, 6, 4))  # no more numbers than for one vector


@pytest.mark.parametrize(("parts", "shape"), [(1, (1, 1)), (2, (1, 2)), (7, (1, 7)), (10, (2, 5)), (49, (7, 7))])
def test_parts_are_as_square_as_can_be(parts, shape):
    assert grid(parts) == shape


def test_tokens_that_are_no_square_are_refused():
    condition = ConditionConfig(**PATCHES).build(16, 3)
    with pytest.raises(AdapterError, match="45 tokens are no square of patches"):
        condition(torch.randn(1, 45, 6))


# what all share


def every(absent="zero"):
    torch.manual_seed(0)
    yield ConditionConfig(**IMAGE, depths=(0, 1), absent=absent).build(16, 3), torch.randn(3, 2, 6)
    yield ConditionConfig(**{**VISUAL, "absent": absent}).build(16, 3), torch.randn(3, 9, 6)
    yield ConditionConfig(**{**PATCHES, "absent": absent}).build(16, 3), torch.randn(3, 10, 6)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("absent", ["zero", "learnt"])
def test_rows_with_none_one_and_several_pictures(which, absent):
    condition, features = list(every(absent))[which]
    if absent == "learnt":
        torch.nn.init.normal_(condition.absent)
    single = condition(features)
    found = condition(features, torch.tensor([2, 0, 2]), 3)
    torch.testing.assert_close(found[0], single[1])
    torch.testing.assert_close(found[2], (single[0] + single[2]) / 2)
    expected = condition.absent if absent == "learnt" else torch.zeros_like(found[1])
    torch.testing.assert_close(found[1], expected)
    found.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in condition.parameters())
    if absent == "learnt":
        torch.testing.assert_close(condition.absent.grad, torch.ones_like(condition.absent))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_batch_without_any_picture(which):
    condition, features = list(every())[which]
    found = condition(features[:0], torch.empty(0, dtype=torch.int64), 2)
    assert torch.equal(found, torch.zeros(((2, 16), (2, 3, 16), (2, 3, 16))[which]))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_shapes_and_rows_of_their_own(which):
    condition, features = list(every())[which]
    found = condition(features)
    assert found.shape == ((3, 16), (3, 3, 16), (3, 3, 16))[which]
    for row in range(3):
        torch.testing.assert_close(condition(features[row : row + 1])[0], found[row], atol=1e-6, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3
    torch.testing.assert_close(condition(features, torch.arange(3), 3), found)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_parameters_stay_fp32_on_a_half_precision_model(which):
    condition, features = list(every("learnt"))[which]
    expected = condition(features)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), condition)
    model.to(torch.float16).to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in condition.parameters()} == {torch.float32}
    assert torch.equal(condition(features), expected)
    assert condition(features.bfloat16()).dtype == torch.float32


def test_every_parameter_of_a_visual_prompt_learns():
    condition, features = list(every())[1]
    (condition(features) * torch.randn(3, 3, 16)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in condition.parameters())


# the cache


class Counting:
    """Stands for a tower: says what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, inputs):
        self.asked.append(list(inputs))
        return torch.stack([torch.full((2, 3), float(len(given))) for given in inputs])


@pytest.fixture
def compute():
    return Counting()


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_hit_computes_nothing(tmp_path, compute, on_disk):
    cache = FeatureCache(tmp_path if on_disk else None, "tower", batch_size=2)
    first = cache.get_many([b"a", b"bb", b"a", b"ccc"], compute)
    assert compute.asked == [[b"a", b"bb"], [b"ccc"]]
    assert [float(features[0, 0]) for features in first] == [1, 2, 1, 3]
    again = cache.get_many([b"ccc", b"dddd", b"bb"], compute)
    assert compute.asked[2:] == [[b"dddd"]]
    assert [float(features[0, 0]) for features in again] == [3, 4, 2]


def test_files_outlive_the_process_and_serve_one_tower(tmp_path, compute):
    FeatureCache(tmp_path, "tower").get_many([b"a"], compute)
    FeatureCache(tmp_path, "tower").get_many([b"a"], compute)
    assert len(compute.asked) == 1
    FeatureCache(tmp_path, "another tower").get_many([b"a"], compute)
    assert len(compute.asked) == 2


def test_a_file_is_known_by_its_content(tmp_path, compute):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    one.write_bytes(b"same")
    two.write_bytes(b"same")
    cache = FeatureCache(tmp_path / "cache", "tower")
    cache.get_many([str(one), two], lambda paths: compute([path.read_bytes() for path in map(Path, paths)]))
    assert compute.asked == [[b"same"]]
    two.write_bytes(b"changed")
    cache.get_many([one, two], lambda paths: compute([path.read_bytes() for path in paths]))
    assert compute.asked[1:] == [[b"changed"]]


@pytest.mark.parametrize("damage", ["empty", "half", "garbage", "other"])
def test_a_damaged_entry_is_computed_again(tmp_path, compute, damage):
    cache = FeatureCache(tmp_path, "tower")
    expected = cache.get_many([b"abc"], compute)[0]
    (path,) = tmp_path.rglob("*.safetensors")
    content = path.read_bytes()
    if damage == "other":
        save_file({"something": torch.ones(1)}, path)
    else:
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "garbage": b"\xff" * 100}[damage])
    assert torch.equal(cache.get_many([b"abc"], compute)[0], expected)
    assert len(compute.asked) == 2
    assert path.read_bytes() == content
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_what_was_computed_before_a_failure_is_kept(tmp_path, compute):
    def failing(inputs):
        if b"x" in inputs:
            raise RuntimeError("out of memory")
        return compute(inputs)

    cache = FeatureCache(tmp_path, "tower", batch_size=1)
    with pytest.raises(RuntimeError):
        cache.get_many([b"a", b"x", b"c"], failing)
    cache.get_many([b"a", b"x", b"c"], compute)
    assert compute.asked == [[b"a"], [b"x"], [b"c"]]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, compute):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written \(Not a directory\)"):
        FeatureCache(tmp_path / "file", "tower").get_many([b"a"], compute)


def test_a_missing_file_is_one_sentence(tmp_path, compute):
    with pytest.raises(DataError, match=r"nowhere.png cannot be read \(No such file or directory\)"):
        FeatureCache(tmp_path, "tower").get_many([tmp_path / "nowhere.png"], compute)


def test_long_work_shows_its_progress(tmp_path, compute, capsys):
    cache = FeatureCache(None, "tower")
    cache.get_many([bytes([i]) for i in range(LONG_WORK - 1)], compute)
    assert capsys.readouterr().err == ""
    cache.get_many([bytes([i, i]) for i in range(LONG_WORK)], compute)
    captured = capsys.readouterr()
    assert f"{LONG_WORK}/{LONG_WORK}" in captured.err
    assert captured.out == ""


def test_digests_tell_inputs_apart(tmp_path):
    picture, samples = Image.new("RGB", (2, 3), "red"), np.arange(4.0)
    for name, content in (("a/1.png", b"x"), ("b/1.png", b"y"), ("c/2.png", b"x")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    different = [
        b"",
        b"a",
        picture,
        Image.new("RGB", (3, 2), "red"),
        Image.new("RGB", (2, 3), "blue"),
        Image.new("L", (2, 3)),
        [picture],
        [picture, picture],
        samples,
        samples.astype(np.float32),
        samples.reshape(2, 2),
        [b"ab", b"c"],
        [b"a", b"bc"],
        tmp_path / "a",
        tmp_path / "b",
        tmp_path / "c",
    ]
    assert len({content_digest(given) for given in different}) == len(different)
    assert content_digest(picture.copy()) == content_digest(picture)
    with pytest.raises(DataError, match="A dict is no input of a tower"):
        content_digest({})
