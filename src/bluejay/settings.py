"""Settings that outlive one command: flags > environment (BLUEJAY_*) > TOML file > default. Read once, then frozen.

The TOML file is $BLUEJAY_CONFIG, or bluejay/config.toml in $XDG_CONFIG_HOME (~/.config):

    model = "gpt-j-6b"
    device = "cuda"
    dtype = "bfloat16"
    threads = 8
    database = "postgresql://bluejay:password@host/bluejay"

    [plans.free]                     # tables belong to the rooms that know what may be in them: `load_table`
    requests_per_day = 100
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bluejay.errors import ConfigError

TABLES = ("server", "engine", "models", "plans", "filters")  # of the server, which reads them itself
DEVICES = "auto, cpu, cuda, cuda:1, mps"
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "int4")


@dataclass(frozen=True)
class Settings:
    """What a command uses where it is not told otherwise.

    Attributes:
        model: path, hub name, or "default" for the model in the package.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto", "float32", "bfloat16", "float16"; "int8" and "int4" on the CPU.
        threads: CPU threads; 0 is as many as the machine, or the container's share of it, is good for.
        database: where accounts and usage are kept: sqlite:///path or postgresql://…; "" is a file of Bluejay's own.
    """

    model: str = "default"
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    database: str = ""


def load_settings(flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Gather the settings.

    Args:
        flags: what the command line gave; None values count as not given.
        environ: the environment, os.environ where None.
    Raises: ConfigError with every wrong or unknown setting at once, and where it came from.
    """
    return Settings(**{name: value for name, (value, _) in explain_settings(flags, environ).items()})


def explain_settings(
    flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> dict[str, tuple[Any, str]]:
    """Each setting's value and where it comes from: a flag, a variable, the file's path or "default".

    Args and Raises: as `load_settings`.
    """
    environ = os.environ if environ is None else environ
    known = {f.name: (f.default, "default") for f in fields(Settings)}
    path = settings_file(environ)
    written = {key: value for key, value in _read(path, environ).items() if key not in TABLES}
    values: dict[str, tuple[Any, str]] = {key: (value, str(path)) for key, value in written.items()}
    for name in known:
        if text := environ.get(f"BLUEJAY_{name.upper()}"):
            values[name] = (text, f"BLUEJAY_{name.upper()}")
    values |= {key: (value, f"--{key}") for key, value in (flags or {}).items() if value is not None}
    problems = [f"{source}: unknown setting {key}" for key, (_, source) in values.items() if key not in known]
    checked = {key: (_checked(key, *values[key], problems), values[key][1]) for key in known if key in values}
    if problems:
        raise ConfigError("; ".join(problems))
    return known | checked


def load_table(name: str, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """One of the settings file's `TABLES`, as it stands there; empty where it does not.

    Raises: ConfigError if the file cannot be read, or if what it has by that name is no table.
    """
    environ = os.environ if environ is None else environ
    path = settings_file(environ)
    table = _read(path, environ).get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {name} is {table!r}, expected a table [{name}]")
    return table


def without_password(url: str) -> str:
    """The URL as it may be shown: *** for user, password and options, one of which may be a password too."""
    shown = re.sub(r"//.*@", "//***@", url)
    return re.sub(r"\?.*", "?***", shown)


def settings_file(environ: Mapping[str, str] | None = None) -> Path:
    """Where the settings file is looked for; it need not be there."""
    environ = os.environ if environ is None else environ
    if explicit := environ.get("BLUEJAY_CONFIG"):
        return Path(explicit)
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "bluejay" / "config.toml"


def _read(path: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if environ.get("BLUEJAY_CONFIG"):
            raise ConfigError(f"{path}: no such file, named by BLUEJAY_CONFIG") from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None


def _checked(name: str, value: Any, source: str, problems: list[str]) -> Any:
    if name == "threads":
        try:
            count = int(value)
        except (TypeError, ValueError):
            count = -1
        if isinstance(value, bool) or not 0 <= count <= 1024:
            problems.append(f"{source}: threads is {value!r}, expected a whole number from 0 (automatic) to 1024")
        return count
    if not isinstance(value, str) or not (value or name == "database"):
        problems.append(f"{source}: {name} is {value!r}, expected a text")
    elif name == "dtype" and value not in DTYPES:
        problems.append(f"{source}: dtype is {value!r}, expected one of {', '.join(DTYPES)}")
    elif name == "device" and not _is_device(value):
        problems.append(f"{source}: device is {value!r}, expected one of {DEVICES}")
    return value


def _is_device(value: str) -> bool:
    return re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", value) is not None
