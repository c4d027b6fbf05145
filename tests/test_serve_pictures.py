"""Pictures in a crowd: an adapter that looks at them among many requests of text, in one running batch."""

import base64
import io
import itertools
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from servers import serving, write_experts
from tiny import open_gates
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from llama_adapter import AdapterConfig, add_adapter, save_adapter
from llama_adapter.base import load_base
from llama_adapter.conditions.perception import condition_config
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import Prompt

pytestmark = pytest.mark.slow
PICTURES = range(6)


def write_seer(base, tower, folder):
    """An adapter with open gates whose prompts depend on pictures."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**shape, image_size=16, patch_size=8, projection_dim=20)
    CLIPVisionModelWithProjection(vision).save_pretrained(tower)
    model = load_base(str(base), torch.device("cpu"))
    config = AdapterConfig(
        adapter_len=5, adapter_layers=3, template="alpaca", condition=condition_config("image", str(tower)),
        base_model_name_or_path=str(base),
    )  # fmt: skip
    adapter = add_adapter(model, config)
    open_gates(adapter, 7, scale=4.0)
    with torch.no_grad():
        for parameter in adapter.condition.parameters():
            parameter.normal_(0, 1 if parameter.dim() > 1 else 0.1)
    return str(save_adapter(model, folder))


def png(number):
    """A picture of noise."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(3 * 16 * 16)).save(buffer, "png")
    return buffer.getvalue()


def content(text, pictures):
    """A message's content as OpenAI's client sends it."""
    urls = [f"data:image/png;base64,{base64.b64encode(png(number)).decode()}" for number in pictures]
    return [
        {"type": "text", "text": text},
        *({"type": "image_url", "image_url": {"url": url}} for url in urls),
    ]


def test_every_answer_of_a_crowd_with_pictures_is_what_it_is_alone(base, tmp_path, monkeypatch):
    monkeypatch.setattr("llama_adapter.serving.scheduler.PIECE", 100)
    adapters = {
        **write_experts(base, tmp_path / "experts", 3),
        "seer": write_seer(base, tmp_path / "t", tmp_path / "s"),
    }
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["sun", "moon", "cat"], k=rng.randint(1, 20))) for _ in range(32)]
    asked = [(text, rng.choice(["base", "expert-0", "expert-1", "expert-2"]), ()) for text in texts]
    for text in texts[:12]:  # one picture, several, none
        asked.append((text, "seer", tuple(rng.choices(PICTURES, k=rng.choice([1, 1, 1, 2, 0])))))
    shown = [("sun", "seer", (number,)) for number in PICTURES]
    asked = [(*request, rng.randint(1, 20)) for request in rng.sample([*asked, *shown], k=len(asked) + len(shown))]
    with serving(base, adapters, max_tokens=64, max_rows=16) as server:

        def ask(request):
            text, name, pictures, new = request
            message = {"role": "user", "content": content(text, pictures)}
            parts = list(
                server.client.chat.completions.create(
                    model=name, messages=[message], temperature=0, max_tokens=new, stream=True, logprobs=True
                )
            )
            tokens = [token for part in parts if part.choices[0].logprobs for token in part.choices[0].logprobs.content]
            return (
                "".join(part.choices[0].delta.content or "" for part in parts),
                pytest.approx([token.logprob for token in tokens], abs=1e-4),
            )

        most = 0
        with ThreadPoolExecutor(32) as pool:
            replies = [pool.submit(ask, request) for request in asked]
            while not all(reply.done() for reply in replies):
                most = max(most, server.scheduler.running)
                time.sleep(0.01)
            got = [reply.result() for reply in replies]
        server.settle()
        assert most > 10  # they ran side by side
        for request, (text, logprobs) in zip(asked, got, strict=True):
            alone = ask(request)
            assert (text, logprobs.expected) == alone, request
        first = sorted(ask(("sun", "seer", (number,), 1))[1].expected[0] for number in PICTURES)
        assert min(after - before for before, after in itertools.pairwise(first)) > 1e-3  # pictures tell
        text, name, pictures, new = next(request for request in asked if request[2])
        prompt = Prompt.of(text, media=tuple(png(number) for number in pictures))
        assert (
            server.session.answer([prompt], name, GenerateConfig(new, 0.0))[0].text
            == ask((text, name, pictures, new))[0]
        )
        slots = server.session.engine.slots
        assert len(slots.lengths) - 1 - len(slots.free) == len(slots.of) <= len(adapters)
