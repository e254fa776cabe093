"""A damaged index.json, or a codebook that it does not name any more."""

import pytest

from agrepa_fast.data.index import load_index, write_index
from agrepa_fast.errors import UserError
from agrepa_fast.files import file_sha256

from .test_shards import write_folder


def test_a_changed_codebook_is_named(tmp_path):
    write_folder(tmp_path)
    codebook = tmp_path / "codebook-speech.safetensors"
    content = bytearray(codebook.read_bytes())
    content[-1] ^= 1
    codebook.write_bytes(content)
    index = load_index(tmp_path, verify=False)  # as a run does: sizes alone
    with pytest.raises(UserError, match=rf"codebook-speech\.safetensors has SHA-256 {file_sha256(codebook)}, not "):
        index.code_mels()


def test_damaged_index_is_named(tmp_path):
    content = write_folder(tmp_path)
    write_index(tmp_path, {**content, "schema": 99})
    with pytest.raises(UserError, match="schema version 99"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text('{"schema": 1, "feat')
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load_index(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("features",), None, "it has features = None"),
        (("shards",), [], "no shards"),
        (("shards", 0), "x", "a shard is 'x'"),
        (("shards", 0, "clips"), -1, "a shard has clips = -1"),
        (("domains", "speech"), [], r"speech is \[\]"),
        (("domains", "speech", "teachers"), {}, "speech has no teachers"),
        (("domains", "speech", "tokens", "bytes"), "1", "speech: tokens has bytes = '1'"),
        (("domains", "speech", "teachers", "tiny", "rate"), ..., "speech: tiny has no rate"),
    ],
)
def test_every_part_of_an_index_has_its_type(tmp_path, place, value, message):
    content = write_folder(tmp_path)
    part = content
    for name in place[:-1]:
        part = part[name]
    if value is ...:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    write_index(tmp_path, content)
    with pytest.raises(UserError, match=rf"index\.json is damaged \({message}\): remove .* and run `agrepa prepare`"):
        load_index(tmp_path)
