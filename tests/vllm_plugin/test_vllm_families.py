"""Every family of the table on vLLM: base and adapters mixed in one batch say what transformers says."""

import pytest
from engines import FAMILIES, answers, apart, compared, engine, prompts, requests, write_adapters, write_family

from llama_adapter.core.families import FAMILIES as TABLE


def test_the_whole_table_is_here():
    assert FAMILIES.keys() == TABLE.keys() >= NOT_HERE.keys()


NOT_HERE = {
    **dict.fromkeys(
        ("gpt_oss", "granitemoe", "mixtral", "qwen2_moe", "qwen3_moe"),
        "vLLM computes experts by Triton where LoRA is enabled, which needs a GPU",
    ),
    "gpt2": "vLLM's GPT-2 does not support LoRA",
}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NOT_HERE))
def test_a_family(family, tmp_path):
    base = apart(write_family, family, tmp_path / "base")
    folders = apart(write_adapters, base, tmp_path)
    with engine(base) as llm:
        rows = requests([None, *folders]) * 4
        found = answers(llm, prompts(len(rows)), rows)
    result = apart(compared, base, found)
    print(f"\n{family}: {result}")
    assert result.equal == result.total == 288
    assert result.worst < 2e-5
    assert result.effect > 0.5
