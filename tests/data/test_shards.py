"""The shard format: what is written is read back, and whatever is not as written is refused by name."""

import hashlib
import io
import json
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from agrepa_fast.config import DataConfig
from agrepa_fast.data.index import SCHEMA, load_index, write_index
from agrepa_fast.data.matching import matching_index
from agrepa_fast.data.reading import read_shard
from agrepa_fast.data.samples import Sample, parse_npy
from agrepa_fast.data.tars import split_clips
from agrepa_fast.data.writing import write_shard
from agrepa_fast.errors import UserError
from agrepa_fast.files import file_sha256
from agrepa_fast.tokenizers.base import tokens_of_frames
from agrepa_fast.tokenizers.code_mels import CodeMels, codebook_bytes
from agrepa_fast.tokenizers.kmeans import Codebook

N_MELS, CODES, DIM = 5, 4, 3


def sample(number, domain="speech"):
    rng = np.random.default_rng(number)
    frames = 7 + number
    return Sample(
        key=f"clip-{number}",
        domain=domain,
        text="hé there",
        labels=("a", "b"),
        frames=frames,
        seconds=0.1 * frames,
        cut=number == 1,
        source="here/x.wav",
        licence="CC0",
        mel=rng.standard_normal((frames, N_MELS)).astype(np.float16),
        tokens=(rng.integers(0, CODES, 4) + (CODES if domain == "audio" else 0)).astype(np.int32),
        teacher=rng.standard_normal(DIM).astype(np.float16),
    )


def write_folder(folder, domains=("speech",), samples=None):
    """A complete folder with two train shards and one val shard per domain; returns index.json's content."""
    content = {"schema": SCHEMA, "features": {"n_mels": N_MELS, "codebook": CODES}, "domains": {}, "shards": []}
    for domain in domains:
        clips = samples or [sample(number, domain) for number in range(5)]
        for split, number, part in (("train", 0, clips[:2]), ("train", 1, clips[2:4]), ("val", 0, clips[4:])):
            written = write_shard(folder / f"{split}-{domain}-{number:04d}.tar", part, "tiny")
            content["shards"].append({**written, "split": split, "domain": domain, "bucket": 11})
        book = Codebook(np.zeros((CODES, DIM), np.float32))
        file = folder / f"codebook-{domain}.safetensors"
        file.write_bytes(codebook_bytes(book, np.full((CODES, N_MELS), len(domain), np.float32)))
        values = np.concatenate([clip.mel for clip in clips[:4]]).astype(np.float64)
        content["domains"][domain] = {
            "mel": {"frames": len(values), "sum": values.sum(), "sum_squares": (values**2).sum()},
            "tokens": {
                "spec": "kmeans",
                "vocab": CODES,
                "offset": CODES if domain == "audio" else 0,
                "file": file.name,
                "bytes": file.stat().st_size,
                "sha256": file_sha256(file),
            },
            "teachers": {
                "tiny": {"spec": "x", "dim": DIM, "rate": None, "identity": {}, "mean": [0.5] * DIM, "files": None}
            },
        }
    write_index(folder, content)
    return content


def test_round_trip(tmp_path):
    write_folder(tmp_path)
    index = load_index(tmp_path)
    assert index.domains == ("speech",)
    assert (index.clips("train", "speech"), index.clips("val", "speech"), index.clips("train", "audio")) == (4, 1, 0)
    read = [clip for shard in index.shards("train", "speech") for clip in read_shard(shard, index)]
    for number, clip in enumerate(read):
        expected = sample(number)
        assert {k: v for k, v in vars(clip).items() if not isinstance(v, np.ndarray)} == {
            k: v for k, v in vars(expected).items() if not isinstance(v, np.ndarray)
        }
        for name in ("mel", "tokens", "teacher"):
            np.testing.assert_array_equal(getattr(clip, name), getattr(expected, name))
            assert getattr(clip, name).dtype == getattr(expected, name).dtype
    np.testing.assert_array_equal(index.teacher("speech").mean, np.full(DIM, 0.5, np.float32))


def test_statistics_cover_all_domains(tmp_path):
    write_folder(tmp_path, ("speech", "audio"))
    index = load_index(tmp_path)
    values = np.concatenate([sample(n, d).mel.reshape(-1) for d in ("speech", "audio") for n in range(4)])
    assert index.mel_mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-9)
    assert index.mel_std == pytest.approx(values.astype(np.float64).std(), rel=1e-9)
    assert index.vocab == 2 * CODES
    np.testing.assert_array_equal(index.code_mels()[:, 0], [6] * CODES + [5] * CODES)  # len("speech"), len("audio")


def test_ids_of_a_missing_domain_are_reserved(tmp_path):
    write_folder(tmp_path, ("audio",))
    index = load_index(tmp_path)
    assert index.token_range("audio") == (CODES, 2 * CODES)
    np.testing.assert_allclose(index.code_mels()[:CODES], index.mel_mean, rtol=1e-6)


def test_same_clips_give_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    assert first == second
    with tarfile.open(tmp_path / "a" / "train-speech-0000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}
        assert [m.name for m in tar][:4] == [f"clip-0.{s}" for s in ("json", "mel.npy", "tiny.npy", "tokens.npy")]


def test_folder_without_shards_says_what_writes_them(tmp_path):
    with pytest.raises(UserError, match=r"has no index\.json: write it with `agrepa prepare"):
        load_index(tmp_path)
    with pytest.raises(UserError, match="is no folder: write it with `agrepa prepare"):
        load_index(tmp_path / "nowhere")


def test_damaged_files_are_named(tmp_path):
    content = write_folder(tmp_path)
    shard = tmp_path / "train-speech-0001.tar"
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[1500] ^= 1
    shard.write_bytes(flipped)
    recorded = next(entry["sha256"] for entry in content["shards"] if entry["file"] == shard.name)
    with pytest.raises(UserError, match=rf"train-speech-0001\.tar has SHA-256 {file_sha256(shard)}, not {recorded}"):
        load_index(tmp_path)
    assert load_index(tmp_path, verify=False).domains == ("speech",)  # sizes alone do not show it
    shard.write_bytes(whole[:-512])
    with pytest.raises(UserError, match=rf"train-speech-0001\.tar has {len(whole) - 512} bytes, not {len(whole)}"):
        load_index(tmp_path, verify=False)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-speech-0001\.tar is missing"):
        load_index(tmp_path)


def rewrite(path, change):
    """Write a tar anew with `change(name, content)` -> (name, content) or None to drop a member."""
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(path, "w") as tar:
        for member in filter(None, (change(*m) for m in members)):
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))


def npy(array, allow_pickle=False):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


class Opened:
    """Unpickling it is what must not happen."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def on(member, content):
    return lambda name, old: (name, content(old) if name == member else old)


BAD = {
    "wrong length": (on("clip-0.mel.npy", lambda _: npy(np.zeros((6, N_MELS), np.float16))), r"clip-0\.mel\.npy"),
    "wrong bins": (on("clip-0.mel.npy", lambda _: npy(np.zeros((7, 4), np.float16))), r"clip-0\.mel\.npy"),
    "wrong type": (on("clip-1.mel.npy", lambda _: npy(np.zeros((8, N_MELS)))), r"clip-1\.mel\.npy.*float64"),
    "nan": (
        on("clip-0.mel.npy", lambda _: npy(np.full((7, N_MELS), np.nan, np.float16))),
        r"clip-0\.mel\.npy: not fin",
    ),
    "foreign id": (
        on("clip-1.tokens.npy", lambda _: npy(np.array([CODES], np.int32))),
        r"clip-1\.tokens\.npy: ids out",
    ),
    "no ids": (on("clip-1.tokens.npy", lambda _: npy(np.zeros(0, np.int32))), r"clip-1\.tokens\.npy"),
    "teacher size": (on("clip-0.tiny.npy", lambda _: npy(np.zeros(DIM + 1, np.float16))), r"clip-0\.tiny\.npy"),
    "pickled npy": (
        on("clip-0.tiny.npy", lambda _: npy(np.array([Opened()], object), allow_pickle=True)),
        r"clip-0\.tiny\.npy is damaged",
    ),
    "plain pickle": (on("clip-0.mel.npy", lambda _: pickle.dumps(Opened())), r"clip-0\.mel\.npy is damaged"),
    "truncated npy": (on("clip-0.mel.npy", lambda old: old[:-8]), r"clip-0\.mel\.npy is damaged"),
    "broken json": (on("clip-1.json", lambda _: b"{"), r"clip-1\.json is damaged"),
    "other domain": (on("clip-1.json", lambda old: old.replace(b'"speech"', b'"audio"')), "domain 'audio'"),
    "missing member": (lambda n, c: None if n == "clip-1.mel.npy" else (n, c), "clip-1 lacks 'mel.npy'"),
    "missing field": (
        on("clip-1.json", lambda old: json.dumps({k: v for k, v in json.loads(old).items() if k != "text"}).encode()),
        "clip-1 lacks 'text'",
    ),
    "twice": (lambda n, c: (n.replace("mel", "json") if n == "clip-0.mel.npy" else n, c), "clip-0 lacks 'mel.npy'"),
    "missing clip": (lambda n, c: None if n.startswith("clip-1") else (n, c), "holds 1 clips, not 2"),
    "absolute path": (lambda n, c: (f"/etc/{n}", c), "member '/etc/clip-0.json' has a path"),
    "parent path": (lambda n, c: (f"../{n}", c), r"member '\.\./clip-0.json' has a path"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_samples_are_refused_by_name(tmp_path, fault):
    change, message = BAD[fault]
    write_folder(tmp_path)
    index = load_index(tmp_path)
    shard = index.shards("train", "speech")[0]
    rewrite(shard.path, change)
    with pytest.raises(UserError, match=r"bytes, not|SHA-256"):
        read_shard(shard, index)
    content = shard.path.read_bytes()  # and now as if it had been written so
    shard = replace(shard, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(UserError, match=message) as raised:
        read_shard(shard, index)
    assert shard.path.name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_truncated_tar_is_named(tmp_path):
    write_folder(tmp_path)
    index = load_index(tmp_path)
    shard = index.shards("train", "speech")[0]
    for size in (700, 3000, 4000):
        whole = shard.path.read_bytes()
        shard.path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"train-speech-0000\.tar"):
            read_shard(shard, index)
        shard.path.write_bytes(whole)


def test_unknown_split_is_refused(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(ValueError, match="validation"):
        load_index(tmp_path).shards("validation", "speech")


def test_codebook_encodes_to_the_nearest_centroid():
    rng = np.random.default_rng(0)
    frames = (rng.standard_normal((600, 8)) + 100).astype(np.float32)  # far from zero: |f|^2 dwarfs the differences
    book = Codebook.fit(frames, 16, "speech")
    distances = ((frames[:, None].astype(np.float64) - book.centroids[None]) ** 2).sum(axis=2)
    chosen = distances[np.arange(600), book.encode(frames)]
    np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=1e-2)
    assert np.array_equal(Codebook.fit(frames, 16, "speech").centroids, book.centroids)
    spread = ((frames - frames.mean(axis=0)) ** 2).sum(axis=1).mean()
    assert distances.min(axis=1).mean() < 0.8 * spread


def test_codebook_needs_a_frame_per_code():
    with pytest.raises(UserError, match=r"data\.codebook=16: the speech train clips have only 15 .* data\.codebook=3"):
        Codebook.fit(np.zeros((15, 2), np.float32), 16, "speech")


def test_code_mels_are_the_means_of_their_frames():
    book = CodeMels(codes=4, n_mels=2)
    # 3 tokens over 7 frames: (i + 0.5) * 3 / 7 = 0.21 0.64 1.07 1.5 1.93 2.36 2.79
    np.testing.assert_array_equal(tokens_of_frames(np.array([0, 3, 0]), 7), [0, 0, 3, 3, 3, 0, 0])
    mel = np.arange(14, dtype=np.float32).reshape(7, 2)
    book.add(np.array([0, 3, 0]), mel)
    book.add(np.array([1]), np.array([[100, 200]], np.float32))
    means = book.means()
    np.testing.assert_allclose(means[0], mel[[0, 1, 5, 6]].mean(axis=0))
    np.testing.assert_allclose(means[3], mel[2:5].mean(axis=0))
    np.testing.assert_allclose(means[1], [100, 200])
    np.testing.assert_allclose(means[2], np.concatenate([mel, [[100, 200]]]).mean(axis=0))  # unused: mean of all frames


def test_index_survives_replace(tmp_path):
    """A frozen index can be copied to another folder's name (moved data)."""
    write_folder(tmp_path)
    index = load_index(tmp_path)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in [f for f in tmp_path.iterdir() if f.is_file()]:
        file.rename(moved / file.name)
    clips = read_shard(replace(index, folder=moved).shards("val", "speech")[0], replace(index, folder=moved))
    assert len(clips) == 1
    assert load_index(moved).mel_mean == index.mel_mean


def matching(folder, **features) -> None:
    """Ask for the shards of a folder as a run does, after adding features to its index."""
    content = write_folder(folder)
    (spec,) = (entry["spec"] for entry in content["domains"]["speech"]["teachers"].values())
    content["domains"]["speech"]["tokens"]["spec"] = "kmeans"
    write_index(folder, {**content, "features": content["features"] | features})
    matching_index(DataConfig(path=str(folder), n_mels=N_MELS, codebook=CODES, speech_teacher=spec))


def test_features_of_other_versions_are_read_or_refused_by_name(tmp_path):
    matching(tmp_path, n_fft=1024, win_length=1024, f_min=0.0)  # once settings, now implied
    line = rf"{tmp_path} was prepared by an earlier version: data\.f_min=20\.0 is no longer a setting: .*: prepare the"
    with pytest.raises(UserError, match=line):
        matching(tmp_path, f_min=20.0)
    with pytest.raises(UserError, match=r"data\.win_length=800 is no longer a setting: windows are data\.n_fft"):
        matching(tmp_path, win_length=800)
    line = rf"{tmp_path} was prepared with data\.dither=0\.5, which this version does not know; it knows .*n_fft.*: use"
    with pytest.raises(UserError, match=line):
        matching(tmp_path, dither=0.5)
    with pytest.raises(UserError, match=r"was prepared with data\.hop_length=300, the run has 256: set data\.hop_le"):
        matching(tmp_path, hop_length=300)


def tar_of(*members: tuple[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


CLIPS = [(f"{key}.{suffix}", bytes([number]) * 700) for number, key in enumerate("abc") for suffix in ("json", "npy")]


def with_header(tar: bytes, at: int, change) -> bytes:
    """A tar whose header at a byte is changed, with its checksum set right again."""
    info = tarfile.TarInfo.frombuf(tar[at : at + 512], "utf-8", "strict")
    change(info)
    return tar[:at] + info.tobuf(tarfile.GNU_FORMAT) + tar[at + 512 :]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_any_writer_are_split_also_with_long_names(form):
    long = "x" * (150 if form != tarfile.USTAR_FORMAT else 90)
    clips, error = split_clips(tar_of(*CLIPS, (f"{long}.npy", b"1"), form=form))
    assert error is None
    assert [clip["__key__"] for clip in clips] == ["a", "b", "c", long]
    assert bytes(clips[1]["npy"]) == b"\x01" * 700


@pytest.mark.parametrize("size", [0, 100, 511, 512, 900, 1024, 1536, 3000, 3583, 3584, 8000, 9216, 9300])
def test_a_cut_tar_keeps_its_whole_clips_and_is_called_truncated(size):
    whole = tar_of(*CLIPS)
    clips, error = split_clips(whole[:size])
    assert error.kind == "truncated"
    wanted = [key for number, key in enumerate("abc") if size >= (number + 1) * 2 * 1536 + (0 if number < 2 else 1)]
    assert [clip["__key__"] for clip in clips] == wanted[: len(clips)]
    assert len(clips) >= len(wanted) - 1
    assert all(bytes(clip["npy"]) == bytes([number]) * 700 for number, clip in enumerate(clips))


@pytest.mark.parametrize("at", [0, 1536, 3072, 4608])
@pytest.mark.parametrize("damage", ["checksum", "name", "text size", "huge size", "negative size"])
def test_a_damaged_header_ends_a_tar_before_its_clip(at, damage):
    whole = tar_of(*CLIPS)
    if damage == "checksum":
        tar = whole[: at + 150] + b"9" + whole[at + 151 :]
    elif damage == "name":
        tar = with_header(whole, at, lambda info: None)
        tar = tar[:at] + tarfile.TarInfo("\udcff.npy").tobuf(tarfile.GNU_FORMAT) + tar[at + 512 :]
    elif damage == "text size":
        tar = whole[: at + 124] + b"zz" + whole[at + 126 :]
    else:
        size = 2**40 if damage == "huge size" else -1536
        tar = with_header(whole, at, lambda info: setattr(info, "size", size))
    clips, error = split_clips(tar)
    assert error.kind == ("truncated" if damage == "huge size" else "corrupt")
    assert [clip["__key__"] for clip in clips] == ["a"] * (at == 4608)  # the clip before may lack a member


def test_headers_nested_without_end_are_a_fault():
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 512
    clips, error = split_clips(tar_of(*CLIPS)[: 2 * 3072] + (name.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 5000)
    assert error.kind == "corrupt"
    assert [clip["__key__"] for clip in clips] == ["a"]


def test_an_array_that_claims_more_than_it_has_allocates_nothing():
    content = io.BytesIO()
    claim = {"descr": "<f2", "fortran_order": False, "shape": (10**15, N_MELS)}
    np.lib.format.write_array_header_1_0(content, claim)
    with pytest.raises(ValueError, match=r"0 bytes are not \(1000000000000000, 5\)"):
        parse_npy(memoryview(content.getvalue()))
