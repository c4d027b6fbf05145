"""`llama-adapter generate`: one prompt, a file of them, or stdin."""

import argparse
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llama_adapter.cli import options, output
from llama_adapter.cli.parser import add_command
from llama_adapter.errors import ConfigError

if TYPE_CHECKING:
    from llama_adapter.inference.session import SessionPlan
    from llama_adapter.inference.writing import Prompt

log = logging.getLogger(__name__)

EXAMPLES = """
llama-adapter generate --adapter runs/first "What is the capital of France?"
llama-adapter generate --adapter runs/pictures --image dog.jpg "What colour is the dog?"
llama-adapter generate --adapter runs/first --file questions.txt --json > answers.jsonl
echo "Name a colour." | llama-adapter generate --adapter runs/first --temperature 0
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    description = "Answer prompts. The text streams to stdout; without --adapter the bare base answers."
    parser = add_command(commands, "generate", run, description, EXAMPLES)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the instruction; '-' or nothing reads stdin")
    parser.add_argument("--input", default="", metavar="TEXT", help="context of the instruction (Alpaca's input)")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE",
        help="picture (or recording, or video) that the prompt is about; repeatable",
    )  # fmt: skip
    parser.add_argument("-f", "--file", help="prompts: a data file or a folder of them, or a text file with one a line")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts of a --file answered at once")
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON object per answer")
    options.add_skip_bad_records(parser)
    options.add_session_options(parser)


def run(args: argparse.Namespace) -> None:
    """Answer what the arguments ask."""
    config = options.decoding_from(args)
    if len(args.adapter) > 1:
        raise ConfigError(f"generate takes one --adapter, not {len(args.adapter)}; chat switches between several.")
    options.at_least_one(args, "batch_size")
    if args.file is not None and (args.prompt is not None or args.input or args.image):
        raise ConfigError("--file excludes a prompt, --input and --image: put them into the file, or leave --file out.")
    planned = options.plan(args)
    images = options.existing(args.image, options.kinds_of(planned))
    name = next(iter(planned.folders), None)
    prompts = _prompts(args, images, planned, name)
    session = options.load(planned, args)
    if args.file is None and not args.as_json:
        session.answer(prompts, name, config, on_text=lambda text: print(text, end="", flush=True))
        print()
        return
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        for asked, answer in zip(batch, session.answer(batch, name, config), strict=True):
            line = {"prompt": asked.messages[-1].content, "input": asked.input, "adapter": name, **asdict(answer)}
            output.print_json(line) if args.as_json else print(answer.text, flush=True)


def _prompts(
    args: argparse.Namespace, images: tuple[str, ...], planned: "SessionPlan", name: str | None
) -> "list[Prompt]":
    """What is asked, checked to be askable before the base's weights are read."""
    from llama_adapter.data import is_data_file
    from llama_adapter.inference.writing import Prompt, asked_otherwise, read_prompts, usable

    writer, text = planned.writer, args.prompt
    raw = writer.template(name) == "raw"
    skipped: list[str] | None = [] if args.file is not None and args.skip_bad_records else None
    if args.file is not None:
        prompts = read_prompts(args.file, raw, skipped, options.kinds_of(planned))
    else:
        if text in (None, "-"):
            text = options.read_stdin("Type the instruction, then Ctrl-D:")
            text = text if raw else text.strip()  # the line break that a shell adds is no part of an instruction
        if not text.strip():
            raise ConfigError("The prompt is empty: give it as an argument, with --file, or on stdin.")
        prompts = [Prompt.of(text, args.input, images)]
    prompts = usable(prompts, lambda prompt: writer.prompt(prompt, name), skipped)
    options.report_skipped(skipped or ())
    if (not raw or is_data_file(args.file or "")) and (warning := asked_otherwise(prompts, writer, name)):
        log.warning("%s: %s", args.file, warning)
    return prompts
