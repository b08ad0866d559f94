"""How large tables are: what a row costs, what a share of a device holds, and what is never undercut."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trimtab.engines.vllm.settings import tables
from trimtab.engines.vllm.settings.config import SteeringSettings, model_sites, stamped
from trimtab.engines.vllm.settings.tables import Tables, decide_tables, parse_memory
from trimtab.errors import SteeringError
from trimtab.ops import SteeringBuffers
from trimtab.ops.sizes import row_bytes
from trimtab.program.resolved_gate import probes_needed, rows_needed
from trimtab.program.room import check_room
from trimtab.sites import GateLimits, HookPoint, ModelSites, Site, SlotLimits
from trimtab.spec import Steering
from trimtab.vectors.vector import SteeringVector

GIB = 1 << 30


def model(layers: int = 32, width: int = 4096, gates: int = 0, stages: tuple[int, ...] = ()) -> ModelSites:
    sites = [Site(layer, HookPoint.POST_BLOCK) for layer in range(layers)]
    return ModelSites(width, layers, frozenset(sites), GateLimits(gates, frozenset(sites[:1] if gates else ()), stages))


def engine(requests: int = 1024, dtype: torch.dtype = torch.bfloat16) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            dtype=dtype, hf_text_config=SimpleNamespace(num_hidden_layers=4), get_hidden_size=lambda: 64
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=requests),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch):
    def of(size: int | None) -> None:
        monkeypatch.setattr(tables, "_device_memory", lambda: size)

    return of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("gates", "row_monitor"), [(0, False), (2, False), (0, True), (3, True)])
def test_a_row_costs_what_the_buffers_then_take(dtype: torch.dtype, gates: int, row_monitor: bool) -> None:
    sites = [Site(layer, HookPoint.POST_BLOCK) for layer in range(3)]

    def held(rows: int) -> int:
        buffers = SteeringBuffers(
            sites, hidden_size=24, max_rows=rows, max_tokens=8, dtype=dtype, gates=gates,
            max_probes=rows if gates else 1, row_monitor=row_monitor,
        )  # fmt: skip
        return buffers.nbytes

    each = row_bytes(len(sites), 24, dtype, probes=gates > 0, row_monitor_sites=3 if row_monitor else 0)
    assert held(110) - held(10) == 100 * each


def test_tables_take_a_share_of_the_device_and_no_more_than_the_worst_case(device) -> None:
    device(80 * GIB)
    small = decide_tables(engine(), model(), 0.01, None)
    assert small.rows == rows_needed(1024, 0)  # 0.5 GiB, of 0.8
    large = decide_tables(engine(), model(80, 8192), 0.01, None)
    each = row_bytes(80, 8192, torch.bfloat16)
    assert large.rows == int(0.8 * GIB) // each == 655
    assert large.nbytes == large.rows * each <= 0.8 * GIB
    assert decide_tables(engine(), model(80, 8192), 0.02, None).rows == 1310
    assert decide_tables(engine(), model(80, 8192), parse_memory("100 MiB"), None).rows == (100 << 20) // each


SHAPES = {  # layers and width
    "8B (Llama 3.1)": (32, 4096),
    "70B (Llama 3.1)": (80, 8192),
    "671B (DeepSeek V3)": (61, 7168),
}


def table(device: Any) -> list[str]:
    """What the page on serving says of tables, computed by what decides them."""
    device(80 * GIB)
    lines = [
        "| model | a row | worst case at 1,024 sequences | with 4 gates | default | default, with gates |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (layers, width) in SHAPES.items():
        plain, gated = model(layers, width), model(layers, width, gates=4)
        each = row_bytes(layers, width, torch.bfloat16)
        unbounded = [decide_tables(engine(), kind, 1 << 50, None) for kind in (plain, gated)]
        default = [decide_tables(engine(), kind, 0.01, None) for kind in (plain, gated)]
        cells = [f"{tables.rows:,} rows, {tables.nbytes / GIB:.2f} GiB" for tables in (*unbounded, *default)]
        lines.append(f"| {name} | {each / (1 << 20):.2f} MiB | {' | '.join(cells)} |")
    return lines


def test_the_page_on_serving_says_what_tables_take(device) -> None:
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    assert "\n".join(table(device)) in page


def test_of_pipeline_stages_the_one_with_most_sites_counts(device) -> None:
    device(80 * GIB)
    assert decide_tables(engine(), model(80, 8192, stages=(30,)), 0.01, None).rows == int(0.8 * GIB) // row_bytes(
        50, 8192, torch.bfloat16
    )


def test_probes_of_rows_count_at_the_sites_that_have_them(device) -> None:
    device(80 * GIB)
    for stages, sites in (((), 80), ((30,), 50), ((79,), 79)):  # the probe is read in the first stage
        found = decide_tables(engine(), model(80, 8192, 4, stages), 0.01, None, lowers=True)
        first = stages[0] if stages else 80
        each = max(
            row_bytes(first, 8192, torch.bfloat16, probes=True, row_monitor_sites=1),
            row_bytes(sites, 8192, torch.bfloat16, probes=True, row_monitor_sites=int(sites == first)),
        )
        assert found.rows == int(0.8 * GIB) // each
        assert found.nbytes == found.rows * each
        assert found.room.lowers
    given = SteeringSettings.parse({"probe_layers": [0], "row_monitor": True})
    assert model_sites(engine(), stamped(engine(), given)).room.lowers


def test_one_request_always_finds_room_unless_rows_are_given(device) -> None:
    device(1 << 20)
    assert decide_tables(engine(), model(gates=4), 0.01, None)[:2] == (rows_needed(1, 4), rows_needed(1, 4))
    assert decide_tables(engine(), model(), 0.01, None)[:2] == (3, 1)
    assert decide_tables(engine(), model(gates=4), 0.01, 9)[:2] == (9, 9)
    assert decide_tables(engine(2), model(gates=4), 0.01, 999)[:2] == (999, probes_needed(2, 4))


def test_where_no_device_can_be_asked_tables_are_small_and_the_log_says_so(device, caplog) -> None:
    device(None)
    assert decide_tables(engine(), model(80, 8192), 0.01, None).nbytes <= tables.UNKNOWN_DEVICE
    assert "Set `table_memory` to a size" in caplog.text
    caplog.clear()
    assert decide_tables(engine(4), model(), 0.01, None).rows == rows_needed(4, 0)
    assert not caplog.text


@pytest.mark.parametrize("given", [0, 1, 1.5, -0.1, "a lot", "5 TiB", "0.0", True, "nan"])
def test_memory_that_is_neither_a_share_nor_a_size_is_refused(given: Any) -> None:
    with pytest.raises(SteeringError, match=r"steering.table_memory: .*a size such as 512MiB"):
        SteeringSettings.parse({"table_memory": given})


@pytest.mark.parametrize(
    ("given", "meant"), [(0.01, 0.01), ("0.02", 0.02), ("512MiB", 512 << 20), (" 1.5 GiB ", 3 << 29)]
)
def test_memory_is_a_share_or_a_size(given: Any, meant: Any) -> None:
    assert parse_memory(SteeringSettings.parse({"table_memory": given}).table_memory) == meant


def test_what_was_decided_travels_in_the_stamp_and_is_not_decided_again(device) -> None:
    device(24 << 20)
    unstamped = SteeringSettings.parse({"table_memory": "64MiB", "max_rows": 9})
    settings = SteeringSettings.parse(stamped(engine(), unstamped).model_dump(mode="json"))
    device(None)
    assert tables.stamped_tables(settings.stamp) == Tables(9, 1, 9 * row_bytes(4, 64, torch.bfloat16))
    assert model_sites(engine(), settings).room == (8, 0, False)
    assert model_sites(engine(), unstamped).room is None
    assert stamped(engine(), settings).stamp == settings.stamp


def test_a_request_of_more_slots_than_tables_have_room_for_is_told_how_many_rows_would_do(device) -> None:
    device(None)
    numbers = torch.randn(96, 16, generator=torch.Generator().manual_seed(0)).numpy()
    vectors = {f"v{i}": SteeringVector({Site(i % 16, HookPoint.POST_BLOCK): row}) for i, row in enumerate(numbers)}
    served = model(layers=16, width=16)
    served = replace(served, slots=SlotLimits(3, served.sites, frozenset({"lowrank"})))
    at = [[f"v{layer + 16 * j}" for j in range(6)] for layer in range(16)]
    spec = [{"kind": "lowrank", "read": names[:3], "write": names[3:]} for names in at]
    asked = Steering.parse({"interventions": spec}).resolve(vectors, served)
    made = decide_tables(engine(requests=1), served, parse_memory("100 MiB"), None)
    assert made.rows == rows_needed(1, 0, 16)
    with pytest.raises(SteeringError, match=r"needs \d+ table rows .*table_memory.*`max_rows` of at least \d+") as e:
        check_room(asked, made.room, "")
    enough = int(re.findall(r"at least (\d+)", str(e.value))[0])
    check_room(asked, decide_tables(engine(requests=1), served, 0.01, enough).room, "")
    with pytest.raises(SteeringError, match="table rows"):
        check_room(asked, decide_tables(engine(requests=1), served, 0.01, enough - 1).room, "")
