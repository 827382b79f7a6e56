import dataclasses
import re
from pathlib import Path

import pytest

from dpq_rec.errors import ConfigError
from service.settings import Settings, read_settings


def test_read_settings_has_the_contracts_defaults():
    settings = read_settings(["--artifact", "a"], {})
    assert (settings.artifact, settings.http_port, settings.grpc_port, settings.max_ids) == (
        Path("a"),
        8080,
        8081,
        65_536,
    )
    assert settings.api_key is None


def test_read_settings_takes_every_setting_from_the_environment():
    values = {
        "artifact": "a", "host": "::", "http_port": "1", "grpc_port": "2", "workers": "3", "threads": "4",
        "max_ids": "5", "max_queries": "8", "max_body_bytes": "6", "max_in_flight": "7", "max_connections": "10",
        "max_calls": "11", "min_ping_seconds": "0.25", "send_seconds": "1.5",
        "api_key": "k", "drain_seconds": "0.5", "stop_seconds": "9", "hang_seconds": "40",
        "log_level": "debug",
    }  # fmt: skip
    settings = read_settings([], {f"DPQ_{name.upper()}": text for name, text in values.items()})
    assert {name: str(value) for name, value in dataclasses.asdict(settings).items()} == {
        **values,
        "stop_seconds": "9.0",
        "hang_seconds": "40.0",
    }


def test_read_settings_lets_the_flag_win_over_the_environment():
    settings = read_settings(["--artifact", "a", "--http-port", "1"], {"DPQ_HTTP_PORT": "2", "DPQ_WORKERS": "5"})
    assert (settings.http_port, settings.workers) == (1, 5)


@pytest.mark.parametrize(
    ("argv", "environment", "said"),
    [
        ([], {}, "Missing from python -m service: --artifact PATH"),
        (["--artifact", "a", "--http-port", "x"], {}, "Error parsing --http-port: invalid literal for int()"),
        (["--artifact", "a"], {"DPQ_DRAIN_SECONDS": "x"}, "--drain-seconds: could not convert string to float: 'x'"),
        (["--artifact", "a"], {"DPQ_DRAIN_SECONDS": "x"}, "set in the environment: DPQ_DRAIN_SECONDS"),
        (["--artifact", "a", "--http-port", "65536"], {}, "http_port: got 65536, want 0 to 65535"),
        (["--artifact", "a", "--http-port", "1", "--grpc-port", "1"], {}, "grpc_port: got 1, the HTTP port"),
        (["--artifact", "a", "--host", ""], {}, "host: got '', want a name or an address"),
        (["--artifact", "a"], {"DPQ_HOST": ""}, "host: got ''"),
        (["--artifact", "a", "--host", " "], {}, "host: got ' '"),
        (["--artifact", "a", "--host", "[::1]"], {}, "host: got '[::1]', want a name or an address, one of IPv6"),
        (["--artifact", "a", "--max-calls", "0"], {}, "max_calls: got 0"),
        (["--artifact", "a", "--min-ping-seconds", "-1"], {}, "min_ping_seconds: got -1"),
        (["--artifact", "a", "--send-seconds", "inf"], {}, "send_seconds: got inf"),
        (["--artifact", "a", "--workers", "0"], {}, "workers: got 0, want 1 or more"),
        (["--artifact", "a", "--max-body-bytes", "0"], {}, "max_body_bytes: got 0"),
        (["--artifact", "a", "--drain-seconds", "nan"], {}, "drain_seconds: got nan"),
        (["--artifact", "a", "--log-level", "loud"], {}, "invalid choice 'loud' for argument '--log-level'"),
        (["--artifact", "a"], {"DPQ_API_KEY": ""}, "api_key: want one or more printable ASCII"),
        (["--artifact", "a"], {"DPQ_API_KEY": "secret "}, "api_key: got a blank at its start or end"),
        (["--artifact", "a", "--api-key", " secret"], {}, "api_key: got a blank at its start or end"),
        (["--artifact", "a"], {"DPQ_API_KEY": "secret\n"}, "api_key: want one or more printable ASCII"),
        (["--artifact", "a", "--hang-seconds", "1"], {}, "hang_seconds: got 1.0, want 2 to 86400"),
        (["--artifact", "a", "--nope"], {}, "Unrecognized options: --nope"),
    ],
)
def test_read_settings_exits_2_and_says_what_is_wrong(argv, environment, said, capsys):
    with pytest.raises(SystemExit) as exit_info:
        read_settings(argv, environment)
    assert exit_info.value.code == 2
    assert said in " ".join(re.sub(r"[^ -~]", " ", capsys.readouterr().err).split())  # without its frame


def test_read_settings_takes_none_for_a_key():
    assert read_settings(["--artifact", "a", "--api-key", "None"], {}).api_key == "None"


def test_read_settings_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as exit_info:
        read_settings(["--help"], {})
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')} " in shown for field in dataclasses.fields(Settings))


def test_readme_names_every_flag_and_its_variable():
    readme = (Path(__file__).parents[2] / "service" / "README.md").read_text()
    for field in dataclasses.fields(Settings):
        assert f"`--{field.name.replace('_', '-')}" in readme
        assert f"`DPQ_{field.name.upper()}`" in readme


def test_settings_do_not_show_the_api_key():
    assert "secret" not in repr(Settings(artifact=Path("a"), api_key="secret"))


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings(artifact=Path("a")).workers = 3


def test_settings_body_limit_fits_the_ids_that_are_allowed():
    assert Settings(artifact=Path("a"), max_ids=1_000_000).body_limit_bytes == 64_000_000
    assert Settings(artifact=Path("a"), max_ids=1).body_limit_bytes == 1 << 20
    assert Settings(artifact=Path("a"), max_ids=1, max_body_bytes=10).body_limit_bytes == 10


def test_settings_check_themselves():
    with pytest.raises(ConfigError, match="threads: got 0, want 1 or more"):
        Settings(artifact=Path("a"), threads=0)
