"""The runtime: choice of instruction set, threads, scratch memory, and use from several Python threads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kernel_support import ISAS, every_isa, gptq_case, same_bits
from ropewalk import native
from ropewalk.base.errors import NativeError, ShapeError


def test_scalar_is_always_there_and_last():
    assert ISAS[-1] == "scalar"
    assert set(ISAS) <= {"avx512bf16", "avx512", "avxvnni", "avx2", "scalar"}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the wide instruction sets are those of x86")
def test_what_the_processor_reports_is_available():
    with open("/proc/cpuinfo") as file:
        flags = next((line.split(":")[1].split() for line in file if line.startswith("flags")), [])
    assert ("avx2" in ISAS) == ({"avx2", "fma", "f16c"} <= set(flags))
    assert ("avxvnni" in ISAS) == ({"avx2", "fma", "f16c", "avx_vnni"} <= set(flags))
    needed = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
    assert ("avx512" in ISAS) == (needed <= set(flags))
    assert ("avx512bf16" in ISAS) == (needed | {"avx512_bf16"} <= set(flags))


@every_isa
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_runtime_reports_what_it_was_asked_for(isa, threads):
    runtime = native.Runtime(isa, threads)
    assert (runtime.isa, runtime.threads) == (isa, threads)


def test_the_default_is_the_best_instruction_set_on_all_processors_of_the_process():
    runtime = native.Runtime()
    assert (runtime.isa, runtime.threads) == (ISAS[0], native.usable_processors())


@pytest.mark.parametrize("isa", ["sse2", "AVX2", "scalar "])
def test_an_unknown_instruction_set_is_refused_with_those_there_are(isa):
    with pytest.raises(NativeError, match=rf"instruction set '{isa}' is not available.*: {', '.join(ISAS)}"):
        native.Runtime(isa, 1)


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_numbers_of_threads_out_of_range_are_refused(threads):
    with pytest.raises(NativeError, match="threads must be between 1 and 1024"):
        native.Runtime(None, threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_computes_alone_and_ends_without_the_threads_that_it_lacks():
    script = """
    import os, sys, threading
    import numpy as np
    from ropewalk import native
    runtime = native.Runtime(threads=3)
    x = np.ones((64, 4096), np.float32)
    weight = np.ones(4096, np.float32)
    expected = native.rms_norm(runtime, x, weight, 1e-5)
    child = os.fork()
    if child == 0:
        for _ in range(3):  # on the stacks of the threads that are not here
            thread = threading.Thread(target=print)
            thread.start()
            thread.join()
        same = (native.rms_norm(runtime, x, weight, 1e-5) == expected).all()
        del runtime
        os._exit(0 if same else 1)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_as_many_threads_as_are_allowed_work():
    case = gptq_case(64, 400, 32)
    runtime, single = native.Runtime(None, 1024), native.Runtime(None, 1)
    x = np.ones((1, 64), np.float32)
    assert same_bits(native.Linear(runtime, [case.pack(runtime)])(x), native.Linear(single, [case.pack(single)])(x))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, which needs Linux")
def test_threads_that_the_system_refuses_are_an_error_and_not_the_end_of_the_process():
    script = """
        import os, resource
        from ropewalk import native
        from ropewalk.base.errors import NativeError
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = used + (256 << 20)  # room for some thread stacks, not for a thousand
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            native.Runtime(None, 1024)
        except NativeError as error:
            print(error)
        print(native.Runtime(None, 2).threads)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    if "AddressSanitizer" in ran.stderr:
        pytest.skip("the address space cannot be limited under AddressSanitizer")
    assert ran.stdout.split("\n")[:2] == ["the system refuses to start 1024 threads", "2"], ran.stderr


@every_isa
def test_two_python_threads_share_one_runtime(isa):
    """Operations of different kinds and sizes at once: each result is that of the operation alone."""
    runtime = native.Runtime(isa, 2)
    case = gptq_case(256, 96, 64, act_order=True)
    linear = native.Linear(runtime, [case.pack(runtime)])
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(rows, 256, generator=generator) for rows in (1, 5, 40, 120)]
    cache = native.KvCache(runtime, 2, 32, 300)
    cache.append_(*(torch.randn(300, 2, 32, generator=generator) for _ in range(2)), 0)

    def once(x: torch.Tensor) -> list[torch.Tensor]:
        rows = len(x)
        q = x.view(rows, 8, 32)
        return [
            linear(x, "int8"),
            linear(x, "exact"),
            cache.attend(q, 300 - rows),
            native.silu_mul(runtime, x),
            native.rms_norm(runtime, x, torch.ones(256), 1e-6),
        ]

    alone = [once(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: once(inputs[i % 4]), range(80)))
    for i, result in enumerate(results):
        assert all(same_bits(a, b) for a, b in zip(result, alone[i % 4], strict=True)), i


@every_isa
def test_scratch_memory_depends_on_rows_and_threads_and_not_on_the_context(isa):
    def scratch(threads: int, num_keys: int, num_rows: int) -> int:
        runtime = native.Runtime(isa, threads)
        assert runtime.scratch_bytes == 0
        cache = native.KvCache(runtime, 1, 64, num_keys)
        cache.append_(torch.zeros(num_keys, 1, 64), torch.zeros(num_keys, 1, 64), 0)
        cache.attend(torch.zeros(num_rows, 4, 64), num_keys - num_rows, window=64)
        return runtime.scratch_bytes

    small = scratch(1, 128, 16)
    assert small == scratch(1, 16384, 16) == scratch(1, 16384, 128)
    assert scratch(3, 128, 16) == 3 * small


@every_isa
def test_scratch_memory_is_kept_and_not_added_up(isa):
    runtime = native.Runtime(isa, 1)
    linear = native.Linear(runtime, [gptq_case(64, 16, 32, act_order=True).pack(runtime)])
    linear(torch.zeros(100, 64))
    held = runtime.scratch_bytes
    linear(torch.zeros(1, 64))
    linear(torch.zeros(100, 64))
    assert runtime.scratch_bytes == held > 0


LARGE = (1024, 2 * 512)  # of silu_mul: its result is as large as those that lie in reused memory


@pytest.mark.parametrize("of", [torch.from_numpy, np.asarray], ids=["torch", "numpy"])
def test_a_large_result_takes_the_memory_of_one_that_was_freed(of):
    runtime, x = native.Runtime(threads=1), of(np.ones(LARGE, np.float32))
    address = native.as_numpy(native.silu_mul(runtime, x)).ctypes.data
    assert native.as_numpy(native.silu_mul(runtime, x)).ctypes.data == address
    assert runtime.scratch_bytes == 1024 * 512 * 4


def test_a_large_result_that_is_still_held_is_left_alone():
    runtime, one = native.Runtime(threads=1), torch.ones(LARGE)
    first, views = native.silu_mul(runtime, one), native.silu_mul(runtime, one)[5:7]
    expected = first[0, 0].item()
    for _ in range(3):
        native.silu_mul(runtime, 2 * one)
    assert (first == expected).all() and (views == expected).all()


def test_large_results_outlive_the_runtime_that_made_them():
    result = native.silu_mul(native.Runtime(threads=1), torch.ones(LARGE))
    assert (result == result[0, 0]).all()


def test_what_is_kept_of_freed_results_is_bounded():
    runtime = native.Runtime(threads=1)
    for num_rows in (*range(1024, 1024 + 40), 70_000):
        native.silu_mul(runtime, torch.zeros(num_rows, 1024))
    held = [native.silu_mul(runtime, torch.zeros(4096, 4096)) for _ in range(6)]  # 32 MiB each
    del held
    assert 0 < runtime.scratch_bytes <= 128 << 20


def test_the_core_refuses_results_of_sizes_that_cannot_be():
    core = native.Runtime(threads=1).core
    for num_rows, num_columns in ((-1, 4), (4, -1), (1 << 31, 4), (4, 1 << 31)):
        with pytest.raises(ShapeError, match=rf"a result of \[{num_rows}, {num_columns}\] is out of range"):
            core.empty(num_rows, num_columns)
    with pytest.raises(MemoryError):
        core.empty(1 << 30, 1 << 30)
    assert core.empty(0, 4).shape == (0, 4)


def test_results_are_of_the_kind_of_the_input():
    runtime = native.Runtime()
    x = np.ones((2, 8), np.float32)
    assert isinstance(native.silu_mul(runtime, x), np.ndarray)
    assert isinstance(native.silu_mul(runtime, torch.from_numpy(x)), torch.Tensor)
    weight = torch.ones(8, requires_grad=True)
    assert isinstance(native.rms_norm(runtime, torch.from_numpy(x), weight, 1e-6), torch.Tensor)


def test_threads_that_place_arrays_at_the_same_time_get_places_of_their_own():
    """Without a lock four threads that placed 240,000 arrays got 239,010 places, and some wrote over others."""
    arena, count = native.Arena(), 20_000
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            placed = list(
                threads.map(
                    lambda thread: [arena.place(np.full(8, thread * count + i)) for i in range(count)], range(4)
                )
            )
    finally:
        sys.setswitchinterval(interval)
    arrays = [array for of_thread in placed for array in of_thread]
    assert len({array.ctypes.data for array in arrays}) == 4 * count
    assert all((array == number).all() for number, array in enumerate(arrays))
