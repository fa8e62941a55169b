"""The contraction of columns and the pass over gradients in memory on the CUDA-on-CPU harness, with planted faults."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    harness_build,
    needs_harness,
    run_script,
)
from test_contract_kernel import EPILOGUE, FOLDER, KERNEL, LAUNCH, LOADERS, PLAN, PRECISIONS, SLAB, SMALL_TILE

OTHERS = ["depthwise", "sums"]
DEPTHWISE = "cuda/depthwise/depthwise.cuh"
SUMS = "cuda/columns/column_sums.cu"
ROWS_ONLY = [  # fewer instantiations
    SMALL_TILE,
    (
        KERNEL,
        "  switch (loader) {",
        "  return launch_contract_tile<kPrecision, ContractLoader::kRows, kMode>(params, tile, stream);\n#if 0",
    ),
    (KERNEL, "kElements, kMode>(params, tile, stream);\n  }", "\n#endif"),
]


def build(precision, **options):
    sources = ["contract_plan.cpp", "contract_launch.cpp", "contract_join_parts.cu", f"contract_{precision}_columns.cu"]
    others = [SUMS, "cuda/merge/merge.cu"]
    others += [f"harness/tests/{name}.cpp" for name in ("contract_entry", "contract_launchers", "depthwise_entry")]
    others += [f"cuda/depthwise/{name}" for name in ("depthwise.cu", "depthwise_plan.cpp", "depthwise_float32.cu")]
    if precision.endswith("float16"):
        others += ["cuda/depthwise/depthwise_bfloat16.cu", "cuda/depthwise/depthwise_float16.cu"]
    else:
        options["defines"] = ["-DONLY_FLOAT32"]
    return harness_build.build([*(f"{FOLDER}/{source}" for source in sources), *others], **options)


def run(library, precision, loaders, amount, *flags, **options):
    script = Path(__file__).with_name("columns_on_cpu.py")
    return run_script(script, library, precision, ",".join(loaders), amount, *flags, **options)


@needs_harness
@pytest.mark.parametrize("precision", PRECISIONS)
def test_columns(precision):
    """Every loader, result, tile and kind of split; and the same bits on every schedule."""
    library = build(precision)

    def run_one(job):
        loaders, amount, seed = job
        done = run(library, precision, loaders, amount, CUDA_ON_CPU_SEED=seed)
        assert done.returncode == 0, f"{job}\n{done.stdout}{done.stderr}"
        return done.stdout

    everything = [*LOADERS, *OTHERS]
    jobs = [(everything, "small", seed) for seed in SEEDS[:2]]
    if precision in ("tf32", "bfloat16"):  # the others differ in arithmetic only
        jobs += [([loader], "full", 0) for loader in everything]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(run_one, jobs))
    assert outputs[0] == outputs[1], outputs


@needs_harness
@pytest.mark.parametrize("precision, sanitizer", [("tf32", "thread"), ("bfloat16", "address")])
def test_columns_under_sanitizers(precision, sanitizer):
    """With several blocks at a time, for races between them, and buffers without slack."""
    library = build(precision, sanitizer=sanitizer, patches=[SMALL_TILE])
    flags, loaders = ["--exact", "--small-tile"], [*LOADERS, *OTHERS]
    done = run(library, precision, loaders, "small", *flags, sanitizer=sanitizer, CUDA_ON_CPU_RESIDENT=3)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- planted faults ----


def wrong(*patches, report="wrong, got"):
    return Fault(PLAIN, WRONG, report, list(patches))


def race(*patches):
    return Fault(THREAD, RACE, "data race", list(patches))


FAULTS = {
    # operands that are kept for all columns of a sample
    "only the first sample's is loaded": wrong((KERNEL, "if (!first_column && next.n", "if (next.n")),
    "it is not loaded where a split begins": Fault(
        PLAIN, (WRONG, REPORTED), "", [(KERNEL, "if (!first_column && next.n != block.n_begin)", "if (!first_column)")]
    ),
    "loaded for the first column, wherever": wrong((KERNEL, "slot = kept_slot<Traits>(params, next.n, next.t0);", "")),
    "slabs of a sample in one place": wrong((KERNEL, "+ t0 / Traits::kRows) %", ") %")),
    "samples in one place": wrong((KERNEL, "(n * params.kept_slabs + t0", "(t0")),
    "more slabs than the ring has": wrong((PLAN, "<= kContractStages &&", "<= kContractStages + 1 &&")),
    "two samples of different n in a slab": wrong((PLAN, "(!plan.packed || plan.split_unit % 2 == 0)", "true")),
    "one slot less": wrong((KERNEL, "t0 / Traits::kRows) % kContractStages", "t0 / Traits::kRows) % 3")),
    # samples (n, v)
    "splits within the columns of a batch_diag": wrong(
        (PLAN, "columns.batch_diag ? columns.V", "columns.batch_diag ? 1"), report=""
    ),
    "every column is the first": wrong((SLAB, "* x.stride_v", "* 0")),
    "columns of another sample": wrong((SLAB, "return n * x.stride_n +", "return 0 * x.stride_n +")),
    # results
    "signs of other samples": wrong((EPILOGUE, "params_.signs[row]", "params_.signs[sample]")),
    "squared signs": wrong((EPILOGUE, "fmaf(sign * g", "fmaf(sign * sign * g")),
    "no reset between samples": wrong((EPILOGUE, "square_[m][c][r] = 0.f;", "")),
    "a split's last columns are left out": wrong(
        (EPILOGUE, "v + 1 < V && sample + 1 < shared_.block.n_end", "v + 1 < V")
    ),
    "the factor in the order of the samples": wrong((EPILOGUE, "int64_t{v} * params_.N + n", "int64_t{n} * V + v")),
    "every batch_diag in one place": wrong((EPILOGUE, "params_.batch_diag + n * elements()", "params_.batch_diag")),
    "parts of other samples": wrong((LAUNCH, "stride_n = columns.V * stride_v", "stride_n = stride_v")),
    # without tensor cores
    "every column of a convolution is the first": wrong((DEPTHWISE, "v * columns.b_stride_v", "0")),
    "a sample's columns begin at the first again": wrong(
        (DEPTHWISE, "v = static_cast<unsigned>(n) - sample", "v = 0 * sample")
    ),
    "sums of squares go on over the samples": wrong((DEPTHWISE, "          sum[element] = 0;\n", "")),
    "rows of the factor in the order of the samples": wrong((DEPTHWISE, "v * problem.N + sample", "n")),
    "a split ends within the columns": wrong((DEPTHWISE, "(columns.V) || n + 1 == end", "(columns.V)")),
    # gradients in memory
    "no barrier before the shares of squares are read": race(
        (SUMS, "__syncthreads();  // the shares of all warps are there", "")
    ),
    "one buffer for all samples": race(
        (SUMS, "squares[n % 2][warp][lane] = square;", "squares[0][warp][lane] = square;"),
        (SUMS, "square += squares[n % 2][w][lane];", "square += squares[0][w][lane];"),
    ),
    "a warp's share is left out": wrong((SUMS, "int w = 1; w < warps", "int w = 2; w < warps")),
    "a part is left out": wrong((SUMS, "int part = 0; part < gradients.parts", "int part = 1; part < gradients.parts")),
    "splits' sums in one place": wrong((SUMS, "partial ? partial + split * count", "partial ? partial")),
    "elements past the end": Fault(
        ADDRESS,
        OUT_OF_BOUNDS,
        "heap-buffer-overflow",
        [(SUMS, "const bool exists = element < count,", "const bool exists = true,")],
    ),
}


@pytest.fixture(scope="module")
def faulty_libraries():
    return FaultyLibraries(
        FAULTS, lambda fault: build("tf32", sanitizer=fault.sanitizer, patches=[*ROWS_ONLY, *fault.patches])
    )


@needs_harness
@pytest.mark.parametrize("name", FAULTS)
def test_fault_planted_in_columns_is_caught(faulty_libraries, name):
    fault = FAULTS[name]
    library = faulty_libraries[name]
    flags = ["--small-tile", "--exact"] if fault.sanitizer else ["--small-tile"]
    loaders = {SUMS: ["sums"], DEPTHWISE: ["depthwise"]}.get(fault.patches[0][0], ["rows"])

    def run_one(seed):
        options = {"sanitizer": fault.sanitizer, "CUDA_ON_CPU_SEED": seed}
        return run(library, "tf32", loaders, "small", *flags, **options)

    check_fault(fault, run_one, seeds=SEEDS[:2])
