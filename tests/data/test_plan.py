"""The order of clips and the buckets' turns: what plan.py promises, for any seed, without reading a shard."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from agrepa_fast.config import DOMAINS
from agrepa_fast.data.index import Shard
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.order import ClipOrder
from agrepa_fast.data.plan import BatchPlan, batch_domains
from agrepa_fast.errors import UserError

COUNTS = (8, 8, 8, 3)


def clip(order: ClipOrder, position: int) -> tuple[int, int]:
    place = order.find(position)
    return place.shard, order.clip(place)


@pytest.mark.parametrize(("frames", "fixed"), [(800, True), (799, False)])
def test_batches_of_clips_of_one_length_have_one_shape(frames, fixed):
    """Those of any length are as long as their longest clip, unless something else fixes them."""
    shard = Shard(Path("x"), 8, "speech", frames, 100, 0, "")
    index = SimpleNamespace(domains=("speech",), shards=lambda split, domain: (shard,))
    assert BatchPlan(index, 1.0, 0, clips=4).fixed_shapes is fixed
    assert BatchPlan(index, 1.0, 0, clips=4, fixed_shapes=True).fixed_shapes


@pytest.mark.parametrize("lanes", [1, 4, 5, 99])
def test_every_clip_once_an_epoch_in_another_order_each_time(lanes):
    order = ClipOrder(COUNTS, lanes, 0, "speech")
    epochs = [[clip(order, epoch * 27 + i) for i in range(27)] for epoch in range(3)]
    wanted = {(shard, number) for shard, count in enumerate(COUNTS) for number in range(count)}
    assert all(set(clips) == wanted for clips in epochs)
    assert len({tuple(clips) for clips in epochs}) == 3
    for seed, name in ((1, "speech"), (0, "audio")):
        other = ClipOrder(COUNTS, lanes, seed, name)
        assert [clip(other, i) for i in range(27)] != epochs[0]
    far = ClipOrder(COUNTS, lanes, 0, "speech")  # without what comes before
    assert [clip(far, 60 + i) for i in range(9)] == epochs[2][6:15]


def test_a_lane_reads_its_shards_one_after_the_other():
    """What a rank reads ahead is what it comes to next, also into the next epoch."""
    counts = [6] * 40
    order = ClipOrder(counts, 4, 0, "speech")
    for lane in range(4):
        places = [order.find(position) for position in range(2 * 240) if order.lane(position) == lane]
        shards = [place.shard for place in places]
        visits = [a for a, b in zip([*shards, None], [None, *shards], strict=True) if a != b and a is not None]
        assert len(visits) == 20  # 10 shards an epoch, each read once
        for place, following in pairwise(places):
            if following.shard == place.shard and following.epoch == place.epoch:
                assert following.remaining == place.remaining - 1
            else:
                assert place.remaining == 0
                assert order.next_shard(place) == following.shard


def test_what_stands_in_for_a_clip():
    order = ClipOrder(COUNTS, 2, 0, "speech")
    place = order.find(5)
    same, following = (list(candidates) for candidates in order.candidates(place, 2))
    assert same[0] == (place.shard, order.clip(place))
    assert Counter(same) == Counter((place.shard, number) for number in range(COUNTS[place.shard]))
    assert {shard for shard, _ in following} == {order._epoch(0)[0][(place.turn + 1) % 4]}


def index_of(**shards: list[tuple[int, int]]) -> SimpleNamespace:
    """domain=[(bucket, clips of one shard), ...]"""

    def of(split, domain):
        return tuple(Shard(Path("x"), clips, domain, 0, bucket, 0, "") for bucket, clips in shards.get(domain, ()))

    return SimpleNamespace(domains=tuple(domain for domain in DOMAINS if domain in shards), shards=of)


BUCKETED = {"speech": [(100, 30), (200, 10), (200, 20)], "audio": [(100, 10), (200, 20), (400, 40)]}


def test_buckets_hold_what_the_budget_allows():
    plan = BatchPlan(index_of(**BUCKETED), 0.5, 0, budget=1700, attention_cost=1 / 400)
    assert [(bucket.frames, bucket.clips) for bucket in plan.buckets] == [
        (100, 13),
        (200, 5),
        (400, 2),
    ]  # 125, 300, 800
    assert plan.buckets[plan.worst].frames == 100  # 1625 of 1700; 5 x 300 = 1500; 2 x 800 = 1600
    plan = BatchPlan(index_of(**BUCKETED), 0.5, 0, budget=1700)
    assert [bucket.clips for bucket in plan.buckets] == [17, 8, 4]
    with pytest.raises(UserError, match=r"train\.batch_frames allows 4 clips of 400 frames.*= 5: raise it"):
        BatchPlan(index_of(**BUCKETED), 0.5, 0, budget=1700, least=5)


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_every_bucket_keeps_in_step_and_domains_are_mixed_by_weight(share):
    plan = BatchPlan(index_of(**BUCKETED), share, 0, budget=1700)
    seen, steps = Counter(), 4 * plan.cycle
    for step in range(steps):
        number, picks = plan.batch(step)
        assert len(picks) == plan.buckets[number].clips
        seen.update((domain, plan.buckets[number].frames) for domain, _ in picks)
    speech = sum(count for (domain, _), count in seen.items() if domain == "speech")
    assert speech / seen.total() == pytest.approx(share, rel=0.02)
    for domain in DOMAINS:
        sizes = Counter()
        for bucket, clips in BUCKETED[domain]:
            sizes[bucket] += clips
        epochs = [seen[domain, bucket] / clips for bucket, clips in sizes.items()]
        assert max(epochs) == pytest.approx(min(epochs), rel=0.03)


def test_no_clip_twice_before_every_clip_once_in_a_bucket_of_a_domain():
    plan, taken = BatchPlan(index_of(**BUCKETED), 0.4, 0, budget=1700), {}
    for step in range(3 * plan.cycle):
        number, picks = plan.batch(step)
        for domain, position in picks:
            taken.setdefault((number, domain), []).append(position)
    assert taken.keys() == plan.orders.keys()
    for key, positions in taken.items():
        # Each position once and in order but within a batch; ClipOrder's epochs do the rest.
        assert sorted(positions) == list(range(len(positions))), key


def test_a_step_is_found_without_those_before():
    running = BatchPlan(index_of(**BUCKETED), 0.4, 3, budget=1700)
    batches = [running.batch(step) for step in range(3 * running.cycle)]
    assert [BatchPlan(index_of(**BUCKETED), 0.4, 3, budget=1700).batch(s) for s in (77, 5)] == [batches[77], batches[5]]
    turns = [number for number, _ in batches]
    assert turns[: running.cycle] != turns[running.cycle : 2 * running.cycle]
    other = BatchPlan(index_of(**BUCKETED), 0.4, 4, budget=1700)
    assert [other.bucket(step)[0] for step in range(running.cycle)] != turns[: running.cycle]
    far, before = running.bucket(10**9)
    cycles, rest = divmod(10**9, running.cycle)
    assert before >= cycles * running.buckets[far].steps
    assert before - cycles * running.buckets[far].steps <= rest


def test_places_of_a_rank_stay_in_their_lanes():
    """On 4 ranks a rank opens a quarter of the shards an epoch and those at its edges, not all of them."""
    counts = [(100, 16)] * 64
    plan = BatchPlan(index_of(speech=counts, audio=counts), 0.47, 0, clips=40)  # 18 or 19 of speech: never even
    layout, opened = BatchLayout(40, 1, 1, 4), set()
    for step in range(1024 // 20):
        number, picks = plan.batch(step)
        for place in layout.places(0):
            domain, position = picks[place]
            opened.add((domain, plan.orders[number, domain].find(position).shard))
    assert len(opened) <= 128 / 2


@pytest.mark.parametrize(("share", "speech"), [(0.5, 4), (0.25, 2), (0.0, 0), (1.0, 8)])
def test_domains_are_spread_over_a_batch(share, speech):
    shards = [(100, 30)]
    plan = BatchPlan(index_of(speech=shards, audio=shards), share, 0, clips=8)
    for step in (0, 1, 7):
        domains = [domain for domain, _ in plan.batch(step)[1]]
        assert domains.count("speech") == speech
        assert domains[:4].count("speech") == speech / 2
    alone = BatchPlan(index_of(audio=shards), share, 0, clips=3)
    assert [domain for domain, _ in alone.batch(5)[1]] == ["audio"] * 3
    assert batch_domains(5, 2) == ["audio", "audio", "speech", "audio", "speech"]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (3, 1), (2, 3)])
@pytest.mark.parametrize("clips", [6, 7, 11])
def test_places_cover_a_batch_and_weights_make_its_mean(world, accumulation, clips):
    layouts = [BatchLayout(None, accumulation, rank, world) for rank in range(world)]
    parts = [(layout, micro) for micro in range(accumulation) for layout in layouts]
    assert [place for layout, micro in parts for place in layout.places(micro, clips)] == list(range(clips))
    losses = [float(place**2) for place in range(clips)]
    means = []
    for layout, micro in parts:
        places = layout.places(micro, clips)
        assert len(places) in (clips // len(parts), -(-clips // len(parts)))
        means.append(layout.weight(micro, clips) * sum(losses[p] for p in places) / len(places))
    assert sum(means) / len(parts) == pytest.approx(sum(losses) / clips)


def test_a_batch_that_does_not_reach_for_all_ranks_is_refused():
    with pytest.raises(UserError, match=r"train\.batch_clips=5 cannot be split over 3 ranks x .*=2: at least 6"):
        BatchLayout(5, 2, 0, 3)
    assert BatchLayout(7, 2, 0, 3).micro_batch == 2
