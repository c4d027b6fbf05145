"""Every family of the table on vLLM: base and adapters mixed in one batch say what transformers says."""

import pytest
from engines import FAMILIES, Compared, answers, engine, prompts, requests, write_adapters, write_family

from llama_adapter.core.families import FAMILIES as TABLE


def test_the_whole_table_is_here():
    assert FAMILIES.keys() == TABLE.keys()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family(family, tmp_path, record_property):
    base = write_family(family, tmp_path / "base")
    folders = write_adapters(base, tmp_path)
    options = {"model_impl": "transformers"} if family == "gpt2" else {}
    with engine(base, **options) as llm:
        rows = requests([None, *folders]) * 4
        found = answers(llm, prompts(len(rows)), rows)
    compared = Compared(base, found)
    print(family, compared)
    record_property("compared", str(compared))
    assert compared.equal == compared.total == 288
    assert compared.worst < 2e-5
    assert compared.effect > 0.5
