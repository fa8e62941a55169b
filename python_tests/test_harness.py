"""The CUDA-on-CPU harness (csrc/harness) tests itself."""

import ctypes
import re
import sys

import numpy as np
import pytest
from harness_tools import ROOT, SEEDS, harness_build, needs_harness, needs_nvcc, run_nvcc, run_script
from rewrite_ptx import rewrite

REDUCE = "cuda/common/reduce.cuh"


# ---- self-tests of the harness ----


def load(path, function):
    library = ctypes.CDLL(str(path))
    library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
    run = getattr(library, function)

    def call(*arguments):
        """None, or the error that the harness reported."""
        converted = [
            argument.encode() if isinstance(argument, str) else ctypes.c_void_p(argument.ctypes.data)
            for argument in arguments
        ]
        status = run(*converted)
        assert status in (0, 1), f"status {status} for {arguments[0]}"
        return library.cuda_on_cpu_last_error().decode() if status else None

    return call


@pytest.fixture(scope="module")
def self_test():
    """Runs a kernel of self_test.cu by name on numpy arrays; fails when the harness reports an error."""
    run = load(harness_build.build(["harness/tests/self_test.cu"]), "run_self_test")

    def call(name, inputs, output):
        error = run(name, np.ascontiguousarray(inputs), output)
        assert error is None, error
        return output

    return call


@pytest.fixture(scope="module")
def faulty_library():
    return harness_build.build(["harness/tests/faulty_kernels.cu"])


@pytest.fixture(params=SEEDS)
def seed(request, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_SEED", str(request.param))
    return request.param


@needs_harness
def test_shuffles(self_test, seed):
    x = np.arange(32, dtype=np.float32) + 100
    lane = np.arange(32)
    out = self_test("shuffles", x, np.zeros((10, 32), np.float32))
    segment = lane & ~7
    sources = [
        np.full(32, 5),
        segment | (lane + 3) & 7,
        lane ^ 16,
        lane ^ 3,
        np.where(lane + 7 < 32, lane + 7, lane),
        np.where(lane + 2 < segment + 8, lane + 2, lane),
        np.where(lane - 7 >= 0, lane - 7, lane),
        np.where(lane - 2 >= segment, lane - 2, lane),
        np.where(lane < 16, lane ^ 1, lane ^ 2),
        lane ^ 1,
    ]
    np.testing.assert_array_equal(out, x[np.stack(sources)])


@needs_harness
@pytest.mark.parametrize("pattern", ["mixed", "all", "none"])
def test_votes(self_test, seed, pattern):
    yes = {"mixed": np.arange(96) % 5 == 0, "all": np.ones(96, bool), "none": np.zeros(96, bool)}[pattern]
    out = self_test("votes", yes.astype(np.int32), np.zeros((6, 96), np.uint32))
    warps = yes.reshape(3, 32)
    ballots = (warps * (np.uint64(1) << np.arange(32, dtype=np.uint64))).sum(1)
    per_warp = [np.repeat(values, 32) for values in (ballots, warps.any(1), warps.all(1))]
    per_block = [np.full(96, value) for value in (yes.sum(), yes.all(), yes.any())]
    np.testing.assert_array_equal(out, np.stack(per_warp + per_block).astype(np.uint32))


@needs_harness
def test_indices(self_test, seed):
    out = self_test("indices", np.zeros(1), np.full((12, 60, 4), -1, np.int32))
    block, thread = np.meshgrid(np.arange(12), np.arange(60), indexing="ij")
    np.testing.assert_array_equal(out, np.stack([block, thread, thread // 4 % 3, thread // 12], -1))


@needs_harness
@pytest.mark.parametrize("resident", [1, 3])
def test_shared_memory(self_test, seed, resident, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_RESIDENT", str(resident))
    x = np.random.default_rng(0).standard_normal((7, 128)).astype(np.float32)
    out = self_test("reverse", x, np.zeros_like(x))
    np.testing.assert_array_equal(out, x[:, ::-1].reshape(7, 4, 32)[:, :, ::-1].reshape(7, 128))


@needs_harness
@pytest.mark.parametrize("resident", [1, 3])
def test_atomics(self_test, seed, resident, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_RESIDENT", str(resident))
    out = self_test("atomics", np.zeros(1), np.zeros(5, np.uint64))
    words = out.view(np.uint32)
    assert out[:1].view(np.float64)[0] == 320 and out[1] == 320 << 33
    assert words[4:5].view(np.float32)[0] == 160 and words[5:6].view(np.int32)[0] == -320
    np.testing.assert_array_equal(words[6:], [960, 319, 0x80000000 + 319, 640])


@needs_harness
def test_intrinsics(self_test, seed):
    x = np.random.default_rng(1).integers(-(2**31), 2**31, 32).astype(np.int32)
    x[:4] = 0, 1, -1, 1 << 20
    out = self_test("intrinsics", x, np.zeros((15, 32), np.int32))
    y, u, v = x[::-1], x.view(np.uint32), x[::-1].view(np.uint32)
    bits = np.uint32(0x3F800000) + (u & 0xFFFF)
    f = bits.view(np.float32)
    expected = [
        [bin(k).count("1") for k in u],
        [32 - int(k).bit_length() for k in u],
        [(int(k) & -int(k)).bit_length() for k in u],
        bits.view(np.int32),
        *(np.minimum(x, y), np.maximum(x, y), np.minimum(u, v).view(np.int32), np.maximum(u, v).view(np.int32)),
        *(np.minimum(f, np.float32(1.25)).view(np.int32), np.maximum(f, np.float32(1.25)).view(np.int32)),
        *(np.minimum(x, y), np.maximum(x, y)),
    ]
    np.testing.assert_array_equal(out[:12], np.stack(expected).astype(np.int64).astype(np.int32))
    np.testing.assert_allclose(out[12], 1e6 / np.sqrt(f), rtol=1e-5)
    assert set(out[13]) == {32} and set(out[14]) == {800}


@needs_harness
def test_named_barriers(self_test, seed):
    x = np.arange(128, dtype=np.float32)
    np.testing.assert_array_equal(self_test("named_barriers", x, np.zeros(128, np.float32)), x.astype(int) ^ 64)


@needs_harness
def test_schedule_follows_the_seed(self_test, monkeypatch):
    def order(**variables):
        for name in ("CUDA_ON_CPU_SEED", "CUDA_ON_CPU_SEQUENTIAL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return tuple(self_test("schedule", np.zeros(1), np.zeros(9, np.int32))[1:])

    assert order(CUDA_ON_CPU_SEQUENTIAL="1") == tuple(range(8))
    orders = [order(CUDA_ON_CPU_SEED=str(seed)) for seed in range(10)]
    assert all(sorted(warps) == list(range(8)) for warps in orders)
    assert len(set(orders)) == 10
    assert orders == [order(CUDA_ON_CPU_SEED=str(seed)) for seed in range(10)]


@needs_harness
def test_async_copies(self_test, seed):
    x = np.random.default_rng(2).integers(0, 2**32, (32, 8), dtype=np.uint32)
    out = self_test("async_copies", x, np.zeros((32, 8), np.uint32))
    lane = np.arange(32)
    bytes_in = x.view(np.uint8).reshape(32, 32)

    def kept(first, size, limits):
        """`size` bytes from `first`, those past each lane's limit zero, as words."""
        inside = np.arange(size) < limits[:, None]
        return np.where(inside, bytes_in[:, first : first + size], 0).astype(np.uint8).view(np.uint32)

    np.testing.assert_array_equal(out[:, :1], kept(0, 4, lane % 5))
    np.testing.assert_array_equal(out[:, 1], np.where(lane % 2, x[:, 1], 0))
    np.testing.assert_array_equal(out[:, 2:4], kept(8, 8, lane % 9))
    np.testing.assert_array_equal(out[:, 4:], x[::-1, 4:])


@needs_harness
def test_matrix_loads(self_test, seed):
    halves = np.random.default_rng(3).integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    out = self_test("matrix_loads", halves, np.zeros((14, 32), np.uint32))
    # Lane l receives the pair of elements (l // 4, 2 (l % 4)), (l // 4, 2 (l % 4) + 1) of each (transposed) matrix.
    pairs = [matrix.reshape(-1).view(np.uint32) for matrix in halves]
    transposed = [np.ascontiguousarray(matrix.T).reshape(-1).view(np.uint32) for matrix in halves]
    select = [0, 1, 2, 3, 0, 1, 0]
    np.testing.assert_array_equal(out, np.stack([pairs[m] for m in select] + [transposed[m] for m in select]))


def tf32_value(bits):
    """What the hardware multiplies: the low 13 bits are ignored."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def half_values(bits, dtype):
    """The two elements of a register, the lower half first."""
    halves = np.stack([bits & 0xFFFF, bits >> 16], -1).astype(np.uint16)
    if dtype == "f16":
        return halves.view(np.float16).astype(np.float64)
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@needs_harness
@pytest.mark.parametrize("dtype, depth", [("tf32", 4), ("tf32", 8), ("bf16", 8), ("bf16", 16), ("f16", 8), ("f16", 16)])
def test_mma_fragments(self_test, dtype, depth, seed):
    """The layouts as the PTX ISA lists them: per register the (row, column) of its elements, for each lane."""
    rng = np.random.default_rng(4)
    a_words, b_words = rng.integers(0, 2**32, (2, 32, 4), dtype=np.uint32)
    c = rng.integers(-50, 50, (32, 4)).astype(np.float32)
    if dtype == "tf32":  # small numbers, exact in float32; the ignored bits hold noise
        numbers = rng.integers(-9, 10, (2, 32, 4)).astype(np.float32).view(np.uint32)
        a_words, b_words = numbers | np.stack([a_words, b_words]) & np.uint32(0x1FFF)
    else:
        numbers = rng.integers(-9, 10, (2, 32, 4, 2)).astype(np.float32)
        if dtype == "f16":
            a_words, b_words = numbers.astype(np.float16).view(np.uint32)[..., 0]
        else:
            a_words, b_words = (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)[..., 0]
    group, t = np.divmod(np.arange(32), 4)
    a, b, accumulator = np.full((16, depth), np.nan), np.full((depth, 8), np.nan), np.full((16, 8), np.nan)
    if dtype == "tf32":
        # a0 (g, t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4); b0 (t, g), b1 (t + 4, g)
        a[group, t], a[group + 8, t] = tf32_value(a_words[:, 0]), tf32_value(a_words[:, 1])
        b[t, group] = tf32_value(b_words[:, 0])
        if depth == 8:
            a[group, t + 4], a[group + 8, t + 4] = tf32_value(a_words[:, 2]), tf32_value(a_words[:, 3])
            b[t + 4, group] = tf32_value(b_words[:, 1])
    else:
        # a0, a1 at (g, 2t + 0, 1); a2, a3 at (g + 8, 2t + 0, 1); a4..a7 the same 8 columns on; b0, b1 at (2t + 0, 1, g)
        for half in range(2):
            values = lambda words, half=half: half_values(words, dtype)[..., half]  # noqa: E731
            a[group, 2 * t + half], a[group + 8, 2 * t + half] = values(a_words[:, 0]), values(a_words[:, 1])
            b[2 * t + half, group] = values(b_words[:, 0])
            if depth == 16:
                a[group, 2 * t + 8 + half], a[group + 8, 2 * t + 8 + half] = (
                    values(a_words[:, 2]),
                    values(a_words[:, 3]),
                )
                b[2 * t + 8 + half, group] = values(b_words[:, 1])
    # c0, c1 at (g, 2t + 0, 1); c2, c3 at (g + 8, 2t + 0, 1)
    for half in range(2):
        accumulator[group, 2 * t + half], accumulator[group + 8, 2 * t + half] = c[:, half], c[:, 2 + half]
    product = a @ b + accumulator
    expected = np.stack([product[group + 8 * (r // 2), 2 * t + r % 2] for r in range(4)], -1)
    inputs = np.concatenate([a_words, b_words[:, :2], c.view(np.uint32)], 1)
    out = self_test(f"mma_{dtype}_k{depth}", inputs, np.zeros((32, 4), np.float32))
    np.testing.assert_array_equal(out, expected)


@needs_harness
def test_scalar_ptx(self_test, seed):
    x = np.random.default_rng(5).standard_normal(32).astype(np.float32)
    x[:6] = np.inf, -np.inf, 0, 1 + 2**-11, -1 - 2**-11, 1 + 2**-12
    out = self_test("scalar_ptx", x, np.zeros((6, 32), np.uint32))
    signed = np.arange(32) - 16
    # To the nearest multiple of the last kept bit (10 mantissa bits), ties away from zero.
    mantissa, exponent = np.frexp(x.astype(np.float64))
    with np.errstate(invalid="ignore"):
        rounded = np.ldexp(np.copysign(np.floor(np.abs(mantissa) * 2**11 + 0.5), mantissa), exponent - 11)
    expected = np.where(np.isinf(x), x, rounded).astype(np.float32).view(np.uint32)
    np.testing.assert_array_equal(out[0], expected)
    np.testing.assert_array_equal(out[1], np.where(signed < -3, 11, 22))
    np.testing.assert_array_equal(out[2], signed <= 3)
    np.testing.assert_array_equal(out[3], signed.astype(np.int32).view(np.uint32) > 3)
    np.testing.assert_array_equal(out[4].view(np.int32), signed)
    assert out[5].all()


# ---- faults that the harness must report ----

HERE = r"csrc/harness/tests/faulty_kernels\.cu:\d+"
REPORTS = {
    "divergent_barrier": rf"divergent barrier: other threads wait at {HERE} at {HERE} \[block \(0, 0, 0\) thread",
    "exit_before_barrier": rf"some threads of the block had exited before this barrier at {HERE}",
    "barrier_in_one_warp": rf"deadlock: 32 threads in barrier at {HERE}; 32 threads in barrier at {HERE};",
    "shuffle_with_absent_lanes": rf"deadlock: 16 threads in barrier at {HERE}; 16 threads in shfl.idx at {HERE};",
    "shuffle_outside_own_mask": rf"shfl.idx: the calling lane is not in its own mask at {HERE}",
    "mma_with_half_a_warp": rf"mma\S+: .aligned instruction with missing or exited lanes at {HERE}",
    "mma_with_a_missing_register": rf"PTX: vector operand 1 must have 4 elements: mma\S+ at {HERE}",
    "mma_of_floats": rf'PTX: operand constraint must be "r": mma\S+ at {HERE}',
    "unknown_instruction": rf"PTX: unsupported instruction: sub.rn.f64x7 at {HERE}",
    "written_input": rf"PTX: writes an input operand: mov.b32 at {HERE}",
    "undefined_register": rf"PTX: undefined register never_set: mov.b32 at {HERE}",
    "unknown_literal": rf"PTX: unsupported literal: 0f3F800000 at {HERE}",
    "misaligned_async_copy": rf"cp.async: misaligned shared address at {HERE}",
    "async_copy_to_global_memory": rf"the address is not in the block's shared memory at {HERE}",
    "async_copy_past_shared_memory": rf"shared-memory address out of range at {HERE}",
    "misaligned_matrix_row": rf"ldmatrix: the row address is not 16-byte aligned at {HERE}",
    "too_much_static_shared_memory": r"more than 48 KiB of static shared memory",
}
WRONG_RESULTS = [
    "uninitialised_dynamic",
    "uninitialised_static",
    "missing_syncwarp",
    "missing_syncthreads",
    "missing_syncthreads_before_reuse",
    "missing_async_wait",
    "missing_syncthreads_before_refill",
]


@needs_harness
@pytest.mark.parametrize("name", REPORTS)
def test_fault_is_reported(faulty_library, self_test, name, seed):
    run = load(faulty_library, "run_faulty_kernel")
    buffers = np.ones(128, np.float32), np.ones(128, np.float32)
    error = run(name, *buffers)
    assert error and re.search(REPORTS[name], error), error
    # The launch after a failed one starts from a clean state.
    assert run("unsynchronised_add", *buffers) is None


@needs_harness
@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_fault_gives_a_wrong_result(faulty_library, name, seed):
    run = load(faulty_library, "run_faulty_kernel")
    inputs, out = np.arange(128, dtype=np.float32), np.ones(128, np.float32)
    assert run(name, inputs, out) is None
    assert not np.all(out == 1)


@needs_harness
@pytest.mark.parametrize(
    "grid, block, shared_bytes, valid",
    [
        ((1, 1), 1024, 232448, True),
        ((1, 65535), 1, 0, True),
        ((1, 1), 1025, 0, False),
        ((1, 1), 0, 0, False),
        ((0, 1), 32, 0, False),
        ((1, 65536), 32, 0, False),
        ((1 << 31, 1), 32, 0, False),
        ((1, 1), 32, 232449, False),
    ],
)
def test_launch_limits(faulty_library, grid, block, shared_bytes, valid):
    library = ctypes.CDLL(str(faulty_library))
    library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
    status = library.run_empty_kernel(*map(ctypes.c_uint, (*grid, block)), ctypes.c_size_t(shared_bytes))
    assert status == (0 if valid else 1)
    assert valid or b"invalid launch configuration" in library.cuda_on_cpu_last_error()


# Runs one kernel on 128 ones; prints the result's first element. The buffers are exact, for AddressSanitizer.
RUN_ONE = """
import ctypes, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
buffers = [np.ones(128, np.float32) for _ in range(2)]
status = getattr(library, sys.argv[2])(sys.argv[3].encode(), *[ctypes.c_void_p(b.ctypes.data) for b in buffers])
print(status, library.cuda_on_cpu_last_error().decode(), "result", buffers[1][0])
"""


def run_one(tmp_path, library, function, kernel, **options):
    script = tmp_path / "run_one.py"
    script.write_text(RUN_ONE)
    return run_script(script, library, function, kernel, **options)


@needs_harness
def test_guard_page(faulty_library, tmp_path):
    done = run_one(tmp_path, faulty_library, "run_faulty_kernel", "shared_index_too_far")
    assert done.returncode < 0
    report = (
        r"invalid memory access \[block \(0, 0, 0\) thread \(127, 0, 0\)\]: byte 512 of 512 bytes of dynamic shared"
    )
    assert re.search(report, done.stderr), done.stderr


@needs_harness
@pytest.mark.parametrize(
    "kernel, report",
    [
        ("shared_index_too_far", "AddressSanitizer: SEGV|AddressSanitizer: use-after-poison"),
        ("static_index_too_far", "AddressSanitizer: use-after-poison"),
        ("global_index_too_far", "AddressSanitizer: heap-buffer-overflow"),
        ("async_copy_reads_too_far", f"AddressSanitizer: an instruction reads out of bounds at {HERE}"),
    ],
)
def test_address_sanitizer(kernel, report, tmp_path):
    library = harness_build.build(["harness/tests/faulty_kernels.cu"], sanitizer="address")
    done = run_one(tmp_path, library, "run_faulty_kernel", kernel, sanitizer="address")
    output = done.stdout + done.stderr
    assert re.search(report, output) and "faulty_kernels.cu" in output, output
    assert done.returncode == 67 or done.stdout.startswith("1 ")


@needs_harness
@pytest.mark.parametrize(
    "kernel, resident, race",
    [
        ("missing_syncthreads", 1, True),
        ("missing_syncthreads_before_reuse", 1, True),
        ("missing_syncwarp", 1, True),
        ("missing_syncthreads_before_refill", 1, True),
        ("unsynchronised_add", 3, True),
        ("unsynchronised_add", 1, False),  # blocks one after another: seen only when several are resident
    ],
)
def test_thread_sanitizer(kernel, resident, race, tmp_path):
    library = harness_build.build(["harness/tests/faulty_kernels.cu"], sanitizer="thread")
    done = run_one(tmp_path, library, "run_faulty_kernel", kernel, sanitizer="thread", CUDA_ON_CPU_RESIDENT=resident)
    assert done.returncode == (66 if race else 0), done.stderr
    assert bool(re.search(r"data race[\s\S]*faulty_kernels\.cu:\d+", done.stderr)) == race, done.stderr


@needs_harness
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_accept_correct_kernels(sanitizer, tmp_path):
    library = harness_build.build(["harness/tests/self_test.cu"], sanitizer=sanitizer)
    script = tmp_path / "run_all.py"
    script.write_text("""
import ctypes, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
for name in sys.argv[2:]:
    buffers = [np.zeros(4096, np.float64) for _ in range(2)]
    assert library.run_self_test(name.encode(), *[ctypes.c_void_p(b.ctypes.data) for b in buffers]) == 0, name
""")
    source = (ROOT / "csrc/harness/tests/self_test.cu").read_text()
    names = re.findall(r"^  CASE\((\w+),", source, re.M)
    assert len(names) == 17
    done = run_script(script, library, *names, sanitizer=sanitizer, CUDA_ON_CPU_RESIDENT=3)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the rewriter ----


def test_rewriter_keeps_lines_and_text():
    source = r"""
// asm("comment" : : );
const char* text = "asm(string)"; const char quote = '"';  /* asm( */
asm volatile(
    "mov.b32 %0, %1; // a:b, c\n"
    "next;"
    : "=r"(x[f(1, 2)]), "+f"(y)
    : "n"(sizeof(A<B, C>)) : "memory");
#if __CUDA_ARCH__ >= 800
__asm__("bar.sync 0;");
asm volatile("a;" ::: "memory");
int asm_name = 1;
"""
    expected = r"""
// asm("comment" : : );
const char* text = "asm(string)"; const char quote = '"';  /* asm( */
::cuda_on_cpu::ptx("mov.b32 %0, %1; // a:b, c\n"
    "next;", ::cuda_on_cpu::output("=r", x[f(1, 2)]), ::cuda_on_cpu::output("+f", y),
    ::cuda_on_cpu::input("n", sizeof(A<B, C>)))

;
#if CUDA_ON_CPU_ARCH >= 800
::cuda_on_cpu::ptx("bar.sync 0;");
::cuda_on_cpu::ptx("a;");
int asm_name = 1;
"""
    assert "".join(rewrite(source).split()) == "".join(expected.split())
    assert rewrite(source).splitlines()[9:] == expected.splitlines()[9:]  # later lines keep their numbers


@pytest.mark.parametrize("source", ['asm("x" : "=r" y);', 'asm("x" : [name] "=r"(y));', 'asm("x"'])
def test_rewriter_refuses_what_it_cannot_read(source):
    with pytest.raises(ValueError):
        rewrite(source)


def test_patches_must_match_exactly_once():
    with pytest.raises(ValueError, match="occurs 0 times"):
        harness_build.kernel_tree([(REDUCE, "no such text", "")])
    with pytest.raises(ValueError, match="times"):
        harness_build.kernel_tree([(REDUCE, "__syncthreads();", "")])


def test_headers_from_pip_packages(tmp_path, monkeypatch):
    """Without nvcc, the packages under site-packages/nvidia serve when together they have every header needed."""
    headers = {
        "cuda_runtime": ["cuda.h", "cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h"],
        "cuda_nvcc": ["crt/host_defines.h"],
    }
    monkeypatch.setattr(harness_build, "find_nvcc", lambda: None)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for package, names in headers.items():
        assert harness_build.cuda_include_folders.__wrapped__() == []
        for name in names:
            header = tmp_path / "nvidia" / package / "include" / name
            header.parent.mkdir(parents=True, exist_ok=True)
            header.touch()
    folders = harness_build.cuda_include_folders.__wrapped__()
    assert [folder.parent.name for folder in folders] == ["cuda_nvcc", "cuda_runtime"]


@needs_nvcc
def test_nvcc_accepts_the_self_tests(tmp_path):
    source = ROOT / "csrc/harness/tests/self_test.cu"
    run_nvcc("-O1", "-arch=sm_80", "-c", source, "-o", tmp_path / "self_test.o")
