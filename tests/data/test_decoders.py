"""Every recording that libsndfile or FFmpeg reads is decoded; what neither reads has the reasons of both."""

import io
import os
import struct
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from agrepa_fast.audio import decoders, waves
from agrepa_fast.audio.decoders import DecodeError
from agrepa_fast.audio.waves import MORE_SUFFIXES, SilentError, decode
from agrepa_fast.errors import UserError

from .test_prepare import tone

RATE = 16000


def write_pyav(path, codec, wave, rate=RATE, container=None):
    """Write a mono wave with FFmpeg."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, bit_rate=64000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        form = stream.codec_context.format.name
        for part in av.AudioResampler(form, "mono", rate, stream.codec_context.frame_size or None).resample(frame):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return path


def similarity(wave, other):
    """The largest correlation over shifts: codecs delay their output."""
    count = min(len(wave), len(other)) // 2
    spectrum = np.fft.rfft(wave[:count], 2 * count).conj() * np.fft.rfft(other[: 2 * count], 2 * count)
    energy = np.linalg.norm(wave[:count]) * max(np.linalg.norm(other[i : i + count]) for i in range(0, count, 64))
    return np.abs(np.fft.irfft(spectrum)).max() / energy


WRITTEN = {  # suffix -> FFmpeg's encoder and container; soundfile writes the others
    **{".m4a": ("aac", "ipod"), ".aac": ("aac", "adts"), ".mp4": ("aac", None), ".mov": ("aac", None)},
    **{".mka": ("flac", None), ".mkv": ("aac", None), ".webm": ("libopus", None), ".weba": ("libopus", "webm")},
    **{".wma": ("wmav2", "asf"), ".tta": ("tta", None), ".wv": ("wavpack", None), ".ac3": ("ac3", None)},
    **{".eac3": ("eac3", None), ".mp2": ("mp2", None), ".flv": ("aac", None), ".avi": ("ac3", None)},
    **{".3gp": ("aac", None), ".oga": ("flac", "ogg"), ".m4b": ("aac", "ipod")},
}
SOUNDFILE = {".aif": "AIFF", ".aifc": "AIFF", ".aiff": "AIFF", ".au": "AU", ".caf": "CAF", ".snd": "AU"}
SOUNDFILE |= {".rf64": "RF64", ".sph": "NIST", ".voc": "VOC", ".w64": "W64", ".wave": "WAV"}
NOT_WRITTEN = {".amr", ".ape", ".dsf", ".g722", ".gsm", ".mpc", ".ra", ".spx"}  # no encoder; g722 has its own test


@pytest.mark.parametrize("suffix", sorted(set(MORE_SUFFIXES) - NOT_WRITTEN))
def test_every_suffix_is_read(suffix, tmp_path):
    path, rate, wave = tmp_path / f"take{suffix}", 48000, tone(1.2, 48000, 3)
    if suffix in WRITTEN:
        write_pyav(path, WRITTEN[suffix][0], wave, rate, WRITTEN[suffix][1])
    else:
        soundfile.write(path, wave, rate, format=SOUNDFILE[suffix], subtype="PCM_16")
    for source in (path, path.read_bytes()):
        read, found = decode(source, path.name)
        assert found == rate
        assert abs(len(read) / rate - 1.2) < 0.1
        assert similarity(wave, read) > 0.9


@pytest.mark.parametrize("source", ["path", "bytes"])
def test_a_flac_without_its_length_is_the_one_with_it(source, tmp_path):
    for subtype in ("PCM_16", "PCM_24"):
        soundfile.write(tmp_path / "a.flac", tone(1.2, 22050, 0), 22050, subtype=subtype)
        content = bytearray((tmp_path / "a.flac").read_bytes())
        content[8 + 13] &= 0xF0
        content[8 + 14 : 8 + 18] = bytes(4)  # total samples of STREAMINFO
        (tmp_path / "unknown.flac").write_bytes(content)
        for part in ((), (0.0, 0.5), (0.4, 0.5), (0.0, 9.0), (5.0, 1.0)):
            wave, rate = decode(tmp_path / "a.flac", "a.flac", *part)
            unknown = tmp_path / "unknown.flac" if source == "path" else bytes(content)
            read, found = decode(unknown, "unknown.flac", *part)
            assert found == rate
            np.testing.assert_array_equal(read, wave)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFDB])
def test_a_wav_whose_length_was_never_written_is_read_to_its_end(size, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.2, RATE, 0), RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = struct.pack("<I", size)
    content[40:44] = struct.pack("<I", size)
    np.testing.assert_array_equal(decode(bytes(content), "b.wav")[0], decode(tmp_path / "a.wav", "a.wav")[0])


def encoded(form, seconds=10.0, **options):
    """The content of a file of a tone that gets louder, and its wave."""
    stream, count = io.BytesIO(), round(seconds * RATE)
    noise = np.random.default_rng(0).standard_normal(count) * 0.2
    wave = np.where(np.arange(count) < count // 5, 0.01, 1) * (tone(seconds, RATE, 0) + noise)
    soundfile.write(stream, wave, RATE, format=form, **options)
    return stream.getvalue(), wave


@pytest.mark.parametrize("source", ["path", "bytes"])
@pytest.mark.parametrize("tag", ["tag", "no tag"])
def test_an_mp3_without_its_length_and_joined_files_are_read_to_their_end(tag, source, tmp_path):
    content, wave = encoded("MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    if tag == "no tag":  # it is the first frame, and tells the number of frames
        content = content[content.index(content[:2], 4) :]
    for number, (whole, seconds) in enumerate(((content, 10), (content + content, 20))):
        (tmp_path / f"{number}.mp3").write_bytes(whole)
        given = tmp_path / f"{number}.mp3" if source == "path" else whole
        read, rate = decode(given, "a.mp3")
        assert rate == RATE
        assert seconds - 0.1 < len(read) / RATE < seconds + 0.3
        assert similarity(wave[-2 * RATE :], read[-3 * RATE :]) > 0.8
        for start, part in ((1.0, 0.5), (seconds - 1.0, 0.5), (seconds - 1.0, 5.0)):
            found = decode(given, "a.mp3", start, part)[0]
            np.testing.assert_allclose(found, read[round(start * RATE) :][: round(part * RATE)], atol=1e-4)


@pytest.mark.parametrize("size", [25, 300, 2000])
def test_tags_between_joined_mp3s_are_left_out(size):
    content, _ = encoded("MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    tag = b"ID3\x04\0\0\0\0" + bytes([size >> 7, size & 127]) + bytes(size)
    read, rate = decode(tag + content + tag + content, "a.mp3")
    assert abs(len(read) / rate - 20) < 0.3


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_joined_ogg_files_are_read_to_their_end(subtype):
    content, _ = encoded("OGG", subtype=subtype)
    read, rate = decode(content * 2, "a.ogg")
    assert abs(len(read) / rate - 20) < 0.1


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg", ".m4a"])
@pytest.mark.parametrize("form", ["WAV", "FLAC", "MP3", "OGG", "aac", "aac after a tag", "m4a"])
def test_a_wrong_suffix_does_not_matter(form, suffix, tmp_path, capfd):
    path, wave = tmp_path / f"take{suffix}", tone(1.2, RATE, 1)
    if form == "m4a" or form.startswith("aac"):
        write_pyav(path, "aac", wave, container="ipod" if form == "m4a" else "adts")
    else:
        soundfile.write(path, wave, RATE, format=form)
    if form == "aac after a tag":
        path.write_bytes(b"ID3\x04\0\0\0\0\x01\x00" + bytes(128) + path.read_bytes())
    read, rate = decode(path, path.name)
    assert rate == RATE
    assert abs(len(read) / RATE - 1.2) < 0.15
    assert similarity(wave, read) > 0.9
    assert capfd.readouterr() == ("", "")


def test_names_in_any_encoding(tmp_path):
    for number, form in enumerate(("wav", "m4a")):
        path = tmp_path / "plain"
        if form == "wav":
            soundfile.write(path, tone(1.2, RATE, number), RATE, format="WAV")
        else:
            write_pyav(path, "aac", tone(1.2, RATE, number), container="ipod")
        name = os.fsdecode(b"stra\xdfe." + form.encode())
        path.rename(tmp_path / name)
        assert abs(len(decode(f"{tmp_path}/{name}", name)[0]) / RATE - 1.2) < 0.1


def test_what_neither_reads_has_both_reasons(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF no wav" * 99)
    message = r"a\.wav: cannot be decoded \(soundfile: .+; PyAV: .+\); remove it or convert it to wav"
    with pytest.raises(UserError, match=message):
        decode(tmp_path / "a.wav", "a.wav")
    with pytest.raises(UserError, match=r"b\.wav: cannot be read \(No such file"):
        decode(tmp_path / "b.wav", "b.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(UserError, match="no regular file"):
        decode(tmp_path / "pipe.wav", "pipe.wav")


def test_headers_that_ask_for_too_much_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.2, RATE, 0), RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    for place, value in ((24, struct.pack("<I", 0xFFFFFFF0)), (22, struct.pack("<H", 1000))):
        changed = content.copy()
        changed[place : place + len(value)] = value
        with pytest.raises(UserError, match="cannot be decoded"):
            decode(bytes(changed), "a.wav")


def test_a_damaged_frame_of_many_channels_does_not_end_the_process(tmp_path):
    path = write_pyav(tmp_path / "a.m4a", "aac", tone(1.0, RATE, 0), container="ipod")
    draw, content, reasons = np.random.default_rng(4), path.read_bytes(), set()
    frame = av.AudioFrame(format="fltp", layout=f"{decoders._MAX_PLANES + 1} channels", samples=8)
    with pytest.raises(DecodeError, match="9 channels in planes"):
        decoders._mean_of_channels(frame)
    for _ in range(200):  # some of them have such frames
        damaged = bytearray(content)
        place = int(draw.integers(len(damaged)))
        damaged[place : place + 2] = draw.bytes(2)
        try:
            decode(bytes(damaged), "a.m4a")
        except UserError as error:
            reasons.add(str(error))
    assert reasons


def test_a_video_without_sound_is_silent_not_damaged(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for _ in range(5):
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    with pytest.raises(SilentError, match=r"a\.mp4: no audio stream"):
        decode(tmp_path / "a.mp4", "a.mp4")


PLAYLISTS = {"hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n", "concat": "ffconcat version 1.0\nfile {}\n"}


@pytest.mark.parametrize("playlist", PLAYLISTS.values(), ids=PLAYLISTS)
def test_a_playlist_opens_no_other_file(playlist, tmp_path):
    secret = write_pyav(tmp_path / "secret.aac", "aac", tone(1.2, RATE, 0), container="adts")
    for name in ("a.mp3", "a.m4a"):
        (tmp_path / name).write_text(playlist.format(secret))
        with pytest.raises(UserError, match="cannot be decoded"):
            decode(tmp_path / name, name)


def test_libraries_print_nothing_and_python_still_does(tmp_path, capfd):
    soundfile.write(tmp_path / "a.mp3", tone(3, RATE, 0), RATE)
    content = bytearray((tmp_path / "a.mp3").read_bytes())
    content[2000:4000] = np.random.default_rng(0).integers(0, 256, 2000, np.uint8).tobytes()
    with soundfile.SoundFile(io.BytesIO(content)) as file, pytest.raises(soundfile.LibsndfileError):
        file.read()
    assert "mpg123" in capfd.readouterr().err  # it would print
    with pytest.raises(UserError, match=r"a\.mp3: cannot be decoded \(soundfile: .*; PyAV: Invalid data"):
        decode(bytes(content), "a.mp3")
    print("here", file=sys.stderr)
    assert capfd.readouterr() == ("", "here\n")


def test_tags_in_other_encodings_are_no_fault(tmp_path):
    path = write_pyav(tmp_path / "a.mka", "flac", tone(1.2, RATE, 0))
    with av.open(str(tmp_path / "b.mka"), "w") as out, av.open(str(path)) as file:
        out.metadata["title"] = "Strasse"
        stream = out.add_stream_from_template(file.streams.audio[0])
        for packet in file.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    content = (tmp_path / "b.mka").read_bytes()
    assert b"Strasse" in content
    assert len(decode(content.replace(b"Strasse", b"Stra\xdfe "), "b.mka")[0]) == round(1.2 * RATE)


def test_reading_stops_where_the_part_ends(tmp_path, monkeypatch):
    path = write_pyav(tmp_path / "a.m4a", "aac", tone(30, RATE, 0), container="ipod")
    whole, _ = decode(path, path.name)
    decoded, mean = [], waves.read_pyav.__globals__["_mean_of_channels"]
    monkeypatch.setitem(waves.read_pyav.__globals__, "_mean_of_channels", lambda f: decoded.append(f) or mean(f))
    part, _ = decode(path, path.name, 1.0, 0.5)
    np.testing.assert_array_equal(part, whole[RATE : RATE + RATE // 2])
    assert len(decoded) < 30


@pytest.mark.parametrize("form", ["MP3", "FLAC"])
def test_a_recording_that_lacks_a_part_is_refused(form):
    stream = io.BytesIO()
    soundfile.write(stream, tone(3, RATE, 0), RATE, format=form)
    content = bytearray(stream.getvalue())
    middle = len(content) // 2
    content[middle : middle + 2000] = np.random.default_rng(0).integers(0, 256, 2000, np.uint8).tobytes()
    with pytest.raises(UserError, match="cannot be decoded"):
        decode(bytes(content), f"a.{form.lower()}")


def test_junk_after_the_end_is_no_damage():
    """Tags that libsndfile does not know."""
    stream = io.BytesIO()
    soundfile.write(stream, tone(3, RATE, 0), RATE, format="MP3")
    wave, _ = decode(stream.getvalue(), "a.mp3")
    for junk in (b"TAG" + bytes(125), b"APETAGEX" + bytes(4000), bytes(9000)):
        np.testing.assert_array_equal(decode(stream.getvalue() + junk, "a.mp3")[0], wave)


def test_the_demo_is_read_as_before(tmp_path):
    """G.722 has no header: its suffix decides."""
    content = np.random.default_rng(0).integers(0, 256, 8000, np.uint8).tobytes()
    (Path(tmp_path) / "a.g722").write_bytes(content)
    wave, rate = decode(content, "a.g722")
    assert (rate, len(wave)) == (16000, 16000)
    np.testing.assert_array_equal(decode(tmp_path / "a.g722", "a.g722", 0.25, 0.5)[0], wave[4000:12000])
