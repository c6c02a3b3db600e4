"""tests/soak.py finds what grows."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from studies import load_script


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    return load_script(Path(__file__).with_name("soak.py"))


def test_slopes_are_for_a_thousand_steps(soak: ModuleType) -> None:
    flat: dict[str, Any] = {"workers_rss_mib": 9.0, "threads": 4, "processes": 3}
    looks = [soak.Look(step=s, rss_mib=100 + 0.25 * s + (-1) ** s, files=20 + s // 100, **flat) for s in range(2000)]
    assert soak.slope(looks, "rss_mib") == pytest.approx(250, abs=0.1)
    assert soak.slope(looks, "files") == pytest.approx(10, abs=0.1)
    assert soak.slope(looks, "threads") == pytest.approx(0, abs=1e-9)
    assert soak.log_ratio([200] * 50 + [210] * 50) == pytest.approx(0.05)


@pytest.mark.slow
def test_a_run_of_all_features_is_watched_to_its_end(soak: ModuleType, tmp_path: Path) -> None:
    row, looks = soak.soak(tmp_path, 10)
    assert row["steps"] == 10 and len(looks) >= 2
    assert all(seen.rss_mib > 50 and seen.files > 3 and seen.threads >= 1 for seen in looks)
    assert max(seen.processes for seen in looks) > 1 and max(seen.workers_rss_mib for seen in looks) > 10
