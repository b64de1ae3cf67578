"""Laws of the settings: each has a flag and a variable, and whatever is wrong is told in one line."""

import re
from pathlib import Path
from typing import Any

import pytest

from server.help import GROUPS
from server.settings import PREFIX, RENAMED, Settings, parse
from server.version import VERSION

VALUES: dict[str, tuple[str, Any]] = {
    "stored_responses_mib": ("64", 64.0),
    "stored_responses_s": ("60", 60.0),
    "model": ("/models/some", "/models/some"),
    "name": ("one, org/two", ("one", "org/two")),
    "load_format": ("gguf", "gguf"),
    "device": ("cuda:1", "cuda:1"),
    "dtype": ("float16", "float16"),
    "quantization": ("fp8", "fp8"),
    "max_gap_ms": ("50", 50.0),
    "context_window": ("2048", 2048),
    "trust_remote_code": ("true", True),
    "cache_dir": ("/somewhere", Path("/somewhere")),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("8000", 8000),
    "api_keys": ("a,b", ("a", "b")),
    "api_keys_file": ("keys", Path("keys")),
    "allowed_hosts": ("a.example,b", ("a.example", "b")),
    "admin_keys": ("key-1,key-2", ("key-1", "key-2")),
    "cors_origins": ("*", ("*",)),
    "page": ("false", False),
    "max_batch_size": ("7", 7),
    "batch_window_ms": ("2.5", 2.5),
    "token_budget": ("4096", 4096),
    "engine": ("packed", "packed"),
    "gpu_memory_utilization": ("0.5", 0.5),
    "prefill_chunk": ("512", 512),
    "speculation": ("5", 5),
    "prefix_sharing": ("key", "key"),
    "batch_invariant": ("true", True),
    "queue_size": ("9", 9),
    "key_queue_size": ("5", 5),
    "key_queue_tokens": ("9000", 9000),
    "unknown_fields": ("refuse", "refuse"),
    "default_max_tokens": ("64", 64),
    "max_output_tokens": ("512", 512),
    "generation_config": ("openai", "openai"),
    "thinking": ("true", True),
    "request_timeout_s": ("12.5", 12.5),
    "drain_timeout_s": ("0", 0.0),
    "watchdog_s": ("20", 20.0),
    "send_timeout_s": ("7.5", 7.5),
    "first_byte_s": ("2.5", 2.5),
    "keep_alive_s": ("75", 75.0),
    "max_connections": ("512", 512),
    "max_body_mib": ("0.5", 0.5),
    "max_bodies_mib": ("64", 64.0),
    "log_format": ("json", "json"),
    "log_level": ("warning", "warning"),
    "otlp_endpoint": ("http://localhost:4318/v1/traces", "http://localhost:4318/v1/traces"),
}
"""For each setting a text that is not its default, and what it means."""


@pytest.fixture(autouse=True)
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("somebody secret")
    monkeypatch.chdir(tmp_path)


def set_what_it_needs(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if field == "admin_keys":
        monkeypatch.setenv(variable("api_keys"), "a,b")


def flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def variable(field: str) -> str:
    return PREFIX + field.upper()


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a bad command line ends with."""
    with pytest.raises(SystemExit) as caught:
        parse(list(arguments))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"microbatch: [^\n]+\n", captured.err), captured.err
    return captured.err


def test_this_file_knows_every_setting() -> None:
    assert set(VALUES) == set(Settings.model_fields)


@pytest.mark.parametrize("field", VALUES)
def test_a_setting_has_a_flag(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_what_it_needs(field, monkeypatch)
    text, value = VALUES[field]
    switches = {True: flag(field), False: flag(f"no_{field}")}
    arguments = [switches[value]] if isinstance(value, bool) else [flag(field), text]
    assert getattr(parse(arguments), field) == value != getattr(parse([]), field)


@pytest.mark.parametrize("field", VALUES)
def test_a_setting_has_a_variable(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = VALUES[field]
    set_what_it_needs(field, monkeypatch)
    monkeypatch.setenv(variable(field), text)
    assert getattr(parse([]), field) == value


@pytest.mark.parametrize("field", VALUES)
def test_an_empty_variable_is_as_good_as_none(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    default = getattr(parse([]), field)
    monkeypatch.setenv(variable(field), "")
    assert getattr(parse([]), field) == default


@pytest.mark.parametrize("flags", [["--port", "1"], ["--port=1"], ["--no-page", "--port", "1"]])
def test_the_model_may_come_first_or_last_without_its_flag_but_not_twice(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["/models/some", *flags], [*flags, "/models/some"]):
        assert parse(arguments) == parse(["--model", "/models/some", *flags])
    for model in (["--model", "two"], ["--model=two"]):
        assert "named twice" in told(capsys, "one", *model)
        assert "named twice" in told(capsys, *model, "one")


def test_an_admin_s_key_must_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--api-keys-file", "keys", "--admin-keys", "somebody"]).admin_keys == ("somebody",)
    assert "nobody" in told(capsys, "--api-keys-file", "keys", "--admin-keys", "nobody")
    assert "nobody" in told(capsys, "--admin-keys", "nobody")  # else a forgotten file of keys leaves the service open


def test_origins_and_hosts_that_no_browser_sends_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for origin in ("app.example", "localhost:3000", "https://app.example/chat", "https://*.app.example", "http://a:*"):
        assert "is not an origin" in told(capsys, "--cors-origins", f"https://fine.example,{origin}")
    sent = (
        "https://App.example/,http://localhost:3000,tauri://localhost,null,*,https://a:443,http://[::1]:80,http://b:443"
    )
    expected = ("https://app.example", "http://localhost:3000", "tauri://localhost", "null", "*")
    ports = ("https://a", "http://[::1]", "http://b:443")
    assert parse(["--cors-origins", sent]).cors_origins == expected + ports
    for host in ("https://chat.example", "chat.example/v1", "*.chat.example"):
        assert "is not a host name" in told(capsys, "--allowed-hosts", f"fine.example:8443,[::1]:1,*,{host}")


def test_a_flag_beats_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROBATCH_PORT", "1111")
    monkeypatch.setenv("MICROBATCH_THINKING", "true")
    assert (parse([]).port, parse([]).thinking) == (1111, True)
    settings = parse(["--port", "2222", "--no-thinking"])
    assert (settings.port, settings.thinking) == (2222, False)


@pytest.mark.parametrize("old", RENAMED)
def test_a_former_flag_still_works_and_is_warned_about_once(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, value = VALUES[RENAMED[old]]
    for arguments in ([flag(old), text], [f"{flag(old)}={text}"], [flag(old), "1", flag(old), text]):
        assert getattr(parse(arguments), RENAMED[old]) == value
        assert capsys.readouterr().err == f"microbatch: {flag(old)} is now called {flag(RENAMED[old])}\n"


@pytest.mark.parametrize("old", RENAMED)
def test_a_former_variable_still_works_below_flags_and_the_present_variable(
    old: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new, (text, value) = RENAMED[old], VALUES[RENAMED[old]]
    monkeypatch.setenv(variable(old), text)
    assert getattr(parse([]), new) == value
    assert capsys.readouterr().err == f"microbatch: {variable(old)} is now called {variable(new)}\n"
    half = type(value)(value / 2)
    assert getattr(parse([flag(new), str(half)]), new) == half
    monkeypatch.setenv(variable(new), str(half))
    assert getattr(parse([]), new) == half


@pytest.mark.parametrize("old", RENAMED)
def test_a_former_variable_counts_in_any_case(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new, (text, value) = RENAMED[old], VALUES[RENAMED[old]]
    monkeypatch.setenv(variable(old).lower(), text)
    assert getattr(parse([]), new) == value


def test_help_does_not_speak_of_former_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert not [old for old in RENAMED if flag(old) in capsys.readouterr().out]


def test_help_has_one_line_for_every_flag_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    for field, info in Settings.model_fields.items():
        name = flag(field).removeprefix("--")
        [line] = [line for line in lines if re.match(rf"  --(\[no-\])?{name} ", line)]
        assert info.description is not None
        assert info.description.partition(";")[0] in line
        assert ("[no-]" in line) == (info.annotation is bool)


def test_help_has_groups_and_says_where_else_settings_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], "microbatch serve")
    text = capsys.readouterr().out
    assert text.startswith("usage: microbatch serve [MODEL] [flags]\n")
    titles = re.findall(r"\n\n([A-Z][^\n]+)\n  --", text)
    assert titles == list(GROUPS.values())
    assert "MICROBATCH_PORT" in text


def test_an_env_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("MICROBATCH_PORT=1111\n")
    monkeypatch.chdir(tmp_path)
    assert parse([]).port == Settings.model_fields["port"].default


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"microbatch {VERSION}\n"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--nope"], "--nope"),
        (["--nope=1"], "--nope"),
        (["--po", "5"], "--po"),
        (["model", "word"], "word"),
        (["--port"], "--port"),
        (["--thinking=maybe"], "--thinking"),
    ],
)
def test_an_unknown_flag_is_told(arguments: list[str], names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert names in told(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--api-keys", ""], "--api-keys"),
        (["--port", "1", "--api-keys=", "--name", "x"], "--api-keys"),
        (["--model", "", "--port", "1"], "--model"),
        ([""], "--model"),
    ],
)
def test_an_empty_value_is_not_taken_for_none(
    arguments: list[str], names: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert names in told(capsys, *arguments)
    monkeypatch.setenv("MICROBATCH_API_KEYS", "secret")
    assert names in told(capsys, *arguments)


@pytest.mark.parametrize("text", [",", " , ", " "])
def test_keys_that_are_asked_for_and_not_there_do_not_open_the_service(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "api-keys" in told(capsys, "--api-keys", text)
    monkeypatch.setenv("MICROBATCH_API_KEYS", text)
    assert "api-keys" in told(capsys)


@pytest.mark.parametrize("name", ["MICROBATCH_NOPE", "microbatch_nope", "MICROBATCH_PORTS", "MICROBATCH_"])
def test_an_unknown_variable_is_told(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "1")
    assert name in told(capsys)


MALFORMED = {
    "load_format": ["onnx"],
    "dtype": ["int8"],
    "quantization": ["int3"],
    "max_gap_ms": ["0", "nan", "fast"],
    "context_window": ["0", "15", "many"],
    "port": ["-1", "65536", "http", "1.5"],
    "max_batch_size": ["0", "1025", "x"],
    "batch_window_ms": ["-1", "nan", "inf", "10001"],
    "token_budget": ["0"],
    "queue_size": ["0", "-1"],
    "default_max_tokens": ["-1", "x"],
    "max_output_tokens": ["0"],
    "generation_config": ["vllm"],
    "request_timeout_s": ["0", "-1", "nan", "inf"],
    "drain_timeout_s": ["-1", "nan", "inf"],
    "send_timeout_s": ["0", "nan", "inf"],
    "max_body_mib": ["0", "nan", "inf"],
    "log_format": ["xml"],
    "log_level": ["loud"],
}


@pytest.mark.parametrize(("field", "text"), [(field, text) for field, texts in MALFORMED.items() for text in texts])
def test_a_malformed_value_is_told_with_its_setting(
    field: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = field.replace("_", "-")
    assert name in told(capsys, f"{flag(field)}={text}")
    monkeypatch.setenv(variable(field), text)
    assert name in told(capsys)


@pytest.mark.parametrize("field", ["trust_remote_code", "thinking"])
def test_a_variable_that_is_no_switch_is_told(
    field: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable(field), "perhaps")
    assert field.replace("_", "-") in told(capsys)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--default-max-tokens", "10", "--max-output-tokens", "9"], ["default-max-tokens", "max-output-tokens"]),
        (["--load-format", "dummy"], ["load-format", "model"]),
        (["--max-gap-ms", "50", "--batch-invariant"], ["max-gap-ms", "batch-invariant"]),
        (["--max-gap-ms", "50", "--engine", "generate"], ["max-gap-ms", "engine"]),
        (["--context-window", "100", "--token-budget", "99"], ["context-window", "token-budget"]),
    ],
)
def test_settings_that_contradict_each_other_are_told(
    arguments: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = told(capsys, *arguments)
    assert all(name in line for name in names)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse([]).port = 1


def test_keys_are_not_shown() -> None:
    assert "hush" not in repr(parse(["--api-keys", "hush"]))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ("smollm2-135m-instruct",)),
        (["--model", "/models/Qwen3-4B/"], ("Qwen3-4B",)),
        (["--model", "Qwen/Qwen3-4B"], ("Qwen3-4B",)),
        (["--model", "/models/Qwen3-4B", "--name", "a,b"], ("a", "b")),
    ],
)
def test_the_model_has_its_folder_s_name_unless_it_is_given_others(
    arguments: list[str], names: tuple[str, ...]
) -> None:
    assert parse(arguments).served_names == names


@pytest.mark.parametrize(("given", "name"), [("model.gguf", "model.gguf"), (".", "here"), ("sub/..", "here")])
def test_a_model_that_is_a_link_has_the_link_s_name(
    given: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As files in the hub's cache are links to others that are named by their hashes."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model.gguf").symlink_to(tmp_path / "0123")
    monkeypatch.chdir(tmp_path / "here")
    assert parse(["--model", given]).served_names == (name,)


@pytest.mark.parametrize(("given", "limit"), [("0", "greater than or equal to 1"), ("9", "less than or equal to 7")])
def test_a_number_of_tokens_out_of_range_is_told_its_range(
    given: str, limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = told(capsys, "--speculation", given)
    assert line.startswith("microbatch: speculation: ")
    assert "'auto' or 'off'" in line
    assert limit in line


@pytest.mark.parametrize(("given", "drafted"), [("auto", None), ("off", 0), ("5", 5)])
def test_speculation_is_a_number_of_tokens(given: str, drafted: int | None) -> None:
    assert parse(["--speculation", given]).max_draft_tokens == drafted
