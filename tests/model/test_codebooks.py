"""The tables of the IQ types, in the forms that kernels look them up in."""

import pytest

from prima_core.model.codebooks import IQ1, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, Grid

GRIDS = {"IQ1": IQ1, "IQ2_XXS": IQ2_XXS, "IQ2_XS": IQ2_XS, "IQ2_S": IQ2_S, "IQ3_XXS": IQ3_XXS, "IQ3_S": IQ3_S}


@pytest.mark.parametrize("name", GRIDS)
def test_planes_expand_to_the_grid(name: str) -> None:
    grid = GRIDS[name]
    assert expanded(grid) == grid.values()


@pytest.mark.parametrize(
    ("grid", "planes"),
    [
        (Grid(8, (5, 6, 7, 8), "e41b1be4"), [[0xE4, 0x1B], [0x1B, 0xE4]]),
        (Grid(4, tuple(range(10, 18)), "10327654"), [[0o10, 0o76], [0o32, 0o54]]),
    ],
)
def test_planes_hold_the_first_levels_of_all_entries_then_the_next(grid: Grid, planes: list[list[int]]) -> None:
    assert grid.planes() == planes


def expanded(grid: Grid) -> list[int]:
    """What the planes say the levels are, entry by entry."""
    shifts, mask = ((0, 2, 4, 6), 3) if len(grid.levels) <= 4 else ((0, 3), 7)
    entries = zip(*grid.planes(), strict=True)
    return [grid.levels[byte >> shift & mask] for entry in entries for byte in entry for shift in shifts]
