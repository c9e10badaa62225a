from pathlib import Path

import pytest

from bluejay.errors import ConfigError
from bluejay.settings import Settings, load_settings, load_table, without_password


def test_flags_go_before_environment_before_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('model = "from-file"\ndtype = "bfloat16"\ndevice = "cpu"\nthreads = 3\n')
    environ = {"BLUEJAY_CONFIG": str(file), "BLUEJAY_DTYPE": "float16", "BLUEJAY_DEVICE": "cuda:1"}
    settings = load_settings({"device": "cuda", "model": None}, environ)
    assert settings == Settings(model="from-file", dtype="float16", device="cuda", threads=3)


def test_without_anything_there_are_defaults(tmp_path: Path) -> None:
    assert load_settings(environ={"XDG_CONFIG_HOME": str(tmp_path)}) == Settings()


def test_the_home_of_the_file_is_xdg(tmp_path: Path) -> None:
    (tmp_path / "bluejay").mkdir()
    (tmp_path / "bluejay" / "config.toml").write_text("threads = 2\n")
    assert load_settings(environ={"XDG_CONFIG_HOME": str(tmp_path)}).threads == 2


def test_all_that_is_wrong_is_said_with_its_source(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("modle = 1\nthreads = true\n")
    with pytest.raises(ConfigError) as caught:
        load_settings({"dtype": "int3"}, {"BLUEJAY_CONFIG": str(file), "BLUEJAY_DEVICE": "tpu"})
    for part in (f"{file}: unknown setting modle", "threads is True", "--dtype: dtype is 'int3'", "BLUEJAY_DEVICE"):
        assert part in str(caught.value)


@pytest.mark.parametrize("content", ["threads =", "\x00"])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load_settings(environ={"BLUEJAY_CONFIG": str(file)})


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="BLUEJAY_CONFIG"):
        load_settings(environ={"BLUEJAY_CONFIG": str(tmp_path / "none.toml")})


def test_tables_are_left_to_those_who_know_them(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    environ = {"BLUEJAY_CONFIG": str(file)}
    file.write_text("threads = 2\n[plans.free]\npriority = 3\n")
    assert load_settings(environ=environ).threads == 2
    assert load_table("plans", environ) == {"free": {"priority": 3}}
    file.write_text("plans = 3\n")
    with pytest.raises(ConfigError, match=r"plans is 3, expected a table \[plans\]"):
        load_table("plans", environ)
    assert load_table("plans", {"XDG_CONFIG_HOME": str(tmp_path)}) == {}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("", ""),
        ("sqlite:////var/lib/a.db", "sqlite:////var/lib/a.db"),
        ("postgresql://me:p@ss/w?rd@host/db?password=x", "postgresql://***@host/db?***"),
        ("postgresql://host/db", "postgresql://host/db"),
    ],
)
def test_passwords_in_urls_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown
