"""The gram_norm kernel: its sources on the CPU-side harness, with planted faults, and through nvcc."""

import pytest
from harness_tools import (
    ADDRESS,
    OUT_OF_BOUNDS,
    PLAIN,
    RACE,
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
KERNEL = "cuda/gram_norm/gram_norm.cuh"
PTX = "cuda/common/ptx.cuh"


def build_gram_norm(precision, **options):
    sources = [f"cuda/gram_norm/gram_norm_{precision}.cu", "cuda/gram_norm/gram_norm_plan.cpp"]
    return harness_build.build(
        [*sources, "harness/tests/gram_norm_entry.cpp"], defines=[f"-DLAUNCHER=gram_norm_{precision}"], **options
    )


run_gram_norm = program("gram_norm")


@needs_harness
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gram_norm(precision):
    """T from 1 to 70 and more, odd shapes, all tiles, splits, layouts; the same bits on every schedule."""
    library = build_gram_norm(precision)
    for size, seeds in (("small", SEEDS), ("full", [0])):
        outputs = check_passes(run_gram_norm, library, precision, size, seeds=seeds)
        assert len(outputs) == 1, outputs


@needs_harness
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("precision", ["tf32x3", "bfloat16"])
def test_gram_norm_under_sanitizers(precision, sanitizer):
    library = build_gram_norm(precision, sanitizer=sanitizer)
    check_under_sanitizer(run_gram_norm, sanitizer, library, precision, "small")


RING_BARRIER = "__syncthreads();  // this slab is there for all threads, and all have left the one that is refilled now"
OFFSETS_BARRIER = "__syncthreads();  // all offsets are there"
ROW_SUMS_BARRIER = "__syncthreads();  // all row sums are there"
SAME_SAMPLE = "const bool same_sample = (row ^ column) < job.slot;"
EXISTS = "n < job.N && t < job.T ?"
VALID_PIECE = "const bool valid = offset >= 0 && first < x.columns;"
IN_KERNEL = r"data race[\s\S]*gram_norm\.cuh"


# Half of the time to compile; the tiles differ in nothing but numbers.
NO_LARGE_TILE = (
    KERNEL,
    "launch_gram_tile<GramTile<Element, kTerms, 128, 32, 64, 4, 1>>(params, plan, workspace, stream);",
    'throw std::runtime_error("left out");',
)


def wrong(*patches):
    return Fault(PLAIN, WRONG, "got", [*patches])


# name: (precision, fault)
FAULTS = {
    "no wait for the copies": ("bfloat16", wrong((KERNEL, "cp_async_wait<kStages - 2>();", ""))),
    "waits for one group too few": (
        "bfloat16",
        wrong((KERNEL, "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();")),
    ),
    "no barrier between slabs": ("tf32x3", wrong((KERNEL, RING_BARRIER, ""))),
    "the same, under ThreadSanitizer": (
        "bfloat16",
        Fault(THREAD, RACE, "data race", [(KERNEL, RING_BARRIER, "")]),
    ),
    "offsets are read before they are there": (
        "bfloat16",
        Fault(THREAD, RACE, IN_KERNEL, [(KERNEL, OFFSETS_BARRIER, "")]),
    ),
    "row sums are read before they are there": (
        "bfloat16",
        Fault(THREAD, RACE, IN_KERNEL, [(KERNEL, ROW_SUMS_BARRIER, "")]),
    ),
    "pairs off the diagonal count once": (
        "bfloat16",
        wrong((KERNEL, "blocks.p == blocks.q ? 1.f : 2.f", "1.f")),
    ),
    "pairs on the diagonal count twice": (
        "bfloat16",
        wrong((KERNEL, "blocks.p == blocks.q ? 1.f : 2.f", "2.f")),
    ),
    "pairs of samples count": ("bfloat16", wrong((KERNEL, SAME_SAMPLE, "const bool same_sample = true;"))),
    "rows past T": ("bfloat16", wrong((KERNEL, EXISTS, "n < job.N ?"))),
    "samples past N": (
        "bfloat16",
        Fault(ADDRESS, OUT_OF_BOUNDS, "heap-buffer-overflow", [(KERNEL, EXISTS, "t < job.T ?")]),
    ),
    "results past N": (
        "bfloat16",
        wrong((KERNEL, "lane % job.slot == 0 && n < job.N", "lane % job.slot == 0")),
    ),
    "columns past the end": ("tf32x3", wrong((KERNEL, VALID_PIECE, "const bool valid = offset >= 0;"))),
    "single columns past the end": (
        "bfloat16",
        wrong((KERNEL, "offset >= 0 && column + c < x.columns", "offset >= 0")),
    ),
    "the element stride is ignored": (
        "bfloat16",
        wrong((KERNEL, "(column + c) * x.stride_c", "(column + c)")),
    ),
    "both rows from p": ("bfloat16", wrong((KERNEL, "rows - kTile + warp %", "warp %"))),
    "fragments swapped": (
        "bfloat16",
        wrong((KERNEL, "2 * (k + c) + lane / 8 % 2", "2 * (k + c) + lane / 16")),
    ),
    "chunks of odd rows swapped": (
        "bfloat16",
        wrong((KERNEL, "place(16 * m + lane % 16, ", "place(16 * m + lane % 16, lane % 2 ^ ")),
    ),
    "columns of b counted to a": (
        "bfloat16",
        wrong((KERNEL, "if (slab == job.slabs[0]) keep_a();", "if (slab == job.slabs[0] + 1) keep_a();")),
    ),
    "a split that ends with a": ("bfloat16", wrong((KERNEL, "if (end <= job.slabs[0]) keep_a();", ""))),
    "a split left out": ("bfloat16", wrong((KERNEL, "int split = 0; split <", "int split = 1; split <"))),
    "a pair left out": (
        "bfloat16",
        wrong((KERNEL, "int pair = lane; pair < pairs;", "int pair = lane + 1; pair < pairs;")),
    ),
    "a product of three left out": ("tf32x3", wrong((PTX, "mma_tf32(step, a_lo, b_hi);", ""))),
    "operands truncated": (
        "tf32",
        wrong((PTX, "fmaf(x, 0x1.6p-12f, x)", "x")),
    ),
    "long sums inside of the tensor cores": (
        "bfloat16",
        wrong((KERNEL, "mma_half<Element>(step,", "mma_half<Element>(sum,")),
    ),
    "norms below zero": (
        "tf32x3",
        wrong((KERNEL, "if (job.pairs == 1) norm = norm < 0 ? 0.f : norm;", "")),
    ),
    "sums of pairs below zero": ("tf32x3", wrong((KERNEL, "total[0] < 0 ? 0.f : total[0]", "total[0]"))),
    "NaN becomes zero": (
        "bfloat16",
        wrong((KERNEL, "if (job.pairs == 1) norm = norm < 0 ? 0.f : norm;", "norm = norm > 0 ? norm : 0.f;")),
    ),
    "workspace for one split too few": (
        "bfloat16",
        Fault(
            ADDRESS,
            OUT_OF_BOUNDS,
            r"AddressSanitizer[\s\S]*gram_norm\.cuh",
            [
                (
                    "cuda/gram_norm/gram_norm_plan.cpp",
                    "best.units * best.splits * part_bytes",
                    "best.units * (best.splits - 1) * part_bytes",
                )
            ],
        ),
    ),
}


@pytest.fixture(scope="module")
def faulty_libraries():
    def build(entry):
        precision, fault = entry
        patches = [*fault.patches, NO_LARGE_TILE]
        return build_gram_norm(precision, sanitizer=fault.sanitizer, patches=patches)

    return FaultyLibraries(FAULTS, build)


@needs_harness
@pytest.mark.parametrize("name", FAULTS)
def test_fault_planted_in_gram_norm_is_caught(faulty_libraries, name):
    precision, fault = FAULTS[name]
    flags = ["--exact"] if fault.sanitizer else []

    def run(seed):
        environment = {"CUDA_ON_CPU_SEED": seed, "CUDA_ON_CPU_RESIDENT": 1}
        return run_gram_norm(
            faulty_libraries[name], precision, "faults", *flags, sanitizer=fault.sanitizer, **environment
        )

    check_fault(fault, run)
