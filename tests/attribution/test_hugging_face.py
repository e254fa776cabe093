"""ablate on models of transformers as they are made, against one forward per block."""

import pytest
import torch
import torch.nn as nn

from agrepa_fast import ablate
from agrepa_fast.attribution.blocks import find_blocks
from agrepa_fast.audio.waves import make_torchaudio_importable

CLIPS, TOKENS = 3, 11
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
CONVOLUTIONS = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
POSITIONS = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}


def text() -> dict[str, torch.Tensor]:
    lengths = torch.tensor([[TOKENS], [8], [5]])
    return {
        "input_ids": torch.randint(0, 50, (CLIPS, TOKENS)),
        "attention_mask": (torch.arange(TOKENS) < lengths).long(),
    }


def llama(transformers):
    config = transformers.LlamaConfig(vocab_size=60, num_key_value_heads=1, **SMALL)
    return transformers.LlamaModel(config), "layers", text()


def llama_without_cache(transformers):
    model, blocks, inputs = llama(transformers)
    return model, blocks, inputs | {"use_cache": False}


def wavlm(transformers):
    """Its first layer makes a bias of clips x heads rows, which layers hand on."""
    config = transformers.WavLMConfig(**SMALL, **CONVOLUTIONS, **POSITIONS)
    return transformers.WavLMModel(config), "encoder.layers", {"input_values": torch.randn(CLIPS, 800)}


def t5_decoder(transformers):
    """Called with the encoder's states beside its own; its first block makes the bias of all."""
    config = transformers.T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2)
    inputs = text() | {"decoder_input_ids": torch.randint(0, 50, (CLIPS, 7)), "use_cache": False}
    return transformers.T5Model(config), "decoder.block", inputs


@pytest.fixture(scope="module")
def transformers():
    make_torchaudio_importable()
    return pytest.importorskip("transformers")


def left_out(block: nn.Module):
    """A forward that hands on the first sequence that it gets, and all else as it makes it."""
    forward = block.forward

    def identity(*args, **kwargs):
        state = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim == 3)
        out = forward(*args, **kwargs)
        return state if isinstance(out, torch.Tensor) else (state, *out[1:])

    return identity


@torch.no_grad()
@pytest.mark.parametrize("make", [llama_without_cache, wavlm, t5_decoder])
def test_equals_one_forward_per_block(make, transformers):
    torch.manual_seed(0)
    model, path, inputs = make(transformers)
    model.eval()
    blocks = list(find_blocks(model, path).values())
    base, wanted = model(**inputs).last_hidden_state.flatten(1), []
    for block in blocks:
        block.forward = left_out(block)
        change = model(**inputs).last_hidden_state.flatten(1) - base
        del block.forward
        wanted.append(change.norm(dim=1) / base.norm(dim=1))
    got = ablate(model, inputs, blocks).values[:, :, 0, 0]
    torch.testing.assert_close(got, torch.stack(wanted), atol=1e-5, rtol=1e-5)
    assert got.min() > 1e-3


def test_a_cache_is_refused_by_the_arguments_name(transformers):
    model, path, inputs = llama(transformers)
    message = r"block 1 \(LlamaDecoderLayer\) keeps state in its argument .*cache.* switch that off \(use_cache=False"
    with pytest.raises(ValueError, match=message):
        ablate(model, inputs, list(find_blocks(model, path).values()))
