"""`llama-adapter generate`: one prompt, a file of them, or stdin."""

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llama_adapter.cli import options, output
from llama_adapter.cli.parser import add_command
from llama_adapter.errors import ConfigError

if TYPE_CHECKING:
    from llama_adapter.inference.session import Prompt

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
    options.add_session_options(parser)


def run(args: argparse.Namespace) -> None:
    """Answer what the arguments ask."""
    config = options.decoding_from(args)
    if len(args.adapter) > 1:
        raise ConfigError(f"generate takes one --adapter, not {len(args.adapter)}; chat switches between several.")
    options.at_least_one(args, "batch_size")
    prompts = _prompts(args.prompt, args.input, args.file, options.existing(args.image, args.adapter))
    session = options.open_session(args)
    name = session.adapters[0] if session.adapters else None
    if args.file is None and not args.as_json:
        session.answer(prompts, name, config, on_text=lambda text: print(text, end="", flush=True))
        print()
        return
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        for asked, answer in zip(batch, session.answer(batch, name, config), strict=True):
            line = {"prompt": asked.messages[-1].content, "input": asked.input, "adapter": name, **asdict(answer)}
            output.print_json(line) if args.as_json else print(answer.text, flush=True)


def _prompts(prompt: str | None, input: str, file: str | None, images: tuple[str, ...]) -> "list[Prompt]":
    from llama_adapter.inference.session import Prompt, read_prompts

    if file is not None:
        if prompt is not None or input or images:
            raise ConfigError(
                "--file excludes a prompt, --input and --image: put them into the file, or leave --file out."
            )
        return read_prompts(file)
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            print("Type the instruction, then Ctrl-D:", file=sys.stderr)
        prompt = sys.stdin.read()
    if not prompt or not prompt.strip():
        raise ConfigError("The prompt is empty: give it as an argument, with --file, or on stdin.")
    return [Prompt.of(prompt.strip(), input, images)]
