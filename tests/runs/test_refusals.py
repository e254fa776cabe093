"""What training refuses: one line, exit code 2, nothing written."""

import gc
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from datetime import timedelta
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from agrepa_fast.errors import UserError
from agrepa_fast.ranks import raising_alike
from agrepa_fast.train import main
from agrepa_fast.training import builder
from agrepa_fast.zero.ds_config import zero_stage

from ..ranks import ROOT, call_on_ranks, run_training, start_training, train

FULL = OSError(28, "No space left on device", "a-file")
FAULTS = (  # that one rank alone has: where, the error, the ranks, and whether the run is a resume
    ("training.builder.check_backend", UserError("planted"), (0, 1), False),
    ("training.builder.validation_clips", UserError("planted"), (0, 1), False),
    ("training.builder.make_objective", TypeError("planted"), (0, 1), False),
    ("training.builder.load_weights", FULL, (0, 1), False),
    ("training.folder.check_writable", FULL, (0,), False),
    ("training.builder.load_vocoder", FULL, (0,), False),
    ("training.folder.FolderLock.acquire", FULL, (0,), False),
    ("checkpoints.load.restore_random_state", UserError("planted"), (0, 1), True),
    ("training.builder.open_tracker", UserError("planted"), (0,), True),
    ("training.builder.drop_later_probes", FULL, (0,), True),
)


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


def lose_validation_clips() -> None:
    if os.environ["RANK"] == "1":
        builder.validation_clips = mock.Mock(side_effect=UserError("planted"))


def test_a_fault_of_rank_1_stops_every_rank_with_one_line_of_rank_0(preset, tmp_path):
    first, second = train(2, "--preset", str(preset), cwd=tmp_path, plant=lose_validation_clips)
    assert (first.code, second.code) == (2, 2), first.output + second.output
    (line,) = [line for line in first.output.splitlines() if "agrepa train:" in line]
    assert line.startswith("agrepa train: rank 1 on ")
    assert line.endswith(": planted")
    assert "agrepa train:" not in second.output


def refuse(faults: Sequence[tuple[str, Exception | None, int, tuple[str, ...]]]) -> list[tuple[int, str]]:
    """The exit code and stderr of a run with each fault: (where, error, rank, arguments)."""
    ended = []
    for place, error, rank, arguments in faults:
        planted = mock.patch(f"agrepa_fast.{place}", side_effect=error) if rank == _rank() else nullcontext()
        with planted, redirect_stderr(StringIO()) as said, pytest.raises(SystemExit) as ending:
            main(arguments)
        ended.append((ending.value.code, said.getvalue()))
        del ending  # tracebacks hold the lock of the run's folder
        if error is not None:
            error.__traceback__ = None
        gc.collect()
    return ended


def _rank() -> int:
    return int(os.environ["RANK"])


def test_an_error_of_one_rank_ends_all_with_one_line_and_costs_no_records(saved, preset, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"}
    new = ("--preset", str(preset), f"run.dir={tmp_path}/new", f"train.start_from={saved}")
    resume = ("--resume", "step00000003", f"run.dir={run}", "train.copy_to=null")
    faults = [
        (place, error, rank, ("--ds_config", "zero2.json", *(resume if resumed else new)))
        for place, error, ranks, resumed in FAULTS
        for rank in ranks
    ]
    for (place, error, rank, _), first, second in zip(faults, *call_on_ranks(2, refuse, faults), strict=True):
        assert (first[0], second[0]) == (2, 2), place
        lines = [line for line in (first[1] + second[1]).splitlines() if line.startswith("agrepa train: ")]
        assert len(lines) == 1, (place, lines)
        assert ("rank 1 on " in lines[0]) == (rank == 1)
        assert ("planted" if "planted" in str(error) else "a-file: No space left") in lines[0]
    assert not (tmp_path / "new" / "config.yaml").exists()
    assert before == {path: path.read_bytes() for path in before}


def refuse_everywhere(arguments: tuple[str, ...], folder: Path) -> list[tuple[int, str]]:
    """`refuse` with faults that every rank has."""
    faults = ["training.builder.build_engine", "training.builder.lines_before_the_first_step"]
    given = [(*arguments, f"run.dir={folder}/{place}") for place in faults]
    return refuse([(place, UserError(place), _rank(), run) for place, run in zip(faults, given, strict=True)])


def test_an_error_of_all_ranks_amid_collectives_of_deepspeed_s_is_one_line(preset, tmp_path):
    arguments = ("--ds_config", "zero3.json", "--preset", str(preset))
    first, second = call_on_ranks(2, refuse_everywhere, arguments, tmp_path)
    assert [code for code, _ in (*first, *second)] == 4 * [2]
    for (_, said), end in zip(first, ("build_engine", "lines_before_the_first_step"), strict=True):
        assert said.splitlines()[-1] == f"agrepa train: training.builder.{end}"
    assert not any("agrepa train:" in said for _, said in second)


def raise_on_rank_1() -> type | None:
    with mock.patch("agrepa_fast.ranks._ALIKE_SECONDS", 0.2):
        try:
            with raising_alike():
                if _rank() == 1:
                    raise UserError("planted")
        except UserError as error:
            return type(error)
    return None


def test_an_error_of_one_rank_amid_collectives_of_deepspeed_s_is_its_own():
    assert call_on_ranks(2, raise_on_rank_1) == [None, UserError]


def refuse_on_two_nodes(folder: Path, arguments: tuple[str, ...]) -> list[tuple[int, str]]:
    """`refuse` in a working folder of each rank's own. Rank 1 does not wait for files of rank 0's to appear."""
    (folder / f"node{_rank()}").mkdir()
    os.chdir(folder / f"node{_rank()}")
    return refuse([("training.folder.time.sleep", None, 1, arguments)])


def test_a_run_folder_that_is_not_shared(preset, tmp_path):
    given = ("--ds_config", "zero2.json", "--preset", str(preset), "run.dir=run")
    ((code, said),), second = call_on_ranks(2, refuse_on_two_nodes, tmp_path, given)
    assert (code, second) == (2, [(2, "")])
    assert "rank 1 on " in said
    assert "run.dir=run: the files of rank 0 are not seen here: choose a folder on storage that all nodes share" in said
    assert {path.name for path in tmp_path.glob("node*/run/*")} == {".lock", "plots"}


def see_stage(rank_1_file: Path, arguments: tuple[str, ...]) -> tuple[int, timedelta]:
    """The ZeRO stage that this rank sees, and how long it waits for the others."""
    seen = []

    def check(ds_config: dict) -> None:
        backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        seen.append((zero_stage(ds_config), backend.options._timeout))
        raise UserError("planted")

    os.chdir(rank_1_file.parent if _rank() else "/")
    with mock.patch("agrepa_fast.training.builder.check_ds_config", check), pytest.raises(SystemExit):
        main(arguments)
    return seen[0]


def test_rank_0_reads_the_ds_config_for_all(preset, tmp_path):
    """On the machine of rank 1, a file has the name of the preset."""
    mine = tmp_path / "zero2.json"
    mine.write_text('{"zero_optimization": {"stage": 1}}')
    given = ("--ds_config", "zero2.json", "--preset", str(preset), f"run.dir={tmp_path}/run", "train.patience=7")
    assert call_on_ranks(2, see_stage, mine, given) == [(2, timedelta(minutes=7))] * 2


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
            (("align.objective=layersync", "align.k=4"), "align.k=4 takes the last: lower it"),
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
