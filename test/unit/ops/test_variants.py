"""Choice between kernels by measurement; times are given here, a GPU's in test/unit/engine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashrt_runtime.ops.variants import ROUNDS, Variants

IDENTITY = {"gpu": "G1", "version": "1"}
OWN, LIBRARY = torch.tensor(1), torch.tensor(2)
CANDIDATES: dict[str, Callable[[], Tensor]] = {"own": lambda: OWN, "library": lambda: LIBRARY}


def table(own: float, library: float) -> tuple[Variants, list[int]]:
    """Variants whose candidates take these times, and what was measured."""
    calls: list[int] = []

    def measure(call: Callable[[], Tensor]) -> float:
        calls.append(int(call()))
        return own if call() is OWN else library

    return Variants(measure), calls


def run(variants: Variants, operation: str = "product 4x4") -> Tensor:
    with variants.measuring():
        return variants.run(operation, CANDIDATES)


@pytest.mark.parametrize(
    ("own", "library", "want"),
    [(1.0, 2.0, OWN), (2.0, 1.0, LIBRARY), (1.07, 1.0, OWN), (1.09, 1.0, LIBRARY), (1.0, 1.0, OWN)],
)
def test_the_fastest_serves_and_the_first_within_noise(own: float, library: float, want: Tensor) -> None:
    variants, calls = table(own, library)
    assert variants.run("product 4x4", CANDIDATES) is OWN, "nothing was measured yet"
    assert calls == []
    assert run(variants) is want
    assert variants.run("product 4x4", CANDIDATES) is want
    assert variants.run("product 8x8", CANDIDATES) is OWN
    assert run(variants) is want
    assert calls == [1, 2] * ROUNDS, "measured once"


@pytest.mark.parametrize("spoiled", [0, 1, 2, 3])
def test_one_bad_measurement_chooses_nothing(spoiled: int) -> None:
    """117 us in place of 13 was seen once."""
    taken = iter(range(2 * ROUNDS))

    def measure(call: Callable[[], Tensor]) -> float:
        return 9.0 if next(taken) == spoiled else float(call())

    variants = Variants(measure)
    assert run(variants) is OWN
    assert variants.measured["product 4x4"] == {"own": 1.0, "library": 2.0}
    slower = {"library": CANDIDATES["library"], "own": CANDIDATES["own"]}
    taken = iter(range(2 * ROUNDS))
    with variants.measuring():
        assert variants.run("the other order", slower) is OWN


def test_a_candidate_that_fails_the_second_time_does_not_serve() -> None:
    answers = iter([1.0, 2.0])

    def measure(call: Callable[[], Tensor]) -> float:
        if call() is LIBRARY:
            return 2.0
        if (found := next(answers)) == 2.0:
            raise RuntimeError("no kernel for this shape")
        return found

    assert run(Variants(measure)) is LIBRARY


def test_a_choice_that_is_no_candidate_any_more() -> None:
    variants, _ = table(2.0, 1.0)
    run(variants)
    assert variants.run("product 4x4", {"own": CANDIDATES["own"]}) is OWN


def test_choices_are_remembered(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "gpu.json"
    first, _ = table(2.0, 1.0)
    with first.remembered(IDENTITY, file):
        run(first)
    second, calls = table(1.0, 2.0)
    with second.remembered(IDENTITY, file):
        assert run(second) is LIBRARY
        assert calls == []
        written = file.stat().st_mtime_ns
    assert file.stat().st_mtime_ns == written, "nothing new, nothing written"
    with second.remembered(IDENTITY, file):
        assert run(second, "another") is OWN
    third, calls = table(1.0, 2.0)
    with third.remembered(IDENTITY, file):
        assert run(third) is LIBRARY
        assert run(third, "another") is OWN
    assert calls == []
    assert third.measured == {each: {"own": each_own, "library": 3.0 - each_own} for each, each_own in (
        ("product 4x4", 2.0), ("another", 1.0))}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"gpu": "G2", "version": "1", "chosen": {"product 4x4": "library"}}', '{"chosen": {}}',
     '{"gpu": "G1", "version": "1", "chosen": []}', '{"gpu": "G1", "version": "1"}',
     '{"gpu": "G1", "version": "1", "chosen": {"product 4x4": "library"}}'],
)  # fmt: skip
def test_a_file_of_another_gpu_or_damaged_is_measured_anew(tmp_path: Path, content: str) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(content)
    variants, calls = table(1.0, 2.0)
    with variants.remembered(IDENTITY, file):
        assert run(variants) is OWN
    assert calls == [1, 2] * ROUNDS
    again, calls = table(2.0, 1.0)
    with again.remembered(IDENTITY, file):
        assert run(again) is OWN
    assert calls == []


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    variants, _ = table(2.0, 1.0)
    with variants.remembered(IDENTITY, tmp_path / "file" / "gpu.json"):
        assert run(variants) is LIBRARY


def test_without_a_place_for_a_file() -> None:
    variants, calls = table(2.0, 1.0)
    with variants.remembered(IDENTITY, None):
        assert run(variants) is LIBRARY
    assert calls == [1, 2] * ROUNDS


def test_measured_anew(tmp_path: Path) -> None:
    """A first load beside another program on the GPU may have chosen wrongly."""
    file = tmp_path / "gpu.json"
    hampered, _ = table(2.0, 1.0)
    with hampered.remembered(IDENTITY, file):
        run(hampered)
    quiet, calls = table(1.0, 2.0)
    with quiet.remembered(IDENTITY, file, anew=True):
        assert run(quiet) is OWN
    assert calls == [1, 2] * ROUNDS
    later, calls = table(2.0, 1.0)
    with later.remembered(IDENTITY, file):
        assert run(later) is OWN
    assert calls == []


def test_a_candidate_that_fails_leaves_the_other() -> None:
    def refused() -> Tensor:
        raise RuntimeError("no kernel for this shape")

    variants = Variants(lambda call: float(call()))
    with variants.measuring():
        assert variants.run("product", {"own": refused, "library": CANDIDATES["library"]}) is LIBRARY
    assert variants.run("product", {"own": refused, "library": CANDIDATES["library"]}) is LIBRARY
    with variants.measuring(), pytest.raises(RuntimeError, match="no kernel"):
        variants.run("another", {"own": refused, "library": refused})


def test_other_threads_do_not_measure() -> None:
    variants, calls = table(2.0, 1.0)
    with variants.measuring(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(variants.run, "product 4x4", CANDIDATES).result() is OWN
    assert calls == []
