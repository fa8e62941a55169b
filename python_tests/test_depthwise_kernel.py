"""The depthwise_stats kernel: its sources on the CPU-side harness, with planted faults, and through nvcc."""

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

DTYPES = ["float32", "bfloat16", "float16"]
KERNEL, LAUNCHER, PLAN = (f"cuda/depthwise/depthwise{end}" for end in (".cuh", ".cu", "_plan.cpp"))


def build(dtypes=("float32",), **options):
    """A library of all element types or of float32 alone."""
    sources = [LAUNCHER, PLAN, "cuda/merge/merge.cu", "harness/tests/depthwise_entry.cpp"]
    sources += [f"cuda/depthwise/depthwise_{dtype}.cu" for dtype in dtypes]
    defines = [] if len(dtypes) == 3 else ["-DONLY_FLOAT32"]
    return harness_build.build(sources, defines=defines, **options)


run = program("depthwise")


@needs_harness
@pytest.mark.parametrize("dtype", DTYPES)
def test_depthwise(dtype):
    """Odd shapes, all kinds of strides, every choice of the plan, special values."""
    library = build(DTYPES)
    seeds = SEEDS if dtype == "float32" else SEEDS[:2]
    check_passes(run, library, dtype, "full", seeds=seeds)


@needs_harness
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_depthwise_under_sanitizers(sanitizer):
    check_under_sanitizer(run, sanitizer, build(sanitizer=sanitizer), "float32", "small")


def wrong(path, old, new):
    return Fault(PLAIN, WRONG, "got", [(path, old, new)])


RACE_HERE, OVERFLOW_HERE = (rf"{what}[\s\S]*depthwise\.cuh" for what in ("data race", "heap-buffer-overflow"))
FAULTS = {
    "no barrier before the sums of other warps are read": Fault(
        THREAD, RACE, RACE_HERE, [(KERNEL, "} else {\n      __syncthreads();", "} else {\n")]
    ),
    "no barrier within the warp": Fault(THREAD, RACE, RACE_HERE, [(KERNEL, "__syncwarp();", "")]),
    "one buffer for all samples": Fault(
        THREAD, RACE, RACE_HERE, [(KERNEL, "(n - begin) % 2 * warps_per_unit", "0 * warps_per_unit")]
    ),
    "every lane of a unit writes its sums": Fault(
        THREAD, RACE, RACE_HERE, [(KERNEL, "if ((lane & (last_bit - first_bit)) == 0)", "if (true)")]
    ),
    "a column to the right of the image, in boxes of one row": Fault(
        ADDRESS, OUT_OF_BOUNDS, OVERFLOW_HERE, [(KERNEL, "j * dilation_w < a_width", "j * dilation_w <= a_width")]
    ),
    "a workspace without the sums of the last split": Fault(
        ADDRESS,
        OUT_OF_BOUNDS,
        "heap-buffer-overflow",
        [(PLAN, "splits > 1 ? splits * count : 0", "splits > 1 ? (splits - 1) * count : 0")],
    ),
    "too little shared memory": Fault(
        ADDRESS,
        OUT_OF_BOUNDS,
        "AddressSanitizer",
        [(KERNEL, "(2 + 2 * plan.slots / slots_in_warp)", "(2 + plan.slots / slots_in_warp)")],
    ),
    "a column to the right of the image, in boxes of several rows": wrong(
        KERNEL,
        "j * static_cast<unsigned>(problem.dilation[2]) < a_width",
        "j * static_cast<unsigned>(problem.dilation[2]) <= a_width",
    ),
    "a row below the image": wrong(KERNEL, "< a_height", "<= a_height"),
    "planes outside count": wrong(KERNEL, "const bool depth_inside = ", "const bool depth_inside = true || "),
    "the window does not move": wrong(KERNEL, "window[i][j] = window[i + kShift][j]", "window[i][j] = window[i][j]"),
    "the window starts one row late": wrong(KERNEL, "load_row(i, i + kShift)", "load_row(i + 1, i + kShift)"),
    "the walk ignores the step": wrong(KERNEL, "a_h += problem.step[1];", "a_h += 1;"),
    "the dilation between rows is ignored": wrong(
        KERNEL, "problem.a.stride[1] * problem.dilation[1]", "problem.a.stride[1]"
    ),
    "a slot walks into its neighbour's rows": wrong(
        KERNEL, "slot.h_end = min(slot.h_begin + plan.strip,", "slot.h_end = min(slot.h_begin + plan.strip + 1,"
    ),
    "rows that no slot takes": wrong(
        PLAN,
        "ceil_div(problem.positions[1], plan.slots / plan.slots_w)",
        "problem.positions[1] / (plan.slots / plan.slots_w)",
    ),
    "a shuffle step is missing": wrong(KERNEL, "bit < last_bit; bit *= 2", "bit < last_bit / 2; bit *= 2"),
    "a warp's sums are left out": wrong(
        KERNEL, "for (int warp = 0; warp < warps_per_unit", "for (int warp = warps_per_unit > 1; warp < warps_per_unit"
    ),
    "the group's channels": wrong(KERNEL, "row / problem.O * problem.channels", "row * problem.channels"),
    "positions of the kernel beyond its edge": Fault(
        ADDRESS, OUT_OF_BOUNDS, OVERFLOW_HERE, [(KERNEL, "j < its_chunk.columns", "j < kColumns")]
    ),
    "units beyond the last": Fault(
        ADDRESS, OUT_OF_BOUNDS, OVERFLOW_HERE, [(KERNEL, " && first_unit + its_unit < units", "")]
    ),
    "a split takes its neighbour's sample": wrong(
        KERNEL,
        "end = params.units * (split + 1) / plan.splits * params.unit",
        "end = min(params.units, params.units * (split + 1) / plan.splits + 1) * params.unit",
    ),
    "samples are counted over all splits": wrong(
        KERNEL, "SampleWeights moment(static_cast<int>(n - begin))", "SampleWeights moment(static_cast<int>(n))"
    ),
    "no weights": wrong(KERNEL, "fmaf(weight, g, sum[element])", "sum[element] + g"),
    "all blocks write the norms of the first": wrong(KERNEL, "params.norm + block_in_split", "params.norm"),
    "centered squares as plain ones": wrong(
        KERNEL,
        "params.centered ? uncentered(square[element], sum[element], inverse_N) : square[element]",
        "square[element]",
    ),
}


@pytest.fixture(scope="module")
def faulty_libraries():
    return FaultyLibraries(FAULTS, lambda fault: build(sanitizer=fault.sanitizer, patches=fault.patches))


@needs_harness
@pytest.mark.parametrize("name", FAULTS)
def test_fault_planted_in_depthwise_is_caught(faulty_libraries, name):
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
