"""The trace reader on small traces made by hand, laid out as GPU and CPU profilers do."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from trtllm_jax.commands.bench.trace import (
    GROUPS,
    group_of,
    kernels,
    newest_trace,
    programs,
    read_kernels,
    read_programs,
)

Event = dict[str, Any]

DECODE, RAGGED = "jit_decode_loop", "jit_ragged_step"
LAYER = "jit(decode_loop)/while/body/layer_7/jit(layer)"


def thread(pid: int, name: str, tid: int | None = None) -> Event:
    where = {"pid": pid} if tid is None else {"pid": pid, "tid": tid}
    return {"ph": "M", "name": "process_name" if tid is None else "thread_name", "args": {"name": name}, **where}


def run(pid: int, tid: int, start: float, us: float, name: str, program: str | None, scope: str = "") -> Event:
    args = {"hlo_op": name} | ({"hlo_module": program} if program else {}) | ({"tf_op": scope} if scope else {})
    return {"ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": us, "name": name, "args": args}


GPU = [
    thread(1, "/device:GPU:0"),
    thread(1, "Stream #13(Compute)", 13),
    thread(1, "Stream #20(MemcpyH2D)", 20),
    thread(1, "XLA Ops", 99),
    thread(2, "/device:GPU:1"),
    thread(2, "Stream #13(Compute)", 13),
    thread(3, "/host:CPU"),
    thread(3, "python", 1),
    run(1, 20, 0, 10, "MemcpyH2D", None),
    run(1, 13, 100, 400, "nvjet_tst_128x64", RAGGED, f"{LAYER}/mlp/dot_general"),
    run(1, 13, 500, 100, "loop_add_fusion_3", RAGGED, f"{LAYER}/attention/add"),
    run(1, 13, 800, 1000, "gemm_fusion_dot_12", DECODE, f"{LAYER}/mlp/dot_general"),
    run(1, 13, 1800, 500, "gemm_fusion_dot_13", DECODE, f"{LAYER}/mlp/dot_general"),
    run(1, 20, 1900, 50, "MemcpyD2H", DECODE),  # beside a kernel: no gap
    run(1, 13, 2350, 150, "decode_attention", DECODE),
    run(1, 13, 2500, 50, "input_reduce_fusion", DECODE, "jit(decode_loop)/while/body/sample/reduce_max"),
    run(1, 13, 2550, 20, "mystery", DECODE),
    run(1, 99, 100, 9999, "nvjet_tst_128x64", RAGGED),  # another view of the same kernels
    run(2, 13, 100, 9999, "nvjet_tst_128x64", RAGGED),  # another device
    {"ph": "X", "pid": 3, "tid": 1, "ts": 0, "dur": 9999, "name": "dispatch"},
]


def test_a_gpu_trace() -> None:
    decode, ragged, transfer = programs(kernels(GPU))
    assert (decode.name, ragged.name) == (DECODE, RAGGED)
    assert decode.groups == pytest.approx(
        {"matmul": 1.5, "copies": 0.05, "attention": 0.15, "sampling": 0.05, "other": 0.02}
    )
    assert decode.idle_ms == pytest.approx(0.2 + 0.05)  # 600 to 800 and 2300 to 2350
    assert ragged.groups == pytest.approx({"matmul": 0.4, "attention": 0.1})
    assert ragged.idle_ms == pytest.approx(0.09)  # 10 to 100
    assert transfer.groups == pytest.approx({"copies": 0.01})
    assert decode.total_ms == pytest.approx(1.77 + 0.25)
    # All time from the first kernel to the last is accounted for, and what ran beside another counts twice.
    assert sum(one.total_ms for one in programs(kernels(GPU))) == pytest.approx(2.57 + 0.05)


def test_kernels_that_differ_in_number_are_one() -> None:
    (name, ms, runs), second, *_ = programs(kernels(GPU))[0].top(5)
    assert (name, ms, runs) == ("gemm_fusion_dot (mlp/dot_general)", pytest.approx(1.5), 2)
    assert second[0] == "decode_attention"


def test_a_loop_on_a_cpu_is_charged_only_what_lies_outside_its_operations() -> None:
    events = [
        thread(7, "/host:CPU"),
        thread(7, "tf_XLAEigen/1", 1),
        run(7, 1, 0, 1000, "while.2", DECODE),
        run(7, 1, 100, 300, "call.1", DECODE),
        run(7, 1, 150, 200, "ynn_fusion.4", DECODE),
        run(7, 1, 500, 400, "wrapped_reduce.9", DECODE),
        {"ph": "X", "pid": 7, "tid": 1, "ts": 20, "dur": 9, "name": "ThunkExecutor::Execute"},
    ]
    (decode,) = programs(kernels(events))
    assert decode.groups == pytest.approx({"other": 0.4, "matmul": 0.2, "norm/elementwise": 0.4})
    assert decode.idle_ms == 0
    assert {name: ms for name, ms, _ in decode.top(9)} == pytest.approx(
        {"while": 0.3, "call": 0.1, "ynn_fusion": 0.2, "wrapped_reduce": 0.4}
    )


@pytest.mark.parametrize(
    ("name", "scope", "group"),
    [
        ("ncclDevKernel_AllReduce_Sum_bf16", "a/logits/psum", "communication"),
        ("all-gather.3", "", "communication"),
        ("MemcpyD2D", "a/attention/copy", "copies"),
        ("copy.3", "", "copies"),
        ("cutlass_80_wmma_tensorop_bf16", "", "matmul"),
        ("cutlass_80_wmma_tensorop_bf16", "a/attention/dot_general", "attention"),
        ("fusion_12", "a/mlp/dot_general", "matmul"),
        ("loop_multiply_fusion", "a/mlp/mul", "norm/elementwise"),
        ("ragged_attention", "", "attention"),
        ("fusion_1", "a/sample/reduce_max", "sampling"),
        ("sort.1", "", "sampling"),
        ("input_reduce_fusion", "", "norm/elementwise"),
        ("while.3", "", "other"),
    ],
)
def test_groups(name: str, scope: str, group: str) -> None:
    assert group in GROUPS
    assert group_of(name, scope) == group


def test_the_newest_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no trace\.json\.gz"):
        newest_trace(tmp_path)
    folder = tmp_path / "plugins" / "profile" / "now"
    folder.mkdir(parents=True)
    with gzip.open(folder / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": GPU}, file)
    assert [one.name for one in read_programs(newest_trace(tmp_path))][:2] == [DECODE, RAGGED]
    read = read_kernels(newest_trace(tmp_path))
    assert [(one.start, one.end, one.self_us) for one in read][:3] == [(0, 10, 10), (100, 500, 400), (500, 600, 100)]
    assert len(read) == 9
