"""The table of what is asked of hosts and what they have."""

from __future__ import annotations

import pytest

from coupled.rl.cluster.placement import GIB, HostResources, ResourceRequest, no_room, placement_table

HERE = HostResources(
    host="10.0.0.1",
    total={"CPU": 8.0, "GPU": 1.0, "memory": 30 * GIB, "node:10.0.0.1": 1.0},
    free={"CPU": 3.0, "memory": 20.5 * GIB},
    is_here=True,
)
OTHERS = [
    HostResources(host="10.0.0.11", total={"CPU": 64.0, "GPU": 4.0}, free={"CPU": 64.0, "GPU": 2.5}),
    HostResources(host="10.0.0.12", total={"CPU": 4.0, "memory": 8 * GIB}, free={"CPU": 4.0, "memory": 8 * GIB}),
]
RANKS = ResourceRequest(num=4, what="trainer ranks", needs={"CPU": 1.0, "GPU": 1.0}, has_one_here=True)


def test_the_table_has_a_line_for_each_host_with_what_is_free_and_for_how_many_there_is_room() -> None:
    assert placement_table(RANKS, [*OTHERS, HERE]).splitlines() == [
        "requested: 4 trainer ranks of 1 CPU, 1 GPU each, one of them here",
        "  host             CPUs free of  GPUs free of  memory, GiB free of  fits",
        "  10.0.0.1 (here)        3 of 8        0 of 1         20.5 of 30.0     0",
        "  10.0.0.11            64 of 64      2.5 of 4           0.0 of 0.0     2",
        "  10.0.0.12              4 of 4        0 of 0           8.0 of 8.0     0",
    ]


def test_gpus_are_left_out_where_nobody_has_or_wants_them() -> None:
    ask = ResourceRequest(num=2, what="rollout workers", needs={"CPU": 2.0})
    table = placement_table(ask, OTHERS[1:])
    assert "GPU" not in table
    assert table.splitlines()[0] == "requested: 2 rollout workers of 2 CPU each"
    assert table.splitlines()[2].split()[-1] == "2"


@pytest.mark.parametrize(
    ("ask", "rooms", "is_possible"),
    [
        (RANKS, [HERE, OTHERS[0]], True),
        (RANKS, [HERE], False),
        (RANKS, OTHERS * 2, False),
        (ResourceRequest(num=8, what="x", needs={"GPU": 0.5}), OTHERS, True),
        (ResourceRequest(num=9, what="x", needs={"GPU": 0.5}), OTHERS, False),
    ],
    ids=["fits when all is free", "too few", "none here", "shares", "too many shares"],
)
def test_what_is_busy_is_told_from_what_is_too_little(
    ask: ResourceRequest, rooms: list[HostResources], is_possible: bool
) -> None:
    assert ask.is_possible(rooms) is is_possible
    text = no_room(ask, rooms, "add hosts")
    assert text.startswith("other work holds" if is_possible else "the cluster has too few hosts")
    assert text.endswith("\nadd hosts")
