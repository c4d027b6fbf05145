"""`llama-adapter serve`."""

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from llama_adapter.cli import options
from llama_adapter.cli.parser import add_command
from llama_adapter.errors import ConfigError, MissingExtraError
from llama_adapter.serving.config import ServeConfig

EXAMPLES = """
llama-adapter serve --adapter runs/first                            # then open http://127.0.0.1:8000
llama-adapter serve --model ./Llama-2-7b-hf --adapter poet=runs/poet --adapter clerk=runs/clerk
llama-adapter serve --model ./Llama-2-7b-hf --adapter-dir experts/ --host 0.0.0.0 --api-key-file key.txt
llama-adapter serve --model ./Llama-2-7b-hf --adapter-dir experts/ --backend vllm
"""
BACKENDS = ("embedded", "vllm")


def add_parser(commands: Any) -> None:
    """Add the command."""
    description = "Serve a base and its adapters over OpenAI's HTTP interface; adapters are model names."
    parser = add_command(commands, "serve", run, description, EXAMPLES)
    base = parser.add_argument_group("base and adapters")
    options.add_base_options(base)
    base.add_argument("--adapter-dir", metavar="DIR", help="folder of adapters, each loaded when it is first asked for")
    base.add_argument("--served-model-name", metavar="NAME", help="what the bare base is called (default: as --model)")
    where = parser.add_argument_group("server")
    where.add_argument("--backend", choices=BACKENDS, default="embedded", help="what decodes (default: embedded)")
    where.add_argument(
        "--host", default=ServeConfig.host, metavar="H", help="address to listen on (default: %(default)s)"
    )
    where.add_argument(
        "--port", type=int, default=ServeConfig.port, metavar="N", help="port; 0: any (default: %(default)s)"
    )
    where.add_argument("--api-key-file", metavar="FILE", help="keys that open the server, one a line")
    where.add_argument("--admin-key-file", metavar="FILE", help="key that opens loading and unloading of adapters")
    limits = parser.add_argument_group("limits")
    for flag, field, text in (
        ("--max-rows", "max_rows", "answers written side by side"),
        ("--max-adapters", "max_adapters", "adapters of --adapter-dir that stay loaded while nobody asks them"),
        ("--max-waiting", "max_waiting", "answers in line; more are refused with 429"),
        ("--max-tokens", "max_tokens", "longest answer"),
        ("--deadline", "deadline", "seconds that a request may take"),
    ):
        default = getattr(ServeConfig, field)
        limits.add_argument(
            flag, type=type(default), default=default, metavar="N", help=f"{text} (default: {default:g})"
        )


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    config = ServeConfig(
        host=args.host, port=args.port, adapter_dir=args.adapter_dir,
        max_rows=args.max_rows, max_adapters=args.max_adapters,
        max_waiting=args.max_waiting, max_tokens=args.max_tokens, deadline=args.deadline,
        api_keys=_keys(args.api_key_file, "LLAMA_ADAPTER_API_KEY"),
        admin_key=_admin_key(args.admin_key_file),
    )  # fmt: skip
    if config.adapter_dir is not None and not os.path.isdir(config.adapter_dir):
        raise ConfigError(f"--adapter-dir {config.adapter_dir} is no folder: give one whose subfolders are adapters.")
    adapters = options.name_adapters(args.adapter)
    _check_names(adapters, config.adapter_dir)
    if args.backend == "vllm":
        _become_vllm(args, config)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(str(error.name), "serve", "serve") from None
    from llama_adapter.serving.run import bind, serve

    with bind(config) as listening:  # before the base is read: a port in use is said at once
        planned = options.plan(args)
        base = args.served_model_name or planned.model
        _check_base_name(base, adapters, config.adapter_dir)
        session = options.load(planned, args)
        serve(session, config, listening, base, adapters, lambda url: print(f"listening on {url}", file=sys.stderr))


NOT_VLLMS = (
    "tower", "template", "load_in_4bit", "load_in_8bit", "base_precision", "max_adapters", "max_waiting", "max_tokens",
    "deadline",
)  # fmt: skip
"""Flags that vLLM has no like for."""
VLLM_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}


def _become_vllm(args: argparse.Namespace, config: ServeConfig) -> None:
    """Check everything, then let vLLM's own server take the place of this process.

    Raises:
        ConfigError: a flag that vLLM has no like for, or several keys.
        LlamaAdapterError: see `serving.vllm_plugin.launch.command`.
    """
    from llama_adapter.cli import build_parser
    from llama_adapter.serving.vllm_plugin.launch import command, environment

    default = build_parser(["serve"]).parse_args(["serve"])
    for name in NOT_VLLMS:
        if getattr(args, name) != getattr(default, name):
            raise ConfigError(f"--{name.replace('_', '-')} has no effect with --backend vllm: leave it out.")
    if config.admin_key is not None:
        raise ConfigError("--backend vllm knows no admin key, and takes orders from whoever may ask: leave it out.")
    if len(config.api_keys) > 1:
        raise ConfigError("--backend vllm takes one API key: write one into the file.")
    planned = options.plan(args)
    line = command(
        planned.model, planned.folders, adapter_dir=args.adapter_dir, host=args.host, port=args.port,
        served_model_name=args.served_model_name,
        options=["--dtype", VLLM_DTYPES[args.precision], "--max-num-seqs", str(args.max_rows)],
    )  # fmt: skip
    from llama_adapter.serving.run import bind

    bind(config).close()  # a port in use is said here
    keys = {"VLLM_API_KEY": config.api_keys[0]} if config.api_keys else {}
    sys.stderr.flush()
    os.execve(line[0], line, {**os.environ, **environment(args.adapter_dir), **keys})


def _check_names(adapters: Mapping[str, str], directory: str | None) -> None:
    """Check that no adapter hides another of that name in the directory.

    Raises:
        ConfigError: one does.
    """
    for name, folder in adapters.items():
        beside = os.path.join(directory or "", name)
        if directory is None or not os.path.isfile(os.path.join(beside, "adapter_config.json")):
            continue
        if os.path.realpath(beside) != os.path.realpath(folder):
            raise ConfigError(
                f"Two adapters are called '{name}', {folder} and {beside}: give the first a name of its own, "
                f"--adapter NAME={folder}."
            )


def _check_base_name(base: str, adapters: Mapping[str, str], directory: str | None) -> None:
    """Check that no adapter is called as the base, which requests could not tell apart.

    Raises:
        ConfigError: one is.
    """
    beside = directory is not None and os.path.isfile(os.path.join(directory, base, "adapter_config.json"))
    if base in adapters or (beside and os.path.basename(base) == base):
        raise ConfigError(
            f"Both an adapter and the bare base are called '{base}': rename the adapter, or name the base with "
            "--served-model-name."
        )


def _admin_key(file: str | None) -> str | None:
    keys = _keys(file, "LLAMA_ADAPTER_ADMIN_KEY")
    if len(keys) > 1:
        raise ConfigError(f"Admin key file {file} has {len(keys)} keys, and one opens administration: leave one.")
    return keys[0] if keys else None


def _keys(file: str | None, variable: str) -> tuple[str, ...]:
    """The keys of a file, or of an environment variable: never of a flag, which every user of the machine can read.

    Raises:
        ConfigError: the file cannot be read or has no key, or the variable is there and empty: a server without a key
            is open to all.
    """
    if file is None:
        key = os.environ.get(variable)
        if key is not None and not key.strip():
            raise ConfigError(f"{variable} is set and empty: write a key into it, or unset it to ask for none.")
        return () if key is None else (key.strip(),)
    try:
        with open(os.path.expanduser(file), encoding="utf-8-sig") as opened:
            keys = tuple(line.strip() for line in opened if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"Key file {file} cannot be read ({reason}): write one key a line.") from None
    if not keys:
        raise ConfigError(f"Key file {file} is empty: write one key a line.")
    return keys
