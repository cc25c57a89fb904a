"""Mixtures: units, epochs, shares in every window, lengths, subsets, capabilities, curriculum."""

import itertools
import pickle
import random

import numpy as np
import pytest

from spatialvlm.data.mixture import Mixture, mixture_for_steps
from spatialvlm.data.sample import Draw
from spatialvlm.data.units import SourceRows, cut_units
from spatialvlm.errors import ConfigError, DataError


def rows(name, family="spatial", groups=(1,) * 100, text=0, **fields):
    """A source whose rows come in groups on the same media, interleaved, then text-only rows."""
    pairs = sorted((k, g) for g, size in enumerate(groups) for k in range(size))
    keys = np.array([g + 1 for _, g in pairs] + [0] * text, np.uint64)
    fields.setdefault("eligible", np.ones(len(keys), bool))
    return SourceRows(name, family, keys, **fields)


def test_rows_on_the_same_media_are_cut_into_powers_of_two():
    units = cut_units(np.full(13, 5, np.uint64), np.arange(13), 8)
    assert {k: v.tolist() for k, v in units.items()} == {
        8: [[0, 1, 2, 3, 4, 5, 6, 7]],
        4: [[8, 9, 10, 11]],
        1: [[12]],
    }
    assert list(cut_units(np.full(13, 5, np.uint64), np.arange(13), 1)) == [1]
    keys = np.array([1, 2, 1, 0, 2, 0, 1], np.uint64)
    cut = cut_units(keys, np.arange(7), 4)
    assert {k: v.tolist() for k, v in cut.items()} == {2: [[0, 2], [1, 4]], 1: [[3], [5], [6]]}


def test_large_sources_are_cut_in_parts_with_the_same_result(monkeypatch):
    keys = np.random.default_rng(0).integers(0, 60, 500).astype(np.uint64)
    whole = cut_units(keys, np.arange(500), 8)
    monkeypatch.setattr("spatialvlm.data.units._ROWS_AT_ONCE", 64)
    parts = cut_units(keys, np.arange(500), 8)
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[k], parts[k]) for k in whole)


def test_one_to_one_and_three_to_one():
    sources = [rows("s"), rows("g", "general")]
    order = Mixture(sources, {"spatial": 1, "general": 1}, samples=8)
    assert [order.at(p).source for p in range(6)] == [0, 1, 0, 1, 0, 1]
    order = Mixture(sources, {"spatial": 3, "general": 1}, samples=8)
    assert [order.at(p).source for p in range(4)] == [0, 0, 1, 0]


def random_mixture(rng):
    count = rng.randint(1, 5)
    sources = [
        rows(
            f"s{i}",
            rng.choice(["spatial", "general"]) if i else "spatial",
            groups=[rng.randint(1, 20) for _ in range(rng.randint(1, 30))],
            text=rng.randint(0, 10),
            repeat=rng.choice([1, 1, 2, 0.5]),
        )
        for i in range(count)
    ]
    families = {"spatial": rng.choice([1, 2, 0.3]), "general": 1}
    if not any(s.family == "general" for s in sources):
        families["general"] = 0
    return Mixture(
        sources, families, seed=rng.randrange(100), branches=rng.choice([1, 2, 8]), samples=5000
    ), sources


def source_share(order, sources, number):
    """Share of a source in the whole mixture, by family weight and rows times repeat."""
    source = sources[number]
    families = dict(zip(order.family_names, order._tree.weights, strict=True))
    rows_of = [order.drawn_rows[s.name] * s.repeat for s in sources]
    mine = sum(r for r, s in zip(rows_of, sources, strict=True) if s.family == source.family)
    return families[source.family] / sum(families.values()) * rows_of[number] / mine


def test_random_mixtures_at_equals_draws_and_rows_come_once_per_epoch():
    rng = random.Random(0)
    for _ in range(200):
        order, sources = random_mixture(rng)
        draws = order.draws(0, 1000)
        for p in rng.sample(range(1000), 10):
            assert order.at(p) == Draw(*draws[p].item())
        start = rng.randrange(10**6)
        assert np.array_equal(
            order.draws(start, start + 50)[7:], order.draws(start + 7, start + 50)
        )
        for number, lane in enumerate(order.lanes):
            mine = draws[draws["lane"] == number]
            for epoch in range(int(mine["epoch"].max(initial=-1))):
                seen = mine["row"][mine["epoch"] == epoch]
                assert np.array_equal(np.sort(seen), np.sort(lane.rows.ravel()))
        for number in range(len(sources)):
            share = source_share(order, sources, number)
            off = np.cumsum(draws["source"] == number) - share * np.arange(1, 1001)
            assert max(off.max(), 0) - min(off.min(), 0) <= 3 * order.branches
        # a unit's rows stand next to each other inside the family
        for family in {s.family for s in sources}:
            members = [i for i, s in enumerate(sources) if s.family == family]
            mine = draws[np.isin(draws["source"], members)][:200]
            for key, unit in itertools.groupby(mine, lambda d: (d["lane"], d["epoch"], d["unit"])):
                branches = [int(d["branch"]) for d in unit]
                assert branches == sorted(branches), key


def test_every_eligible_row_is_in_exactly_one_lane():
    rng = random.Random(3)
    for _ in range(20):
        order, sources = random_mixture(rng)
        for i, source in enumerate(sources):
            seen = [lane.rows.ravel() for lane in order.lanes if lane.source == i]
            if seen:
                assert np.array_equal(
                    np.sort(np.concatenate(seen)), np.flatnonzero(source.eligible)
                )


def worst_window(hits, share, window):
    counts = np.concatenate([[0], np.cumsum(hits)])
    return np.abs(counts[window:] - counts[:-window] - share * window).max()


def test_shares_hold_in_every_window():
    sources = [
        rows("a", groups=[13] * 40),
        rows("b", groups=[3] * 100),
        rows("c", "general", groups=[1] * 700, text=200),
        rows("d", "general", groups=[2] * 50),
    ]
    families = {"spatial": 1, "general": 1}
    for branches, window in ((1, 1000), (8, 10_000)):
        order = Mixture(sources, families, branches=branches, samples=1)
        source = order.draws(0, 60_000)["source"]
        assert worst_window(source < 2, 0.5, 1000) <= 1
        for number, share in enumerate((0.5 * 520 / 820, 0.5 * 300 / 820, 0.45, 0.05)):
            worst = worst_window(source == number, share, window)
            assert worst <= 3 * branches
            assert worst <= 0.005 * window


def test_length_in_epochs():
    sources = [rows("s", groups=[1] * 1000), rows("g", "general", groups=[1] * 600)]
    order = Mixture(sources, {"spatial": 1, "general": 1}, epochs=1)
    assert order.length == 2000
    draws = order.draws(0, 2000)
    spatial = draws[draws["source"] == 0]
    assert sorted(spatial["row"]) == list(range(1000))
    general = draws[draws["source"] == 1]
    assert len(general) == 1000
    assert set(general["epoch"]) == {0, 1}
    assert not np.array_equal(general["row"][:400], general["row"][600:])
    alone = Mixture([rows("g", "general")], {"general": 2.0}, epochs=1.5)
    assert alone.length == 150


def test_repeat_two_and_a_half():
    order = Mixture([rows("s", repeat=2.5)], {"spatial": 1}, epochs=1)
    assert order.length == 250
    draws = order.draws(0, 250)
    counts = np.bincount(draws["row"], minlength=100)
    assert sorted(np.unique(counts)) == [2, 3]
    assert (counts == 3).sum() == 50


def test_epochs_end_when_the_named_family_is_through():
    sources = [rows("a", groups=[1] * 37), rows("b", "general"), rows("c", "chat")]
    order = Mixture(sources, {"spatial": 2, "general": 1, "chat": 0.5}, epochs=3, of="spatial")
    draws = order.draws(0, order.length)
    assert (draws["source"] == 0).sum() == 111


def test_subsets_are_nested_and_spread():
    def subset(**fields):
        order = Mixture([rows("s", groups=[1] * 1000, **fields)], {"spatial": 1}, samples=1)
        return {int(r) for lane in order.lanes for r in lane.rows.ravel()}

    small, large = subset(fraction=0.1), subset(fraction=0.3)
    assert len(small) == 100
    assert small < large
    assert max(small) > 900
    assert min(small) < 100
    assert subset(max_samples=50) < small


def test_capabilities_split_a_family():
    capability = np.array([0] * 90 + [1] * 10, np.int16)
    source = rows("s", capability=capability, capabilities=("count", "size"))
    extra = rows("e", capability=capability, capabilities=("size", "depth"))
    order = Mixture(
        [source, extra], {"spatial": 1}, capabilities={"count": 1, "size": 1}, samples=1
    )
    draws = order.draws(0, 4000)
    drawn = [order.lanes[n].capability for n in draws["lane"]]
    assert (drawn.count("count"), drawn.count("size")) == (2000, 2000)
    size = draws[
        np.isin(draws["lane"], [n for n, x in enumerate(order.lanes) if x.capability == "size"])
    ]
    assert abs((size["source"] == 1).sum() - 1800) <= 3
    assert any("10 rows have none" in w for w in order.warnings)
    with pytest.raises(ConfigError, match="colour: no row has it; the rows have count, size"):
        Mixture([source], {"spatial": 1}, capabilities={"count": 1, "colour": 1}, samples=1)


def test_capability_shares_hold_in_every_window():
    """3:1 inside the spatial half of a 1:1 mixture, whatever the sources hold: 0.5 % of every 1,000 or 10,000."""
    capability = np.array([0, 1, 1, 1, 1] * 200, np.int16)
    named = {"capability": capability, "capabilities": ("count", "size")}
    sources = [
        rows("a", groups=[5] * 200, **named),
        rows("b", groups=[1] * 1000, **named),
        rows("c", "general"),
    ]
    for branches, window in ((1, 1000), (8, 10_000)):
        order = Mixture(
            sources,
            {"spatial": 1, "general": 1},
            branches=branches,
            capabilities={"count": 3, "size": 1},
            samples=1,
        )
        draws = order.draws(0, 60_000)
        lanes = np.array([lane.capability or "" for lane in order.lanes])[draws["lane"]]
        assert worst_window(draws["source"] < 2, 0.5, 1000) <= 1
        for name, share in (("count", 0.375), ("size", 0.125)):
            worst = worst_window(lanes == name, share, window)
            assert worst <= 3 * branches
            assert worst <= 0.005 * window


def test_weights_of_sources():
    sources = [rows("a", groups=[1] * 10, weight=3), rows("b", weight=1)]
    order = Mixture(sources, {"spatial": 1}, samples=1)
    assert (order.draws(0, 400)["source"] == 0).sum() == 300
    with pytest.raises(ConfigError, match="give all of them a weight"):
        Mixture([rows("a", weight=3), rows("b")], {"spatial": 1}, samples=1)


def test_token_weights():
    sources = [rows("s", mean_tokens=3804.0), rows("g", "general", mean_tokens=700.0)]
    order = Mixture(sources, {"spatial": 1, "general": 1}, unit="tokens", samples=1)
    share = (order.draws(0, 10_000)["source"] == 0).mean()
    assert share == pytest.approx(0.155, abs=5e-4)
    with pytest.raises(ConfigError, match="source s has none"):
        Mixture([rows("s")], {"spatial": 1}, unit="tokens", samples=1)


def test_token_weights_of_capabilities():
    capability = np.array([0] * 50 + [1] * 50, np.int16)
    both = rows("s", capability=capability, capabilities=("a", "b"), mean_tokens=300.0)
    long = rows("l", capability=capability, capabilities=("b", "c"), mean_tokens=500.0)
    other = rows("g", "general", mean_tokens=400.0)
    order = Mixture(
        [both, long, other],
        {"spatial": 1, "general": 1},
        unit="tokens",
        capabilities={"a": 1, "b": 1},
        samples=1,
    )
    draws = order.draws(0, 10_000)["source"]
    tokens = [300 * (draws == 0).sum() + 500 * (draws == 1).sum(), 400 * (draws == 2).sum()]
    assert tokens[0] == pytest.approx(tokens[1], rel=2e-3)


def test_epochs_of_sources():
    sources = [rows("s", groups=[8] * 20), rows("t", groups=[1] * 40), rows("g", "general")]
    order = Mixture(sources, {"spatial": 1, "general": 1}, branches=8, samples=1)
    drawn = np.bincount(order.draws(0, 3000)["source"])
    for name, count, total in zip("stg", drawn, (160, 40, 100), strict=True):
        assert order.epochs(3000)[name] == pytest.approx(count / total, abs=8 / total)


def test_curriculum_goes_from_easy_to_hard_and_shuffles_inside():
    difficulty = np.linspace(1, 0, 1000).astype(np.float32)
    difficulty[:50] = np.nan
    source = rows("s", groups=[1] * 1000, difficulty=difficulty)
    order = Mixture([source], {"spatial": 1}, curriculum_buckets=10, samples=1)
    first, again = order.draws(0, 1000)["row"], order.draws(1000, 2000)["row"]
    known = difficulty[first[:90]]
    assert known.max() < 0.11
    assert not np.array_equal(first[:90], np.sort(first[:90]))
    assert sorted(first) == list(range(1000))
    assert sorted(first[:95]) == sorted(again[:95])
    assert not np.array_equal(first, again)
    unknown = np.flatnonzero(np.isnan(difficulty[first]))
    assert 400 < unknown.mean() < 600
    assert any("50 units without a key" in w for w in order.warnings)


def test_branches_are_halved_until_steps_are_diverse():
    sources = [rows("s", groups=[8] * 100)]
    order = mixture_for_steps(
        sources,
        {"spatial": 1},
        global_batch_size=32,
        max_branches=8,
        min_media_per_step=16,
        samples=1,
    )
    assert order.branches == 2
    assert "at most 2 rows instead of 8" in order.warnings[-1]
    assert order.distinct_media(32) == 16
    auto = mixture_for_steps(
        sources, {"spatial": 1}, global_batch_size=32, max_branches=8, samples=1
    )
    assert auto.branches == 8
    with pytest.raises(ConfigError, match="above"):
        mixture_for_steps(
            sources,
            {"spatial": 1},
            global_batch_size=4,
            max_branches=8,
            min_media_per_step=5,
            samples=1,
        )


def test_fingerprint_names_what_differs():
    base = {"families": {"spatial": 1}, "seed": 0, "branches": 8, "samples": 10}
    order = Mixture([rows("s", content_key="a")], **base)
    same = Mixture([rows("s", content_key="a")], **base)
    assert order.fingerprint == same.fingerprint
    other = Mixture([rows("s", content_key="b")], **(base | {"seed": 1}))
    assert order.fingerprint != other.fingerprint
    differ = {name for name, part in order.parts.items() if other.parts[name] != part}
    assert differ == {"seed", "sources"}


def test_pickled_mixtures_draw_the_same():
    order, _ = random_mixture(random.Random(5))
    again = pickle.loads(pickle.dumps(order))
    assert np.array_equal(order.draws(0, 500), again.draws(0, 500))


@pytest.mark.parametrize(
    ("families", "fields", "message"),
    [
        ({"spatial": 0}, {}, "all weights are 0"),
        ({"spatial": -1}, {}, "not negative"),
        ({"spatial": float("nan")}, {}, "finite"),
        ({"general": 1}, {}, "not one of general"),
        ({"spatial": 1, "general": 1}, {}, "general has weight 1 and no source"),
        ({"spatial": 1}, {"fraction": 0}, "fraction must be in"),
        ({"spatial": 1}, {"repeat": -1}, "repeat must be"),
        ({"spatial": 1}, {"max_samples": 0}, "max_samples must be"),
        ({"spatial": 1}, {"weight": float("inf")}, "finite"),
        ({"spatial": 1}, {"eligible": np.zeros(100, bool)}, "no row to draw"),
    ],
)
def test_impossible_mixtures_are_refused(families, fields, message):
    with pytest.raises(ConfigError, match=message):
        Mixture([rows("s", **fields)], families, samples=10)


def test_a_source_of_weight_zero_is_named():
    order = Mixture([rows("s"), rows("t", repeat=0)], {"spatial": 1}, samples=10)
    assert order.warnings == ["never drawn because their weight is 0: t"]
    assert (order.draws(0, 100)["source"] == 0).all()


def test_cached_units_give_the_same_order_and_are_pickled_by_path(tmp_path):
    groups = [8, 5, 3, 1, 1] * 500
    difficulty = np.linspace(0, 1, 9000).astype(np.float32)
    for fields, options in (
        ({}, {}),
        ({"fraction": 0.5}, {}),
        ({"difficulty": difficulty}, {"curriculum_buckets": 4}),
    ):
        orders = [
            Mixture(
                [rows("s", groups=groups, cache_dir=cache, **fields)],
                {"spatial": 1},
                branches=8,
                samples=1,
                **options,
            )
            for cache in (None, tmp_path, tmp_path)
        ]
        for order in orders[1:]:
            assert np.array_equal(order.draws(0, 3000), orders[0].draws(0, 3000))
            assert order.fingerprint == orders[0].fingerprint
        state = pickle.dumps(orders[2])
        assert 5 * len(state) < len(pickle.dumps(orders[0]))
        assert np.array_equal(pickle.loads(state).draws(0, 99), orders[0].draws(0, 99))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failed_write_leaves_no_units(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spatialvlm.data.units.np.save", full)
    with pytest.raises(DataError, match="No space left"):
        Mixture([rows("s", cache_dir=tmp_path)], {"spatial": 1}, samples=1)
    assert list(tmp_path.iterdir()) == []


def test_row_groups_are_shuffled_whole_and_rows_inside():
    group = np.repeat(np.arange(50), 20)
    source = rows("s", groups=[1] * 1000, row_group=group)
    order = Mixture([source], {"spatial": 1}, samples=1)
    for epoch in range(2):
        drawn = order.draws(1000 * epoch, 1000 * epoch + 1000)["row"]
        assert sorted(drawn) == list(range(1000))
        visited = [int(g) for g, _ in itertools.groupby(group[drawn])]
        assert len(visited) == 50
        assert visited != sorted(visited)
        assert not np.array_equal(drawn[:20], np.sort(drawn[:20]))
    assert not np.array_equal(order.draws(0, 1000)["row"], order.draws(1000, 2000)["row"])
    assert order.at(777) == Draw(*order.draws(777, 778)[0].item())


def test_golden_order():
    sources = [rows("s", groups=[5, 2, 1]), rows("g", "general", groups=[1] * 4)]
    order = Mixture(sources, {"spatial": 1, "general": 1}, branches=4, samples=1)
    draws = order.draws(0, 32)
    assert draws["source"].tolist() == [0, 1] * 16
    spatial, general = draws["row"][::2].tolist(), draws["row"][1::2].tolist()
    # a group of 4, a pair twice, the group again, two single rows twice: weights 4 : 2 : 2
    assert spatial == [0, 3, 5, 6, 1, 4, 1, 4, 0, 3, 5, 6, 7, 2, 7, 2]
    assert general == [2, 0, 3, 1, 3, 1, 0, 2, 2, 0, 3, 1, 1, 0, 2, 3]


def test_other_weights_open_no_file(tmp_path, monkeypatch):
    sources = [rows("s", cache_dir=tmp_path), rows("g", "general", cache_dir=tmp_path)]
    Mixture(sources, {"spatial": 1, "general": 1}, samples=1)
    monkeypatch.setattr("spatialvlm.data.units.cut_units", None)
    monkeypatch.setattr("spatialvlm.data.units.np.load", None)
    assert Mixture(sources, {"spatial": 3, "general": 1}, samples=1).length == 1


def test_subsets_do_not_depend_on_anything_but_the_seed():
    def subset(seed):
        source = rows("s", groups=[1] * 500, fraction=0.02)
        return (
            Mixture([source], {"spatial": 1}, seed=seed, samples=1).lanes[0].rows.ravel().tolist()
        )

    assert subset(0) == subset(0) != subset(1)
