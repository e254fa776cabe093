"""Statistics over scores, and the layers and weights that are chosen from them."""

import json
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch

from agrepa_fast import foga, select_layers
from agrepa_fast.attribution.points import ProbeBatch
from agrepa_fast.attribution.scores import LayerScores
from agrepa_fast.attribution.selection import LayerSelection, NotRankableError

from ..testing import small_batch, small_model


class TestStatistics:
    def scores(self, per_clip, step=0, draws=1):
        """LayerScores of one domain whose per-clip scores are the rows of `per_clip`, (L, C)."""
        change = torch.tensor(per_clip)[..., None, None].expand(-1, -1, 1, draws).clone()
        clips = change.shape[1]
        return LayerScores(change, torch.zeros(clips), torch.zeros(clips, dtype=torch.long), (0.5,), step=step)

    def test_bootstrap_probability_that_the_top_k_is_the_top_k(self):
        """Two clips that disagree: L1 wins a resample when clip 1 is drawn twice (1/4) or each once (1/2)."""
        certain = self.scores([[0.9, 0.8], [0.1, 0.2], [0.5, 0.4]])
        assert certain.top_k_probability("speech", 1) == certain.top_k_probability("speech", 2) == 1
        torn = self.scores([[0.9, 0.1], [0.2, 0.6]])
        assert torn.top_k_probability("speech", 1) == pytest.approx(0.75, abs=0.03)
        assert torn.top_k_probability("speech", 1) == torn.top_k_probability("speech", 1)

    def test_layers_that_tie_share_the_place(self):
        """Clip 4 moves every layer alike, so that four layers tie in every resample and L3 is above or below them."""
        tied = [[0.30, 0.31, 0.32, 0.10]] * 2 + [[0.40, 0.41, 0.42, 0.12]] + [[0.30, 0.31, 0.32, 0.10]] * 2
        scores = self.scores(tied)
        assert scores.in_top_k("speech", 3).tolist() == pytest.approx([0.5, 0.5, 1, 0.5, 0.5])
        assert scores.top_k_probability("speech", 3) == pytest.approx(1 / 6)
        soft = select_layers(scores, k=3, choice="soft")
        assert soft.layers == {"speech": (1, 2, 3, 4, 5)}
        hard = select_layers(scores, k=3)
        assert hard.layers == {"speech": (1, 2, 3)}
        assert "0.17" in hard.warning
        assert self.scores(tied[:2]).top_k_probability("speech", 1) == 0.5
        assert self.scores(tied).top_k_probability("speech", 5) == 1

    def test_one_clip_says_nothing_about_others(self):
        assert self.scores([[0.9], [0.1]]).top_k_probability("speech", 1) is None
        assert select_layers(self.scores([[0.9], [0.1]]), k=1).evidence["speech"]["top_k_probability"] is None

    def test_the_probability_is_that_of_the_layers_that_may_be_chosen(self):
        """L1 has the highest mean, all from one clip of three: it is not measured, and L2 is chosen for sure."""
        chosen = select_layers(self.scores([[0.0, 0.0, 9.0], [0.4, 0.5, 0.6], [0.1, 0.1, 0.1]]), k=1)
        assert chosen.layers == {"speech": (2,)}
        assert chosen.evidence["speech"]["top_k_probability"] == 1

    def test_rank_correlation(self):
        up, down = self.scores([[0.1], [0.2], [0.3]]), self.scores([[3.0], [2.0], [0.1]])
        assert up.rank_correlation(up, "speech") == pytest.approx(1)
        assert up.rank_correlation(down, "speech") == pytest.approx(-1)

    def test_pooled_probes_count_less_the_older_they_are(self):
        values = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0))  # probes, layers, clips
        probes = [self.scores(one.tolist(), step=step, draws=2) for step, one in enumerate(values)]
        torch.testing.assert_close(probes[2].pooled_with([], 5).values, probes[2].values, atol=0, rtol=0)
        pooled = probes[2].pooled_with(probes[:2], 3)
        expected = (1 * values[0] + 2 * values[1] + 3 * values[2]) / 6
        torch.testing.assert_close(pooled.per_clip("speech"), expected)
        pooled = probes[2].pooled_with(probes[1:2], 3)  # the second of a run: the third has not come yet
        torch.testing.assert_close(pooled.per_clip("speech"), (2 * values[1] + 3 * values[2]) / 5)
        early, late = self.scores([[0.1, 0.3], [0.2, 0.2]], step=1), self.scores([[0.3, 0.5], [0.2, 0.6]], step=2)
        pooled = late.pooled_with([early], 2)
        assert pooled.clips("speech") == 2
        assert pooled.step == 2
        with pytest.raises(ValueError, match="same clips"):
            late.pooled_with([self.scores([[0.1], [0.2]])], 2)


class TestSelection:
    def scores(self, speech, audio, floor=1e-7, spread=0.01):
        """LayerScores of 4 clips a domain around the given means."""
        clips = torch.tensor([-1.0, 1.0, -1.0, 1.0]) * spread
        change = torch.cat([torch.tensor(m)[:, None] * (1 + clips) for m in (speech, audio)], dim=1)[..., None, None]
        base = foga(
            small_model(len(speech)), ProbeBatch(*small_batch(), torch.tensor([0, 1, 0]), (0, 1, 2)), times=(0.5,)
        )
        return replace(
            base, values=change, floor=torch.full((8,), floor), domain=torch.tensor([0] * 4 + [1] * 4), step=7
        )

    def test_top_k_per_domain_with_normalised_weights(self):
        chosen = select_layers(self.scores([0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.6]), k=2)
        assert chosen.layers == {"speech": (1, 3), "audio": (3, 4)}
        assert chosen.weights["speech"] == pytest.approx((4 / 7, 3 / 7))
        assert chosen.weights["audio"] == pytest.approx((1 / 3, 2 / 3))
        assert chosen.step == 7
        assert chosen.evidence["speech"]["mean"] == pytest.approx([0.4, 0.1, 0.3, 0.2])

    def test_other_weightings(self):
        scores = self.scores([0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.6])
        assert select_layers(scores, 2, "equal").weights["speech"] == (0.5, 0.5)
        assert select_layers(scores, 2, "raw2x").weights["speech"] == pytest.approx((0.8, 0.6))

    def test_refuses_the_zero_initialisations_floor(self, probe_batch):
        asleep = foga(small_model(awake=False), probe_batch, times=(0.5,))
        with pytest.raises(NotRankableError, match="0 of 4 layers"):
            select_layers(asleep)
        with pytest.raises(NotRankableError, match="audio: 1 of 4"):
            select_layers(self.scores([0.4, 0.1, 0.3, 0.2], [0.5, 2e-7, 3e-7, 1e-7], floor=1e-7), k=2)

    def test_a_noisy_layer_is_not_measured(self):
        """Mean 0.1 with a standard error as large does not stand out of the floor."""
        with pytest.raises(NotRankableError):
            select_layers(self.scores([0.1, 0.1], [0.1, 0.1], spread=3.0), k=1)
        assert select_layers(self.scores([0.1, 0.2], [0.1, 0.2], spread=0.1), k=1).layers["audio"] == (2,)

    def test_the_fewest_layers_that_carry_a_share(self):
        scores = self.scores([0.4, 0.1, 0.3, 0.2], [0.7, 0.1, 0.1, 0.1])
        chosen = select_layers(scores, share=0.65, confidence=0.9)
        assert chosen.layers == {"speech": (1, 3), "audio": (1,)}  # 0.4 + 0.3 of 1, 0.7 of 1
        assert chosen.evidence["speech"]["k"] == 2
        assert select_layers(scores, share=0.75).layers == {"speech": (1, 3, 4), "audio": (1, 2)}
        with pytest.raises(NotRankableError, match="audio: 1 of 4"):
            select_layers(self.scores([0.4, 0.3, 0.2, 0.1], [0.5, 1e-7, 1e-7, 1e-7]), share=1.0, confidence=1.0)

    def test_a_share_that_hangs_on_one_clip_takes_more_layers(self):
        """L1 carries 0.6 of the sum on average, but 0.3 and 0.9 of it in the two clips: in 3 of 4 resamples at least
        0.6, once 0.3."""
        change = torch.tensor([[0.3, 0.9], [0.7, 0.1]])[..., None, None]
        scores = LayerScores(change, torch.zeros(2), torch.zeros(2, dtype=torch.long), (0.5,))
        assert scores.share_probability("speech", [0], 0.55) == pytest.approx(0.75, abs=0.03)
        assert scores.share_probability("speech", [0, 1], 0.55) == 1
        change = torch.tensor([[0.4, 0.8, 0.4, 0.8], [0.6, 0.2, 0.6, 0.2]])[..., None, None]  # L1 has it 11 times of 16
        scores = LayerScores(change, torch.zeros(4), torch.zeros(4, dtype=torch.long), (0.5,))
        assert select_layers(scores, share=0.55, confidence=0.6).layers["speech"] == (1,)
        assert select_layers(scores, share=0.55, confidence=0.9).layers["speech"] == (1, 2)

    def test_all_layers_carry_all_scores_however_they_are_summed(self):
        scores = TestSoftChoice().scores((1 + torch.rand(24)).tolist(), clips=12)
        assert select_layers(scores, share=1.0).layers["speech"] == tuple(range(1, 25))

    def test_a_share_takes_as_many_layers_at_each_time_as_carry_it_there(self):
        means = [[3, 0.30], [0.05, 0.29], [0.05, 0.28], [0.05, 0.27]]
        scores = TestSoftChoice().scores(means, 0.001, times=(0.1, 0.9))
        chosen = select_layers(scores, share=0.6, per_time=True)
        first, last = chosen.weights_at["speech"]
        assert first == (1, 0, 0)
        assert last == pytest.approx((0.30 / 0.87, 0.29 / 0.87, 0.28 / 0.87), abs=1e-3)
        assert chosen.evidence["speech"]["k"] == 3

    def test_layers_and_weights_for_every_time(self):
        scores = self.scores([0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.6])
        late = (
            scores.values * torch.tensor([0.1, 1.0, 1.0, 1.0])[:, None, None, None]
        )  # L1 is silent at the second time
        scores = replace(scores, values=torch.cat((scores.values, late), dim=2), times=(0.2, 0.7))
        chosen = select_layers(scores, k=2, per_time=True)
        assert chosen.times == (0.2, 0.7)
        assert chosen.layers["speech"] == (1, 3, 4)
        first, second = chosen.weights_at["speech"]
        assert first == pytest.approx((4 / 7, 3 / 7, 0))
        assert second == pytest.approx((0, 0.6, 0.4))
        assert chosen.weights["speech"] == pytest.approx((2 / 7, (3 / 7 + 0.6) / 2, 0.2))

    def test_storage_scores_rank_without_a_floor_and_never_weigh_below_zero(self):
        scores = replace(self.scores([-0.4, -0.1, 0.3, -0.2], [-0.1, -0.2, -0.3, -0.6]), measure="lasp")
        chosen = select_layers(scores, k=2)
        assert chosen.layers == {"speech": (2, 3), "audio": (1, 2)}
        assert chosen.weights == {"speech": pytest.approx((0, 1)), "audio": (0.5, 0.5)}

    def test_a_layer_below_zero_takes_nothing_of_a_share(self):
        """L1 carries 0.30 of 0.85, L1, L2 and L3 0.75: the others would take 0.65 away from both."""
        scores = replace(TestSoftChoice().scores([0.30, 0.25, 0.20, 0.10, -0.30, -0.35], 0.001), measure="lasp")
        assert select_layers(scores, share=0.85).layers["speech"] == (1, 2, 3)
        assert select_layers(scores, share=0.9).layers["speech"] == (1, 2, 3, 4)
        assert scores.share_probability("speech", [0], 0.9) == 0
        scores = replace(TestSoftChoice().scores([-0.1, -0.2, -0.3], 0.001), measure="lasp")
        with pytest.raises(NotRankableError, match=r"speech: no layer scores above 0 with probability 0\.9"):
            select_layers(scores, share=0.9)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"choice": "softly"}, "did you mean 'soft'"),
            ({"choice": "soft", "share": 0.5}, "a soft choice weighs the Top-K"),
        ],
    )
    def test_bad_choices(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            select_layers(self.scores([0.4, 0.1], [0.1, 0.2]), 1, **arguments)

    def test_bad_arguments(self):
        scores = self.scores([0.4, 0.1], [0.1, 0.2])
        with pytest.raises(ValueError, match="2 layers that were measured"):
            select_layers(scores, k=3)
        with pytest.raises(ValueError, match="did you mean 'normalized'"):
            select_layers(scores, k=1, weighting="normalised")


class TestSoftChoice:
    """Layers weighted by their probability to be in the Top-K."""

    def scores(self, means, spread=0.1, clips=16, times=(0.5,), seed=0):
        """LayerScores of one domain around the given means (L,), or (L, times)."""
        means = torch.tensor(means).reshape(len(means), 1, -1)
        noise = torch.randn(len(means), clips, len(times), generator=torch.Generator().manual_seed(seed))
        values = (means + spread * (noise - noise.mean(1, keepdim=True))).unsqueeze(-1)
        return LayerScores(values, torch.zeros(clips), torch.zeros(clips, dtype=torch.long), times)

    def weights(self, scores, choice, k=2, weighting="normalized"):
        """Lambda of every layer, 0 for those not chosen."""
        made, weights = select_layers(scores, k, weighting, choice=choice), torch.zeros(scores.depth)
        for layer, weight in zip(made.layers["speech"], made.weights["speech"], strict=True):
            weights[layer - 1] = weight
        return weights

    def moved(self, a, b, choice):
        """The total-variation distance of the weights of two sets of scores."""
        return float((self.weights(a, choice) - self.weights(b, choice)).abs().sum() / 2)

    @pytest.mark.parametrize("weighting", ["normalized", "equal", "raw2x"])
    def test_the_naive_version(self, weighting):
        scores = self.scores([0.50, 0.40, 0.39, 0.10])
        clips, draw = scores.values[:, :, 0, 0].double(), torch.Generator().manual_seed(0)
        picks = [torch.randint(16, (16,), generator=draw) for _ in range(2000)]
        inside = torch.zeros(4, dtype=torch.float64)
        for pick in picks:
            for layer in sorted(range(4), key=lambda one: -clips[one, pick].mean())[:2]:
                inside[layer] += 1 / 2000
        assert inside[3] < 0.05 < inside[2] < inside[1] < 0.95 < inside[0]
        raw = inside[:3] * (1 if weighting == "equal" else clips.mean(1)[:3])
        expected = 2 * raw if weighting == "raw2x" else raw / raw.sum()
        made = select_layers(scores, 2, weighting, choice="soft")
        assert made.layers["speech"] == (1, 2, 3)
        assert made.weights["speech"] == pytest.approx(expected.tolist(), abs=1e-6)
        assert made.evidence["speech"]["choice"] == "soft"

    @pytest.mark.parametrize("weighting", ["normalized", "equal", "raw2x"])
    @pytest.mark.parametrize("per_time", [False, True])
    def test_it_is_the_hard_choice_where_the_top_k_is_certain(self, weighting, per_time):
        scores = self.scores([[0.9, 0.1], [0.5, 0.8], [0.1, 0.6], [0.2, 0.3]], spread=0.01, times=(0.2, 0.7))
        hard, soft = (select_layers(scores, 2, weighting, choice=c, per_time=per_time) for c in ("hard", "soft"))
        assert (soft.layers, soft.weights, soft.weights_at) == (hard.layers, hard.weights, hard.weights_at)

    def test_weights_sum_to_one_at_every_time(self):
        scores = self.scores([[0.5, 0.1], [0.4, 0.3], [0.39, 0.31], [0.1, 0.5]], times=(0.2, 0.7))
        made = select_layers(scores, 2, choice="soft", per_time=True)
        assert [sum(row) for row in made.weights_at["speech"]] == pytest.approx([1, 1])
        assert sum(made.weights["speech"]) == pytest.approx(1)
        first, second = made.weights_at["speech"]
        assert first[3] == second[0] == 0  # L4 at the first time, L1 at the second
        assert min(first[1], first[2], second[1], second[2]) > 0.1  # L2 and L3 are a tie at both

    def test_a_near_tie_moves_soft_weights_little_and_hard_ones_much(self):
        a, b = self.scores([0.5, 0.4001, 0.4, 0.1]), self.scores([0.5, 0.4, 0.4001, 0.1])
        assert self.moved(a, b, "hard") == pytest.approx(4 / 9, abs=0.01)
        assert self.moved(a, b, "soft") < 0.005

    @pytest.mark.parametrize("seed", range(5))
    def test_no_layer_enters_or_leaves_with_a_jump(self, seed):
        """L3 rises from below L2 to above L1 in steps of 0.2 standard errors."""
        path = [self.scores([0.5, 0.4, 0.25 + 0.005 * step, 0.1], seed=seed) for step in range(61)]
        assert max(self.moved(a, b, "soft") for a, b in pairwise(path)) < 0.05
        assert max(self.moved(a, b, "hard") for a, b in pairwise(path)) > 0.3

    def test_a_higher_score_never_weighs_less(self):
        rising = [self.weights(self.scores([0.5, 0.4, 0.3 + 0.02 * step, 0.2]), "soft") for step in range(11)]
        third = [float(weights[2]) for weights in rising]
        assert third == sorted(third)
        assert third[0] < 0.1
        assert third[-1] > 0.4

    def test_a_single_clip_is_no_ground_for_a_soft_choice(self):
        with pytest.raises(NotRankableError, match="one clip says nothing about others"):
            select_layers(self.scores([0.5, 0.4], clips=1), 1, choice="soft")


class TestUndecided:
    """A warning where the Top-K cannot be told from the next layers."""

    def select(self, spread, **options):
        scores = TestSoftChoice().scores([0.50, 0.40, 0.39, 0.10], spread)
        return select_layers(scores, 2, confidence_floor=0.9, **options)

    def test_a_near_tie_is_undecided(self):
        made = self.select(0.1)
        probability = made.evidence["speech"]["top_k_probability"]
        assert 0.4 < probability < 0.9
        assert f"its probability is speech {probability:.2f}, below probe.confidence_floor=0.9;" in made.warning
        restored = LayerSelection.from_dict(json.loads(json.dumps(asdict(made))))
        assert restored.warning == made.warning

    def test_what_is_certain_or_soft_is_not(self):
        assert self.select(0.001).warning is None
        assert self.select(0.1, choice="soft").warning is None
        assert LayerSelection("shallow", {"speech": (1,)}, {"speech": (1.0,)}).warning is None


class TestHysteresis:
    """Layers that are aligned already stay until the evidence is against them."""

    def probes(self, means, count=40, wander=0.01):
        """LayerScores of probes whose layers wander about their means by less than the clips' standard error, 0.025."""
        made, draw = TestSoftChoice(), torch.Generator().manual_seed(1)
        noise = wander * torch.randn(count, len(means), generator=draw)
        return [made.scores((torch.tensor(means) + row).tolist()) for row in noise]

    def follow(self, probes, before=None, **options):
        """The choices of successive probes, each with the one before it."""
        chosen = []
        for scores in probes:
            before = select_layers(scores, 2, before=before, **options)
            chosen.append(before)
        return chosen

    def test_noise_flips_no_layers(self):
        probes = self.probes([0.5, 0.4, 0.4, 0.1])
        assert len({select_layers(scores, 2).layers["speech"] for scores in probes}) == 2  # a coin
        held = self.follow(probes)
        assert len({one.layers["speech"] for one in held}) == 1
        assert len({one.weights["speech"] for one in held}) == len(probes)  # weights follow the scores

    def test_a_real_change_replaces_the_lowest_layer(self):
        first = self.probes([0.5, 0.4, 0.3, 0.1], 1)
        (before,) = self.follow(first)
        assert before.layers["speech"] == (1, 2)
        (after,) = self.follow(self.probes([0.5, 0.3, 0.45, 0.1], 1), before)
        assert after.layers["speech"] == (1, 3)
        (all_new,) = self.follow(self.probes([0.1, 0.2, 0.5, 0.6], 1), before)
        assert all_new.layers["speech"] == (3, 4)
        assert all_new.evidence["speech"]["top_k_probability"] == 1

    def test_the_probability_is_that_of_the_layers_that_are_aligned(self):
        (before,) = self.follow(self.probes([0.5, 0.42, 0.40, 0.1], 1, 0))
        (after,) = self.follow(self.probes([0.5, 0.40, 0.42, 0.1], 1, 0), before)
        assert after.layers["speech"] == (1, 2)
        assert after.evidence["speech"]["top_k_probability"] < 0.5

    def test_a_layer_that_sinks_into_the_floor_is_replaced(self):
        (before,) = self.follow(self.probes([0.5, 0.4, 0.3, 0.1], 1))
        (after,) = self.follow(self.probes([0.5, 0.0, 0.3, 0.1], 1), before)
        assert after.layers["speech"] == (1, 3)

    def test_the_number_of_layers_of_a_share_follows_it(self):
        scores = TestSoftChoice().scores([0.4, 0.1, 0.3, 0.2], 0.001)
        (two,) = (select_layers(scores, share=0.65),)
        three = select_layers(scores, share=0.85, before=two)
        assert (two.layers["speech"], three.layers["speech"]) == ((1, 3), (1, 3, 4))
        assert select_layers(scores, share=0.65, before=three).layers["speech"] == (1, 3)

    def test_noise_changes_the_number_of_layers_of_a_share_once(self):
        probes = self.probes([0.4, 0.2, 0.2, 0.1, 0.1])
        assert len({len(select_layers(scores, share=0.58).layers["speech"]) for scores in probes}) == 2  # a coin
        held = self.follow(probes, share=0.58)
        changes = [a.layers["speech"] != b.layers["speech"] for a, b in pairwise(held)]
        assert sum(changes) <= 1
        scores = TestSoftChoice().scores([0.4, 0.15, 0.15, 0.15, 0.15], 0.001)  # two layers carry 0.55 for sure
        assert len(select_layers(scores, share=0.58, before=held[-1]).layers["speech"]) == 3

    @pytest.mark.parametrize("per_time", [False, True])
    def test_a_cosine_below_0_gives_no_weight_and_no_less_hold(self, per_time):
        made = TestSoftChoice()

        def choose(second: float, third: float, before=None) -> LayerSelection:
            means = [[0.5, 0.5], [second] * 2, [third] * 2, [-0.9, -0.9]]
            scores = replace(made.scores(means, times=(0.2, 0.7)), measure="lasp")
            return select_layers(scores, 2, per_time=per_time, before=before)

        before = choose(-0.10, -0.11)
        assert before.layers["speech"] == (1, 2)
        assert before.weights["speech"] == (1, 0)
        assert choose(-0.11, -0.10, before).layers["speech"] == (1, 2)
        assert choose(-0.5, -0.1, before).layers["speech"] == (1, 3)

    def test_every_time_has_its_own(self):
        made = TestSoftChoice()
        before = select_layers(made.scores([[0.5, 0.4], [0.4, 0.5]], times=(0.2, 0.7)), 1, per_time=True)
        now = made.scores([[0.45, 0.1], [0.46, 0.5]], times=(0.2, 0.7))
        after = select_layers(now, 1, per_time=True, before=before)
        assert after.weights_at["speech"] == ((1, 0), (0, 1))
        assert select_layers(now, 1, per_time=True).weights_at["speech"] == ((1,), (1,))  # L2 at both
        assert select_layers(now, 1, before=before).layers["speech"] == (2,)  # of other times: nothing is held

    def test_a_soft_choice_drops_a_layer_later_than_it_takes_one(self):
        made = TestSoftChoice()
        rising = [made.scores([0.5, 0.4, 0.3 + 0.005 * step, 0.1]) for step in range(20)]
        inside = [float(scores.in_top_k("speech", 2)[2]) for scores in rising]
        enters = next(step for step, p in enumerate(inside) if p >= 0.05)
        stays = next(step for step, p in enumerate(inside) if p >= 0.025)
        assert stays < enters
        aligned = self.follow(rising, choice="soft")
        assert [3 in one.layers["speech"] for one in aligned] == [step >= enters for step in range(20)]
        aligned = self.follow(rising[::-1], choice="soft")[::-1]
        assert [3 in one.layers["speech"] for one in aligned] == [step >= stays for step in range(20)]
