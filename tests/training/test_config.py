from dataclasses import fields

import pytest

from agrepa_fast.config import Config, ModelConfig
from agrepa_fast.config_file import load_config, preset_names, save_config, settings_that_differ
from agrepa_fast.errors import UserError


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_survive_saving(name, tmp_path):
    config = load_config(name)
    assert config.run.preset == name
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_overrides_are_typed():
    config = load_config(
        "demo", ["train.lr=1e-3", "align.strategy=fixed:4,8", "eval.times=[0.5]", "data.mel_norm=null"]
    )
    assert config.train.lr == 1e-3
    assert config.align.fixed_layers == (4, 8)
    assert config.eval.times == [0.5]
    assert config.data.mel_norm is None


def test_another_backbone_leaves_out_the_sizes_of_the_presets_own(tmp_path):
    """Those that are typed stay, and so does all that the shards decide; the message is for what was typed."""
    typed = ["model.backbone=voicebox", "model.options.dim=64", "model.n_mels=80"]
    given = load_config("demo", typed).model
    assert given == ModelConfig(backbone="voicebox", options={"dim": 64}, n_mels=80)
    with pytest.raises(UserError, match=r"model\.depth is AudioDiT's: for voicebox write model.options\.depth="):
        load_config("demo", [*typed, "model.depth=8"])
    assert load_config("demo", ["model.backbone=audio_dit"]) == load_config("demo")
    assert load_config("voicebox", ["model.backbone=audio_dit", "model.depth=3"]).model == ModelConfig(depth=3)

    file = tmp_path / "mine.yaml"
    file.write_text("model: {backbone: 'mine:Mine', options: {size: 5}, padding: upstream, extra_vocab: 7}\n")
    sibling = load_config(file, ["model.backbone=mine:Other"]).model
    assert (sibling.options, sibling.padding) == ({"size": 5}, "upstream")
    other = load_config(file, ["model.backbone=other:Mine"]).model
    assert (other.options, other.padding, other.extra_vocab) == ({}, "strict", 7)
    file.write_text("model: {backbone: voicebox, dim: 64}\n")
    with pytest.raises(UserError, match=r"model\.dim is AudioDiT's"):
        load_config(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "did you mean 'steps'"),
        ("trian.steps=3", "did you mean 'train'"),
        ("train.steps", "write section.field=value"),
        ("steps=3", "write section.field=value"),
        ("train.lr=fast", "train.lr"),
        ("train.lr=-1", "must be positive"),
        ("align.strategy=fogga", "did you mean 'foga'"),
        ("align.strategy=fixed", "fixed:4,8,12"),
        ("align.strategy=fixed:", "fixed:4,8,12"),
        ("align.strategy=deep:", "fixed:4,8,12, and only for fixed"),
        ("align.strategy=fixed:0,4", "numbered 1 to 8"),
        ("align.strategy=fixed:9", "numbered 1 to 8"),
        ("align.k=9", "more than the model's 8 layers"),
        ("model.heads=5", "does not divide"),
        ("model.gelu=relu", "erf or tanh"),
        ("data.teacher_precision=bf16", "fp32 or fp16"),
        ("probe.times=[0.0]", "between 0 and 1"),
        ("probe.warmup_steps=400", "leaves no step to align"),
        ("data.f_max=12000.0", "at most half"),
        ("data.sample_rate=2147483647", "must be from 1 to 1048576"),
        ("train.betas=[0.9,1.5]", "2 values, each in [0, 1)"),
        ("train.betas=[0.9]", "2 values"),
        ("train.steps=2.5", "a whole number is wanted"),
        ("train.compile=maybe", "true or false is wanted"),
        ("train.peak_tflops=0", "must be positive, or null"),
        ("train.lr=.nan", "a finite number is wanted"),
        ("data.mel_norm=htk", "slaney, or null"),
        ("train.weight_decay=-1", "must not be negative"),
        ("align.lr=0", "must be positive"),
        ("model.dim=0", "from 1 to 1048576"),
        ("train.betas=[0.9", "train.betas"),
        ("data.win_length=2048", "no longer a setting: windows are data.n_fft samples long"),
        ("probe.max_rows=64", "no longer a setting: lower probe.chunk"),
        ("data.hop_length=0", "from 1 to"),
        ("flow.sigma=0", "must be positive"),
        ("flow.times=lognormal", "flow.times='lognormal': write uniform, logit_normal, or logit_normal:MEAN,SCALE"),
        ("flow.times=logit_normal:0", "such as logit_normal:-0.8,0.8"),
        ("flow.times=logit_normal:0,0", "a positive SCALE"),
        ("flow.times=uniform:0,1", "write uniform"),
    ],
)
def test_bad_values_get_one_line_that_names_them(override, message):
    with pytest.raises(UserError) as raised:
        load_config("demo", [override])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_settings_of_earlier_versions_load_with_the_value_that_is_implied_now(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("data: {n_fft: 512, win_length: 512, f_min: 0.0}\nprobe: {max_rows: null}\neval: {samples: 1}\n")
    assert load_config(path).data.n_fft == 512
    path.write_text("data: {n_fft: 512, win_length: 400}\n")
    with pytest.raises(UserError, match="win_length=400 is no longer a setting"):
        load_config(path)


def test_every_setting_says_what_it_means():
    for part in fields(Config):
        for setting in fields(part.default_factory):
            assert setting.metadata["meaning"], f"{part.name}.{setting.name}"


def test_a_resume_may_change_what_no_number_depends_on():
    saved = load_config("demo")
    names = {
        name for name, _, _ in settings_that_differ(saved, load_config("demo", ["train.steps=900", "eval.clips=3"]))
    }
    assert names == set()
    differing = settings_that_differ(
        saved, load_config("demo", ["train.lr=1e-3", "data.workers=1", "data.val_share=0.2"])
    )
    assert differing == [("data.val_share", 0.1, 0.2), ("train.lr", 4e-3, 1e-3)]


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'demo'"):
        load_config("dmo")


def test_a_preset_that_is_a_list(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="sections with fields"):
        load_config(tmp_path / "list.yaml")


def test_a_config_cannot_run_code(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("run: {dir: !!python/object/apply:os.system ['touch pwned']}")
    with pytest.raises(UserError, match="python/object"):
        load_config(path)
