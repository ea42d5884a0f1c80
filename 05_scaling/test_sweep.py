"""The fit against a law that is known, and a sweep that is stopped."""

import json

import numpy as np
import pytest
import sweep

LAW = dict(E=1.8, A=400.0, B=900.0, a=0.35, b=0.4)
GRID = [(n, d) for n in np.geomspace(1e5, 3e6, 5) for d in np.geomspace(1e5, 1e7, 5)]
N, D = np.array(GRID).T
LOSS = LAW["E"] + LAW["A"] / N ** LAW["a"] + LAW["B"] / D ** LAW["b"]


def test_the_fit_finds_the_law_that_made_the_points():
    found = sweep.fit(N, D, LOSS)
    for name, value in LAW.items():
        assert found[name][0] == pytest.approx(value, rel=1e-3), name
    assert found["split"][0] == pytest.approx(0.4 / 0.75, rel=1e-3)
    assert found["rms"] < 1e-5
    np.testing.assert_allclose(
        sweep.predict(found, 1e8, 1e9), 1.8 + 400 / 1e8**0.35 + 900 / 1e9**0.4
    )


def test_error_bars_are_as_wide_as_the_values_scatter():
    random = np.random.default_rng(0)
    found = [sweep.fit(N, D, LOSS + random.normal(0, 0.01, len(N))) for _ in range(20)]
    for name in ("E", "A", "B", "a", "b", "split"):
        values, errors = np.array([f[name] for f in found]).T
        truth = LAW.get(name, 0.4 / 0.75)
        within = (np.abs(values - truth) < 2 * errors).mean()
        assert 0.8 <= within <= 1.0, name
        assert 0.5 < values.std() / np.median(errors) < 2, name


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="5 unknowns cannot be fitted to 5 points"):
        sweep.fit(N[:5], D[:5], LOSS[:5])
    with pytest.raises(ValueError, match="1 sizes"):
        sweep.fit(np.full(9, 1e5), np.geomspace(1e5, 1e6, 9), np.arange(9))


def test_a_sweep_goes_on_where_it_was_stopped_and_takes_the_best_rate(tmp_path):
    tokens = [np.tile(np.arange(50, dtype=np.uint16), 40)]
    base = dict(context_length=16, tokens_per_step=64, seed=1, optimizer="muon", text="x")
    base |= dict(compile=False)
    where, said = tmp_path / "runs.jsonl", []

    def run(rates, say=said.append):
        shapes, budgets = [(32, 1), (64, 1)], [640, 1280]
        args = (shapes, rates, budgets, base, tokens, tokens[0][:200], 50, where)
        return sweep.sweep(*args, say=say)

    def stop(text):
        if text.startswith("3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([0.01], stop)
    assert len(where.read_text().splitlines()) == 3
    rows = run([0.01])
    assert len(rows) == len(where.read_text().splitlines()) == 4
    assert [r["D"] for r in rows] == [640, 640, 1280, 1280]
    assert rows[0]["N"] == 32 * 64 + 32 * 32 + 3 * 32 * 96 + 50 * 32
    rows = run([0.01, 1e-6])  # 4 more runs; at 1e-6 nothing is learnt
    assert len(where.read_text().splitlines()) == 8 and said[-1].startswith("8/8")
    chosen = sweep.best(rows)
    assert len(chosen) == 4 and {r["key"]["max_lr"] for r in chosen} == {0.01}
    law = {k: (1.0, 0.1) for k in "EABab"}
    sweep.plot(rows, law, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert json.loads(where.read_text().splitlines()[0])["key"]["text"] == "x"
