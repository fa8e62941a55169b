"""The outer_norm kernel: its sources on the CPU-side harness, with planted faults, and through nvcc."""

import re

import pytest
from harness_tools import (
    ADDRESS,
    OUT_OF_BOUNDS,
    PLAIN,
    RACE,
    REPORTED,
    ROOT,
    THREAD,
    WRONG,
    Fault,
    FaultyLibraries,
    check_fault,
    check_passes,
    check_under_sanitizer,
    harness_build,
    needs_harness,
    needs_nvcc,
    program,
    run_nvcc,
)

OUTER_NORM = "cuda/outer_norm/outer_norm.cuh"
REDUCE = "cuda/common/reduce.cuh"
DTYPES = ["float32", "float64", "bfloat16", "float16"]


def build_outer_norm(dtype, **options):
    sources = [f"cuda/outer_norm/outer_norm_{dtype}.cu", "harness/tests/outer_norm_entry.cpp"]
    return harness_build.build(sources, defines=[f"-DLAUNCHER=outer_norm_{dtype}"], **options)


run_outer_norm = program("outer_norm")


FEW_BLOCKS = (OUTER_NORM, "kOuterNormMaxBlocks = 1 << 16;", "kOuterNormMaxBlocks = 2;")


@needs_harness
@pytest.mark.parametrize("patches", [(), (FEW_BLOCKS,)], ids=["as_is", "few_blocks"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_norm(dtype, patches):
    """Odd shapes, misaligned rows, all kinds of strides, special values; also with blocks that take many samples."""
    library = build_outer_norm(dtype, patches=patches)
    check_passes(run_outer_norm, library, dtype, "full")


@needs_harness
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_norm_under_sanitizers(dtype, sanitizer):
    library = build_outer_norm(dtype, sanitizer=sanitizer, patches=[FEW_BLOCKS])
    check_under_sanitizer(run_outer_norm, sanitizer, library, dtype, "small")


WRITE_PARTIAL = "partial[threadIdx.x / 32][v] = values[v];"
WAR_BARRIER = "__syncthreads();  // the sums of the previous call have been read"
RAW_BARRIER = "__syncthreads();  // all partial sums are there"
FAULTS = {
    # Some threads then see poison, take the branch for rows out of range, and meet nobody at its barriers.
    "no barrier before the partial sums are read": Fault(
        PLAIN,
        REPORTED,
        "had exited before this barrier",
        [(REDUCE, RAW_BARRIER, "")],
    ),
    "the same, under ThreadSanitizer": Fault(THREAD, RACE, r"data race[\s\S]*reduce\.cuh", [(REDUCE, RAW_BARRIER, "")]),
    "no barrier before the partial sums are overwritten": Fault(
        PLAIN,
        WRONG,
        "got",
        [(REDUCE, WAR_BARRIER, ""), FEW_BLOCKS],
    ),
    "that one under ThreadSanitizer": Fault(
        THREAD,
        RACE,
        r"data race[\s\S]*reduce\.cuh",
        [(REDUCE, WAR_BARRIER, ""), FEW_BLOCKS],
    ),
    "barrier inside a branch": Fault(
        PLAIN,
        REPORTED,
        r"deadlock|divergent barrier",
        [(REDUCE, RAW_BARRIER, "if (threadIdx.x < 128) __syncthreads();")],
    ),
    "all warps write the same partial sum": Fault(
        THREAD,
        RACE,
        r"data race[\s\S]*reduce\.cuh",
        [(REDUCE, WRITE_PARTIAL, "partial[0][v] = values[v];")],
    ),
    "a shuffle step is missing": Fault(PLAIN, WRONG, "got", [(REDUCE, "lanes = 16;", "lanes = 8;")]),
    "shuffles with half a mask": Fault(PLAIN, REPORTED, "not in its own mask", [(REDUCE, "0xffffffffu", "0xffffu")]),
    "a warp's sum is left out": Fault(
        PLAIN,
        WRONG,
        "got",
        [(REDUCE, "int warp = 0; warp < kWarps", "int warp = 1; warp < kWarps")],
    ),
    "partial sums for one warp too few": Fault(
        ADDRESS,
        OUT_OF_BOUNDS,
        "runtime error: index|use-after-poison",
        [
            (
                REDUCE,
                "KERNEL_SHARED(partial, Sum[kWarps][kValues]);",
                "KERNEL_SHARED(partial, Sum[kWarps - 1][kValues]);",
            )
        ],
    ),
    "the tail reads one element too far": Fault(
        PLAIN,
        WRONG,
        "got",
        [(OUTER_NORM, "if (tail < count)", "if (tail <= count)")],
    ),
    "the same, under AddressSanitizer": Fault(
        ADDRESS,
        OUT_OF_BOUNDS,
        r"heap-buffer-overflow[\s\S]*outer_norm\.cuh",
        [(OUTER_NORM, "if (tail < count)", "if (tail <= count)")],
    ),
    "one pack too many": Fault(
        ADDRESS,
        OUT_OF_BOUNDS,
        r"heap-buffer-overflow[\s\S]*outer_norm\.cuh",
        [(OUTER_NORM, "const int64_t packs = (count - head) / kPack;", "const int64_t packs = count / kPack + 1;")],
    ),
    "the head is longer than the row": Fault(
        PLAIN,
        WRONG,
        "got",
        [(OUTER_NORM, "to_boundary < count ? to_boundary : count", "to_boundary")],
    ),
    "packs start at the row, aligned or not": Fault(
        ADDRESS,
        OUT_OF_BOUNDS,
        "misaligned address",
        [(OUTER_NORM, "const int64_t head = to_boundary < count ? to_boundary : count;", "const int64_t head = 0;")],
    ),
    "the element stride is ignored": Fault(
        PLAIN,
        WRONG,
        "got",
        [(OUTER_NORM, "square<Sum>(row[k * stride])", "square<Sum>(row[k])")],
    ),
    "the next sample's row": Fault(
        PLAIN,
        WRONG,
        "got",
        [(OUTER_NORM, "static_cast<const T*>(params.input) + n *", "static_cast<const T*>(params.input) + (n + 1) *")],
    ),
    "one sample too many": Fault(PLAIN, WRONG, "got", [(OUTER_NORM, "n < params.N;", "n <= params.N;")]),
    "blocks do not go on to further samples": Fault(
        PLAIN,
        WRONG,
        "got",
        [(OUTER_NORM, "int64_t{gridDim.x} * kSamples", "params.N"), FEW_BLOCKS],
    ),
    "no second look at rows out of range": Fault(
        PLAIN,
        WRONG,
        "special values",
        [(OUTER_NORM, "if (!in_range(norms[0]) || !in_range(norms[1]))", "if (false)")],
    ),
    "an empty row times Inf": Fault(
        PLAIN,
        WRONG,
        "I=0",
        [(OUTER_NORM, "if (params.I == 0 || params.O == 0) product = 0;", "")],
    ),
}


@pytest.fixture(scope="module")
def faulty_libraries():
    return FaultyLibraries(
        FAULTS, lambda fault: build_outer_norm("float32", sanitizer=fault.sanitizer, patches=fault.patches)
    )


@needs_harness
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(faulty_libraries, name):
    fault = FAULTS[name]
    size, flags = ("small", ["--exact"]) if fault.sanitizer else ("full", [])

    def run(seed):
        return run_outer_norm(
            faulty_libraries[name], "float32", size, *flags, sanitizer=fault.sanitizer, CUDA_ON_CPU_SEED=seed
        )

    check_fault(fault, run)


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvcc_vectorises_loads(dtype, tmp_path):
    ptx = tmp_path / "kernel.ptx"
    run_nvcc("-O3", "-arch=sm_80", "-ptx", ROOT / f"csrc/cuda/outer_norm/outer_norm_{dtype}.cu", "-o", ptx)
    assert re.search(r"ld\.global\S*\.v[24]\.(f32|f64|u32|b32|b64)", ptx.read_text())
