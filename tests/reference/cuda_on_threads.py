"""CUDA C++ on a CPU: a thread of the host for each of a block, one block after the other in the order of the grid.

For programs whose threads all meet at the same barriers, and whose blocks wait for earlier ones alone. What a GPU does
side by side, and its caches, are not in it: it shows wrong arithmetic and wrong places, no race.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

COMPILER = shutil.which("g++")
_HOST = r"""
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>
using std::max; using std::min;
struct float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { unsigned x; };
static thread_local Index threadIdx;
static Index blockIdx;
struct Barrier {
    std::mutex lock; std::condition_variable all; int waiting = 0; long turn = 0;
    void wait() {
        std::unique_lock<std::mutex> held(lock);
        const long mine = turn;
        if (++waiting == THREADS) { waiting = 0; ++turn; all.notify_all(); }
        else all.wait(held, [&] { return turn != mine; });
    }
};
static Barrier barrier;
static unsigned long long exchanged[THREADS];
inline void __syncthreads() { barrier.wait(); }
inline void __threadfence() {}
template <class T> T __shfl_xor_sync(unsigned, T value, int other) {
    std::memcpy(&exchanged[threadIdx.x], &value, sizeof(T));
    barrier.wait();
    T found;
    std::memcpy(&found, &exchanged[threadIdx.x ^ other], sizeof(T));
    barrier.wait();
    return found;
}
template <class T> T __ldcg(const T* from) { return *from; }
inline int atomicAdd(int* at, int by) { const int before = *at; *at += by; return before; }
inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(x)
"""
_RUN = r"""
template <class Work> void on_threads(long long blocks, Work work) {
    for (long long block = 0; block < blocks; ++block) {
        blockIdx.x = block;
        std::vector<std::thread> threads;
        for (unsigned i = 0; i < THREADS; ++i) threads.emplace_back([=] { threadIdx.x = i; work(); });
        for (auto& thread : threads) thread.join();
    }
}
"""


@lru_cache(maxsize=32)
def library(
    source: str, functions: tuple[tuple[str, int], ...], macros: tuple[tuple[str, str], ...], folder: Path
) -> Any:
    """The source as a library, with ``NAME_on_threads(blocks, arguments ..)`` for every function.

    Args:
        source: whose two pieces of a GPU's assembler are a read and a write of a flag.
        functions: names, and how many arguments each has.
        macros: names and values.
        folder: for what is compiled.
    """
    plain = source.replace(
        'asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(columns_done) : "l"(done + other) : "memory");',
        "columns_done = done[other];",
    ).replace(
        'asm volatile("st.release.gpu.global.s32 [%0], %1;" :: "l"(done + segment), "r"(leaf_end) : "memory");',
        "done[segment] = leaf_end;",
    )
    assert "asm" not in plain
    entries = "".join(_entry(plain, name, count) for name, count in functions)
    stem = f"{abs(hash((plain, macros)))}"
    (folder / f"{stem}.cpp").write_text(_HOST + plain + _RUN + entries)
    assert COMPILER is not None
    defines = [f"-D{key}={value}" for key, value in macros]
    command = [COMPILER, "-std=c++17", "-O2", "-w", "-fPIC", "-shared", "-pthread", *defines]
    subprocess.run([*command, str(folder / f"{stem}.cpp"), "-o", str(folder / f"{stem}.so")], check=True)
    return ctypes.CDLL(str(folder / f"{stem}.so"))


def _entry(source: str, name: str, count: int) -> str:
    """A function of pointers and numbers, all of 64 bits, that calls it with the types that it wants."""
    start = source.index(f"\n{name}(") + len(name) + 2
    kinds = [part.rsplit(maxsplit=1)[0] for part in source[start : source.index(")", start)].split(",")]
    assert len(kinds) == count
    taken = ", ".join(f"long long a{i}" for i in range(count))
    passed = ", ".join(f"({kind})a{i}" for i, kind in enumerate(kinds))
    call = f"on_threads(blocks, [=] {{ {name}({passed}); }});"
    return f'extern "C" void {name}_on_threads(long long blocks, {taken}) {{ {call} }}\n'


def launched(library: Any, name: str, blocks: int, arguments: Sequence[Tensor | int]) -> None:
    """What a launch does, done when this returns."""
    values = [ctypes.c_longlong(x.data_ptr() if isinstance(x, Tensor) else x) for x in arguments]
    getattr(library, f"{name}_on_threads")(ctypes.c_longlong(blocks), *values)
