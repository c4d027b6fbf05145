"""Adapter folders that somebody made to hurt: each is one sentence, and nothing large is allocated for it."""

import json
import os
import struct
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import HIDDEN, adapted, tiny_llama

from llama_adapter import AdapterConfig, list_adapters, load_adapter, save_adapter
from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.errors import AdapterError
from llama_adapter.formats.inspect import describe_adapter
from llama_adapter.formats.native import (
    BLOCK_TENSORS,
    CONFIG_FILE,
    LARGEST_CONFIG,
    LARGEST_HEADER,
    WEIGHTS_FILE,
    tensor_shapes,
)

MEGABYTE = 2**20
SEES = "visual_prompt"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sound adapters by kind of condition (None for text alone), as the bytes of their two files."""
    found = {}
    for kind in (None, "image", SEES):
        sizes = {"blocks": 2, "block_width": 8, "block_heads": 2} if kind == SEES else {"width": 4}
        condition = kind and ConditionConfig(kind, "nowhere", tower_width=6, **sizes)
        model = tiny_llama()
        adapted(model, condition=condition)
        folder = save_adapter(model, tmp_path_factory.mktemp("sound"))
        found[kind] = [(folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return found


@pytest.fixture
def make(folders, tmp_path):
    """Writes a sound folder of a kind."""

    def write(kind=None):
        for name, content in zip((CONFIG_FILE, WEIGHTS_FILE), folders[kind], strict=True):
            (tmp_path / name).write_bytes(content)
        return tmp_path

    return write


@pytest.fixture
def check_refused(monkeypatch):
    """Checks that a folder is refused with a message, by `load_adapter` and `inspect`, without any large allocation."""
    model = tiny_llama()
    empty = torch.empty

    def small(*size, **options):
        made = empty(*size, **options)
        assert made.device.type == "meta" or made.nbytes < MEGABYTE, "a tensor was made for a refused adapter"
        return made

    def check(folder, message, *, without_base=True):
        monkeypatch.setattr(torch, "empty", small)
        for read in (lambda: load_adapter(model, folder), lambda: describe_adapter(folder))[: 1 + without_base]:
            tracemalloc.start()
            try:
                with pytest.raises(AdapterError, match=message) as error:
                    read()
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert peak < 24 * MEGABYTE
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 1500 + len(str(folder))
        assert list_adapters(model) == []

    return check


def change(folder, *path, value):
    """Put `value` at a path into the configuration."""
    file = folder / CONFIG_FILE
    values = json.loads(file.read_text())
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(values))


def header(folder, content, data=0):
    """A weights file with this header and as many bytes of data."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(content)) + content + bytes(data))


@pytest.mark.parametrize("kind", [None, "image", SEES])
def test_the_sound_folders_load(make, kind):
    model = tiny_llama()
    assert load_adapter(model, make(kind)).num_parameters == describe_adapter(make(kind))["parameters"]


# numbers in the configuration

LARGE = [10**6, 10**9, 2**63 - 1, 2**63, 10**30]


@pytest.mark.parametrize("value", LARGE)
@pytest.mark.parametrize("key", ["adapter_len", "adapter_layers"])
def test_a_huge_adapter_is_refused(make, check_refused, key, value):
    folder = make()
    change(folder, key, value=value)
    rule = "more than the base's 3 layers" if key == "adapter_layers" else r"not float \["
    check_refused(folder, rule if value < 2**31 else f"{key} is .*; it must be below 2147483648")


@pytest.mark.parametrize("value", LARGE)
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads"])
def test_a_huge_base_is_refused(make, check_refused, key, value):
    folder = make()
    change(folder, "base_shape", key, value=value)
    check_refused(folder, f"{key}|missing|not float")


@pytest.mark.parametrize("value", LARGE)
def test_as_many_layers_as_a_huge_base_has_are_not_counted_out(make, check_refused, value):
    folder = make()
    change(folder, "base_shape", "num_hidden_layers", value=value)
    change(folder, "adapter_layers", value=value)
    check_refused(
        folder, "num_hidden_layers|asks for more than its 4 tensors" if value < 2**31 else "adapter_layers is .* below"
    )


@pytest.mark.parametrize("value", LARGE)
@pytest.mark.parametrize(
    ("kind", "key"),
    [("image", "tower_width"), ("image", "width"), (SEES, "tower_width"), (SEES, "blocks"), (SEES, "block_width")],
)
def test_a_huge_condition_is_refused(make, check_refused, kind, key, value):
    folder = make(kind)
    change(folder, "condition", key, value=value)
    rule = "not float|asks for more|no weights fit|block_heads"
    check_refused(folder, rule if value < 2**31 else f"{key} is .*; it must be below 2147483648")


def test_blocks_are_built_only_for_as_many_tensors_as_there_are(make, check_refused, monkeypatch):
    folder = make(SEES)
    monkeypatch.setattr(ConditionConfig, "build", lambda *_: pytest.fail("built the condition"))
    change(folder, "condition", "blocks", value=2000 // BLOCK_TENSORS)
    check_refused(folder, "asks for more than its")


def test_the_shapes_of_many_blocks_are_those_of_the_module():
    condition = ConditionConfig(
        SEES, "nowhere", tower_width=6, blocks=12, block_width=8, block_heads=2, absent="learnt"
    )
    shape = {"num_hidden_layers": 3, "hidden_size": HIDDEN, "num_attention_heads": 4}
    config = AdapterConfig(4, 2, base_shape=shape, condition=condition)
    built = {f"condition.{key}": tuple(p.shape) for key, p in condition.build(HIDDEN, 4).named_parameters()}
    assert {key: size for key, size in tensor_shapes(config).items() if key.startswith("condition.")} == built


def test_thousands_of_blocks_that_the_file_has_are_not_built(make, check_refused, monkeypatch):
    folder, build = make(SEES), ConditionConfig.build
    header(folder, {f"layers.{i}.x": entry([0], end=0) for i in range(12_000)})
    change(folder, "condition", "blocks", value=1000)

    def one(config, *sizes):
        assert config.blocks == 1
        return build(config, *sizes)

    monkeypatch.setattr(ConditionConfig, "build", one)
    check_refused(folder, "missing.*unexpected")


def test_many_depths_are_refused(make, check_refused):
    folder = make("image")
    change(folder, "condition", "depths", value=list(range(10_000)))
    check_refused(folder, "not float")


def test_thousands_of_broken_rules_are_named_in_part(make, check_refused):
    folder = make("image")
    change(folder, "condition", "depths", value=["a"] * 10_000)
    check_refused(folder, "depths.0 is 'a'; .*depths.19 is 'a'; it must be a valid integer$")


@pytest.mark.parametrize("value", [0, -1, -(10**30)])
@pytest.mark.parametrize(
    "path", [("adapter_len",), ("adapter_layers",), ("base_shape", "hidden_size"), ("condition", "width")]
)
def test_numbers_below_one_are_refused(make, check_refused, path, value):
    folder = make("image")
    change(folder, *path, value=value)
    check_refused(folder, f"{path[-1]}")


NUMBERS = [
    ("adapter_len",),
    ("adapter_layers",),
    ("format_version",),
    ("base_shape", "num_hidden_layers"),
    ("condition", "width"),
    ("condition", "depths"),
]


@pytest.mark.parametrize("value", [True, False, "4", "", [4.5], {}, {"a": 1}, 4.0, 4.5, [[[]]], [True], ["1"]])
@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_what_is_no_whole_number_is_refused(make, check_refused, path, value):
    folder = make("image")
    change(folder, *path, value=value)
    check_refused(folder, path[-1])


@pytest.mark.parametrize("value", [[], [1], "llama", 3, True, {}, {"hidden_size": {"a": [1]}}, {"hidden_size": None}])
@pytest.mark.parametrize("key", ["base_shape", "condition"])
def test_wrong_nesting_is_refused(make, check_refused, key, value):
    folder = make()
    change(folder, key, value=value)
    check_refused(folder, f"{key}|base's shape")


@pytest.mark.parametrize("key", ["bias", "kind", "activation", "absent"])
@pytest.mark.parametrize("value", [None, 1, "", "x" * 50_000, ["gelu"], {}])
def test_wrong_words_are_refused(make, check_refused, key, value):
    folder = make("image")
    change(folder, "condition", key, value=value)
    check_refused(folder, f"{key} is ")


@pytest.mark.parametrize("value", [None, 1, "", ["bundled"], {}])
def test_a_tower_without_a_name_is_refused(make, check_refused, value):
    folder = make("image")
    change(folder, "condition", "tower", value=value)
    check_refused(folder, "tower is ")


# the text of the configuration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 1, "adapter_len": NaN}', "NaN is no JSON number"),
        ('{"format_version": 1, "adapter_len": -Infinity}', "-Infinity is no JSON number"),
        ('{"format_version": 1, "adapter_len": 1e400}', "adapter_len is inf; it must be a valid integer"),
        ('{"format_version": 1, "adapter_len": 1' + "0" * 5000 + "}", "cannot be read as JSON"),
        ('{"format_version": 1, "adapter_len": 1' + "0" * 4000 + "}", "it must be below 2147483648"),
        ('{"format_version": 1, "adapter_len": 4, "adapter_len": 4}', "a key stands there twice"),
        ('{"format_version": 1, "base_shape": {"a": 1, "a": 2}}', "a key stands there twice"),
        ('{"format_version": 1, "x\\ny": 1}', r"unknown key 'x\\ny'"),
        ('{"format_version": 1, "' + "x" * 60_000 + '": 1}', "unknown key 'xxx"),
        (json.dumps({"format_version": 1, **dict.fromkeys(map(str, range(4000)))}), "unknown key '0'"),
        ('{"peft_type": ' + "[" * 900 + "]" * 900 + "}", "PEFT"),
        ("[" * 60_000, "nested too deep"),
        ('{"a":' * 13_000, "nested too deep"),
        ("\0" * 100, "cannot be read as JSON"),
        ("\ufeff{}", "cannot be read as JSON"),
        ("1", "not llama-adapter's"),
        ("null", "not llama-adapter's"),
    ],
    ids=lambda value: value[:30],
)
def test_hostile_json_is_refused(make, check_refused, text, message):
    folder = make()
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    check_refused(folder, message)


def test_a_huge_configuration_is_not_read(make, check_refused):
    folder = make()
    with (folder / CONFIG_FILE).open("r+b") as file:
        file.truncate(2**40)  # sparse: it takes no room on the disk
    check_refused(folder, "has 1,099,511,627,776 bytes")
    with (folder / CONFIG_FILE).open("r+b") as file:
        file.truncate(LARGEST_CONFIG + 1)
    check_refused(folder, "bytes and no adapter's configuration has")


# the weights file


def entry(shape, begin=0, end=None, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, 8 if end is None else end]}


@pytest.mark.parametrize(
    "content",
    [
        {"a": entry([10**12], end=4 * 10**12)},
        {"a": entry([2**63, 2**63])},
        {"a": entry([2**64])},
        {"a": entry([-2])},
        {"a": entry([1.5])},
        {"a": entry([2]), "b": entry([2], 4, 12)},
        {"a": entry([2], 4, 12)},
        {"a": entry([2], 8, 0)},
        {"a": entry([2], dtype="F31")},
        {"a": entry([4])},
        {"a": 1},
        [],
        b'{"a":',
        b"[" * 100_000,
        b"\xff" * 100,
        b"",
    ],
    ids=lambda content: str(content)[:60],
)
def test_a_lying_header_is_refused(make, check_refused, content):
    folder = make()
    header(folder, content, 8)
    check_refused(folder, "is truncated or no safetensors file")


@pytest.mark.parametrize("claimed", [LARGEST_HEADER + 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_any_size_is_not_read(make, check_refused, claimed):
    folder = make()
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        file.write(struct.pack("<Q", claimed))
        file.truncate(2**41)
    check_refused(folder, "a header of .* bytes")


@pytest.mark.parametrize("count", [5000, 10_000])
def test_a_header_with_many_tensors_is_refused(make, check_refused, count):
    folder = make()
    header(folder, {f"layers.{i}.x": entry([0], end=0) for i in range(count)})
    check_refused(folder, r"missing \['layers.1.gate'.*unexpected \['layers.0.x'")


def test_long_names_of_tensors_are_cut_short(make, check_refused):
    folder = make()
    header(folder, {"x\n" * 100_000: entry([0], end=0)})
    check_refused(folder, "unexpected")


def test_a_large_file_of_another_shape_is_not_read(make, check_refused):
    folder = make()
    sizes = {f"layers.{i}.{kind}": [2**36] for i in (1, 2) for kind in ("prompt", "gate")}
    header(folder, {key: entry(size, 2**38 * i, 2**38 * (i + 1)) for i, (key, size) in enumerate(sizes.items())})
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        size = (folder / WEIGHTS_FILE).stat().st_size
        file.truncate(size + 2**40)
    check_refused(folder, r"layers.1.prompt is F32 \[68719476736\], not float \[4, 32\]|unable to mmap")


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_tensors_that_are_no_floats_are_refused(make, check_refused, dtype):
    folder = make()
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({**tensors, "layers.1.prompt": torch.zeros(4, HIDDEN).to(dtype)}, folder / WEIGHTS_FILE)
    check_refused(folder, r"layers.1.prompt is .* \[4, 32\], not float \[4, 32\]")


@pytest.mark.parametrize("value", [1e300, -1e39, float("inf"), float("nan")])
def test_what_fp32_cannot_hold_is_refused(make, check_refused, value):
    folder = make()
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["layers.2.prompt"] = tensors["layers.2.prompt"].double()
    tensors["layers.2.prompt"][3, 1] = value
    save_file(tensors, folder / WEIGHTS_FILE)
    check_refused(folder, "layers.2.prompt holds NaN, infinity or more than fp32 can")


def test_float64_that_fits_is_read_as_fp32(make):
    folder = make()
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({key: tensor.double() for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    loaded = load_adapter(tiny_llama(), folder).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())


def test_loaded_tensors_outlive_the_file(make):
    folder = make()
    wanted = load_file(folder / WEIGHTS_FILE)
    loaded = load_adapter(tiny_llama(), folder).state_dict()
    size = (folder / WEIGHTS_FILE).stat().st_size
    (folder / WEIGHTS_FILE).write_bytes(bytes(size))  # in place: a view of the file would change with it
    assert all(torch.equal(loaded[key], wanted[key].clone()) for key in loaded if wanted[key].any())


# places


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_links_in_a_circle_are_refused(make, check_refused, name):
    folder = make()
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "other")
    (folder / "other").symlink_to(folder / name)
    check_refused(folder, f"{name} cannot be read \\(Too many levels of symbolic links\\)")


def test_a_folder_that_links_to_itself_is_refused(tmp_path, check_refused):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    check_refused(tmp_path / "loop", "cannot be read \\(Too many levels of symbolic links\\)")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_folders_pipes_and_devices_in_place_of_files_are_refused(make, check_refused, name):
    folder = make()
    for place in (lambda p: p.mkdir(), os.mkfifo, lambda p: p.symlink_to("/dev/zero")):
        (folder / name).unlink()
        place(folder / name)
        check_refused(folder, f"{name} is no file")
        if (folder / name).is_dir():
            (folder / name).rmdir()
            (folder / name).touch()


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_without_permission_is_refused(make, check_refused, name, monkeypatch):
    folder, real = make(), type(make()).open

    def forbidden(path, *args, **options):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(type(folder), "open", forbidden)
    check_refused(folder, rf"{name} .*Permission denied")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_folder_without_permission_is_refused(make, check_refused, name, monkeypatch):
    folder, real = make(), type(make()).stat

    def forbidden(path, *args, **options):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(type(folder), "stat", forbidden)
    check_refused(folder, rf"{name} cannot be read \(Permission denied\)")


@pytest.mark.parametrize("source", ["a\0b", "x" * 5000, "a/" * 3000])
def test_impossible_names_are_refused(check_refused, source):
    check_refused(source, r"cannot be read \(.*\): copy")


def test_a_file_in_place_of_the_folder_is_refused(make, check_refused):
    check_refused(make() / CONFIG_FILE, "is not an adapter: it is no folder")


def test_a_config_for_another_base_is_refused_in_few_words(make, check_refused):
    folder = make()
    shape = json.loads((folder / CONFIG_FILE).read_text())["base_shape"]
    change(folder, "base_shape", value={**{f"k{i}" * 40: 10**500 + i for i in range(40)}, **shape})
    check_refused(folder, "was made for", without_base=False)
    change(folder, "base_model_name_or_path", value="x\n" * 10_000)
    check_refused(folder, "was made for", without_base=False)


def test_an_adapter_config_of_python_s_own_huge_number_is_one_sentence():
    with pytest.raises(ValueError, match="adapter_layers is a number of thousands of digits; it must be at least 0"):
        AdapterConfig(adapter_layers=-(10**5000))
