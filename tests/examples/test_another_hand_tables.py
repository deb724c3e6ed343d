"""Intervals against SciPy and brute force, and tables of runs whose results are known."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from another_hand import tables
from another_hand.intervals import Statistic, auc, difference, gap, mean, rate
from cafe.errors import CafeError
from cafe.evaluation.metrics import modality_gap


def rows_of(seed: int, bias: float = 0.0, scenes: int = 40) -> list[dict]:
    """Two rows a scene, of which a part is right, with a margin and a label each."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(2 * scenes):
        label = rng.random() < 0.5
        marks = {"x/right": int(rng.random() < 0.5 + bias), "x/part": [int(rng.integers(2)), int(rng.integers(1, 4))]}
        margin = round(float(rng.normal(label)), 1)
        row = {"id": number, "group": f"scene {number // 2}", "margin": margin, "label": "yes" if label else "no"}
        rows.append({**row, "marks": marks})
    return rows


def of_groups(rows: list[dict], statistic: Statistic) -> list[list[dict]]:
    return [[row for row in rows if row["group"] == group] for group in statistic.groups]


@pytest.mark.parametrize("result", ["x/right", "x/part"])
def test_a_rate_of_drawn_scenes_is_that_of_their_rows(result):
    rows = rows_of(0)
    statistic = rate(rows, result)
    weights = np.random.default_rng(1).integers(3, size=(5, 40))
    for drawn, found in zip(weights, statistic.compute(weights.astype(float)), strict=True):
        repeated = [row for w, group in zip(drawn, of_groups(rows, statistic), strict=True) for row in group * w]
        marks = np.array([np.broadcast_to(row["marks"][result], 2) for row in repeated])
        denominators = marks[:, 1].sum() if result == "x/part" else len(marks)
        assert found == pytest.approx(100 * marks[:, 0].sum() / denominators)


def test_the_area_of_drawn_scenes_is_scikit_learns():
    rows = rows_of(0)
    statistic = auc(rows)
    weights = np.random.default_rng(1).integers(3, size=(5, 40))
    for drawn, found in zip(weights, statistic.compute(weights.astype(float)), strict=True):
        repeated = [row for w, group in zip(drawn, of_groups(rows, statistic), strict=True) for row in group * w]
        expected = roc_auc_score([row["label"] == "yes" for row in repeated], [row["margin"] for row in repeated])
        assert found == pytest.approx(100 * expected)


def test_the_area_without_a_pair_is_chance():
    row = {"group": "a", "margin": 1.0, "label": "yes", "marks": {}}
    assert auc([row]).value == 50


def test_the_gap_of_drawn_scenes_is_that_of_their_embeddings():
    rng = np.random.default_rng(0)
    images, texts, owner = rng.normal(size=(4, 3)), rng.normal(size=(6, 3)), np.array([0, 0, 1, 2, 3, 3])
    statistic = gap(images, texts, owner)
    assert statistic.value == pytest.approx(modality_gap(images, texts))
    assert statistic.compute(np.array([[2.0, 0, 1, 0]]))[0] == pytest.approx(
        modality_gap(images[[0, 0, 2]], texts[[0, 1, 0, 1, 3]])
    )


def test_the_gap_by_chance_is_that_of_random_signs(tmp_path):
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    np.savez(tmp_path / "embeddings.npz", images=images, texts=texts, owner=np.arange(40))
    signs = rng.choice([-1, 1], size=(20_000, 40))
    gaps = signs @ (images - texts) / 40
    expected = np.sqrt(np.square(gaps).sum(axis=1).mean())
    assert tables.Run(tmp_path).gap_by_chance == pytest.approx(expected, rel=0.02)


def test_parts_of_a_mean_with_the_same_scenes_are_drawn_together():
    first, second = rate(rows_of(0), "x/right"), rate(rows_of(1, scenes=30), "x/right")
    both = mean([first, second])
    assert both.groups == first.groups
    weights = np.random.default_rng(0).integers(1, 3, size=(1, 40)).astype(float)
    own = [first.groups.index(group) for group in second.groups]
    expected = (first.compute(weights) + second.compute(weights[:, own])) / 2
    np.testing.assert_allclose(both.compute(weights), expected)


def test_with_one_seed_the_interval_is_scipys():
    first, second = rows_of(0, 0.2, 200), rows_of(1, scenes=200)
    found = difference([rate(first, "x/right")], [rate(second, "x/right")], num_resamples=20000)

    right = np.array([[row["marks"]["x/right"] for row in rows] for rows in (first, second)]).reshape(2, 200, 2)
    expected = stats.bootstrap(
        tuple(100 * right.mean(axis=2)),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20000,
        random_state=np.random.default_rng(5),
    )
    low, high = expected.confidence_interval
    assert found.value == pytest.approx(100 * (right[0].mean() - right[1].mean()))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03 * (high - low))


def test_scenes_and_seeds_are_drawn_together_by_brute_force():
    runs = [[rate(rows_of(10 * arm + seed, 0.1 * arm), "x/right") for seed in range(3)] for arm in range(2)]
    found = difference(runs[1], runs[0], num_resamples=20000)

    rng = np.random.default_rng(7)
    values = np.array([[run.compute(np.eye(40)) for run in arm] for arm in runs])  # (arm, seed, scene)
    drawn = []
    for _ in range(20000):
        seeds, scenes = rng.integers(3, size=3), rng.integers(40, size=40)
        chosen = values[:, seeds][:, :, scenes].mean(axis=(1, 2))
        drawn.append(chosen[1] - chosen[0])
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03 * (high - low))


def test_an_arm_without_variation_over_scenes_still_varies_over_seeds():
    runs = [Statistic(("a", "b"), lambda weights, value=value: np.full(len(weights), value)) for value in (0.0, 6.0)]
    base = Statistic(("a", "b"), lambda weights: np.zeros(len(weights)))
    found = difference(runs, [base])
    assert (found.value, found.low, found.high) == (3, 0, 6)


def test_runs_on_other_scenes_are_not_compared():
    with pytest.raises(ValueError, match="same scenes"):
        difference([rate(rows_of(0), "x/right")], [rate(rows_of(0, scenes=30), "x/right")])


def write_run(directory: Path, recall: float, name: float, exact: int, apart: float, seed: int = 0) -> None:
    """The results of a run on 40 scenes, with shares of right answers, and a distance of images and texts."""
    rng = np.random.default_rng(seed)
    outputs = {
        "retrieval_image_to_text": {"retrieval/image_to_text/R@1": recall},
        "retrieval_text_to_image": {"retrieval/text_to_image/R@1": recall},
        "vqa": {"vqa/name": name},
        "captions": {"captions/exact": exact, "objects/recall": name, "objects/hallucinated": 1 - name},
    }
    (directory / "outputs").mkdir(parents=True)
    other = {"id": "other", "marks": {"vqa/count": 1}}  # not all rows of a file are of one category
    results = {}
    for file, shares in outputs.items():
        rows = [other] if file == "vqa" else []
        for number in range(40):
            marks = {result: int(number < 40 * share) for result, share in shares.items()}
            rows.append({"id": number, "group": f"scene-{number}", "marks": marks})
        (directory / "outputs" / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        results |= {result: 100 * share for result, share in shares.items()}
    images = rng.normal(size=(40, 4))
    np.savez(
        directory / "embeddings.npz", images=images, texts=images + np.array([apart, 0, 0, 0]), owner=np.arange(40)
    )
    results["geometry/modality_gap"] = apart
    (directory / "results.json").write_text(json.dumps(results))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An ablation of two seeds, in which the joint arm is close to the best of each."""
    shares = {"contrastive": (0.9, 0, 0, 0.1), "language": (0.1, 0.8, 1, 1.0), "joint": (0.9, 0.75, 1, 0.1)}
    write_run(tmp_path / "base/measured/openmoji", 0.1, 0.5, 0, 1.0)
    for arm, values in shares.items():
        for seed in range(2):
            write_run(tmp_path / f"{arm}-{seed}/measured/openmoji", *values, seed=seed)
    write_run(tmp_path / "joint-objective.temperature=0.1-0/measured/openmoji", 0.5, 0.5, 0, 1.0)
    return tmp_path


def test_runs_are_found_by_arm_and_seed(output):
    runs = tables.collect(output, "openmoji")
    assert {arm: len(found) for arm, found in runs.items()} == {
        "base": 1,
        "contrastive": 2,
        "language": 2,
        "joint": 2,
        "joint-objective.temperature=0.1": 1,
    }


def test_a_table_has_chance_floor_arms_and_differences(output):
    runs = {arm: runs for arm, runs in tables.collect(output, "openmoji").items() if arm in tables.ARMS}
    table = tables.format_folder(runs, {"chance": {"vqa/name": 0.8}, "floor": {"vqa/name": 62.4}})
    cells = {line.split(" | ")[0]: line.strip(" |").split(" | ")[1:] for line in table.splitlines()[2:]}
    row = cells["| what is it, open"]
    assert row[:6] == ["0.8", "62.4", "50.0", "0.0", "80.0", "75.0"]
    assert row[6].startswith("−5.0 [−12.5, ")
    assert row[7].startswith("**+75.0 [")
    assert cells["| modality gap ↓"][2:6] == ["1.000", "0.100", "1.000", "0.100"]
    assert not any("POPE" in label for label in cells)


def test_variants_of_the_joint_arm_are_compared_with_language_alone(output):
    lines = tables.format_variants(tables.collect(output, "openmoji")).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| language",
        "| joint",
        "| joint-objective.temperature=0.1",
    ]
    assert "| +5.0 [+0.0, " in lines[3]
    assert "**+30.0 [" in lines[4]


def test_what_must_hold_is_judged(output):
    found = {must.claim: must.holds for must in tables.musts(tables.collect(output, "openmoji"))}
    assert found == {
        "scene finds its description, R@1: joint within 3 points of contrastive alone": True,
        "description finds its scene, R@1: joint within 3 points of contrastive alone": True,
        "what is it, open: joint within 2 points of language alone": False,
        "shown concepts named: joint within 2 points of language alone": False,
        "named concepts that are absent: joint within 2 points of language alone": False,
        "contrastive alone cannot speak: under 1% of descriptions right": True,
        "modality gap: joint under a fifth of the base's": True,
    }


def test_all_tables_are_written(output):
    text = tables.write_tables(output, {})
    assert "## openmoji" in text
    assert "modality gap: joint under a fifth of the base's | 0.100 of 1.000; 0.016 by chance | met |" in text
    assert "**missed**" in text


def test_photographs_have_a_row_for_each_model(tmp_path):
    for number, name in enumerate(("base", "stamps")):
        results = {
            f"retrieval/{way}/R@{k}": number + k for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({**results, "geometry/modality_gap": 0.25}))
    first, _, *rows = tables.format_photographs(tmp_path).splitlines()
    assert first.startswith("| | image to text, R@1 | image to text, R@5 |")
    assert rows[1] == "| stamps | 2.0 | 6.0 | 11.0 | 2.0 | 6.0 | 11.0 | 0.250 |"


def test_without_results_one_sentence_says_so(tmp_path):
    with pytest.raises(CafeError, match="no results"):
        tables.write_tables(tmp_path, {})
