"""Data: records -> examples -> text -> tokens and labels, one module a step."""

from llama_adapter.data.encode import IGNORE, Encoded, encode, encode_all, encode_prompt
from llama_adapter.data.formats import Example, Media, Message, parse_record, without_tags
from llama_adapter.data.kinds import data_files, is_data_file
from llama_adapter.data.records import read_records
from llama_adapter.data.sources import Loaded, load_examples, with_found_media
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
    "is_data_file",
    "load_examples",
    "parse_record",
    "read_records",
    "render",
    "render_prompt",
    "with_found_media",
    "without_tags",
]
