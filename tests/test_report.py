"""Reports: intervals, worst cases, digests, and what survives the disk."""
from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from robustify import report as reports
from robustify.environment import environment
from robustify.errors import UserError
from robustify.intervals import paired_difference, wilson
from robustify.report import Report, Row

LINF, W2 = "Linf:8/255", "W2-Linf:8/255"


def bits(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text])


def sample(seconds: float = 2.0) -> Report:
    verdicts = {
        "clean": bits("11111110"),
        f"pgd {LINF}": bits("11110000"),
        f"apgd-ce {LINF}": bits("110011"),
    }
    rows = [
        Row("clean", None, 8, 7, passes={"forward": 1}, seconds=seconds, kind="clean"),
        Row("pgd", LINF, 8, 4, {"steps": 20, "eps": 8 / 255}, {"forward": 21, "backward": 20}, seconds),
        Row("apgd-ce", LINF, 6, 4, {"steps": 100}, {"forward": 101, "backward": 101}, seconds),
        Row("w-pgd", W2, 8, 3.25, {"p": math.inf}, {"forward": 20}, seconds, "distributional"),
    ]
    return Report("timm:tiny", "cifar10", "test", rows, verdicts, {"torch": "2.4"}, seed=3, notes=["one", "two"])


def test_printed_it_is_the_table_and_the_notes():
    text = str(sample())
    assert text.splitlines()[0] == "timm:tiny on cifar10, test"
    assert text.splitlines()[1].split() == ["attack", "threat", "accuracy", "interval", "n", "seconds"]
    first = ["clean", "pgd", "apgd-ce", "w-pgd", "worst", "attack", "pgd", "apgd-ce", "w-pgd", "one", "two"]
    assert [line.split()[0] for line in text.splitlines()[2:]] == first
    assert "apgd-ce  steps=100" in text.splitlines()
    assert "87.50 %" in text
    assert repr(sample()) == "<Report of timm:tiny on cifar10, test: 4 rows>"
    assert str(Report("m", "d", "test", [])) == "m on d, test"


def test_rows_give_shares_and_refuse_nonsense():
    row = sample().rows[3]
    assert row.accuracy == 3.25 / 8
    assert row.settings == {"p": "inf"}
    low, high = row.interval
    assert low < row.accuracy < high
    with pytest.raises(ValueError, match="9 correct of 8"):
        Row("pgd", LINF, 8, 9)
    with pytest.raises(ValueError, match="0 examples"):
        Row("pgd", LINF, 0, 0)
    with pytest.raises(ValueError, match="clean row"):
        Row("clean", LINF, 8, 8, kind="clean")


def test_wilson_by_hand():
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # Brown, Cai, DasGupta 2001
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10)[1] == 1.0
    low, high = wilson(9000, 10000)
    assert 0.89 < low < 0.9 < high < 0.91


def test_headline_is_the_worst_case_per_example_on_the_shared_ones():
    headline = sample().headline(LINF)
    assert (headline.n, headline.correct) == (6, 2)  # 111111 & 111100 & 110011
    assert headline.attacks == ("pgd", "apgd-ce")
    assert headline.interval == wilson(2, 6)


def test_headline_counts_a_clean_mistake_as_one():
    verdicts = {"clean": bits("10"), f"pgd {LINF}": bits("11")}
    rows = [Row("clean", None, 2, 1, kind="clean"), Row("pgd", LINF, 2, 2)]
    assert Report("m", "d", "test", rows, verdicts).headline(LINF).correct == 1


def test_distributional_headline_is_the_lowest_row():
    assert sample().headline(W2).accuracy == 3.25 / 8
    assert sample().held(W2) is None
    with pytest.raises(KeyError, match="no attack of L2:1"):
        sample().headline("L2:1")


def test_a_report_refuses_verdicts_of_others_and_twins():
    rows = [Row("pgd", LINF, 2, 1)]
    for verdict in (bits("11"), bits("100")):
        with pytest.raises(ValueError, match="do not belong"):
            Report("m", "d", "test", rows, {f"pgd {LINF}": verdict})
    with pytest.raises(ValueError, match="do not belong"):
        Report("m", "d", "test", rows, {"fgsm": bits("10")})
    with pytest.raises(ValueError, match="same attack"):
        Report("m", "d", "test", rows * 2)


def test_save_and_load(tmp_path):
    report = sample()
    report.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert again == report
    assert again.verdicts.keys() == report.verdicts.keys()
    assert all((again.verdicts[k] == report.verdicts[k]).all() for k in report.verdicts)
    value = json.loads((tmp_path / "report.json").read_text())
    assert value["rows"][1]["accuracy"] == 0.5
    assert value["headlines"][0]["accuracy"] == 2 / 6
    assert value["digest"] == report.digest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.npz"]


@pytest.mark.parametrize("harm", ["gone", "of another run"])
def test_figures_stand_without_their_verdicts(tmp_path, harm):
    report = sample()
    report.save(tmp_path / "report.json")
    side = tmp_path / "report.npz"
    side.unlink()
    if harm != "gone":
        sample().save(tmp_path / "other.json")
        side.write_bytes((tmp_path / "other.npz").read_bytes() + b"x")
    again = Report.load(tmp_path / "report.json")
    assert again.verdicts == {}
    assert again.headline(LINF) == report.headline(LINF)
    assert again.digest() == report.digest()


@pytest.mark.parametrize("verdicts", ["there", "gone"])
@pytest.mark.parametrize("change", [{"correct": 7}, {"settings": {"steps": 1000}}])
def test_figures_that_were_changed_are_refused(tmp_path, verdicts, change):
    path = tmp_path / "report.json"
    sample().save(path)
    value = json.loads(path.read_text())
    value["rows"][1 if "settings" in change else 3].update(change)
    path.write_text(json.dumps(value))
    if verdicts == "gone":
        path.with_suffix(".npz").unlink()
    with pytest.raises(UserError, match=f"was changed: its figures have the digest .*, not {sample().digest()}"):
        Report.load(path)
    reports.save_pair(path, sample(), sample())
    pair = json.loads(path.read_text())
    path.write_text(json.dumps({**pair, "after": value}))
    with pytest.raises(UserError, match="was changed"):
        reports.load_pair(path)
    del value["digest"]  # a report without one is not refused
    path.write_text(json.dumps(value))
    if "settings" in change:
        assert Report.load(path).rows[1].settings == {"steps": 1000}


def test_pairs(tmp_path):
    before, after = sample(), dataclasses.replace(sample(), model_id="hardened", verdicts={})
    reports.save_pair(tmp_path / "report.json", before, after)
    again = reports.load_pair(tmp_path / "report.json")
    assert again == (before, after)
    assert again[0].verdicts.keys() == before.verdicts.keys()
    assert again[1].verdicts == {}
    sample().save(tmp_path / "single.json")
    for name in ("single.json", "absent.json"):
        with pytest.raises(UserError, match=r"single\.json does not hold|no report") as caught:
            reports.load_pair(tmp_path / name)
        assert "robustify finetune" in caught.value.hint
    with pytest.raises(UserError, match="two reports, before and after"):
        Report.load(tmp_path / "report.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_loading_something_else(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError):
        Report.load(tmp_path / "report.json")
    with pytest.raises(UserError, match="no report"):
        Report.load(tmp_path / "absent.json")


def test_digest_sees_figures_and_not_time():
    one = sample()
    assert one.digest() == dataclasses.replace(sample(seconds=9.0), created="later", environment={}).digest()
    rows = [dataclasses.replace(row, n=row.n + 1) if row.kind == "distributional" else row for row in one.rows]
    assert one.digest() != dataclasses.replace(one, rows=rows).digest()
    assert one.digest() != dataclasses.replace(one, split="val").digest()
    assert len(one.digest()) == 12


def test_table_ends_with_the_worst_case():
    lines = sample().table()
    assert [line["attack"] for line in lines] == ["clean", "pgd", "apgd-ce", "w-pgd", "worst case"]
    assert list(lines[-1].values()) == ["worst case", "Linf 8/255", "33.33 %", "[9.68, 70.00]", "6", ""]


def test_paired_difference():
    before, after = bits("1100110011" * 100), bits("1111110011" * 100)
    difference, low, high = paired_difference(before, after)
    assert difference == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.175, 0.225), abs=0.002)  # sqrt(0.2 * 0.8 / 1000) * 1.96 = 0.0248
    unpaired = 1.96 * math.sqrt(0.6 * 0.4 / 1000 + 0.8 * 0.2 / 1000)
    assert high - low < 2 * unpaired
    assert paired_difference(after, before) == pytest.approx((-0.2, -high, -low))


def test_paired_difference_of_few_examples():
    same = paired_difference(bits("10"), bits("10"))
    assert same[0] == 0
    assert same[1] < -0.3 < 0.3 < same[2]
    assert paired_difference(bits("0000"), bits("1111"))[2] == 1.0
    assert paired_difference(bits("00001"), bits("11"))[0] == 1.0
    with pytest.raises(ValueError, match="no examples"):
        paired_difference(bits(""), bits("1"))


def test_paired_interval_covers():
    """At n=30, with 15 % of the verdicts won and 3 % lost: counts are whole, so coverage is not quite 95 %."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        u = rng.random(30)
        _, low, high = paired_difference(u < 0.5, (u < 0.5) & (u > 0.03) | (u > 0.85))
        hits += low <= 0.12 <= high
    assert hits / 2000 > 0.93


def test_environment_names_versions_and_device():
    found = environment()
    assert {"python", "torch", "timm", "robustify", "device", "threads", "platform"} <= found.keys()
    assert all(found.values())


def test_plain_values():
    value = {"a": np.float32(0.5), "b": (1, {3, 2}), "c": np.arange(2), "d": float("nan"), "e": None, 1: np.bool_(True)}
    assert reports.plain(value) == {"a": 0.5, "b": [1, [2, 3]], "c": [0, 1], "d": "nan", "e": None, "1": True}


def test_loads_without_torch_and_timm():
    code = "import sys, robustify.report; sys.exit(bool({'torch', 'timm'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_union_is_what_withstands_every_threat():
    rows = [Row("clean", None, 4, 4, kind="clean"), Row("pgd", "Linf:8/255", 4, 3)]
    verdicts = {"clean": np.ones(4, bool), "pgd Linf:8/255": np.array([1, 1, 1, 0], bool)}
    assert Report("m", "d", "test", rows, verdicts).union() is None
    rows.append(Row("pgd", "L1:12", 4, 3))
    verdicts["pgd L1:12"] = np.array([0, 1, 1, 1], bool)
    union = Report("m", "d", "test", rows, verdicts).union()
    assert (union.threat, union.correct, union.n) == ("Linf:8/255 and L1:12", 2, 4)
    assert Report("m", "d", "test", rows, verdicts).table()[-1]["threat"] == "Linf 8/255 and L1 12"
