"""Frozen audio encoders, the teachers of representation alignment and of the tokens.

teacher = load_teacher("openai/whisper-large-v3")     # from the model hub
teacher = load_teacher("/models/wavlm-large@12")      # a folder, the output of its 12th layer
teacher = load_teacher("package:whisper-base@3")      # from a package, no model hub needed
teacher = load_teacher("beats:/models/BEATs_iter3_plus_AS2M.pt@9", "cuda", "fp16")
frames = teacher.frames([wave])[0]                    # (frames, teacher.dim) float32

The demo's audio teacher is Whisper-base's third layer. Whisper's encoder carries information on sound events (Gong et
al., Interspeech 2023, "Whisper-AT"), most of it below its end. Leave-one-out nearest-neighbour label accuracy of the
pooled, centred vectors of the first 2.2 s of each sound of the demo corpus:

                                      L1     L2     L3     L4     L5     L6    end  log-mel  aisfx
    sonic-pi (165 files, 14 kinds)  .606   .606   .636   .503   .485   .467   .497     .467   .624
    lincity (119 files, 39 kinds)   .160   .160   .168   .126   .168   .101   .134     .101   .185

L3 against the end on sonic-pi: 33 files better, 10 worse. aisfx, a network for sound effects, is no better and gives 5
frames per second, too few for tokens. The third layer gives 50 and needs no second download.
"""

from ..audio.waves import import_torchaudio
from .base import Teacher, cannot_load, model_source, split_layer

__all__ = ["Teacher", "load_teacher"]

_WAYS = "package:whisper-base, a folder saved with save_pretrained, or a name on the model hub, which needs a network"


def load_teacher(spec: str, device: str = "cpu", dtype: str = "fp32") -> Teacher:
    """Return the teacher of `spec`: `package:NAME`, `beats:FILE.pt`, a folder saved with save_pretrained, or a name on
    the model hub.

    `@N` at its end takes the output of encoder layer N, from 1, instead of the model's output. dtype: fp32, or fp16 for
    weights and activations; frames are float32 in both. Reads weights from safetensors, or from a pytorch_model.bin
    with weights_only, and never runs code that comes with a model. Raises UserError, in one line with the remedy, if
    there is no such model, layer or network, and for a model that cannot be a teacher.
    """
    import_torchaudio()  # transformers imports it
    from transformers import AutoConfig

    base, layer = split_layer(spec)
    if base.startswith("beats:"):
        from .beats import load_beats

        return load_beats(spec, base, layer, device, dtype)
    source, identity = _locate(base)
    identity = {"spec": spec, **identity}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type == "whisper":
            from .whisper import load_whisper as load
        else:
            from .families import load_encoder as load
        teacher = load(config, base, source, layer, identity, device, dtype)
    except (OSError, ValueError) as error:  # transformers' for a missing file and an unknown model type
        raise cannot_load(f"teacher {spec!r}", error, _WAYS) from error
    revision = getattr(config, "_commit_hash", None)  # of a model from the hub
    if revision:
        teacher.identity["version"] = revision
    return teacher


def _locate(base: str) -> tuple[str, dict]:
    """Return the argument of from_pretrained, and the known facts on its origin."""
    if base.startswith("package:"):
        from .packages import packaged

        name = base.removeprefix("package:")
        encoder = packaged(name)
        return str(encoder.folder(name)), encoder.facts
    return model_source(base, f"teacher {base!r}", _WAYS), {}
