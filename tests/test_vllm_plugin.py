"""What of the vLLM plugin runs without vLLM: the operator, folders, salts, the command line. The rest: vllm_plugin/."""

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from jinja2.exceptions import TemplateError
from tiny import adapted, tiny_llama

from llama_adapter import AdapterConfig, add_adapter, save_adapter
from llama_adapter.base import load_tokenizer
from llama_adapter.data.formats import Message
from llama_adapter.data.templates import render_prompt
from llama_adapter.errors import AdapterError, ConfigError, MissingExtraError, ModelError, UnsupportedModelError
from llama_adapter.serving.vllm_plugin import gated, launch, register
from llama_adapter.serving.vllm_plugin.chat import as_jinja
from llama_adapter.serving.vllm_plugin.folders import folder_digest, is_ours, rank_of
from llama_adapter.serving.vllm_plugin.salts import Salts

CASES = [(37, 5, 4, 2, 16, 64, 0.0), (37, 5, 4, 4, 10, 96, 0.0), (20, 3, 8, 2, 7, 32, 30.0)]


def exact(query, key, value, lengths, slots, scale, softcap):
    """The operator in plain loops, in float64."""
    heads, size = value.shape[1], value.shape[3]
    rows = query.double().view(len(query), heads, size)
    out = torch.zeros_like(rows)
    for token, slot in enumerate(slots[: len(query)].tolist()):
        if slot < 0 or not lengths[slot]:
            continue
        for head in range(heads):
            count = int(lengths[slot])
            scores = key[slot, head // (heads // key.shape[1]), :count].double() @ rows[token, head] * scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            out[token, head] = scores.softmax(0) @ value[slot, head, :count].double()
    return out.view_as(query)


@pytest.mark.parametrize("gathered", [gated.GATHERED, 0], ids=["token by token", "slot by slot"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_operator_is_the_formula_and_exactly_zero_for_the_base(case, gathered, monkeypatch):
    monkeypatch.setattr(gated, "GATHERED", gathered)
    tokens, count, heads, key_heads, prompts, size, softcap = case
    torch.manual_seed(0)
    query = torch.randn(tokens, heads * size)
    key, value = torch.randn(count, key_heads, prompts, size), torch.randn(count, heads, prompts, size)
    lengths = torch.tensor([prompts, 3, 0, prompts - 1, 1][:count], dtype=torch.int32)
    for slots in (torch.randint(-1, count, (tokens + 5,)), torch.arange(tokens + 5) // 8 % (count + 1) - 1):
        out = torch.ops.llama_adapter.gated_prompts(query, key, value, lengths, slots, size**-0.5, softcap)
        expected = exact(query, key, value, lengths, slots, size**-0.5, softcap)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
        assert torch.count_nonzero(out[slots[:tokens] < 0]) == 0
        assert torch.count_nonzero(out) > 0


def test_the_operator_takes_no_tokens_and_has_a_shape_for_compilers():
    arguments = (torch.zeros(2, 2, 3, 4), torch.zeros(2, 4, 3, 4), torch.ones(2, dtype=torch.int32))
    slots = torch.zeros(5, dtype=torch.long)
    assert torch.ops.llama_adapter.gated_prompts(torch.zeros(0, 16), *arguments, slots, 1.0, 0.0).shape == (0, 16)
    torch.library.opcheck(
        torch.ops.llama_adapter.gated_prompts, (torch.randn(4, 16), *arguments, slots, 1.0, 0.0),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_llama()
    adapted(model)
    return save_adapter(model, tmp_path_factory.mktemp("adapter") / "poet")


def test_a_folder_is_ours_by_its_format_version(folder, tmp_path):
    assert is_ours(folder)
    assert not is_ours(tmp_path)
    assert not is_ours(tmp_path / "gone")
    for content in (b'{"peft_type": "LORA"}', b"[", b"[1]", b"7", b"\xff", b"[" * 90000):
        (tmp_path / "adapter_config.json").write_bytes(content)
        assert not is_ours(tmp_path)


def test_a_digest_is_of_both_files(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert folder_digest(copy) == folder_digest(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        changed = shutil.copytree(folder, tmp_path / name)
        content = bytearray((changed / name).read_bytes())
        content[-2] ^= 1
        (changed / name).write_bytes(content)
        assert folder_digest(changed) != folder_digest(folder)
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        folder_digest(copy)


def test_a_rank_is_the_prompts_or_loras(folder):
    assert rank_of(AdapterConfig(adapter_len=10, adapter_layers=1)) == 10
    assert rank_of(AdapterConfig(adapter_len=10, adapter_layers=0, lora_rank=4, lora_targets=("q_proj",))) == 4
    assert rank_of(AdapterConfig(adapter_len=10, adapter_layers=1, lora_rank=32, lora_targets=("q_proj",))) == 32


def request(path, number=1, inplace=False):
    return SimpleNamespace(lora_int_id=number, lora_path=str(path), load_inplace=inplace)


class TestSalts:
    @pytest.fixture
    def poet(self, folder, tmp_path):
        return shutil.copytree(folder, tmp_path / "poet")

    def write(self, poet, number):
        path = poet / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": f"base {number}"}))

    def test_the_salt_is_of_what_was_loaded_until_it_is_loaded_again(self, poet):
        salts, seen = Salts(lambda path: path), []
        assert salts.loading(request(poet), lambda: "done", list) == "done"
        seen.append(salts.of(request(poet)))
        self.write(poet, 1)
        assert salts.of(request(poet)) == seen[0]
        salts.loading(request(poet), lambda: None, list)  # the workers have it already
        assert salts.of(request(poet)) == seen[0]
        salts.loading(request(poet, inplace=True), lambda: None, list)
        seen.append(salts.of(request(poet, inplace=True)))
        self.write(poet, 2)
        salts.loading(request(poet, number=2), lambda: None, list)
        seen.append(salts.of(request(poet, number=2)))
        salts.forget(2)
        seen.append(salts.of(request(poet, number=2)))
        assert len(set(seen)) == 4

    def test_a_content_that_comes_back_under_a_name_has_a_new_salt(self, poet):
        salts, seen = Salts(lambda path: path), []
        for number in (1, 2, 1):
            self.write(poet, number)
            salts.loading(request(poet, inplace=True), lambda: None, list)
            seen.append(salts.of(request(poet)))
        assert len(set(seen)) == 3

    def test_two_engines_agree_on_the_salt_of_a_first_load(self, poet):
        found = {Salts(lambda path: path).of(request(poet, number)) for number in (1, 2)}
        assert found == {folder_digest(poet)}

    def test_what_is_not_ours_has_none(self, tmp_path):
        salts = Salts(lambda path: path)
        assert salts.loading(request(tmp_path), lambda: 3, list) == 3
        assert salts.of(request(tmp_path)) is None

    def test_files_that_change_while_they_are_loaded_are_refused(self, poet):
        dropped = []
        with pytest.raises(AdapterError, match="changed while it was loaded"):
            Salts(lambda path: path).loading(request(poet), lambda: self.write(poet, 1), lambda: dropped.append(1))
        assert dropped == [1]

    def test_files_that_change_while_a_load_fails_leave_no_worker_with_them(self, poet):
        dropped = []

        def load():
            self.write(poet, 1)
            raise ValueError("changed while it was read")

        with pytest.raises(ValueError, match="while it was read"):
            Salts(lambda path: path).loading(request(poet), load, lambda: dropped.append(1))
        assert dropped == [1]

    def test_a_load_that_fails_leaves_the_salt(self, poet):
        salts = Salts(lambda path: path)
        before = salts.of(request(poet))
        self.write(poet, 1)
        with pytest.raises(ZeroDivisionError):
            salts.loading(request(poet, inplace=True), lambda: 1 // 0, list)
        assert salts.of(request(poet)) == before


class TestCommand:
    @pytest.fixture(autouse=True)
    def installed(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    @pytest.fixture
    def experts(self, base, tmp_path):
        """Adapters of the tiny base: a plain one, a long one, one with LoRA, one with norms, one that is none."""
        from llama_adapter.base import load_base

        model = load_base(str(base), torch.device("cpu"))
        kinds = {
            "plain": {}, "long": {"adapter_len": 20}, "lora": {"lora_rank": 2, "lora_targets": ("q_proj",)},
            "norms": {"norms": True},
        }  # fmt: skip
        for name, kind in kinds.items():
            add_adapter(model, AdapterConfig(**{"adapter_len": 4, "adapter_layers": 2, **kind}), name)
            save_adapter(model, tmp_path / name, name)
        (tmp_path / "none").mkdir()
        return tmp_path

    def value(self, line, flag):
        return line[line.index(flag) + 1]

    def test_what_is_typed_for_one_adapter(self, base, experts):
        line = launch.command(str(base), {"poet": str(experts / "plain")}, port=1234, options=["--dtype", "float32"])
        assert line[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        assert self.value(line, "--model") == str(base)
        assert self.value(line, "--lora-modules") == f"poet={experts / 'plain'}"
        assert self.value(line, "--lora-target-modules") == "attn"
        assert [self.value(line, flag) for flag in ("--host", "--port")] == ["127.0.0.1", "1234"]
        assert [self.value(line, f"--max-{name}") for name in ("lora-rank", "loras", "cpu-loras")] == ["8", "1", "1"]
        assert line[-2:] == ["--dtype", "float32"]
        assert list(launch.environment(None)) == ["VLLM_PLUGINS"]

    def test_a_directory_is_looked_through(self, base, experts):
        line = launch.command(str(base), {}, adapter_dir=str(experts))
        assert [self.value(line, f"--max-{name}") for name in ("lora-rank", "loras", "cpu-loras")] == ["32", "3", "3"]
        assert not {"--lora-target-modules", "--lora-modules"} & set(line)  # there is LoRA among them
        assert launch.environment(str(experts))["LLAMA_ADAPTER_DIR"] == str(experts)

    def test_the_page_is_switched_on_and_no_plugin_off(self, monkeypatch):
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        monkeypatch.setattr(launch, "entry_points", lambda group: [SimpleNamespace(name=group.partition(".")[2])])
        named = launch.environment(None)["VLLM_PLUGINS"].split(",")
        assert {"llama_adapter", "general_plugins", "platform_plugins"} <= set(named)
        monkeypatch.setenv("VLLM_PLUGINS", "other")
        assert launch.environment(None)["VLLM_PLUGINS"] == "llama_adapter,other"

    def test_what_cannot_be_served_is_said_before_anything_starts(self, base, experts, monkeypatch):
        wider = tiny_llama(hidden_size=64)
        adapted(wider)
        save_adapter(wider, experts / "wider")
        for name, path, says in (
            ("poet", experts / "norms", "has norms"),
            ("poet", experts / "wider", "was made for"),
            ("poet", experts / "gone", "there is nothing of that name"),
            ("a b", experts / "plain", "malformed"),
            (str(base), experts / "plain", "malformed"),
        ):
            with pytest.raises(AdapterError, match=says):
                launch.command(str(base), {name: str(path)})
        with pytest.raises(AdapterError, match="what the bare base is called"):
            launch.command(str(base), {"poet": str(experts / "plain")}, served_model_name="poet")
        with pytest.raises(ConfigError, match="is no folder"):
            launch.command(str(base), {}, adapter_dir=str(experts / "gone"))
        with pytest.raises(ModelError):
            launch.command(str(experts / "gone"), {})
        (experts / "mamba").mkdir()
        (experts / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
        with pytest.raises(UnsupportedModelError, match="mamba"):
            launch.command(str(experts / "mamba"), {})
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingExtraError, match=r"llama-adapter\[vllm\]"):
            launch.command(str(base), {})

    def test_chats_are_written_as_in_training_or_refused(self, base, experts):
        for name, template in (("plain", "alpaca"), ("long", "chat"), ("lora", "raw")):
            path = experts / name / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "template": template}))
        line = launch.command(str(base), {"a": str(experts / "plain")})
        assert "### Response:" in self.value(line, "--chat-template")
        line = launch.command(str(base), {"a": str(experts / "lora")})
        assert "as it is: one message" in self.value(line, "--chat-template")
        assert "--chat-template" not in launch.command(str(base), {"a": str(experts / "long")})
        for one, two in itertools.combinations(("plain", "long", "lora"), 2):
            with pytest.raises(ConfigError, match="vLLM has one for a whole server"):
                launch.command(str(base), {"a": str(experts / one), "b": str(experts / two)})

    def test_more_prompts_than_vllm_has_room_for(self, tmp_path):
        model = tiny_llama()
        adapted(model, adapter_len=513)
        folder = save_adapter(model, tmp_path / "long")
        with pytest.raises(ConfigError, match="513 prompts"):
            launch.slots_for([str(folder)])
        assert launch.slots_for([str(tmp_path)]) == {}


@pytest.mark.parametrize(
    "chat",
    [
        "u:Hi",
        "s:Be brief.\n u:Hi a:Hello. u:Bye",
        "u:One u:two a:three</s> u:'four' {{ 5 }}",
    ],
)
def test_our_templates_are_those_of_training(base, chat):
    tokenizer = load_tokenizer(str(base))
    for kind in ("alpaca", "raw")[: 1 + (chat == "u:Hi")]:
        text = in_jinja(kind, tokenizer, chat)
        messages = [Message(message["role"], message["content"]) for message in read_chat(chat)]
        wanted = render_prompt(messages, "alpaca", tokenizer, raw=kind == "raw").text
        assert text == "<s>" + wanted
        assert tokenizer(text, add_special_tokens=False).input_ids == tokenizer(wanted).input_ids
    if chat.startswith("s:"):
        assert text == in_jinja("alpaca", tokenizer, f"d{chat[1:]}")


@pytest.mark.parametrize(
    ("kind", "chat", "says"),
    [
        ("alpaca", "s:Be brief.", "must end with a user message"),
        ("alpaca", "u:Hi a:Hello.", "must end with a user message"),
        ("alpaca", "u:Hi a:Hello. a:Bye. u:Bye", "by turns"),
        ("alpaca", "a:Hello. u:Hi", "by turns"),
        ("alpaca", "u:Hi s:Be brief. u:Bye", "by turns"),
        ("raw", "s:Be brief. u:Hi", "one message"),
    ],
)
def test_chats_that_training_could_not_write_are_refused(base, kind, chat, says):
    with pytest.raises(TemplateError, match=says):
        in_jinja(kind, load_tokenizer(str(base)), chat)


@pytest.mark.parametrize("kind", ["alpaca", "raw"])
@pytest.mark.parametrize("nothing", ["", " \n", [{"type": "text", "text": ""}]], ids=str)
def test_a_system_message_of_nothing_is_none_and_parts_are_joined_as_they_are(base, kind, nothing):
    template, tokenizer = as_jinja(kind, load_tokenizer(str(base))), load_tokenizer(str(base))
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "the sun"}]
    for chat in (
        [{"role": "user", "content": parts}],
        [{"role": "system", "content": nothing}, {"role": "user", "content": "Name the sun"}],
        [{"role": "developer", "content": nothing}, {"role": "user", "content": parts}],
    ):
        text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
        assert text == in_jinja(kind, tokenizer, "u:Name the sun")


def read_chat(chat):
    roles = {"u": "user", "a": "assistant", "s": "system", "d": "developer"}
    return [{"role": roles[part[0]], "content": part[2:]} for part in re.split(" (?=[uasd]:)", chat)]


def in_jinja(kind, tokenizer, chat):
    template = as_jinja(kind, tokenizer)
    return tokenizer.apply_chat_template(
        read_chat(chat), chat_template=template, tokenize=False, add_generation_prompt=True
    )


def test_the_package_needs_no_vllm_until_it_registers():
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from llama_adapter.serving.vllm_plugin import register, launch, folders, salts, gated\n"
        "try: register()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip().startswith(
        "MissingExtraError The vLLM plugin needs 'vllm', which is not installed: pip "
    )


def test_the_entry_point_is_register():
    from importlib.metadata import entry_points

    found = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "llama_adapter"]
    if not found:
        pytest.skip("installed before the plugin was there")
    assert found[0].load() is register
