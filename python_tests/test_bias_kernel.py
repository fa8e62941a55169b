"""The bias_stats kernels: their sources on the CPU-side harness, with planted faults, and through nvcc."""

import re

import pytest
from harness_tools import (
    ADDRESS,
    OUT_OF_BOUNDS,
    PLAIN,
    RACE,
    ROOT,
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
    needs_nvcc,
    program,
    run_nvcc,
)

DTYPES = ["float32", "bfloat16", "float16"]
KERNEL, LAUNCHER, PLAN = (f"cuda/bias/bias{end}" for end in (".cuh", ".cu", "_plan.cpp"))
NORMS = "cuda/common/norm_window.cuh"


def build(dtypes=("float32",), **options):
    """A library of all element types or of float32 alone."""
    sources = [LAUNCHER, PLAN, "cuda/merge/merge.cu", "harness/tests/bias_entry.cpp"]
    sources += [f"cuda/bias/bias_{dtype}.cu" for dtype in dtypes]
    defines = [] if len(dtypes) == 3 else ["-DONLY_FLOAT32"]
    return harness_build.build(sources, defines=defines, **options)


run = program("bias")


@needs_harness
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias(dtype):
    """Odd shapes, all kinds of strides, every choice of the plan, special values, accuracy of long sums."""
    library = build(DTYPES)
    seeds = SEEDS if dtype == "float32" else SEEDS[:2]
    check_passes(run, library, dtype, "full", seeds=seeds)


@needs_harness
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bias_under_sanitizers(dtype, sanitizer):
    check_under_sanitizer(run, sanitizer, build(DTYPES, sanitizer=sanitizer), dtype, "small")


def wrong(path, old, new):
    return Fault(PLAIN, WRONG, "got", [(path, old, new)])


RACE_HERE, OVERFLOW_HERE = (rf"{what}[\s\S]*bias\.cuh" for what in ("data race", "heap-buffer-overflow"))
FAULTS = {
    "no barrier before the sums of other warps are read": Fault(
        THREAD, RACE, RACE_HERE, [(KERNEL, "} else {\n      __syncthreads();", "} else {\n")]
    ),
    "no barrier within the warp": Fault(THREAD, RACE, RACE_HERE, [(KERNEL, "__syncwarp();", "")]),
    "one buffer for all samples": Fault(
        THREAD, RACE, RACE_HERE, [(KERNEL, "(sample - begin) % 2 * warps_per_unit", "0 * warps_per_unit")]
    ),
    "no barrier before the shares of norms are read": Fault(
        THREAD,
        RACE,
        r"data race[\s\S]*norm_window\.cuh",
        [(NORMS, "__syncthreads();  // the shares of all warps are there", "")],
    ),
    "no barrier before they are overwritten": Fault(
        THREAD, RACE, r"data race[\s\S]*norm_window\.cuh", [(NORMS, "__syncthreads();  // they have been read", "")]
    ),
    "misaligned vectors": Fault(
        ADDRESS, OUT_OF_BOUNDS, "misaligned address", [(PLAN, "problem.stride_o == 1 &&", "problem.stride_o == 1 ||")]
    ),
    "a load beyond the last sample": Fault(
        ADDRESS,
        OUT_OF_BOUNDS,
        OVERFLOW_HERE,
        [(KERNEL, "min(int64_t{s}, end - 1 - batch)", "int64_t{s}")],
    ),
    "a load beyond the last position": Fault(
        ADDRESS,
        OUT_OF_BOUNDS,
        OVERFLOW_HERE,
        [(KERNEL, "min(step + l * slots, end - 1)", "step + l * slots")],
    ),
    "a workspace without the sums of parts": Fault(
        ADDRESS,
        OUT_OF_BOUNDS,
        "AddressSanitizer: heap",
        [
            (
                PLAN,
                "plan.workspace_bytes = 4 * std::max(plan.first.floats, plan.second.floats);",
                "plan.workspace_bytes = 4;",
            )
        ],
    ),
    "too little shared memory": Fault(
        ADDRESS, OUT_OF_BOUNDS, "AddressSanitizer", [(KERNEL, "size_t{2} * (pass.slots", "size_t{1} * (pass.slots")]
    ),
    "only the last window of norms": wrong(
        NORMS, "if (taken % kSamples != 0 && sample + 1 != end) return;", "if (sample + 1 != end) return;"
    ),
    "a warp's share of the norm is left out": wrong(NORMS, "int warp = 0;", "int warp = 1;"),
    "blocks overwrite each other's norms": wrong(NORMS, "out[n * stride] = sum", "out[n] = sum"),
    "a vector's sums all to its first output": wrong(KERNEL, "first_output + k, g[s][k]", "first_output, g[s][k]"),
    "two eighths of the loads are not added": wrong(
        KERNEL, "for (int distance = 1; distance < kBiasLoads;", "for (int distance = 1; distance < kBiasLoads / 2;"
    ),
    "the last position counts several times": wrong(KERNEL, "(loaded[l], step + l * slots < end,", "(loaded[l], true,"),
    "a long sum in float32": Fault(
        PLAIN,
        WRONG,
        "of numpy's sum",
        [
            (KERNEL, "double totals[kVector] = {};", "float totals[kVector] = {};"),
            (KERNEL, "round < 8 &&", "round < (1 << 30) &&"),
            (KERNEL, "constexpr int kBiasLoads = 8;", "constexpr int kBiasLoads = 1;"),
        ],
    ),
    "the stride of another position dim": wrong(KERNEL, "depth * problem.stride[0]", "depth * problem.stride[1]"),
    "dims merged that are apart in memory": wrong(
        PLAN, "problem.stride[d] == stride[last] * size[last]", "problem.stride[d] >= stride[last] * size[last]"
    ),
    "a shuffle step is missing": wrong(KERNEL, "bit < last_bit; bit *= 2", "bit < last_bit / 2; bit *= 2"),
    "a warp's sums are left out": wrong(
        KERNEL, "for (int warp = 0; warp < warps_per_unit", "for (int warp = warps_per_unit > 1; warp < warps_per_unit"
    ),
    "parts of the positions overlap": wrong(
        KERNEL,
        "(params.steps * part / params.t_splits) + my_slot",
        "(max(params.steps * part / params.t_splits - 1, 0L)) + my_slot",
    ),
    "outputs beyond the last": Fault(ADDRESS, OUT_OF_BOUNDS, OVERFLOW_HERE, [(KERNEL, " && o < problem.O;", ";")]),
    "a split takes its neighbour's sample": wrong(
        KERNEL,
        "for (int64_t sample = begin; sample < end; ++sample)",
        "for (int64_t sample = begin; sample < min(end + 1, params.samples); ++sample)",
    ),
    "samples are counted over all splits": wrong(
        KERNEL, "SampleWeights(static_cast<int>(sample - begin))", "SampleWeights(static_cast<int>(sample))"
    ),
    "no weights": wrong(KERNEL, "sum = fmaf(weight, g, sum);", "sum += g;"),
    "centered squares as plain ones": wrong(
        KERNEL, "params.centered ? uncentered(square, sum, inverse_N) : square", "square"
    ),
}


@pytest.fixture(scope="module")
def faulty_libraries():
    return FaultyLibraries(FAULTS, lambda fault: build(sanitizer=fault.sanitizer, patches=fault.patches))


@needs_harness
@pytest.mark.parametrize("name", FAULTS)
def test_fault_planted_in_bias_is_caught(faulty_libraries, name):
    fault = FAULTS[name]
    size, flags = ("small", ["--exact"]) if fault.sanitizer else ("full", [])
    check_fault(
        fault,
        lambda seed: run(
            faulty_libraries[name],
            "float32",
            size,
            *flags,
            sanitizer=fault.sanitizer,
            CUDA_ON_CPU_SEED=seed,
            CUDA_ON_CPU_RESIDENT=3 if fault.sanitizer else 1,
        ),
    )


# ---- the same sources through nvcc ----


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvcc_vectorises_loads(dtype, tmp_path):
    ptx = tmp_path / "kernel.ptx"
    run_nvcc("-O3", "-arch=sm_80", "-ptx", ROOT / f"csrc/cuda/bias/bias_{dtype}.cu", "-o", ptx)
    functions = re.split(r"\.visible \.entry ", ptx.read_text())[1:]
    loads = sorted(len(re.findall(r"ld\.global\S*\.v4\.\w32", text)) for text in functions)
    assert loads[:2] == [0, 0] and len(loads) == 5, loads  # single elements
    assert loads[2] >= 4 and loads[3] >= 8, loads  # four samples at a time, eight positions
