"""The square_gemm kernels: their sources on the CPU-side harness, with planted faults, and through nvcc."""

import pytest
from harness_tools import (
    ADDRESS,
    OUT_OF_BOUNDS,
    PLAIN,
    RACE,
    REPORTED,
    SEEDS,
    THREAD,
    WRONG,
    Fault,
    FaultyLibraries,
    check_fault,
    check_passes,
    check_under_sanitizer,
    harness_build,
    needs_harness,
    program,
)

PRECISIONS = ["tf32", "tf32x3", "bfloat16", "float16"]
KERNEL = "cuda/square_gemm/square_gemm.cuh"
PTX = "cuda/common/ptx.cuh"


def build_square_gemm(precision, **options):
    sources = [f"cuda/square_gemm/square_gemm_{precision}.cu", "cuda/square_gemm/square_gemm_plan.cpp"]
    return harness_build.build(
        [*sources, "harness/tests/square_gemm_entry.cpp"], defines=[f"-DLAUNCHER=square_gemm_{precision}"], **options
    )


run_square_gemm = program("square_gemm")


@needs_harness
@pytest.mark.parametrize("precision", PRECISIONS)
def test_square_gemm(precision):
    """Odd shapes, tiles, splits, layouts, subsets of results, means of all sizes; the same bits on every schedule."""
    library = build_square_gemm(precision)
    for size, seeds in (("small", SEEDS), ("full", [0])):
        outputs = check_passes(run_square_gemm, library, precision, size, seeds=seeds)
        assert len(outputs) == 1, outputs


@needs_harness
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("precision", ["tf32x3", "bfloat16"])
def test_square_gemm_under_sanitizers(precision, sanitizer):
    library = build_square_gemm(precision, sanitizer=sanitizer)
    check_under_sanitizer(run_square_gemm, sanitizer, library, precision, "small")


RING_BARRIER = "__syncthreads();  // this slab is there for all threads, and all have left the one that is refilled now"
# Half of the time to compile; the tiles differ in nothing but numbers.
NO_LARGE_TILE = (KERNEL, "} else if constexpr (kTerms == 1) {", "} else if constexpr (kTerms == 0) {")


def wrong(*patches):
    return Fault(PLAIN, WRONG, "got", [*patches])


def overflow(*patches):
    return Fault(ADDRESS, OUT_OF_BOUNDS, r"AddressSanitizer[\s\S]*square_gemm\.cuh", [*patches])


PRODUCT = "const float deviation = fmaf(static_cast<float>(__ldg(b[k] + n * job.x[1].stride_n)), x, -mean[k]);"
STORED = "static_cast<float>(Element(sum[j]))"
CANCELLED = "centered[j] = left < job.smallest_share * square[j] ? kSquareCancelled : left;"
DEVIATION = "const float centered = fmaf(-sum[k] * inverse_N, sum[k], square[k]);"
# name: (precision, fault)
FAULTS = {
    "no wait for the copies": ("bfloat16", wrong((KERNEL, "cp_async_wait<Tile::kStages - 2>();", ""))),
    "waits for one group too few": (
        "tf32",
        wrong((KERNEL, "cp_async_wait<Tile::kStages - 2>();", "cp_async_wait<Tile::kStages - 1>();")),
    ),
    "no barrier between slabs": ("tf32", wrong((KERNEL, RING_BARRIER, ""))),
    "the same, under ThreadSanitizer": ("bfloat16", Fault(THREAD, RACE, "data race", [(KERNEL, RING_BARRIER, "")])),
    "all splits write the same part": (
        "bfloat16",
        Fault(
            THREAD,
            RACE,
            r"data race[\s\S]*square_gemm\.cuh",
            [(KERNEL, "int64_t{blockIdx.y} * job.O * job.I + at", "at")],
        ),
    ),
    "samples past N": (
        "tf32",
        wrong((KERNEL, "const bool valid = n + row < N && inside;", "const bool valid = inside;")),
    ),
    "single samples past N": (
        "bfloat16",
        wrong(
            (
                KERNEL,
                "const bool valid = n + row < N && column + c < x.columns;",
                "const bool valid = column + c < x.columns;",
            )
        ),
    ),
    "columns past the end": (
        "tf32",
        Fault(
            ADDRESS,
            REPORTED,
            "an instruction reads out of bounds",
            [(KERNEL, "const bool inside = first < x.columns;", "const bool inside = true;")],
        ),
    ),
    "rows of results past O": ("tf32", overflow((KERNEL, "if (output >= job.O) continue;", ""))),
    "columns of results past I": ("tf32", overflow((KERNEL, "if (input + j < job.I) store", "store"))),
    "the element stride is ignored": ("bfloat16", wrong((KERNEL, "(column + c) * x.stride_c", "(column + c)"))),
    "a row of fragments swapped": ("tf32", wrong((KERNEL, "lane / 4 * 4 + 2 * m + r;", "lane / 4 * 4 + 2 * r + m;"))),
    "samples paired wrongly": (
        "bfloat16",
        wrong((KERNEL, "pairs[1] = x.x >> 16 | (y.x & 0xffff0000u);", "pairs[1] = y.x >> 16 | (x.x & 0xffff0000u);")),
    ),
    "squares rounded twice": (
        "tf32",
        wrong(
            (
                KERNEL,
                "return kSquare ? y * y : y;",
                "const float z = __uint_as_float(to_tf32(y)); return kSquare ? z * z : y;",
            )
        ),
    ),
    "squares not rounded": (
        "tf32",
        wrong((PTX, "fmaf(x, 0x1.6p-12f, x)", "x")),
    ),
    "a product of three left out": ("tf32x3", wrong((PTX, "mma_tf32(step, a_hi, b_lo);", ""))),
    "the gradient from squares": (
        "tf32x3",
        wrong((KERNEL, "multiply_floats<false>(sums, b, a, lane)", "multiply_floats<true>(sums, b, a, lane)")),
    ),
    "long sums inside of the tensor cores": (
        "bfloat16",
        wrong(
            (
                KERNEL,
                "mma_tf32(step, b_square[0][m], a_square[0]);",
                "mma_tf32(squares[m][4 * block + v], b_square[0][m], a_square[0]);",
            ),
            (
                KERNEL,
                "mma_tf32(step, b_square[1][m], a_square[1]);",
                "mma_tf32(squares[m][4 * block + v], b_square[1][m], a_square[1]);",
            ),
        ),
    ),
    "a split left out": ("tf32", wrong((KERNEL, "int s = 0; s < job.splits", "int s = 1; s < job.splits"))),
    "vectors at misaligned results": (
        "tf32",
        Fault(
            ADDRESS,
            OUT_OF_BOUNDS,
            "misaligned address",
            [("cuda/square_gemm/square_gemm_plan.cpp", "p.I % 4 == 0 && aligned", "aligned")],
        ),
    ),
    "centered by the gradient as stored": (
        "bfloat16",
        wrong(
            (
                KERNEL,
                "fmaf(-sum[j] * inverse_N, sum[j], square[j])",
                f"fmaf(-{STORED} * inverse_N, {STORED}, square[j])",
            )
        ),
    ),
    "cancelled sums are kept": ("tf32x3", wrong((KERNEL, CANCELLED, "centered[j] = left;"))),
    "cancelled sums become zero": (
        "tf32x3",
        wrong((KERNEL, CANCELLED, "centered[j] = left < job.smallest_share * square[j] ? 0.f : left;")),
    ),
    "NaN is taken for cancelled": (
        "tf32x3",
        wrong((KERNEL, CANCELLED, "centered[j] = left >= job.smallest_share * square[j] ? left : 0.f;")),
    ),
    "the mean's rounding is ignored": ("tf32x3", wrong((KERNEL, DEVIATION, "const float centered = square[k];"))),
    "deviations from a rounded product": (
        "tf32x3",
        wrong(
            (
                KERNEL,
                PRODUCT,
                "volatile float product = static_cast<float>(__ldg(b[k] + n * job.x[1].stride_n)) * x;\n"
                "const float deviation = product - mean[k];",
            ),
        ),
    ),
    "one sample has a spread": ("tf32x3", wrong((KERNEL, "job.N == 1 || centered < 0", "centered < -1"))),
    "deviations of rows past O": (
        "tf32x3",
        overflow((KERNEL, "(o + k < job.O ? o + k : 0) * job.x[1].stride_c", "(o + k) * job.x[1].stride_c")),
    ),
}


@pytest.fixture(scope="module")
def faulty_libraries():
    def build(entry):
        precision, fault = entry
        patches = [*fault.patches, NO_LARGE_TILE]
        return build_square_gemm(precision, sanitizer=fault.sanitizer, patches=patches)

    return FaultyLibraries(FAULTS, build)


@needs_harness
@pytest.mark.parametrize("name", FAULTS)
def test_fault_planted_in_square_gemm_is_caught(faulty_libraries, name):
    precision, fault = FAULTS[name]
    flags = ["--exact"] if fault.sanitizer else []
    resident = 3 if fault.sanitizer == THREAD else 1

    def run(seed):
        environment = {"CUDA_ON_CPU_SEED": seed, "CUDA_ON_CPU_RESIDENT": resident}
        library = faulty_libraries[name]
        return run_square_gemm(library, precision, "faults", *flags, sanitizer=fault.sanitizer, **environment)

    check_fault(fault, run)
