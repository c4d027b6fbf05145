"""Conditions on a model: the arithmetic, files, training and answering with pictures."""

import json
import os
import signal
import wave

import numpy as np
import pytest
import torch
from PIL import Image
from runs import recipe, tiny_tokenizer
from tiny import HIDDEN, adapted, open_gates, tiny_model, tokens
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, WhisperConfig, WhisperModel

from llama_adapter import AdapterConfig, add_adapter, load_adapter, remove_adapter, save_adapter, use_adapter
from llama_adapter.cli import main
from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.conditions.perception import Perception, condition_config
from llama_adapter.conditions.towers import Tower
from llama_adapter.errors import AdapterError, ConfigError, DataError, Interrupted
from llama_adapter.evaluation.instructions import evaluate_instructions, read_tasks
from llama_adapter.evaluation.scienceqa.answers import answer_questions, choose_letters
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import SessionPlan, load_session
from llama_adapter.inference.writing import Prompt, read_prompts
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.loop import Run, train
from llama_adapter.training.optimizer import build_optimizer
from llama_adapter.training.plan import plan_run
from llama_adapter.training.prepare import prepare

CONDITION = ConditionConfig("image", "nowhere", tower_width=6, depths=(0, -1))
FAMILIES = ["llama", "qwen3", "olmo2", "phi3", "gpt_neox", "gpt2", "gemma2"]
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPVisionConfig(**shape, image_size=16, patch_size=8, projection_dim=20)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with plain pictures and records that ask for their colour."""
    folder = tmp_path_factory.mktemp("pictures")
    records = []
    for number in range(16):
        name = list(COLOURS)[number % 2]
        file = f"{number}.png"
        Image.new("RGB", (16, 16), tuple(min(255, c + number) for c in COLOURS[name])).save(folder / file)
        records.append({"instruction": "colour?", "input": "", "output": name, "image": file})
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


# arithmetic


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 4])
@torch.no_grad()
def test_a_condition_is_added_to_every_prompt(family, length):
    """A row under condition c equals a whole model whose prompts are P + c."""
    model, ids = tiny_model(family), tokens()
    adapter = adapted(model)
    condition = torch.randn(3, length, HIDDEN)
    with use_adapter(model, "default", condition[:, 0] if length == 1 else condition):
        found = model(ids).logits
    before = {i: layer.prompt.clone() for i, layer in adapter.layers.items()}
    for row in range(3):
        for i, layer in adapter.layers.items():
            layer.prompt.copy_(before[i] + condition[row])
        torch.testing.assert_close(found[row], model(ids[row : row + 1]).logits[0], atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


@torch.no_grad()
def test_closed_gates_leave_the_base_under_any_condition():
    model, ids = tiny_model(), tokens()
    expected = model(ids).logits
    add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2))
    with use_adapter(model, "default", 100 * torch.randn(3, HIDDEN)):
        assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_rows_of_several_adapters_have_conditions_of_their_own():
    model, ids = tiny_model(), tokens()
    base_logits = model(ids).logits
    adapted(model, "a", 1)
    adapted(model, "b", 2, adapter_len=6)
    condition = torch.randn(3, HIDDEN)
    with use_adapter(model, ["b", None, "a"], condition):
        mixed = model(ids).logits
    torch.testing.assert_close(mixed[1], base_logits[1], atol=1e-6, rtol=1e-6)
    for row, name in ((0, "b"), (2, "a")):
        with use_adapter(model, name, condition[row : row + 1]):
            torch.testing.assert_close(mixed[row], model(ids[row : row + 1]).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", ["default", ["default", "other", None]])
@torch.no_grad()
def test_generation_with_cache_sees_the_condition_at_every_step(names):
    model, ids = tiny_model(), tokens()
    adapted(model)
    adapted(model, "other", 3)
    with use_adapter(model, names, 3 * torch.randn(3, HIDDEN)):
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    with use_adapter(model, names, -3 * torch.randn(3, HIDDEN)):
        assert not torch.equal(cached, model.generate(ids, **options))


def test_prompts_of_a_step_are_projected_once_under_a_condition():
    model, ids = tiny_model(), tokens()
    adapted(model)
    calls = []
    module = model.model.layers[-1].self_attn
    forward = module.v_proj.forward
    module.v_proj.forward = lambda x: calls.append(x.shape) or forward(x)
    with torch.no_grad(), use_adapter(model, "default", torch.randn(3, HIDDEN)):
        model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert sum(shape == (3, 4, HIDDEN) for shape in calls) == 1


def test_the_condition_learns_at_a_rate_of_its_own():
    adapter = add_adapter(tiny_model(), AdapterConfig(adapter_len=4, adapter_layers=2, condition=CONDITION))
    for own, factor in ((None, 1.0), (0.003, 0.25)):
        optimizer = build_optimizer(adapter, TrainConfig(lr=0.012, condition="image", condition_lr=own))
        found = {id(p): group["factor"] for group in optimizer.param_groups for p in group["params"]}
        of_condition = {id(p) for p in adapter.condition.parameters()}
        assert found == {id(p): factor if id(p) in of_condition else 1.0 for p in adapter.parameters()}


def test_gradients_reach_the_condition():
    model, ids = tiny_model(), tokens()
    adapter = add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2, condition=CONDITION))
    open_gates(adapter)
    condition = adapter.condition(torch.randn(3, 2, 6))
    with use_adapter(model, "default", condition):
        model(ids, labels=ids).loss.backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("shape", [(3, 8), (3, 3, HIDDEN), (3, 1, 1, HIDDEN)])
def test_a_condition_of_the_wrong_shape_is_refused(shape):
    model = tiny_model()
    adapted(model)
    rule = r"does not fit adapter 'default': it must be \[rows, 32\] or \[rows, 4, 32"
    with pytest.raises(AdapterError, match=rule), use_adapter(model, "default", torch.randn(shape)):
        pass


def test_conditions_are_as_many_as_rows():
    model = tiny_model()
    adapted(model)
    refused = pytest.raises(AdapterError, match="2 conditions for a batch of 3 rows")
    with use_adapter(model, "default", torch.randn(2, HIDDEN)), refused:
        model(tokens())


# files


def test_a_condition_is_saved_with_its_adapter(tmp_path):
    model = tiny_model()
    adapter = add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2, condition=CONDITION), "a")
    save_adapter(model, tmp_path, "a")
    loaded = load_adapter(model, tmp_path, "b")
    assert loaded.config == adapter.config
    assert loaded.config.condition == CONDITION
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    assert any(key.startswith("condition.") for key in adapter.state_dict())
    for key, tensor in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    assert adapter.num_parameters == sum(tensor.numel() for tensor in adapter.state_dict().values())


def test_the_condition_moves_with_the_model_and_goes_with_its_adapter():
    model = tiny_model()
    names = set(model.state_dict())
    adapter = add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2, condition=CONDITION))
    assert any("zero_init_conditions" in name for name in model.state_dict())
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    remove_adapter(model)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize(("layers", "total"), [(10, 0.97e6), (20, 1.37e6), (30, 1.79e6)])
def test_parameter_counts_of_the_paper_s_table_4(layers, total):
    from transformers import LlamaConfig, LlamaForCausalLM

    six_scales = ConditionConfig("image", "clip", tower_width=768, depths=(4, 8, 12, 16, 20, 24))
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
        adapter = add_adapter(model, AdapterConfig(adapter_len=10, adapter_layers=layers, condition=six_scales))
    assert adapter.num_parameters == pytest.approx(total, rel=0.01)


# training and answering


@pytest.fixture(scope="module")
def trained(tower, pictures, tmp_path_factory):
    """On the bundled base, as a random one cannot be made to write words by its prompts."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = {"condition": "image", "tower": str(tower), "tower_depths": (1, 3), "adapter_layers": None}
    settings |= {"adapter_len": 10, "epochs": 40.0, "warmup_epochs": 2.0, "lr": 0.03, "val_size": 0}
    train(recipe("bundled", pictures / "data.json", folder, **settings))
    return folder


def asked(session, adapter, files):
    prompts = [Prompt.of("colour?", media=(str(file),)) for file in files]
    return [a.text for a in session.answer(prompts, adapter, GenerateConfig(max_new_tokens=4, temperature=0))]


def test_another_picture_changes_the_answer(trained, pictures):
    session = load_session(None, {"run": str(trained)}, torch.device("cpu"))
    files = [pictures / "0.png", pictures / "1.png", pictures / "2.png"]
    assert asked(session, "run", files) == ["red", "blue", "red"]
    scores, _ = evaluate_instructions(session, "run", read_tasks(str(pictures / "data.json")), max_new_tokens=4)
    assert scores[-1].exact_match == 1.0


def test_a_stopped_run_resumes_to_the_same_bits_from_kept_features(base, tower, pictures, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    settings = {"condition": "image", "tower": str(tower), "max_steps": 4, "absent": "learnt"}
    train(recipe(base, pictures / "data.json", tmp_path / "whole", **settings))
    step = Run._step

    def interrupted(run, *args):
        if run.experts[0].progress.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, *args)

    kept = {**settings, "feature_cache": str(cache)}
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", interrupted)
        with pytest.raises(Interrupted):
            train(recipe(base, pictures / "data.json", tmp_path / "halves", **kept))
    assert list(cache.rglob("*.safetensors"))
    monkeypatch.setattr(Tower, "features", None)  # nothing is left to compute
    train(recipe(base, pictures / "data.json", tmp_path / "halves", resume=True, **kept))
    for name in ("adapter_model.safetensors", "last/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


def test_micro_batches_do_not_change_what_is_learnt(base, tower, pictures, tmp_path):
    settings = {"condition": "image", "tower": str(tower), "max_steps": 3, "val_size": 0, "absent": "learnt"}
    losses = []
    for size in (2, 8):
        config = recipe(base, pictures / "data.json", tmp_path / str(size), micro_batch_size=size, **settings)
        losses.append(train(config).train_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("kind", ["patches", "visual_prompt", "video"])
def test_other_kinds_train_and_answer(base, tower, pictures, tmp_path, kind):
    if kind == "video":
        for number in range(8):
            clip = tmp_path / f"clip{number}"
            clip.mkdir()
            for frame in range(2):
                Image.new("RGB", (16, 16), list(COLOURS.values())[number % 2]).save(clip / f"{frame}.png")
        records = [{"instruction": "colour?", "output": list(COLOURS)[i % 2], "video": f"clip{i}"} for i in range(8)]
        data = tmp_path / "data.json"
        data.write_text(json.dumps(records), encoding="utf-8")
    else:
        data = pictures / "data.json"
    blocks = {"visual_blocks": 1, "visual_width": 16, "visual_heads": 2} if kind == "visual_prompt" else {}
    settings = {"condition": kind, "tower": str(tower), "val_size": 0, "max_steps": 2, **blocks}
    config = recipe(base, data, tmp_path / "run", **settings)
    assert np.isfinite(train(config).train_loss)
    session = load_session(None, {"run": str(tmp_path / "run")}, torch.device("cpu"))
    file = tmp_path / "clip0" if kind == "video" else pictures / "0.png"
    assert len(asked(session, "run", [file])) == 1


def test_sound_trains_and_answers(base, tmp_path):
    shape = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    quiet = {"suppress_tokens": None, "begin_suppress_tokens": None}
    config = WhisperConfig(
        vocab_size=99, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=50,
        **shape, **special, **quiet,
    )  # fmt: skip
    WhisperModel(config).save_pretrained(tmp_path / "tower")
    records = []
    for number, pitch in enumerate((200, 900) * 4):
        tone = (20000 * np.sin(2 * np.pi * pitch * np.arange(8000) / 16000)).astype("<i2")
        with wave.open(str(tmp_path / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(tone.tobytes())
        records.append({"instruction": "high?", "output": "no" if pitch == 200 else "yes", "audio": f"{number}.wav"})
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    settings = {"condition": "audio", "tower": str(tmp_path / "tower"), "val_size": 0, "max_steps": 2}
    assert np.isfinite(train(recipe(base, tmp_path / "data.json", tmp_path / "run", **settings)).train_loss)
    session = load_session(None, {"run": str(tmp_path / "run")}, torch.device("cpu"))
    assert len(asked(session, "run", [tmp_path / "0.wav"])) == 1


def test_no_one_and_several_pictures_in_a_batch(trained, pictures):
    session = load_session(None, {"run": str(trained)}, torch.device("cpu"))
    red, blue = str(pictures / "0.png"), str(pictures / "1.png")
    greedy = GenerateConfig(max_new_tokens=4, temperature=0)
    rows = [Prompt.of("colour?"), Prompt.of("colour?", media=(red,)), Prompt.of("colour?", media=(red, blue))]
    together = [a.text for a in session.answer(rows, "run", greedy)]
    alone = [session.answer([row], "run", greedy)[0].text for row in rows]
    assert together == alone
    assert together[1] == "red"


# wrong inputs


def test_pictures_for_an_adapter_that_has_never_seen_any(base, pictures, tmp_path, monkeypatch):
    train(recipe(base, pictures / "data.json", tmp_path / "run", max_steps=1))
    session = load_session(None, {"run": str(tmp_path / "run")}, torch.device("cpu"))
    with pytest.raises(AdapterError, match="'run' was trained on text alone and cannot look at files"):
        asked(session, "run", [pictures / "0.png"])
    monkeypatch.setattr(SessionPlan, "load", None)  # said before weights are read
    with pytest.raises(SystemExit) as stop:
        main(["generate", "colour?", "--adapter", str(tmp_path / "run"), "--image", str(pictures / "0.png")])
    assert stop.value.code == 2


def test_a_condition_without_anything_to_look_at(base, tower, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 8), encoding="utf-8")
    config = recipe(base, tmp_path / "data.json", tmp_path / "run", condition="image", tower=str(tower))
    for stops in (train, plan_run):  # validate says what train would
        with pytest.raises(ConfigError, match="condition is image, and no record names a file"):
            stops(config)


def test_a_picture_and_nobody_to_look_at_it(pictures, capsys):
    for command in (["generate", "colour?"], ["chat"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--model", "bundled", "--image", str(pictures / "0.png")])
        assert stop.value.code == 2
        assert "--image needs an adapter that was trained with --condition" in capsys.readouterr().err


def test_a_missing_picture_is_named(pictures, tmp_path):
    (tmp_path / "ask.json").write_text(json.dumps([{"instruction": "colour?", "image": "no.png"}]), encoding="utf-8")
    with pytest.raises(DataError, match=r"record 1: 'no.png' is neither there nor in "):
        read_prompts(str(tmp_path / "ask.json"))


def test_a_tower_of_another_width(tower):
    with pytest.raises(AdapterError, match=r"features of width 6 .* gives 20"):
        Perception(ConditionConfig("image", str(tower), tower_width=6), torch.device("cpu"))


def test_the_bundled_tower_tells_colours_apart(pictures):
    perception = Perception(condition_config("image", "bundled"), torch.device("cpu"))
    first, second, third = perception.features([str(pictures / f"{i}.png") for i in range(3)])
    assert first.shape == (6, 128)
    alike, apart = (first[-1] - third[-1]).norm(), (first[-1] - second[-1]).norm()
    assert alike < 0.5 * apart


def test_condition_config_reads_the_tower_s_width(tower):
    config = condition_config("image", str(tower), width=8)
    assert (config.tower_width, config.depths, config.width) == (20, (1, 2, 3), 8)
    assert condition_config("visual_prompt", str(tower)).depths == (-1,)
    with pytest.raises(AdapterError, match="hidden states 0 to 3, not \\[9\\]"):
        condition_config("image", str(tower), (9,))


# the command line


def test_generate_with_a_picture(trained, pictures, capsys):
    main(["generate", "--adapter", str(trained), "--image", str(pictures / "1.png"), "--temperature", "0", "colour?"])
    assert capsys.readouterr().out.strip() == "blue"
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--adapter", str(trained), "--image", "no.png", "colour?"])
    assert stop.value.code == 2
    assert "--image no.png does not exist: check the path." in capsys.readouterr().err


def test_a_file_of_prompts_with_pictures(trained, pictures, tmp_path, capsys):
    records = [{"instruction": "colour?", "image": str(pictures / f"{i}.png")} for i in range(3)]
    (tmp_path / "ask.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    main(["generate", "--adapter", str(trained), "--file", str(tmp_path / "ask.jsonl"), "--temperature", "0"])
    assert capsys.readouterr().out.split() == ["red", "blue", "red"]


@pytest.fixture(scope="module")
def scienceqa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scienceqa")
    problems, splits = {}, {"train": [], "test": []}
    for number in range(16):
        pid, split = str(number), "train" if number < 12 else "test"
        name = list(COLOURS)[number % 2]
        choices = ["red", "blue"] if number % 4 < 2 else ["blue", "red"]
        (folder / split / pid).mkdir(parents=True)
        Image.new("RGB", (16, 16), COLOURS[name]).save(folder / split / pid / "image.png")
        problems[pid] = {
            "question": "Which colour?", "choices": choices, "answer": choices.index(name), "hint": "",
            "image": "image.png", "task": "closed choice", "grade": "grade2", "subject": "natural science",
            "topic": "", "category": "", "skill": "", "lecture": "", "solution": "", "split": split,
        }  # fmt: skip
        splits[split].append(pid)
    (folder / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
    (folder / "pid_splits.json").write_text(json.dumps(splits), encoding="utf-8")
    return folder


def test_scienceqa_from_folder_to_table(base, tower, scienceqa, tmp_path, capsys):
    from llama_adapter.evaluation.scienceqa.questions import read_scienceqa

    run = tmp_path / "run"
    settings = {"condition": "image", "tower": str(tower), "tower_depths": (3,), "max_steps": 3, "val_size": 0}
    train(recipe(base, f"scienceqa:{scienceqa}:train", run, **settings))
    main(
        ["evaluate", "scienceqa", "--data", str(scienceqa), "--adapter", str(run), "--by", "likelihood", "--json",
         "--save", str(tmp_path / "answers.json")]
    )  # fmt: skip
    first = json.loads(capsys.readouterr().out)
    assert first["count"] == 4
    assert first["unparseable"] == 0
    arguments = ["--data", str(scienceqa), "--predictions", str(tmp_path / "answers.json"), "--rule", "mm-cot"]
    main(["evaluate", "scienceqa", *arguments, "--json"])
    assert json.loads(capsys.readouterr().out)["right"] == first["right"]
    session = load_session(None, {"run": str(run)}, torch.device("cpu"))
    questions = read_scienceqa(scienceqa, "test")
    assert set(answer_questions(session, "run", questions, max_new_tokens=2)) == {q.pid for q in questions}
    assert set(choose_letters(session, "run", questions).values()) <= {0, 1}


def test_text_alone_needs_no_pictures(base, scienceqa, tmp_path, capsys):
    """The paper's LLaMA-Adapter_T, from a folder without any picture."""
    for name in ("problems.json", "pid_splits.json"):
        (tmp_path / name).write_bytes((scienceqa / name).read_bytes())
    train(recipe(base, f"scienceqa:{tmp_path}:train", tmp_path / "run", max_steps=1, val_size=0))
    arguments = ["--data", str(tmp_path), "--adapter", str(tmp_path / "run"), "--by", "likelihood", "--json"]
    main(["evaluate", "scienceqa", *arguments])
    assert json.loads(capsys.readouterr().out)["count"] == 4


def test_another_picture_is_another_data_set(base, pictures):
    config, tokenizer = recipe(base, pictures / "data.json", "unused"), tiny_tokenizer()
    records = json.loads((pictures / "data.json").read_text(encoding="utf-8"))
    records[0]["image"], records[2]["image"] = records[2]["image"], records[0]["image"]
    (pictures / "swapped.json").write_text(json.dumps(records), encoding="utf-8")
    swapped = recipe(base, pictures / "swapped.json", "unused")
    assert prepare(config, tokenizer).digest != prepare(swapped, tokenizer).digest


def test_scienceqa_needs_somebody_who_answers(scienceqa, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "scienceqa", "--data", str(scienceqa)])
    assert stop.value.code == 2
    assert "Nobody answers: pass --adapter FOLDER" in capsys.readouterr().err


# data


def test_llava_conversations_lose_their_tags(pictures, tmp_path):
    from llama_adapter.data import load_examples

    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    record = {"id": "1", "image": str(pictures / "0.png"), "conversations": turns}
    (tmp_path / "llava.json").write_text(json.dumps([record]), encoding="utf-8")
    example = load_examples([str(tmp_path / "llava.json")]).examples[0]
    assert example.messages[0].content == "What is it?"
    assert example.media == (str(pictures / "0.png"),)


def test_a_tag_inside_a_sentence_leaves_a_blank():
    from llama_adapter.data import parse_record

    record = {"instruction": "Compare <image> and <image> now.", "output": "Alike.", "images": ["a.png", "b.png"]}
    assert parse_record(record).messages[0].content == "Compare and now."


def test_coco_captions(pictures):
    from llama_adapter.data import load_examples

    images = [{"id": 7, "file_name": "0.png"}]
    captions = {"images": images, "annotations": [{"image_id": 7, "caption": "A red square. "}]}
    (pictures / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    example = load_examples([f"coco:{pictures / 'captions.json'}"]).examples[0]
    assert example.messages[1].content == "A red square."
    assert example.media == (str(pictures / "0.png"),)
    captions["annotations"][0]["image_id"] = 8
    (pictures / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    captions["annotations"] += [5, {"image_id": 7, "caption": "Red."}]
    (pictures / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    with pytest.raises(DataError, match="annotation 1: it has no caption, or its image_id is not among 'images'"):
        load_examples([f"coco:{pictures / 'captions.json'}"])
    loaded = load_examples([f"coco:{pictures / 'captions.json'}"], skip_bad_records=True)
    assert [example.messages[1].content for example in loaded.examples] == ["Red."]
    assert len(loaded.skipped) == 2
