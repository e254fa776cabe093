"""What a user types or writes into a file is what a setting gets: names, paths, numbers, and files of any encoding."""

import dataclasses
from pathlib import Path

import pytest

from agrepa_fast.config import Config, RunConfig, TrainConfig
from agrepa_fast.config_file import load_config, save_config
from agrepa_fast.errors import UserError
from agrepa_fast.settings import base_type

NAMES = (
    *("20241128_153000", "0010", "1e5", "on", "1_000", "2024", "1.0", "2024-11-28", "12:30:00", "0x10", ".5", ".nan"),
    *("None", "Null", "NULL", "none", "true", "[a]", "{a}", "a: b", "a #b", "#a", "!a", "*a", "&a", "@a", "%a", "- a"),
    *("'a'", '"a"', "a=b", "a b", "naïve", "?", "|", ">", ",", "a\\b", "-", "=", "<<", "a\u202fb"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_text_that_was_typed_or_quoted_in_a_file_and_survives_saving(name, tmp_path):
    for setting in ("run.dir", "data.path", "train.wandb"):
        section, _, field = setting.partition(".")
        config = load_config("demo", [f"{setting}={name}"])
        assert getattr(getattr(config, section), field) == name
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", ["20241128_153000", "0010", "1e5", "on", "1_000", "2024-11-28", "12:30:00", "None"])
def test_a_plain_name_in_a_file_is_its_text(name, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"run: {{dir: {name}}}\n")
    assert load_config(tmp_path / "mine.yaml").run.dir == name


def test_no_value_is_null_on_the_command_line_and_what_yaml_says_in_a_file(tmp_path):
    assert load_config("demo", ["run.dir=null", "train.profile=null", "model.vocab=null"]).run.dir is None
    for written in ("null", "~", "Null", ""):
        (tmp_path / "mine.yaml").write_text(f"run:\n  dir: {written}\ntrain:\n  profile: {written}\n")
        config = load_config(tmp_path / "mine.yaml")
        assert (config.run.dir, config.train.profile) == (None, None)
    (tmp_path / "mine.yaml").write_text("run: {dir: 'null'}\n")
    assert load_config(tmp_path / "mine.yaml").run.dir == "null"


@pytest.mark.parametrize("setting", ["run.dir", "data.path", "train.start_from", "train.copy_to"])
def test_a_tilde_is_the_home_folder_wherever_a_path_is_written(setting, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    section, _, field = setting.partition(".")
    (tmp_path / "mine.yaml").write_text(f"{section}: {{{field}: ~/a}}\n")
    for config in (load_config("demo", [f"{setting}=~/a"]), load_config("~/mine.yaml")):
        assert getattr(getattr(config, section), field) == f"{tmp_path}/a"
    monkeypatch.chdir(tmp_path)
    for kept in ("a/~/b", "s3://a/~b", "./~"):
        assert getattr(getattr(load_config("demo", [f"{setting}={kept}"]), section), field) == kept
    with pytest.raises(UserError, match=rf"{setting}=~nobody-of-this-name/a: no home folder"):
        load_config("demo", [f"{setting}=~nobody-of-this-name/a"])


@pytest.mark.parametrize(("text", "value"), [("1e5", 100_000), ("0010", 10), ("+7", 7), ("1_000", 1000), ("5.0", 5)])
def test_a_whole_number_is_read_in_tens(text, value, tmp_path):
    assert load_config("demo", [f"probe.clips={text}"]).probe.clips == value
    (tmp_path / "mine.yaml").write_text(f"probe: {{clips: {text}}}\n")
    assert load_config(tmp_path / "mine.yaml").probe.clips == value


@pytest.mark.parametrize(
    "text", ["1:30", "0x10", "yes", "true", "on", "1.5", "", "~", "ten", "1e400", "9" * 5000, "null"]
)
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(UserError, match=r"probe\.clips="):
        load_config("demo", [f"probe.clips={text}"])


def numbers() -> list[tuple[str, type]]:
    """Every setting that is a number or a list of them, by its name."""
    names = [
        (part.name, part.default_factory, field.name)
        for part in dataclasses.fields(Config)
        for field in dataclasses.fields(part.default_factory)
    ]
    return [
        (f"{section}.{name}", base_type(cls, name))
        for section, cls, name in names
        if base_type(cls, name) in (int, float, list)
    ]


@pytest.mark.parametrize(
    "text", ["inf", "-inf", ".inf", "nan", "1e400", "1e300", "-1e300", "9" * 40, "9" * 5000, "true"]
)
def test_every_number_is_finite_and_fits(text):
    found = numbers()
    assert len(found) > 60
    for name, base in found:
        if name == "train.clip_norm" and text in ("inf", ".inf"):
            continue  # no clipping
        with pytest.raises(UserError) as refusal:
            load_config("demo", [f"{name}={f'[{text}]' if base is list else text}"])
        assert str(refusal.value).startswith(f"{name}="), refusal.value
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 300


def test_a_seed_has_64_bits():
    assert load_config("demo", [f"run.seed={-(2**63)}"]).run.seed == -(2**63)
    with pytest.raises(UserError, match=r"run\.seed=99999999999999999999: must be from"):
        load_config("demo", ["run.seed=99999999999999999999"])


def test_values_of_programs_are_not_turned_into_others():
    for create in (lambda: TrainConfig(lr=True), lambda: TrainConfig(steps=True), lambda: RunConfig(dir=5)):
        with pytest.raises(UserError, match="is wanted"):
            create()


@pytest.mark.parametrize("text", ["a\nb", "a\x00b", "a\u2028b", "\x1b[2J"])
def test_a_text_does_not_break_the_line_of_a_message(text, tmp_path):
    with pytest.raises(UserError, match="control characters") as refusal:
        load_config("demo", [f"run.dir={text}"])
    assert len(str(refusal.value).splitlines()) == 1


class TestFiles:
    TEXT = "# Müller\ntrain:\n  steps: 7000\n"

    def test_utf_8_with_and_without_a_byte_order_mark(self, tmp_path):
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / "mine.yaml").write_text(self.TEXT, encoding=encoding)
            assert load_config(tmp_path / "mine.yaml").train.steps == 7000

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
    def test_other_encodings_are_refused_by_name(self, encoding, tmp_path):
        (tmp_path / "mine.yaml").write_text(self.TEXT, encoding=encoding)
        with pytest.raises(UserError, match=r"mine\.yaml (is not UTF-8|cannot be read)") as refusal:
            load_config(tmp_path / "mine.yaml")
        assert "\n" not in str(refusal.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("train: {steps: 1}\ntrain: {steps: 2}", "'train' comes twice"),
            ("train: {steps: 1, steps: 2}", "'steps' comes twice"),
            ("- 1", "not a list"),
            ("train: 5", "'train' has the value '5'"),
            ("train: {self: 1}", r"train\.self is unknown"),
            ("train: {null: 1}", r"train\.None is unknown"),
            ("? [1]\n: 2", "unhashable"),
            ("run: {dir: !!python/name:os.system x}", "python/name"),
            ("train: {steps: !!timestamp x}", "timestamp"),
            ('run: {dir: "\\UFFFFFFFF"}', "cannot be read"),
            ("a: &a {b: *a}", "'a' is unknown"),
            ("train: {steps: " + "[" * 3000, "cannot be read"),
            ("train: {steps: [1]}", "a whole number is wanted"),
            ("run: {dir: [a]}", "a text is wanted"),
            ("train: {steps: 1}\n---\n", "a single document"),
            ("run: {dir: ''}", r"run\.dir=: a text is wanted"),
        ],
    )
    def test_what_is_wrong_is_named(self, text, message, tmp_path):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(UserError, match=message) as refusal:
            load_config(tmp_path / "mine.yaml")
        assert "\n" not in str(refusal.value)

    def test_nested_aliases_cost_nothing(self, tmp_path):
        """Each line has the one before ten times: 10^9 texts if all were written out."""
        lines = ["a0: &a0 x"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
        (tmp_path / "mine.yaml").write_text("run:\n  " + "\n  ".join(lines) + "\n  dir: *a9\n")
        with pytest.raises(UserError, match=r"run\.a0 is unknown"):
            load_config(tmp_path / "mine.yaml")
        (tmp_path / "mine.yaml").write_text(
            "run:\n  dir:\n  - "
            + "\n  - ".join([f"&a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" if n else "&a0 x" for n in range(10)])
        )
        with pytest.raises(UserError, match="a text is wanted") as refusal:
            load_config(tmp_path / "mine.yaml")
        assert len(str(refusal.value)) < 300

    def test_merges_and_aliases_are_yaml_s(self, tmp_path):
        (tmp_path / "mine.yaml").write_text("eval: &e {clips: 4}\nprobe: {<<: *e, clips: 5}\n")
        assert load_config(tmp_path / "mine.yaml").probe.clips == 5


def test_a_file_that_cannot_be_read_is_not_missing(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text("")

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"mine\.yaml cannot be read: Permission denied"):
        load_config(path)
