"""The contract kernel for Hopper: its sources on the CPU-side harness, with planted faults, and through nvcc."""

import re
from pathlib import Path

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
    harness_build,
    needs_harness,
    needs_nvcc,
    run_nvcc,
    run_script,
)

FOLDER = "cuda/contract_sm90"
KERNEL, WRAPPERS = f"{FOLDER}/contract_sm90.cuh", f"{FOLDER}/ptx_sm90.cuh"
LAUNCHER, MAP = f"{FOLDER}/contract_sm90.cpp", f"{FOLDER}/tensor_map.cpp"
HOST = [LAUNCHER, f"{FOLDER}/contract_sm90_plan.cpp", MAP, "cuda/merge/merge.cu"]
ENTRY = "harness/tests/contract_sm90_entry.cpp"
DTYPES = ["bfloat16", "float16"]
KERNELS = [f"{FOLDER}/contract_sm90_{dtype}.cu" for dtype in DTYPES]


def build_contract_sm90(**options):
    return harness_build.build([*KERNELS, *HOST, ENTRY], defines=["-DBACKPACK_CUDA_SM90A"], **options)


def run_contract_sm90(library, dtype, size, *flags, **options):
    options = {"CUDA_ON_CPU_CAPABILITY": 90, **options}
    return run_script(Path(__file__).with_name("contract_sm90_on_cpu.py"), library, dtype, size, *flags, **options)


@needs_harness
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_sm90(dtype, seed):
    """All results, edges of tiles and of slabs, splits, small integers bit for bit, infinities."""
    done = run_contract_sm90(build_contract_sm90(), dtype, "full", CUDA_ON_CPU_SEED=seed)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_harness
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_it_applies_to(dtype):
    done = run_contract_sm90(build_contract_sm90(), dtype, "refusals")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_harness
@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_other_devices(capability):
    """Code for sm_90a runs on no other, newer ones included."""
    arguments = build_contract_sm90(), "bfloat16", "refusals", "--another-device"
    done = run_contract_sm90(*arguments, CUDA_ON_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_harness
def test_old_driver():
    arguments = build_contract_sm90(), "bfloat16", "refusals", "--another-device"
    done = run_contract_sm90(*arguments, CUDA_ON_CPU_OLD_DRIVER=1)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_harness
def test_built_without_it():
    library = harness_build.build([LAUNCHER, f"{FOLDER}/contract_sm90_plan.cpp", ENTRY])
    done = run_contract_sm90(library, "bfloat16", "refusals", "--another-device")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_harness
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_sm90_under_sanitizers(dtype, sanitizer):
    """With several blocks at a time, for races between them, and buffers without slack."""
    library = build_contract_sm90(sanitizer=sanitizer)
    done = run_contract_sm90(library, dtype, "small", "--exact", sanitizer=sanitizer, CUDA_ON_CPU_RESIDENT=3)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- planted faults ----

CAUGHT = (WRONG, REPORTED)  # depending on the schedule
LOOP = """      const uint64_t b = b_descriptor(), a = a_descriptor();
      fence_registers(g);
#pragma unroll
"""
WAIT_FULL = "      wait(&shared.full[at.stage], at.parity);\n"
WAIT_EMPTY = "wait(&shared.empty[at.stage], at.parity ^ 1);"
RELEASE = """      release(in_use);
      accumulate = true;
      in_use = at.stage;
"""
SAMPLE_ENDS = """    wait_for_accumulators(g);
    release(in_use);
    in_use = -1;
"""
NORMS_THERE = "sync_some<1, kConsumers>();  // the shares of all warps are there"
NORMS_READ = "sync_some<1, kConsumers>();  // they have been read"
TIMEOUT = r"deadlock: \d+ threads in mbarrier.try_wait"
FAULTS = {
    # The ring.
    "no wait for a slab": Fault(PLAIN, CAUGHT, "", [(KERNEL, WAIT_FULL + LOOP, LOOP)]),
    "that wait with the wrong parity": Fault(
        PLAIN, CAUGHT, "", [(KERNEL, WAIT_FULL + LOOP, WAIT_FULL.replace("parity", "parity ^ 1") + LOOP)]
    ),
    "refill before the release": Fault(PLAIN, CAUGHT, "", [(KERNEL, WAIT_EMPTY, "")]),
    "the wait for the release has the wrong parity": Fault(
        PLAIN, CAUGHT, "", [(KERNEL, WAIT_EMPTY, WAIT_EMPTY.replace("parity ^ 1", "parity"))]
    ),
    "one arrival releases a slab": Fault(
        PLAIN,
        CAUGHT,
        "",
        [(KERNEL, "init_barrier(&shared.empty[stage], kConsumerWarps)", "init_barrier(&shared.empty[stage], 1)")],
    ),  # fmt: skip
    "a slab is released with its products in flight": Fault(
        PLAIN,
        REPORTED,
        "an operand in shared memory changed while a wgmma in flight read it",
        [(KERNEL, RELEASE, "      release(at.stage);\n      accumulate = true;\n")],
    ),  # fmt: skip
    "no release": Fault(PLAIN, REPORTED, TIMEOUT, [(KERNEL, RELEASE, RELEASE.replace("release(in_use);", ""))]),
    "fewer bytes expected than copied": Fault(
        PLAIN, CAUGHT, "", [(KERNEL, "arrive_and_expect(full, kSlabBytes)", "arrive_and_expect(full, kSlabBytes / 2)")]
    ),
    "more bytes expected than copied": Fault(
        PLAIN,
        REPORTED,
        TIMEOUT,
        [(KERNEL, "arrive_and_expect(full, kSlabBytes)", "arrive_and_expect(full, kSlabBytes + 16)")],
    ),  # fmt: skip
    "no fence after the initialisation": Fault(
        PLAIN, REPORTED, "initialised without a fence.mbarrier_init", [(KERNEL, "    fence_barrier_init();\n", "")]
    ),
    "no barrier after the initialisation": Fault(
        PLAIN, CAUGHT, "before mbarrier.init", [(KERNEL, "__syncthreads();  // the barriers are ready", "")]
    ),
    # Products.
    "no wait for the accumulators": Fault(PLAIN, CAUGHT, "", [(KERNEL, SAMPLE_ENDS, SAMPLE_ENDS[29:])]),
    "no wgmma.fence": Fault(
        PLAIN, REPORTED, "no wgmma.fence has ordered", [(KERNEL, LOOP, LOOP.replace("fence_registers(g);", ""))]
    ),
    "accumulators are not reset": Fault(
        PLAIN, WRONG, "wrong", [(KERNEL, "    in_use = -1;\n    accumulate = false;\n", "    in_use = -1;\n")]
    ),
    "each slab resets them": Fault(PLAIN, WRONG, "wrong", [(KERNEL, "k > 0 || accumulate", "k > 0")]),
    "the last positions are left out": Fault(
        PLAIN, WRONG, "wrong", [(KERNEL, "k * kDepth < rows_left", "(k + 1) * kDepth <= rows_left || k == 0")]
    ),
    "the second warpgroup takes the rows of the first": Fault(
        PLAIN, WRONG, "wrong", [(KERNEL, "shared.b[at.stage][warpgroup]", "shared.b[at.stage][0]")]
    ),
    "wrong stride in the descriptor": Fault(
        PLAIN, CAUGHT, "", [(WRAPPERS, "kEightRows = 8 * 128 / 16", "kEightRows = 16 * 128 / 16")]
    ),
    "no swizzle in the descriptor": Fault(PLAIN, CAUGHT, "", [(WRAPPERS, "kSwizzle128 = 1;", "kSwizzle128 = 0;")]),
    "no swizzle in the copies": Fault(
        PLAIN, WRONG, "wrong", [(MAP, "CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_SWIZZLE_NONE")]
    ),
    "every slab of b is the first": Fault(
        PLAIN, WRONG, "wrong", [(KERNEL, "o0 + box * kSm90BoxColumns, t0, n", "o0 + box * kSm90BoxColumns, 0, n")]
    ),
    # The work at sample boundaries.
    "norms are added before all are there": Fault(PLAIN, WRONG, "batch_l2", [(KERNEL, NORMS_THERE, "")]),
    "norms are overwritten before they are read": Fault(
        THREAD, RACE, r"data race[\s\S]*contract_sm90\.cuh", [(KERNEL, NORMS_READ, "")]
    ),
    "norms for one sample too few": Fault(
        ADDRESS,
        OUT_OF_BOUNDS,
        "runtime error: index|use-after-poison",
        [(KERNEL, "float norms[kNormWindow][kConsumerWarps];", "float norms[kNormWindow - 1][kConsumerWarps];")],
    ),  # fmt: skip
    "norms of what lies beyond the edge": Fault(
        PLAIN, WRONG, "infinite.*batch_l2", [(KERNEL, "norm_of(g, place, whole_tile)", "norm_of(g, place, true)")]
    ),
    "weights of other samples": Fault(
        PLAIN, WRONG, "weights=True", [(KERNEL, "params.weights[n]", "params.weights[0]")]
    ),
    "the count of samples goes on over splits": Fault(
        PLAIN, WRONG, "centered", [(KERNEL, "weights(n - n_begin)", "weights(n)")]
    ),
    "a column too many is stored": Fault(
        PLAIN, WRONG, "past|wrong", [(KERNEL, "if (columns >= 1) row", "if (columns >= 0) row")]
    ),
    "a row too many is stored": Fault(
        ADDRESS,
        OUT_OF_BOUNDS,
        r"heap-buffer-overflow[\s\S]*contract_sm90\.cuh",
        [(KERNEL, "8 * half >= place.O) continue;", "8 * half > place.O) continue;")],
    ),  # fmt: skip
    "splits write to one place": Fault(
        PLAIN, WRONG, "splits=", [(KERNEL, "part = blockIdx.z * elements", "part = 0 * elements")]
    ),
    "the tiles' norms are not added": Fault(
        PLAIN, WRONG, "batch_l2", [(LAUNCHER, "if (outputs.batch_l2 && tiles > 1) sum_rows", "if (false) sum_rows")]
    ),
}


def build_faulty(fault):
    return harness_build.build(
        [KERNELS[0], *HOST, ENTRY],
        defines=["-DBACKPACK_CUDA_SM90A", "-DBFLOAT16_ALONE"],
        sanitizer=fault.sanitizer,
        patches=fault.patches,
    )


@pytest.fixture(scope="module")
def faulty_libraries():
    return FaultyLibraries(FAULTS, build_faulty)


@needs_harness
@pytest.mark.parametrize("name", FAULTS)
def test_fault_planted_in_contract_sm90_is_caught(faulty_libraries, name):
    fault = FAULTS[name]
    flags = ["--exact"] if fault.sanitizer == ADDRESS else []

    def run(seed):
        options = {"sanitizer": fault.sanitizer, "CUDA_ON_CPU_SEED": seed}
        return run_contract_sm90(faulty_libraries[name], "bfloat16", "short", *flags, **options)

    check_fault(fault, run, range(3))


# ---- the same sources through nvcc ----


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvcc_compiles_without_spills_or_serialisation(dtype, tmp_path):
    """ptxas says so when it has to wait after each wgmma."""
    report = run_nvcc(
        *("-O3", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v"),
        *("-gencode=arch=compute_90a,code=sm_90a", "-c", ROOT / f"csrc/{FOLDER}/contract_sm90_{dtype}.cu"),
        *("-o", tmp_path / "kernel.o"),
    )
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0")] * 2, report
    assert re.findall(r"Used (\d+) registers", report) == ["168"] * 2, report  # at entry: setmaxnreg changes it
    assert "Potential Performance Loss" not in report and "setmaxnreg" not in report, report


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvcc_emits_the_instructions_of_hopper(dtype, tmp_path):
    ptx = tmp_path / "kernel.ptx"
    source = ROOT / f"csrc/{FOLDER}/contract_sm90_{dtype}.cu"
    run_nvcc("-O3", "-gencode=arch=compute_90a,code=compute_90a", "-ptx", source, "-o", ptx)
    text, element = ptx.read_text(), {"bfloat16": "bf16", "float16": "f16"}[dtype]
    # Two kernels, each with four products for whole slabs and one in a loop for the rest.
    assert len(re.findall(rf"wgmma\.mma_async\S*m64n128k16\.f32\.{element}\.{element}", text)) == 2 * 5
    assert len(re.findall(r"cp\.async\.bulk\.tensor\.3d", text)) == 2 * 4
