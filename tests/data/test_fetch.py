"""Packages: fetched through apt-get and pip, taken from the downloads folder, and each way to fail."""

import gzip
import hashlib
import io
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from agrepa_fast.errors import UserError
from agrepa_fast.fetch import build_folder, cache_dir, fetch_apt, fetch_pip

APT = "asterisk-core-sounds-en"
PIP = ("iniconfig", "2.0.0", "b6a85871a79d2e3b22d2d1b94ac2824226a63c6b741c88f7ae975f18b6778374")
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("AGREPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_client(monkeypatch):
    popen = subprocess.Popen

    def refuse(command, *args, **kwargs):
        assert Path(command[0]).name == "dpkg-deb", "a client was started"
        return popen(command, *args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", refuse)


def left_over(cache: Path) -> list[str]:
    """Return the contents of the cache, except the downloads folder."""
    return [str(path.relative_to(cache)) for path in cache.glob("*/*") if path.parent.name != "downloads"]


def put_wheel(cache: Path, name: str = "parcel", member: str = "parcel/data.txt") -> str:
    (cache / "downloads").mkdir(parents=True, exist_ok=True)
    file = cache / "downloads" / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, "content")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def put_deb(cache: Path, members: list[tarfile.TarInfo]) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"content") if member.isreg() else None)
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": packed.getvalue()}
    content = b"!<arch>\n"
    for name, data in parts.items():  # "odd" has an odd length: the next header starts one byte later
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    (cache / "downloads").mkdir(parents=True, exist_ok=True)
    (cache / "downloads" / "parcel_1%3a2-3_all.deb").write_bytes(content)


def tar_member(name: str, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    if link:
        member.type, member.linkname = tarfile.SYMTYPE, link
    else:
        member.size = len(b"content")
    return member


def test_apt_package_comes_from_apt_get_and_stays(cache, monkeypatch):
    root = fetch_apt(APT)
    assert root.parent == cache / "apt"
    assert re.fullmatch(rf"{APT}-\d[\w.+~:-]*", root.name)
    texts = root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    assert b"vm-goodbye" in gzip.decompress(texts.read_bytes())
    assert left_over(cache) == [f"apt/{root.name}"]
    (cache / "apt" / f"{APT}-g722-9.9").mkdir()  # another package, whose name begins like this one's
    monkeypatch.setenv("PATH", "")
    assert fetch_apt(APT) == root


def test_wheel_comes_from_pip_and_stays(cache, monkeypatch):
    root = fetch_pip(*PIP)
    assert "class IniConfig" in (root / "iniconfig/__init__.py").read_text()
    assert left_over(cache) == ["pip/iniconfig-2.0.0"]
    monkeypatch.setattr(subprocess, "Popen", None)
    assert fetch_pip(*PIP) == root


def test_a_wheel_in_downloads_needs_no_network(cache, no_client):
    root = fetch_pip("parcel", "1.0", put_wheel(cache))
    assert (root / "parcel/data.txt").read_text() == "content"


def test_a_deb_in_downloads_needs_no_network(cache, no_client):
    put_deb(cache, [tar_member("./usr/share/parcel/data.txt")])
    root = fetch_apt("parcel")
    assert root == cache / "apt" / "parcel-1:2-3"  # ":" is an epoch, %3a in file names
    assert (root / "usr/share/parcel/data.txt").read_text() == "content"


def test_debs_are_unpacked_by_the_python_of_debian_12(cache, no_client, monkeypatch):
    """Python 3.11.2: its tarfile has no filters."""
    extractall = tarfile.TarFile.extractall

    def without_filter(self, path=".", members=None, *, numeric_owner=False):
        extractall(self, path, members, numeric_owner=numeric_owner)

    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    monkeypatch.setattr(tarfile.TarFile, "extractall", without_filter)
    put_deb(cache, [tar_member("./usr/share/parcel/data.txt")])
    assert (fetch_apt("parcel") / "usr/share/parcel/data.txt").read_text() == "content"


@pytest.mark.parametrize("compression", ["xz", "zstd", "gzip"])  # of Debian, of Ubuntu, and of others
def test_debs_of_every_release_are_unpacked(cache, no_client, tmp_path, compression):
    file = tmp_path / "tree" / "usr" / "share" / "data.txt"
    file.parent.mkdir(parents=True)
    file.write_text("content")
    (tmp_path / "tree" / "DEBIAN").mkdir()
    control = "Package: parcel\nVersion: 2.0\nArchitecture: all\nMaintainer: me <a@b.c>\nDescription: none\n"
    (tmp_path / "tree" / "DEBIAN" / "control").write_text(control)
    (cache / "downloads").mkdir(parents=True)
    command = ["dpkg-deb", f"-Z{compression}", "--build", tmp_path / "tree", cache / "downloads" / "parcel_2.0_all.deb"]
    subprocess.run(command, check=True, capture_output=True)
    assert (fetch_apt("parcel") / "usr/share/data.txt").read_text() == "content"


def test_a_deb_in_downloads_takes_the_place_of_another_version(cache, no_client):
    (cache / "apt" / "parcel-0.9").mkdir(parents=True)
    assert fetch_apt("parcel").name == "parcel-0.9"
    put_deb(cache, [tar_member("./x")])
    assert fetch_apt("parcel").name == "parcel-1:2-3"


def test_without_dpkg_deb_the_error_says_where_the_files_go(cache, monkeypatch):
    put_deb(cache, [tar_member("./x")])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"no dpkg-deb here.*install dpkg, or unpack .* folder .*/apt/parcel-1:2-3"):
        fetch_apt("parcel")
    assert left_over(cache) == []


def test_a_wrong_hash_names_both_and_leaves_nothing(cache, no_client):
    wanted, found = "0" * 64, put_wheel(cache)
    with pytest.raises(UserError) as error:
        fetch_pip("parcel", "1.0", wanted)
    message = str(error.value)
    assert found in message
    assert wanted in message
    assert f"remove {cache / 'downloads' / 'parcel'}" in message
    assert "\n" not in message
    assert left_over(cache) == []


def test_a_file_that_is_no_package_is_refused(cache, no_client):
    (cache / "downloads").mkdir(parents=True)
    for file in ("parcel-1.0-py3-none-any.whl", "parcel_1.0_all.deb"):
        (cache / "downloads" / file).write_bytes(b"neither")
    sha256 = hashlib.sha256(b"neither").hexdigest()
    for fetch, package in ((fetch_apt, ("parcel",)), (fetch_pip, ("parcel", "1.0", sha256))):
        with pytest.raises(UserError, match="cannot be unpacked"):
            fetch(*package)
    assert left_over(cache) == []


def test_without_a_network_the_error_says_what_to_do(cache, tmp_path, monkeypatch):
    (tmp_path / "apt.conf").write_text('Acquire::Retries::Delay "false";')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, UNREACHABLE)
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", UNREACHABLE)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    for fetch, package, command in (
        (fetch_apt, (APT,), "`apt-get update`, then `apt-get download asterisk-core-sounds-en`"),
        (fetch_pip, PIP, "`pip download --no-deps --only-binary=:all: iniconfig==2.0.0`"),
    ):
        with pytest.raises(UserError) as error:
            fetch(*package)
        assert f"run {command} and put the file into {cache / 'downloads'}" in str(error.value)
        assert "\n" not in str(error.value)
    assert left_over(cache) == []


@pytest.fixture
def no_lists(tmp_path, monkeypatch):
    """A system on which nobody has run apt-get update."""
    (tmp_path / "lists" / "partial").mkdir(parents=True)
    settings = f'Dir::State::lists "{tmp_path}/lists"; Dir::Cache "{tmp_path}";'
    (tmp_path / "apt.conf").write_text(settings)
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))


def test_missing_package_lists_are_fetched_into_the_cache(cache, no_lists, tmp_path, capsys):
    assert fetch_apt(APT).is_dir()
    assert f"fetching lists into {cache / 'apt-state'}" in capsys.readouterr().out
    assert list((tmp_path / "lists").iterdir()) == [tmp_path / "lists" / "partial"]  # the system's stay as they are


def test_a_package_that_no_source_has_is_named(cache, no_lists, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: None)  # the update
    with pytest.raises(UserError, match=r"\(Unable to locate package none-such-42\): run `apt-get update"):
        fetch_apt("none-such-42")


def test_a_machine_without_apt_get_is_told_where_the_file_goes(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"no apt-get here.*on Debian.*downloads"):
        fetch_apt(APT)


def test_another_process_may_be_first(cache):
    root = cache / "apt" / "parcel-1"

    def build(folder: Path) -> None:
        (folder / "mine").touch()
        root.mkdir()  # the other one, while this one was at work
        (root / "theirs").touch()

    assert build_folder(root, build) == root
    assert [path.name for path in root.iterdir()] == ["theirs"]
    assert left_over(cache) == ["apt/parcel-1"]


def test_an_interruption_leaves_nothing(cache):
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_folder(cache / "apt" / "parcel-1", build)
    assert left_over(cache) == []


def test_a_cache_that_is_no_folder_is_a_user_error(cache, no_client):
    cache.write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written.*set AGREPA_CACHE"):
        fetch_pip("parcel", "1.0", "0" * 64)


def test_the_cache_is_in_the_home_folder_unless_set(monkeypatch):
    monkeypatch.delenv("AGREPA_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "agrepa_fast"
    monkeypatch.setenv("AGREPA_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
