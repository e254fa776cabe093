"""The two libraries that decode recordings: libsndfile, and FFmpeg for the formats and streams that libsndfile refuses.

Each reader returns the mean of the channels, (samples,) float32, and the rate in Hz, or raises DecodeError.
"""

import io
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from .c_stderr import muted

MAX_RATE = 1_000_000  # Hz; a damaged header may claim any, and the arrays of a part grow with it
MAX_CHANNELS = 256
_SEARCHED = 2**27  # bytes without a frame; video between two frames of sound is less
_MAX_PLANES = 8  # PyAV reads beyond FFmpeg's array, and ends the process, for more: a damaged frame may claim 59
_GAP = 0.01  # seconds; times in Matroska are rounded to 1 ms
_UNKNOWN = 2**62  # frames: libsndfile's mark of a stream whose header has no length is 2**63 - 1
# libsndfile stops at the end that it takes from the first frames of an MP3, or from the first of joined files.
_MAY_BE_LONGER = {"MP3", "OGG"}
_SYNC, _TAGS = b"\xff", (b"ID3", b"TAG", b"APETAGEX")  # begin a frame of an MP3, and a tag
_TRIMMED = 0.3  # seconds; decoders leave out the encoder's delay and padding, up to 4 frames of an MP3
# Demuxers of recordings. The others include playlists, which open the files and the URLs that they name.
_DEMUXERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,g722,gsm,iff,loas,matroska,webm,mov,mp4,m4a,"
    "3gp,3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,nistsphere,ogg,rm,sox,tta,voc,w64,wav,wv,xwma"
)
# A damaged frame is an error: FFmpeg would fill its place with silence or noise.
_OPTIONS = {"format_whitelist": _DEMUXERS, "err_detect": "crccheck+explode"}


class DecodeError(Exception):
    """A reader cannot decode a recording. The text is the reason."""


class NoAudioError(DecodeError):
    """A video without a sound track."""


def read_soundfile(source: str | os.PathLike | bytes, start: float, seconds: float | None) -> tuple[np.ndarray, int]:
    """Decode a part of a recording with libsndfile. `source` is a path, or the file's bytes."""
    import soundfile

    try:
        opened = io.BytesIO(source) if isinstance(source, bytes) else os.fsencode(source)
        # libsndfile's MP3 decoder prints its complaints, without the name of the file.
        with muted(), soundfile.SoundFile(opened) as file:
            rate = _checked_rate(file.samplerate, file.channels)
            if file.frames >= _UNKNOWN:
                raise DecodeError("the header has no length")
            if file.format == "MP3" and _is_adts(source):
                raise DecodeError("AAC, not MP3")
            file.seek(min(round(start * rate), file.frames))
            samples = -1 if seconds is None else round(seconds * rate)
            wave = file.read(samples, dtype="float32", always_2d=True)
            at_end = file.tell() >= file.frames
            if at_end and file.format in _MAY_BE_LONGER and _packet_seconds(source) > file.frames / rate + _TRIMMED:
                raise DecodeError("the file goes on after the end that its header tells")
            return _mean(wave, axis=1), rate
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".")
        # libsndfile says so of a file that only begins like MP3. The file exists: `decode` has looked.
        raise DecodeError("Format not recognised" if reason.startswith("File does not exist") else reason) from error
    except DecodeError:
        raise
    except Exception as error:  # of soundfile, numpy or the disk, for a header that no encoder writes
        raise DecodeError(_describe(error)) from error


def read_pyav(
    source: str | os.PathLike | bytes, start: float, seconds: float | None, demuxer: str | None = None
) -> tuple[np.ndarray, int]:
    """Decode a part of the first audio stream of a recording with FFmpeg. demuxer: for formats without a header."""
    import av

    try:
        # FFmpeg refuses names that are not UTF-8, so it gets an open file. Tags may be in any encoding.
        with (
            _open(source) as file,
            av.open(stream := _Stream(file), format=demuxer, options=_OPTIONS, metadata_errors="replace") as container,
        ):
            if not container.streams.audio:
                raise (NoAudioError if container.streams.video and not stream.fault else DecodeError)("no audio stream")
            track = container.streams.audio[0]
            if track.codec_context is None:
                raise DecodeError("an unknown codec")
            # FLAC numbers its samples. Other timestamps may have gaps by design, as of silence that is not sent.
            frames = stream.reset_after(frame for packet in _packets(container, track) for frame in packet.decode())
            rate, pieces = _pieces(frames, start, seconds, numbered=track.codec.name == "flac")
            return np.concatenate(pieces) if pieces else np.zeros(0, np.float32), rate or track.rate
    except av.error.FFmpegError as error:
        raise DecodeError(stream.fault or error.strerror) from error
    except DecodeError:
        raise
    except Exception as error:  # of PyAV, numpy or the disk, for a header that no encoder writes
        raise DecodeError(_describe(error)) from error


def _packets(container, track) -> Iterator:
    """Yield the packets of a track, without the tags between joined MP3s, which the decoder would refuse. The last
    packet is empty, and asks the decoder for what it still has."""
    in_tag = False  # a tag may be several packets long
    for packet in container.demux(track):
        if container.format.name == "mp3" and packet.size:
            start = bytes(packet)[:8]
            in_tag = start.startswith(_TAGS) or (in_tag and start[:1] != _SYNC)
        if not in_tag or not packet.size:
            yield packet


def _packet_seconds(source: str | os.PathLike | bytes) -> float:
    """Return the length of the packets of the first audio stream without decoding them, 0 if FFmpeg cannot tell it.
    Junk between or after the frames of an MP3 does not count."""
    import av

    try:
        with (
            _open(source) as file,
            av.open(stream := _Stream(file), options=_OPTIONS, metadata_errors="replace") as container,
        ):
            track, ticks = container.streams.audio[0], 0
            for packet in stream.reset_after(container.demux(track)):
                if container.format.name != "mp3" or bytes(packet)[:1] == _SYNC:
                    ticks += packet.duration or 0
            return float(ticks * track.time_base)
    except Exception:  # of PyAV, for a damaged file: libsndfile's length stands
        return 0.0


class _Stream:
    """A file for FFmpeg, which would read and keep gigabytes in search of a frame. Without a name, so that the content
    alone decides on the format. Raises nothing, since PyAV would print it: see `fault`."""

    def __init__(self, file: BinaryIO):
        self.tell, self.fault = file.tell, ""
        self._file, self._left = file, _SEARCHED

    def read(self, size: int) -> bytes:
        """Return the next bytes, or none after a fault."""
        try:
            content = b"" if self.fault else self._file.read(size)
        except OSError as error:
            self.fault, content = error.strerror, b""
        self._left -= len(content)
        if self._left < 0:
            self.fault, content = f"no audio in {_SEARCHED >> 20} MiB", b""
        return content

    def seek(self, offset: int, whence: int) -> int:
        """Return the new place, -1 if there is no such place: damaged files name some."""
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):
            return -1

    def reset_after(self, parts: Iterator) -> Iterator:
        """Yield frames or packets, and let FFmpeg search again after each. Raises DecodeError if a fault ended them."""
        for part in parts:
            self._left = _SEARCHED
            yield part
        if self.fault:
            raise DecodeError(self.fault)


def _pieces(frames: Iterator, start: float, seconds: float | None, numbered: bool) -> tuple[int, list[np.ndarray]]:
    """Return the rate, 0 if there are no frames, and the waves of the frames of a part. numbered: the times of frames
    show which ones are missing."""
    rate, pieces, place, began = 0, [], 0, None  # place: of the next frame, in samples
    for frame in frames:
        if numbered and frame.time is not None:
            began = frame.time if began is None else began
            if abs(frame.time - began - place / frame.sample_rate) > _GAP:
                raise DecodeError(f"samples are missing at {frame.time:.1f} s")
        if frame.sample_rate != rate:
            if rate:
                raise DecodeError(f"the rate changes from {rate} to {frame.sample_rate} Hz")
            rate = _checked_rate(frame.sample_rate, frame.layout.nb_channels)
            first = round(start * rate)
            end = None if seconds is None else first + round(seconds * rate)
        wave = _mean_of_channels(frame)[max(0, first - place) : None if end is None else max(0, end - place)]
        if len(wave):
            pieces.append(wave)
        place += frame.samples
        if end is not None and place >= end:
            break
    return rate, pieces


def _mean_of_channels(frame) -> np.ndarray:
    if frame.format.is_planar and frame.layout.nb_channels > _MAX_PLANES:
        raise DecodeError(f"{frame.layout.nb_channels} channels in planes")
    values = frame.to_ndarray()  # planar: (channels, samples), packed: (1, samples x channels)
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype == np.uint8:
        values = (values.astype(np.float32) - 128) / 128
    elif values.dtype.kind == "i":
        values = values.astype(np.float32) / np.float32(2.0 ** (8 * values.dtype.itemsize - 1))
    return _mean(values, axis=0)


def _mean(channels: np.ndarray, axis: int) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # the wave is checked later, and named then
        return channels.mean(axis=axis, dtype=np.float32)


def _checked_rate(rate: int, channels: int) -> int:
    if not (0 < rate <= MAX_RATE and 0 < channels <= MAX_CHANNELS):
        raise DecodeError(f"the header says {rate} Hz and {channels} channels")
    return rate


def _is_adts(source: str | os.PathLike | bytes) -> bool:
    """Whether a file that libsndfile takes for MP3 is AAC: their frames begin alike, with another layer."""
    with _open(source) as stream:
        head = stream.read(10)
        if head.startswith(b"ID3") and len(head) == 10:
            stream.seek(10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True)))
            head = stream.read(2)
    return len(head) >= 2 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0


def _open(source: str | os.PathLike | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: PTH123 - may be a str


def _describe(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:120]
    return text or type(error).__name__
