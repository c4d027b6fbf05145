"""Data: records -> examples -> text -> tokens and labels, one module a step."""

from llama_adapter.data.encode import IGNORE, Encoded, encode, encode_all, encode_prompt, encode_records
from llama_adapter.data.examples import Example, Media, Message
from llama_adapter.data.formats import parse_question, parse_record
from llama_adapter.data.kinds import data_files, is_data_file
from llama_adapter.data.media import without_tags
from llama_adapter.data.records import read_records
from llama_adapter.data.sources import Loaded, load_examples, log_findings
from llama_adapter.data.templates import TEMPLATES, Rendered, check_template, render, render_prompt

__all__ = [
    "IGNORE",
    "TEMPLATES",
    "Encoded",
    "Example",
    "Loaded",
    "Media",
    "Message",
    "Rendered",
    "check_template",
    "data_files",
    "encode",
    "encode_all",
    "encode_prompt",
    "encode_records",
    "is_data_file",
    "load_examples",
    "log_findings",
    "parse_question",
    "parse_record",
    "read_records",
    "render",
    "render_prompt",
    "without_tags",
]
