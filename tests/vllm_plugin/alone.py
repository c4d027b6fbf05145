"""An engine in a process of its own: `python alone.py KIND BASE OUTPUT ADAPTER ...`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: F401  (vLLM's environment)
from engines import answers, engine, prompts, requests
from torch._dynamo.utils import counters


def keep_compiling():
    """Let torch.compile stay on: vLLM's CPU platform switches it off where LoRA is on."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def without_lora(cls, config):
        lora, config.lora_config = config.lora_config, None
        try:
            return check(cls, config)
        finally:
            config.lora_config = lora

    CpuPlatform.check_and_update_config = classmethod(without_lora)


def main():
    kind, base, output, *folders = sys.argv[1:]
    settings = {
        "tensor parallel": {"tensor_parallel_size": 2},
        "speculative": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}},
        "compiled": {"enforce_eager": False},
    }[kind]
    if kind == "compiled":
        keep_compiling()
    with engine(base, **settings) as llm:
        rows = requests([None, *folders]) * 4
        tokens = prompts(len(rows))
        found = [*answers(llm, tokens, rows), *answers(llm, tokens, rows)]
    graphs = counters["stats"]["unique_graphs"]
    Path(output).write_text(json.dumps({"found": found, "graphs": graphs}))


if __name__ == "__main__":
    main()
