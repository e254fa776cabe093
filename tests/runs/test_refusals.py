"""What training refuses: one line, exit code 2, nothing written."""

import re
import shutil

import pytest

from ..ranks import ROOT, run_training, start_training, train


def refused_by_the_page() -> dict[str, set[str]]:
    """Each value of the last table of docs/objectives.md, and everything that it refuses beside that."""
    table = (ROOT / "docs/objectives.md").read_text().rpartition("|---|---|\n")[2]
    cells = [
        [re.findall(r"`(?:topology [AB], )?([^`]+)`", cell) for cell in line.split("|")] for line in table.splitlines()
    ]
    return {value[0]: set(others) for _, value, others, _ in cells}


REFUSED = refused_by_the_page()


def test_a_fault_that_rank_0_finds_stops_every_rank_with_one_line(preset, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(preset.parent, shards)
    (shards / "train-audio-0001.tar").unlink()
    first, second = train(2, "--preset", str(preset), f"data.path={shards}", cwd=tmp_path)
    assert (first.code, second.code) == (2, 2), first.output + second.output
    assert "train-audio-0001.tar is missing" in first.output
    assert "Traceback" not in first.output + second.output
    assert "agrepa train:" not in second.output


def test_a_refusal_as_users_see_it(tmp_path):
    """The one refusal of a process of its own."""
    (process,) = start_training(1, "--preset", "dmo", cwd=tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.splitlines()[-1] == "agrepa train: preset 'dmo' is unknown: did you mean 'demo'?"
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(preset, tmp_path):
    args = ("--preset", str(preset), "run.dir=run", "train.lr=1e30", "train.warmup_steps=0", "train.save_every=1")
    output = run_training(1, *args, "train.log_every=5", cwd=tmp_path, wanted=2)
    assert "lower train.lr" in output
    assert "Traceback" not in output
    for path in (tmp_path / "run" / "checkpoints").glob("step*"):
        assert int(path.name[4:]) < 3


class TestRefusals:
    """One line, exit code 2, nothing written."""

    def refused(self, preset, cwd, *arguments) -> str:
        output = run_training(1, "--preset", str(preset), *arguments, cwd=cwd, wanted=2)
        lines = [line for line in output.splitlines() if line.startswith("agrepa train: ")]
        assert len(lines) == 1, output
        assert "Traceback" not in output
        return lines[0]

    def test_a_run_folder_that_holds_another_run(self, preset, baseline):
        before = (baseline / "metrics.jsonl").read_bytes()
        assert "already holds a run" in self.refused(preset, baseline, f"run.dir={baseline}")
        assert (baseline / "metrics.jsonl").read_bytes() == before

    def test_another_architecture(self, preset, tmp_path):
        run = ("run.dir=run", "train.steps=3", "align.strategy=none")
        run_training(1, "--preset", str(preset), *run, cwd=tmp_path)
        line = self.refused(preset, tmp_path, "run.dir=run", "--resume", "latest", "model.depth=5", "train.steps=9")
        assert "another architecture: model.depth is 4" in line  # and the run is as it was:
        line = self.refused(preset, tmp_path, "run.dir=run", "--resume", "latest", "train.batch_clips=4")
        assert "train.batch_clips is 8 there and 4" in line
        line = self.refused(preset, tmp_path, "run.dir=run", "--resume", "latest", "align.strategy=shallow")
        assert "align.strategy is none there" in line
        assert "no checkpoint 'step7'" in self.refused(preset, tmp_path, "run.dir=run", "--resume", "step7")

    def test_an_end_before_the_checkpoint(self, preset, tmp_path):
        run_training(1, "--preset", str(preset), "run.dir=run", "train.steps=3", "align.strategy=none", cwd=tmp_path)
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"]
        before = {path: path.read_bytes() for path in files}
        line = self.refused(preset, tmp_path, "run.dir=run", "--resume", "latest", "train.steps=2")
        assert "step00000003 is later than train.steps=2: raise it to 3 at least" in line
        assert {path: path.read_bytes() for path in files} == before

    @pytest.mark.parametrize(
        ("ds_config", "message"),
        [
            ("{", "is no JSON"),
            ("[1]", "a JSON object is wanted"),
            ('{"train_micro_batch_size_per_gpu": 3}', "3 contradicts the run's 8"),
            ('{"bf16": {"enabled": true}}', "contradicts fp32 on cpu"),
            ('{"fp16": {"enabled": true}}', "bf16 or fp32"),
            ('{"optimizer": {"type": "Lamb"}}', "remove it"),
            ('{"bf16": true}', "an object is wanted"),
            ('{"zero_optimization": {"stage": 9}}', "stage 9 is unknown"),
            ('{"zero_optimization": {"stage": 1, "reduce_bucket_size": -5}}', 'reduce_bucket_size": -5'),
            ('{"zero_optimization": {"stage": 3, "stage3_max_reuse_distance": -5}}', "stage3_max_reuse_distance=-5"),
        ],
    )
    def test_a_ds_config_that_is_wrong(self, ds_config, message, preset, tmp_path):
        (tmp_path / "ds.json").write_text(ds_config)
        assert message in self.refused(preset, tmp_path, "--ds_config", "ds.json")
        assert {path.name for path in tmp_path.iterdir()} <= {"ds.json", "runs"}
        assert not list(tmp_path.glob("runs/*/config.yaml"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--ds_config", "zero4.json"), "did you mean 'zero"),
            (("train.batch_clips=1", "train.accumulation=2"), "at least 2 are needed"),
            (
                ("train.batch_frames=40", "train.accumulation=2"),
                "allows 1 clips of 25 frames, fewer than ranks x train.accumulation = 2",
            ),
            (("data.path=nowhere",), "agrepa prepare"),
            (("probe.clips=23",), "23 speech clips of the train split are wanted, 22 are there"),
            (("model.vocab=99",), "model.vocab=99"),
            (("--resume", "latest", "run.dir=nowhere"), "holds no run"),
            (("data.hop_length=300",), "hop_length=256"),
            (("data.audio_teacher=package:whisper-base",), "prepared with data.audio_teacher=openai/whisper-large-v3"),
            (("align.objective=frames",), "one vector per clip of speech: prepare with data.teacher_rate"),
            (("align.objective=sra", "align.strategy=deep"), "align.strategy=deep takes the last"),
            (("model.backbone=voicebox", "model.extra_vocab=9"), "voicebox takes no second token"),
            (("eval.vocoder=package:hifigan",), "eval.vocoder"),
            (("eval.vocoder=grifin-lim",), "did you mean 'griffin-lim'"),
        ],
    )
    def test_a_setting_that_is_wrong(self, arguments, message, preset, tmp_path):
        assert message in self.refused(preset, tmp_path, *arguments)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("align.objective=layersync", "align.strategy=deep"),
            ("align.objective=irepa", "shards without data.teacher_rate"),
            ("align.strategy=middle", "align.share=0.5"),
            ("align.strategy=lasp", "align.bitc_speech=0"),
            ("model.extra_vocab=1024", "shards without data.extra_tokens"),
        ],
    )
    def test_a_pair_that_the_page_of_objectives_refuses(self, first, second, preset, tmp_path):
        """The shards of the tests have neither teacher frames nor second tokens."""
        assert second in REFUSED[first]
        assert first in REFUSED[second]
        self.refused(preset, tmp_path, *(setting for setting in (first, second) if " " not in setting))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("align.objective=layersync", "align.strategy=middle"),
        ("align.objective=sra", "flow.reference=infill"),
        ("align.strategy=gradnorm", "flow.prediction=x"),
    ],
)
def test_a_pair_that_the_page_of_objectives_does_not_refuse(first, second, preset, tmp_path):
    assert second not in REFUSED[first]
    assert first not in REFUSED[second]
    run_training(1, "--preset", str(preset), "run.dir=run", first, second, "train.steps=4", cwd=tmp_path)
