"""What is wrong in a ds_config is named in one line: the section, the field, its value and the remedy."""

import json

import pytest
import torch

from agrepa_fast.config import TrainConfig
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.errors import UserError
from agrepa_fast.zero.ds_config import find_ds_config, resolve_ds_config
from agrepa_fast.zero.ds_sections import adopt_sections
from agrepa_fast.zero.refusals import check_ds_config, deepspeed_refusals


def read(values: dict, tmp_path) -> None:
    """Do all that a run does with a ds_config before it makes anything."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    passed, train, _ = adopt_sections(find_ds_config(str(path)), TrainConfig(batch_clips=8))
    check_ds_config(resolve_ds_config(passed, train, BatchLayout(8, 1, 0, 1), torch.device("cpu")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage": 3, "stage3_prefetch_bucket_size": 15099494.4}, "stage3_prefetch_bucket_size=15099494.4: .* integer"),
        ({"stage": 2, "reduce_bucket_size": 0}, 'reduce_bucket_size": 0: a number above 0'),
        ({"stage": 2, "reduce_bucket_size": "5e8 bytes"}, 'reduce_bucket_size": "5e8 bytes": a number above 0'),
        ({"stage": 2, "allgather_bucket_size": 0}, 'allgather_bucket_size": 0: a number above 0'),
        ({"stage": 3, "sub_group_size": False}, 'sub_group_size": false: a number above 0'),
        ({"stage": 2, "no_such_key": 1}, "no_such_key=1 is unknown: known: "),
        ({"stage": 2, "overlap_coms": True}, "overlap_coms=True is unknown: did you mean 'overlap_comm'"),
        ({"stage": 3, "mics_shard_size": 8}, r"mics_shard_size.*\(zero_optimization.mics_shard_size=8: correct or"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "pin": 1}}, r"offload_optimizer\.pin=1 is unknown"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 7}}, r"offload_optimizer\.ratio=7: .* less than"),
        ({"stage": 2, "offload_optimizer": {"device": "gpu"}}, "device 'gpu' is not supported"),
        ({"stage": True}, "stage true is unknown"),
        ({"stage": "2"}, 'stage "2" is unknown'),
        ({"stage": [2]}, r"stage \[2\] is unknown"),
        ({"stage": 2, "overlap_comm": "perhaps"}, "overlap_comm='perhaps': .* boolean"),
    ],
)
def test_a_wrong_field_of_zero(values, message, tmp_path):
    with pytest.raises(UserError, match=message) as refusal:
        read({"zero_optimization": values}, tmp_path)
    assert "\n" not in str(refusal.value)
    assert "validation error" not in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"communication_data_type": "fp13"}, 'communication_data_type": "fp13": fp32, fp16 or bf16'),
        ({"communication_data_type": 5}, 'communication_data_type": 5: fp32, fp16 or bf16'),
        ({"data_types": {"grad_accum_dtype": "fp13"}}, 'data_types.grad_accum_dtype": "fp13": fp32, fp16 or bf16'),
        ({"data_types": {"keep_in_fp32_modules": 5}}, "keep_in_fp32_modules"),
        ({"data_types": 5}, '"data_types": an object is wanted'),
        ({"comms_logger": True}, '"comms_logger": an object is wanted'),
        ({"comms_logger": {"enabled": "perhaps"}}, '"comms_logger": enabled='),
        ({"fp16": {"enabled": "perhaps"}}, '"fp16": enabled='),
        ({"fp16": {"enabled": 1}}, "this engine trains in bf16 or fp32"),
        ({"steps_per_print": 0}, 'steps_per_print": 0: a number above 0'),
        ({"gradient_predivide_factor": "x"}, 'gradient_predivide_factor": "x": a number above 0'),
        ({"prescale_gradients": "no"}, 'prescale_gradients": "no": true or false'),
        ({"optimizer": {"type": "AdamW", "params": {"lr": True}}}, r'"optimizer": train\.lr=true: a number is wanted'),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}},
            r'"optimizer": train\.lr=fast: a number is wanted',
        ),
        ({"optimizer": {"type": ["AdamW"]}}, "remove it"),
        ({"scheduler": {"type": ["WarmupLR"]}}, "neither WarmupCosineLR nor WarmupLR"),
        ({"wandb": True}, '"wandb": an object is wanted'),
        ({"wandb": {"enabled": True, "project": 5}}, r'"wandb": train\.wandb=5: a text is wanted'),
    ],
)
def test_a_wrong_section(values, message, tmp_path):
    with pytest.raises(UserError, match=message) as refusal:
        read(values, tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' comes twice"),
        (b'{"gradient_clipping": NaN}', "NaN is no finite number"),
        (b'{"gradient_clipping": 1e400}', "1e400 is no finite number"),
        (b"[" * 100_000, "is no JSON"),
        (b"9" * 5000, "is no JSON"),
        ('{"a": "é"}'.encode("latin-1"), "is not UTF-8"),
        ("{}".encode("utf-16"), "is not UTF-8"),
        (b"", "is no JSON"),
    ],
)
def test_a_file_that_is_no_ds_config(content, message, tmp_path):
    (tmp_path / "ds.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        find_ds_config(str(tmp_path / "ds.json"))
    assert "\n" not in str(refusal.value)


def test_a_byte_order_mark_and_a_home_folder(tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_bytes(b'\xef\xbb\xbf{"zero_optimization": {"stage": 2}}')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_ds_config("~/ds.json") == {"zero_optimization": {"stage": 2}}


def test_every_type_of_deepspeed_s_is_a_refusal_and_no_other(tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    for kind in (DeepSpeedConfigError, ZeRORuntimeException, KeyError, TypeError, NotImplementedError, RuntimeError):
        with (
            pytest.raises(UserError, match=r"DeepSpeed refuses this ds_config: .*sub_group_size=7"),
            deepspeed_refusals({"zero_optimization": {"sub_group_size": 7}}),
        ):
            raise kind("sub_group_size\nis odd")
    for error in (
        OSError(28, "full"),
        MemoryError(),
        torch.OutOfMemoryError("x"),
        UserError("x"),
        RuntimeError("CUDA error: x"),
        RuntimeError("[gloo] Connection reset"),
    ):
        with pytest.raises(type(error)), deepspeed_refusals({}):
            raise error
