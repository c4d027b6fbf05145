"""The hub's conventions, through its own client against a stand-in: push, revisions, cards, refusals."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from hub_stand_in import Repository, stand_in
from runs import recipe, write_base, write_data
from tiny import adapted, tiny_llama, tokens

from llama_adapter import get_adapter, load_adapter, push_adapter, save_adapter, train
from llama_adapter.cli import main
from llama_adapter.errors import AdapterError, ConfigError
from llama_adapter.formats.card import base_licence, is_unedited, marked, public_name, write_card
from llama_adapter.formats.inspect import describe_adapter
from llama_adapter.formats.native import CONFIG_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own way to upload
FILES = {CONFIG_FILE, WEIGHTS_FILE, "README.md"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that the client takes for the hub, with a cache and a token of its own."""
    from huggingface_hub import constants

    with stand_in() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
        monkeypatch.setenv("HF_TOKEN", "hf_owner")
        monkeypatch.chdir(tmp_path)
        hub.address = address
        yield hub


def make(folder, seed=1, **settings):
    model = tiny_llama()
    adapted(model, seed=seed, **{"base_model_name_or_path": "some/base", "template": "alpaca", **settings})
    return save_adapter(model, folder)


def front(card):
    return yaml.safe_load(card.split("---\n")[1])


def prompt(model):
    return next(iter(get_adapter(model).layers.values())).prompt


# there and back


def test_an_adapter_goes_up_and_comes_down_bit_for_bit(hub, tmp_path):
    folder = make(tmp_path / "adapter")
    (folder / "optimizer.bin").write_bytes(b"big")
    (folder / "last").mkdir()
    address = push_adapter(folder, "owner/first")
    assert hub.repositories["owner/first"].private
    files = hub.files("owner/first")
    assert files.keys() == FILES
    assert address == f"{hub.address}/owner/first/commit/{hub.repositories['owner/first'].branches['main']}"
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert files[name] == (folder / name).read_bytes()
    assert not (folder / "README.md").exists()  # nothing is written to somebody's folder
    card = files["README.md"].decode()
    assert 'load_adapter(model, "owner/first")' in card
    assert front(card)["base_model"] == "some/base"
    model, expected = tiny_llama(), tiny_llama()
    load_adapter(model, "owner/first")
    load_adapter(expected, folder)
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)
    assert describe_adapter("owner/first")["parameters"] == describe_adapter(folder)["parameters"]


def test_a_model_is_pushed_as_it_stands(hub):
    model = tiny_llama()
    adapted(model, "a")
    adapted(model, "b", seed=3)
    push_adapter(model, "owner/b", "b", token="hf_owner")
    other = tiny_llama()
    load_adapter(other, "owner/b")
    assert torch.equal(prompt(other), next(iter(get_adapter(model, "b").layers.values())).prompt)


def test_revisions_are_kept_apart_and_pinned(hub, tmp_path):
    first, second, third = (make(tmp_path / name, seed) for seed, name in enumerate("abc"))
    push_adapter(first, "owner/pinned")
    old = hub.repositories["owner/pinned"].branches["main"]
    push_adapter(second, "owner/pinned")
    push_adapter(third, "owner/pinned", revision="v2/try")
    loads = {"owner/pinned": second, f"owner/pinned@{old}": first, "owner/pinned@v2/try": third}
    for source, folder in loads.items():
        model, expected = tiny_llama(), tiny_llama()
        load_adapter(model, source)
        load_adapter(expected, folder)
        assert torch.equal(prompt(model), prompt(expected)), source
    model = tiny_llama()
    load_adapter(model, "owner/pinned", revision=old)
    load_adapter(expected := tiny_llama(), first)
    assert torch.equal(prompt(model), prompt(expected))
    with pytest.raises(AdapterError, match="names a revision, and revision is 'x': give one"):
        load_adapter(tiny_llama(), "owner/pinned@main", revision="x")
    with pytest.raises(AdapterError, match="it has no revision 'v9': give a branch, a tag or a commit"):
        load_adapter(tiny_llama(), "owner/pinned", revision="v9")


def test_a_pinned_commit_that_was_read_once_needs_no_hub(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    push_adapter(make(tmp_path / "adapter"), "owner/kept")
    commit = hub.repositories["owner/kept"].branches["main"]
    load_adapter(tiny_llama(), f"owner/kept@{commit}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    load_adapter(tiny_llama(), f"owner/kept@{commit}")
    assert len(hub.asked) == asked


def test_a_card_on_the_hub_is_kept(hub, tmp_path):
    folder = make(tmp_path / "adapter")
    push_adapter(folder, "owner/first")
    hub.repositories["owner/first"].commit("main", {"README.md": b"mine", "notes.txt": b"too"})
    push_adapter(make(tmp_path / "other", seed=7), "owner/first")
    files = hub.files("owner/first")
    assert files["README.md"] == b"mine"
    assert files["notes.txt"] == b"too"
    assert files[WEIGHTS_FILE] == (tmp_path / "other" / WEIGHTS_FILE).read_bytes()


def test_an_edited_card_of_the_folder_goes_up_as_it_is(hub, tmp_path):
    folder = make(tmp_path / "adapter")
    (folder / "README.md").write_text("# Mine\n\npath/to/adapter stays\n")
    push_adapter(folder, "owner/first")
    assert hub.files("owner/first")["README.md"] == b"# Mine\n\npath/to/adapter stays\n"


# what is refused, and that nothing went up then


def refused(hub, source, repository, match, **options):
    with pytest.raises(AdapterError, match=match) as error:
        push_adapter(source, repository, **options)
    assert "\n" not in str(error.value)
    assert not any("/commit/" in path for _, path in hub.asked)


def test_without_a_token_or_the_right_to_write(hub, tmp_path, monkeypatch):
    folder = make(tmp_path / "adapter")
    refused(hub, folder, "someone/first", "your token may not do that: make one with write access")
    refused(hub, folder, "owner/first", "your token may not do that", token="hf_reader")
    monkeypatch.delenv("HF_TOKEN")
    refused(hub, folder, "owner/first", r"cannot be pushed to \(the hub wants to know who asks: log in with 'hf auth")
    assert hub.repositories == {}


def test_a_public_repository_is_not_written_to_by_accident(hub, tmp_path):
    folder = make(tmp_path / "adapter")
    push_adapter(folder, "owner/open", private=False)
    assert not hub.repositories["owner/open"].private
    hub.asked.clear()
    refused(hub, folder, "owner/open", "owner/open is public: pass --public")
    push_adapter(folder, "owner/open", private=False)


def test_names_folders_and_the_offline_mode(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    folder = make(tmp_path / "adapter")
    for name in ("first", "a/b/c", "owner/first@v2", "./owner/x", ""):
        refused(hub, folder, name, "is no repository: give 'owner/name'")
    refused(hub, tmp_path / "nothing", "owner/first", "is not an adapter")
    (folder / WEIGHTS_FILE).write_bytes(b"damaged")
    refused(hub, folder, "owner/first", "is truncated or no safetensors file")
    assert hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(hub, make(tmp_path / "sound"), "owner/first", "HF_HUB_OFFLINE is set, so nothing can be pushed")
    with pytest.raises(AdapterError, match=r"\(HF_HUB_OFFLINE is set, and the cache has it not: unset it"):
        load_adapter(tiny_llama(), "owner/first")
    assert hub.asked == []


def test_reading_what_is_not_there_or_not_for_everybody(hub, tmp_path, monkeypatch):
    push_adapter(make(tmp_path / "adapter"), "owner/private")
    hub.repositories["owner/private"].commit("empty", {})
    hub.repositories["owner/private"].commits[hub.repositories["owner/private"].branches["empty"]] = {"a.txt": b""}
    with pytest.raises(AdapterError, match="there is no such repository, or it is private: check the name"):
        load_adapter(tiny_llama(), "owner/nothing")
    with pytest.raises(AdapterError, match=f"has no {CONFIG_FILE}"):
        load_adapter(tiny_llama(), "owner/private@empty")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match="the hub wants to know who asks: log in with 'hf auth login'"):
        load_adapter(tiny_llama(), "owner/private")


def test_a_hub_that_is_ill_or_away(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    folder = make(tmp_path / "adapter")
    hub.status = 500
    refused(hub, folder, "owner/first", "the hub answers 500: try again later")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(hub, folder, "owner/first", "the hub cannot be reached")


# the card of a run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("hub") / "secret" / "base")


def test_a_run_leaves_a_card_and_pushes_where_asked(hub, base, tmp_path):
    (base / "README.md").write_text("---\nlicense: llama2\n---\n")
    (tmp_path / "private-place").mkdir()
    data = write_data(tmp_path / "private-place" / "data.json")
    result = train(recipe(base, data, tmp_path / "run", push_to_hub="owner/run"))
    card = (tmp_path / "run" / "README.md").read_text()
    assert is_unedited(card)
    values = front(card)
    assert values["library_name"] == "llama-adapter"
    assert values["pipeline_tag"] == "text-generation"
    assert values["license"] == "llama2"
    assert "base_model" not in values  # a folder has no name on the hub
    found = describe_adapter(tmp_path / "run")
    for text in (
        "| base | base (llama) |",
        f"| parameters | {found['parameters']:,} (",
        "| data | data.json: 20 examples to train on, 4 to validate |",
        f"| validation loss | {result.best_val_loss:.4f} at step {result.best_step}, {result.base_val_loss:.4f} before",
        "learning rate 0.02 |",
        "adapter_len 4",
        "under `llama2`",
    ):
        assert text in card, text
    assert "secret" not in card
    assert "private-place" not in card
    assert hub.files("owner/run").keys() == FILES
    assert hub.files("owner/run")["README.md"].decode() != card  # it names the repository
    assert 'generate --adapter owner/run "' in hub.files("owner/run")["README.md"].decode()
    assert is_unedited(hub.files("owner/run")["README.md"].decode())


def test_a_run_that_may_not_push_stops_before_it_starts(hub, base, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    data = write_data(tmp_path / "data.json")
    with pytest.raises(AdapterError, match="owner/run cannot be pushed to"):
        train(recipe(base, data, tmp_path / "run", push_to_hub="owner/run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(AdapterError, match="is no repository"):
        train(recipe(base, data, tmp_path / "run", push_to_hub="run"))
    with pytest.raises(ConfigError):
        recipe(base, data, tmp_path / "run", push_to_hub=3)


def test_a_push_that_fails_at_the_end_costs_no_run(hub, base, tmp_path, monkeypatch):
    monkeypatch.setattr("llama_adapter.training.draft.open_repository", lambda _: monkeypatch.delenv("HF_TOKEN"))
    data = write_data(tmp_path / "data.json")
    with pytest.raises(AdapterError, match=r"log in with .* The run is finished and kept; try again: llama-adapter pu"):
        train(recipe(base, data, tmp_path / "run", max_steps=1, push_to_hub="owner/run"))
    assert (tmp_path / "run" / "README.md").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    main(["push", str(tmp_path / "run"), "owner/run"])
    assert hub.files("owner/run").keys() == FILES


def test_a_card_writes_a_whole_number_without_a_fraction(base, tmp_path):
    train(recipe(base, write_data(tmp_path / "data.json"), tmp_path / "run", val_size=2.0))
    assert "val_size 2," in (tmp_path / "run" / "README.md").read_text()


def test_a_card_names_no_epochs_beside_the_steps_that_replace_them(base, tmp_path):
    data = write_data(tmp_path / "data.json")
    for steps, told in ((2, False), (None, True)):
        folder = tmp_path / f"run-{steps}"
        train(recipe(base, data, folder, max_steps=steps, epochs=3))
        assert (", epochs 3" in (folder / "README.md").read_text()) == told


def test_an_edited_card_survives_runs_and_an_unedited_one_is_renewed(base, tmp_path):
    data, card = write_data(tmp_path / "data.json"), tmp_path / "run" / "README.md"
    train(recipe(base, data, tmp_path / "run", max_steps=1))
    first = card.read_text()
    train(recipe(base, data, tmp_path / "run", max_steps=2, overwrite=True))
    assert card.read_text() != first
    card.write_text(card.read_text().replace("# Adapter for", "# My adapter for"))
    mine = card.read_text()
    train(recipe(base, data, tmp_path / "run", max_steps=3, overwrite=True))
    assert card.read_text() == mine


def test_what_is_unedited(tmp_path):
    text = "---\na: 1\n---\n\nText\n"
    assert is_unedited(marked(text))
    assert not is_unedited(marked(text) + "more\n")
    assert not is_unedited(marked(text).replace("Text", "Tex"))
    assert not is_unedited(text)
    assert not is_unedited("")
    assert write_card(tmp_path, text)
    assert write_card(tmp_path, text + "new\n")
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert not write_card(tmp_path, text)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe"


def test_names_in_cards_and_licences(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_name(str(base)) == "base"
    assert public_name("owner/name") == "owner/name"
    assert public_name("owner/name/file-Q4.gguf") == "owner/name"
    assert public_name("/gone/away") == public_name("./away") == public_name("~/away") == "away"
    assert base_licence("bundled") == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert base_licence(str(tmp_path)) is None
    (tmp_path / "README.md").unlink()
    assert base_licence(str(tmp_path)) is None


def test_the_licence_of_a_base_on_the_hub_is_that_of_its_card(hub, tmp_path):
    push_adapter(make(tmp_path / "adapter"), "owner/base")
    hub.repositories["owner/base"].commit("main", {"README.md": b"---\nlicense: mit\n---\n"})
    assert base_licence("owner/base") == "mit"
    assert base_licence("owner/nothing") is None
    push_adapter(make(tmp_path / "other", base_model_name_or_path="owner/base"), "owner/other")
    assert front(hub.files("owner/other")["README.md"].decode())["license"] == "mit"


def test_the_card_of_an_adapter_for_pictures_says_so(hub, tmp_path):
    from llama_adapter.conditions.config import ConditionConfig

    condition = ConditionConfig("image", "bundled", 8)
    push_adapter(make(tmp_path / "adapter", condition=condition), "owner/pictures")
    assert front(hub.files("owner/pictures")["README.md"].decode())["pipeline_tag"] == "image-text-to-text"


# the command line


def test_the_commands_know_the_hub(hub, base, tmp_path, capsys):
    data = write_data(tmp_path / "data.json")
    train(recipe(base, data, tmp_path / "run", max_steps=2))
    main(["push", str(tmp_path / "run"), "owner/cli", "--revision", "v1"])
    assert capsys.readouterr().out.startswith(f"{hub.address}/owner/cli/commit/")
    main(["inspect", "owner/cli@v1", "--json"])
    assert json.loads(capsys.readouterr().out)["config"]["adapter_len"] == 4
    main(["generate", "--adapter", "owner/cli@v1", "--max-new-tokens", "2", "--json", "sun"])
    assert json.loads(capsys.readouterr().out)["adapter"] == "cli-v1"
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--adapter", "owner/cli@v7", "sun"])
    assert "it has no revision 'v7'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_environment_variables_of_the_hub_are_honoured(tmp_path):
    folder = make(tmp_path / "adapter")
    with stand_in() as (hub, address):
        names = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_owner", "HF_HOME": str(tmp_path / "home")}
        names |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        environment = {**os.environ, **names}
        command = [sys.executable, "-m", "llama_adapter"]
        pushed = subprocess.run(
            [*command, "push", folder, "owner/env"], env=environment, capture_output=True, text=True, timeout=120
        )
        assert pushed.returncode == 0, pushed.stderr
        assert hub.files("owner/env").keys() == FILES
        environment["HF_HUB_OFFLINE"] = "1"
        pushed = subprocess.run(
            [*command, "push", folder, "owner/env"], env=environment, capture_output=True, text=True, timeout=120
        )
    assert pushed.returncode == 2
    assert pushed.stderr == "Error: HF_HUB_OFFLINE is set, so nothing can be pushed to owner/env: unset it.\n"


def test_a_gguf_base_comes_from_the_hub(hub, base, tmp_path):
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    from llama_adapter.base import load_base, load_tokenizer

    file = write_gguf(base, tmp_path / "tiny-Q8_0.gguf", "Q8_0")
    hub.repositories["owner/base"] = Repository(private=True)
    hub.repositories["owner/base"].commit("main", {"tiny-Q8_0.gguf": file.read_bytes()})
    there, here = "owner/base/tiny-Q8_0.gguf", str(file)
    ids = torch.tensor([load_tokenizer(there)("sun and moon")["input_ids"]])
    models = [load_base(name, torch.device("cpu"), "fp32") for name in (there, here)]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
