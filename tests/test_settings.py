"""Settings: the order of the sources, what each one rejects, and the docs table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mimo_local.errors import UsageError
from mimo_local.settings import OPTIONS, Paths, Settings, describe, variable

DOCS = Path(__file__).parent.parent / "docs" / "settings.md"

# One value per setting and source: (config.toml text, its value, variable text, its value, flag).
VALUES = {
    "model": ('"/a"', Path("/a"), "/b", Path("/b"), Path("/c")),
    "context": ("100", 100, "200", 200, 300),
    "threads": ("1", 1, "2", 2, 3),
    "ram": ('"48GB"', 48 * 10**9, "32 GiB", 32 << 30, 10**9),
    "device": ('"cpu"', "cpu", "cuda", "cuda", "auto"),
    "vram": ("0", 0, "12GB", 12 * 10**9, 10**9),
    "prefetch": ('"on"', "on", "off", "off", "auto"),
    "draft": ('"on"', "on", "off", "off", "auto"),
    "kv_dtype": ('"f32"', "f32", "int8", "int8", "auto"),
    "sessions_size": ("0", 0, "20GB", 20 * 10**9, 10**9),
    "window": ("5", 5, "6", 6, 7),
    "preset": ('"code"', "code", "math", "math", "agent"),
    "temperature": ("0", 0.0, "0.5", 0.5, 1.5),
    "top_p": ("0.1", 0.1, "0.2", 0.2, 0.3),
    "top_k": ("0", 0, "2", 2, 3),
    "min_p": ("0", 0.0, "0.2", 0.2, 0.3),
    "repetition_penalty": ("1", 1.0, "1.2", 1.2, 1.3),
    "presence_penalty": ("-1", -1.0, "0.5", 0.5, 2.0),
    "frequency_penalty": ("0", 0.0, "0.5", 0.5, -2.0),
    "max_tokens": ("1", 1, "2", 2, 3),
    "seed": ("0", 0, "2", 2, 3),
    "system": ('"x"', "x", "y", "y", "z"),
    "think": ("true", True, "0", False, True),
    "history": ("false", False, "1", True, False),
    "remote": ('"http://a:1/"', "http://a:1", "https://b/v1", "https://b/v1", "http://[::1]:8000"),
    "remote_model": ('"x"', "x", "y", "y", "z"),
}


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "config", tmp_path / "data", tmp_path / "cache")


def write(paths: Paths, text: str) -> None:
    paths.config_dir.mkdir(parents=True, exist_ok=True)
    paths.config_file.write_text(text, encoding="utf-8")


def test_the_table_of_this_test_is_complete() -> None:
    assert set(VALUES) == set(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_source_beats_the_one_below_and_says_so(name: str, paths: Paths) -> None:
    toml, from_file, text, from_env, flag = VALUES[name]
    default = Settings.resolve(paths=paths, env={})
    assert default.origin[name] == "default"
    write(paths, f"{name} = {toml}\n")
    settings = Settings.resolve(paths=paths, env={})
    assert getattr(settings, name) == from_file
    assert settings.origin[name] == str(paths.config_file)
    env = {variable(name): text}
    settings = Settings.resolve(paths=paths, env=env)
    assert (getattr(settings, name), settings.origin[name]) == (from_env, variable(name))
    settings = Settings.resolve(paths=paths, env=env, **{name: flag})
    assert (getattr(settings, name), settings.origin[name]) == (flag, "flag")
    others = set(OPTIONS) - {name}
    assert all(getattr(settings, o) == getattr(default, o) for o in others)
    assert all(settings.origin[o] == "default" for o in others)


def test_a_flag_that_was_not_typed_and_an_empty_variable_say_nothing(paths: Paths) -> None:
    settings = Settings.resolve(paths=paths, env={"MIMO_TOP_P": ""}, top_p=None, model=None)
    assert settings == Settings()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("context", "15"),
        ("context", "true"),
        ("context", "1.5"),
        ("context", '"many"'),
        ("threads", "0"),
        ("kv_dtype", '"f16"'),
        ("ram", "0"),
        ("ram", '"much"'),
        ("ram", '"8iB"'),
        ("prefetch", "1"),
        ("draft", "3"),
        ("device", '"gpu"'),
        ("window", "0"),
        ("temperature", "-0.1"),
        ("temperature", "nan"),
        ("temperature", "false"),
        ("top_p", "0"),
        ("top_p", "1.01"),
        ("top_k", "-1"),
        ("min_p", "[1]"),
        ("repetition_penalty", "0"),
        ("repetition_penalty", "inf"),
        ("presence_penalty", "2.1"),
        ("frequency_penalty", "nan"),
        ("max_tokens", "0"),
        ("seed", "-1"),
        ("system", "3"),
        ("think", '"maybe"'),
        ("model", '""'),
        ("history", '"perhaps"'),
        ("remote", '"10.0.0.5:8000"'),
        ("remote", '"ftp://a"'),
        ("remote", '"http://:80"'),
        ("remote", '"http://a:99999"'),
        ("remote", '"http://user:secret@a"'),
        ("remote", '"http://a/?key=secret"'),
        ("remote_model", "1"),
    ],
)
def test_a_bad_value_names_file_key_and_value(name: str, bad: str, paths: Paths) -> None:
    write(paths, f"{name} = {bad}\n")
    with pytest.raises(UsageError) as caught:
        Settings.resolve(paths=paths, env={})
    assert str(paths.config_file) in str(caught.value)
    assert f"`{name}`" in str(caught.value)
    assert describe(name) in caught.value.hint


@pytest.mark.parametrize("address", ["http://user:s3cret@a", "https://a/v1?key=s3cret"])
def test_a_secret_in_an_address_is_refused_and_not_shown(address: str, paths: Paths) -> None:
    with pytest.raises(UsageError) as caught:
        Settings.resolve(paths=paths, env={"MIMO_REMOTE": address})
    assert "s3cret" not in str(caught.value) + caught.value.hint
    assert "MIMO_REMOTE_KEY" in str(caught.value)


def test_off_is_no_address_and_beats_the_file(paths: Paths) -> None:
    write(paths, 'remote = "http://a"\n')
    assert not Settings.resolve(paths=paths, env={}, remote="off").remote


@pytest.mark.parametrize(
    ("name", "bad"), [("context", "12k"), ("top_p", """ "x" """), ("seed", "-")]
)
def test_a_bad_variable_names_itself(name: str, bad: str, paths: Paths) -> None:
    with pytest.raises(UsageError, match=variable(name)):
        Settings.resolve(paths=paths, env={variable(name): bad})


def test_a_bad_flag_names_itself(paths: Paths) -> None:
    with pytest.raises(UsageError, match=r"--top-p is '3'"):
        Settings.resolve(paths=paths, env={}, top_p=3)


def test_unknown_keys_broken_toml_and_unreadable_files_are_told(paths: Paths) -> None:
    write(paths, "top-p = 0.5\n")
    with pytest.raises(UsageError, match="no setting `top-p`") as caught:
        Settings.resolve(paths=paths, env={})
    assert "top_p" in caught.value.hint
    write(paths, "zzz = 1\n")
    with pytest.raises(UsageError, match=str(paths.config_file)) as caught:
        Settings.resolve(paths=paths, env={})
    assert all(name in caught.value.hint for name in OPTIONS)
    write(paths, "top_p 0.5\n")
    with pytest.raises(UsageError, match="not valid TOML"):
        Settings.resolve(paths=paths, env={})
    paths.config_file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        Settings.resolve(paths=paths, env={})


def test_mimo_home_moves_every_folder(tmp_path: Path) -> None:
    moved = Paths.default({"MIMO_HOME": str(tmp_path)})
    for folder in (moved.config_dir, moved.data_dir, moved.cache_dir):
        assert folder.parent == tmp_path
    usual = Paths.default({})
    assert "mimo-local" in str(usual.config_dir)
    assert len({usual.config_dir, usual.cache_dir}) == 2


def test_packs_are_found_by_name_and_only_when_finished(paths: Paths) -> None:
    assert paths.first_pack() is None
    (paths.packs_dir / "a-half").mkdir(parents=True)
    for name in ("c", "b"):
        (paths.packs_dir / name).mkdir()
        (paths.packs_dir / name / "pack.json").touch()
    assert paths.first_pack() == paths.packs_dir / "b"
    named = Settings.resolve(paths=paths, env={}, model="c").model
    assert named == paths.packs_dir / "c"
    assert Settings.resolve(paths=paths, env={}, model="a-half").model == Path("a-half")


def test_docs_list_every_setting_with_variable_and_default() -> None:
    rows = {}
    for line in DOCS.read_text(encoding="utf-8").split("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].startswith("`"):
            rows[cells[0].strip("`")] = cells[1:]
    assert list(rows) == list(OPTIONS)
    for name, (env, default, meaning) in rows.items():
        assert env == f"`{variable(name)}`"
        value = getattr(Settings(), name)
        expected = "-" if value is None else str(value).lower()
        assert default == expected
        # The table may add names in brackets; the first words are the help text's.
        assert meaning.split("(")[0].strip() in describe(name)


def test_importing_settings_is_light() -> None:
    code = (
        "import sys, mimo_local.settings, mimo_local; "
        "print([m for m in ('torch', 'numpy', 'textual', 'platformdirs') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
