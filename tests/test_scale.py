"""benchmarks/step_simulation.py and benchmarks/scale.py: cases that are small enough for a hand, and the page."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def small():  # type: ignore[no-untyped-def]
    """Two groups of 10 and 20 prompt tokens, and durations that are easy to add."""
    from step_simulation import Costs, Group

    costs = Costs(decode_fixed=1, decode_row=0.1, prefill_tok=0.01, learn_fixed=2, learn_tok=0.5, rest=3, slots=2)
    return Group(10, (2, 4)), Group(20, (1,)), costs


def test_a_free_slot_takes_the_next_response() -> None:
    """Two steps of two rows (2.4), then the other prompt (0.2), a step of two rows (1.2) and one of one row (1.1)."""
    import dataclasses

    from step_simulation import draw

    a, b, costs = small()
    found = draw([a, b], costs)
    assert found.seconds == pytest.approx(0.1 + 2.4 + 0.2 + 1.2 + 1.1) and found.waited == 0
    assert found.row_share == pytest.approx((2 * 2 + 2 + 1) / (4 * 2))
    # the second group is judged from 3.9 to 4.4, the first from 5.0 to 6.0
    assert draw([a, b], dataclasses.replace(costs, judge=0.5)).waited == pytest.approx(1.0)
    assert draw([], costs).seconds == 0


def test_packed_tokens_hold_the_prompt_once_and_no_last_token() -> None:
    from step_simulation import learn

    a, b, costs = small()
    assert (a.tok, b.tok) == (10 + 1 + 3, 20)
    assert learn([a, b], 2, costs) == [2 + 20 / 2, 2 + 14 / 2]
    assert learn([a, b], 1, costs) == [2 + 34 / 2]


def test_synchronous_ranks_wait_for_the_slowest_at_both_barriers() -> None:
    """Rank 0 draws 4.7 s and learns 12, rank 1 draws 1.3 s and learns 9; 3 s are for the rest."""
    from step_simulation import synchronous

    a, b, costs = small()
    found = synchronous([a, b], 2, costs)
    assert found.seconds == pytest.approx(4.7 + 12 + 3) and found.num_trained == 2
    assert found.idle == pytest.approx(1 - (4.7 + 12 + 3 + 1.3 + 9 + 3) / (2 * 19.7))
    assert synchronous([a, b], 1, costs).idle == pytest.approx(0)


def test_a_refill_is_a_drawing_of_its_own() -> None:
    """The first group is flat; what replaces it takes 1.2 s on rank 0, while rank 1 has nothing to draw."""
    from step_simulation import Group, synchronous

    a, b, costs = small()
    found = synchronous([a._replace(is_flat=True), b], 2, costs, [[Group(10, (1,))]])
    assert found.seconds == pytest.approx(4.7 + 1.2 + 12 + 3) and found.num_trained == 2
    assert found.idle == pytest.approx(1 - (20.9 + 1.3 + 2 + 10 / 2 + 3) / (2 * 20.9))


def test_one_step_off_lasts_as_long_as_its_slower_part() -> None:
    from step_simulation import one_step_off

    a, b, costs = small()
    found = one_step_off([a, b], 1, 1, costs)
    assert found.seconds == pytest.approx(19 + 3)
    assert found.idle == pytest.approx(1 - (5.0 + 19 + 2 * 3) / (2 * 22))


def test_durations_are_those_of_the_line_that_made_the_rows() -> None:
    from step_simulation import fitted

    rows = [
        {"response_tok": n, "packed_tok": 2 * n, "generate_s": 0.5 + 0.001 * n, "update_s": 0.004 * n, "step_s": 0.0}
        for n in (100, 200, 400)
    ]
    rows = [{**row, "step_s": row["generate_s"] + row["update_s"] + 0.25} for row in rows]
    costs = fitted(rows, 10)
    assert (costs.decode_fixed, costs.decode_row) == (pytest.approx(0.05), pytest.approx(0.001))
    assert costs.learn_tok == pytest.approx(0.002) and abs(costs.learn_fixed) < 1e-9
    assert costs.rest == pytest.approx(0.25)


def test_measured_steps_are_reproduced_within_what_they_scatter() -> None:
    from step_simulation import checked, load_rows

    check = checked(load_rows())
    assert (check.num_fitted, check.num_steps) == (90, 10)
    assert abs(check.error) < 0.05 and check.median_error < 1.25 * check.scatter


def test_measured_peaks_of_ranks_are_within_a_tenth_of_the_plan() -> None:
    """As committed, and as docs/devices.md has them."""
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "memory.jsonl").read_text().splitlines()]
    told = [row for row in rows if row["checkpoint_every"] > 1]
    assert [row["case"] for row in told] == ["1:data", "2:data", "2:fsdp", "4:data", "4:fsdp"]
    for row in rows:
        assert row["ratio"] == pytest.approx(1, abs=0.1)
    for row in told:
        ranks, kind = row["case"].split(":")
        assert f"| {ranks} | {kind} | {row['plan_gib']:.2f} | {row['fact_gib']:.2f} | {row['ratio']:.2f} |" in page


def test_network_and_products_meet_at_flops_over_bytes() -> None:
    """8 FLOPs and 8 bytes a weight: 801 TFLOP/s over 450 GB/s are 1,780 tokens; attention and head shift it."""
    from scale import GEMM_SHARE, H100, MODELS, NVLINK, least_micro_tok, line

    assert least_micro_tok(MODELS[1], H100, NVLINK) == pytest.approx(989e12 * GEMM_SHARE / NVLINK, rel=0.05)
    one = line(MODELS[0], 16, H100, "data")
    assert one.sent == pytest.approx(2 * 15 / 16 * 4 * 1_543_714_304)  # of Qwen2.5-1.5B, by its makers
    assert one.between_nodes["1 x 100 Gb/s"] == pytest.approx(one.sent / 12.5e9)
    assert set(line(MODELS[0], 8, H100, "data").between_nodes.values()) == {0.0}


def test_the_page_has_what_the_arithmetic_gives_today() -> None:
    import scale

    page = scale.PAGE.read_text(encoding="utf-8")
    for name, text in {**scale.arithmetic(), "check": scale.check_text(scale.checked(scale.load_rows())) + "."}.items():
        assert f"<!-- {name}:start -->\n{text}\n<!-- {name}:end -->" in page, "python benchmarks/scale.py --write"
