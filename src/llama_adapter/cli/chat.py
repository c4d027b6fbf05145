"""`llama-adapter chat`: a conversation in the terminal."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from llama_adapter.cli import options
from llama_adapter.cli.parser import add_command
from llama_adapter.errors import AdapterError, ConfigError, DataError
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.settings import unknown_name

if TYPE_CHECKING:
    from llama_adapter.inference.session import Session

EXAMPLES = """
llama-adapter chat --adapter runs/first
llama-adapter chat --adapter runs/pictures --image dog.jpg
llama-adapter chat --adapter poet=runs/poet --adapter clerk=runs/clerk
"""
HELP_IMAGE = "/image FILE     show a picture; '/image' alone takes it away"
HELP = f"""/reset          forget the conversation
/adapter NAME   switch to another adapter ('none': the bare base)
{HELP_IMAGE}
/help           this list
/exit           leave (also Ctrl-D)"""
ALONE = "No template: each line is completed as it is, and what was said before is not remembered."


def add_parser(commands: Any) -> None:
    """Add the command."""
    description = "Talk to the model. It remembers the conversation; /help lists the commands."
    parser = add_command(commands, "chat", run, description, EXAMPLES)
    parser.add_argument("--system", metavar="TEXT", help="system message that opens the conversation")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="picture to talk about; repeatable"
    )
    options.add_session_options(parser)


def run(args: argparse.Namespace) -> None:
    """Read, answer, repeat."""
    config = options.decoding_from(args)
    from llama_adapter.data.examples import check_encodable

    check_encodable(args.system or "", "--system")
    planned = options.plan(args)
    images = options.existing(args.image, options.kinds_of(planned))
    if args.system and planned.writer.template([None, *planned.folders][-1]) == "raw":
        raise ConfigError("--system needs a template, and what answers takes none: leave it out, or pass --template.")
    conversation = Conversation(options.load(planned, args), config, args.system, images)
    _note(f"adapter: {conversation.adapter or 'none'}; /help lists the commands")
    if conversation.raw:
        _note(ALONE)
    options.keep_bytes(sys.stdin)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            _note("\n/exit or Ctrl-D leaves")
            continue
        command = line.strip()
        if command in ("/exit", "/quit"):
            break
        if command.startswith("/"):
            _note(conversation.command(command))
        elif command:
            conversation.say(line if conversation.raw else command)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Conversation:
    """The history, and which adapter answers next."""

    def __init__(
        self, session: "Session", config: GenerateConfig, system: str | None, images: tuple[str, ...] = ()
    ) -> None:
        from llama_adapter.data import Message

        self.session, self.config, self.images = session, config, images
        self.opening = () if system is None else (Message("system", system),)
        self.messages: tuple[Message, ...] = self.opening
        self.adapter = session.adapters[-1] if session.adapters else None

    def command(self, line: str) -> str:
        """Carry out a /command and say what happened."""
        word, _, argument = line.partition(" ")
        if word == "/help":
            return HELP if self._looks else HELP.replace(f"{HELP_IMAGE}\n", "")
        if word == "/reset":
            self.messages = self.opening
            return "The conversation starts anew."
        if word == "/adapter":
            return self._switch(argument.strip())
        if word == "/image":
            return self._show(argument.strip())
        known = ["/reset", "/adapter", *(["/image"] if self._looks else []), "/help", "/exit"]
        return unknown_name("command", word, known)

    @property
    def _looks(self) -> bool:
        """Whether any of the adapters takes files."""
        return bool(self.images or self.session.perceptions)

    def _show(self, file: str) -> str:
        try:
            self.images = options.existing([file] if file else [], self.session.perceptions, "/image")
        except (ConfigError, DataError) as error:
            return str(error)
        return f"Looking at {file}." if file else "Looking at nothing."

    def _switch(self, name: str) -> str:
        choices = [*self.session.adapters, "none"]
        if name not in choices:
            return f"adapters: {', '.join(choices)}" if not name else unknown_name("adapter", name, choices)
        self.adapter = None if name == "none" else name
        return f"Now answering: {name if name != 'none' else 'the bare base'}." + (f" {ALONE}" if self.raw else "")

    @property
    def raw(self) -> bool:
        """Whether who answers takes text as it is, without a template, and so without a history."""
        return self.session.writer.template(self.adapter) == "raw"

    def say(self, text: str) -> None:
        """Stream the answer to `text`; a Ctrl-C cuts it short and forgets the turn."""
        from llama_adapter.data import Message
        from llama_adapter.inference.writing import Prompt

        try:
            asked = (*(() if self.raw else self.messages), Message("user", text))
        except DataError as error:
            _note(str(error))
            return
        prompt = Prompt(asked, media=self.images)
        try:
            answer = self.session.answer([prompt], self.adapter, self.config, on_text=_print)[0]
        except KeyboardInterrupt:
            _note("\n(cut short)")
            return
        except AdapterError as error:
            _note(f"{error} /image takes the picture away.")
            return
        except DataError as error:
            _note(f"{error} /reset starts anew.")
            return
        print()
        if answer.text and not self.raw:
            self.messages = (*asked, Message("assistant", answer.text))


def _print(text: str) -> None:
    print(text, end="", flush=True)
