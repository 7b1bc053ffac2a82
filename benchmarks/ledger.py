# SPDX-License-Identifier: Apache-2.0
"""Every promise that can be measured, beside the evidence: the page docs/ledger.md.

A promise is quoted from the document that makes it. Speed and memory are the goals of goals.py,
judged by results files; what holds on every run is a test's to hold; the rest is named with the
command that measures it. What no file shows is pending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import comparison, training_record
from benchmarks.comparison import Judgement
from benchmarks.markdown import other_threads, table
from benchmarks.sources import DEVICES, Folder, Source, Subject, command, newest_trainings, subjects

PENDING = "pending"


@dataclass(frozen=True)
class Promise:
    """A sentence of a document and the tests that hold it; `cuda` says that they run on a GPU."""

    text: str
    made_in: str
    tests: tuple[str, ...]
    cpu: bool = True
    cuda: bool = True


@dataclass(frozen=True)
class Statement:
    """Figures of a document that a command gives and no results file keeps."""

    text: str
    made_in: str
    command: str


def _per_op(test: str, *ops: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{op}.py::{test}" for op in ops)


_DIFFERENTIABLE = ("dilated_conv2d", "upsample_add", "cross_entropy", "upsample_cross_entropy")

PROMISES = (
    Promise(
        "every op's error against float64 is held to that of torch in the same dtype plus a "
        "stated floor",
        "README.md",
        (
            *_per_op("test_agrees_with_torch_and_reference", *_DIFFERENTIABLE),
            "tests/test_upsample_argmax.py::test_agrees_with_argmax_of_upsampled_logits",
            "tests/test_dilated_conv2d_kernels.py::test_kernels_agree_with_torch_and_reference",
        ),
    ),
    Promise(
        "Half types accumulate in fp32 and round once",
        "README.md",
        (
            "tests/test_upsample_add.py::test_half_types_are_rounded_once",
            "tests/test_upsample_cross_entropy.py::"
            "test_half_logits_are_not_rounded_after_interpolation",
        ),
    ),
    Promise(
        "whose forward pass rounds less than oneDNN's",
        "docs/numerics.md",
        ("tests/test_dilated_conv2d_cpu.py::test_dense_error_is_not_above_torchs",),
        cuda=False,
    ),
    Promise(
        "relative rms error 2.6e-7 over 4608 products",
        "docs/numerics.md",
        ("tests/test_dilated_conv2d_gemm.py::test_emulated_gemm_maps_of_long_sums",),
        cuda=False,
    ),
    Promise(
        "The same inputs give the same bits on every run",
        "README.md",
        (
            *_per_op("test_twenty_runs_give_the_same_bits", *_DIFFERENTIABLE),
            "tests/test_dilated_conv2d_kernels.py::"
            "test_twenty_runs_of_every_family_give_the_same_bits",
        ),
    ),
    Promise(
        "for the fused ops and depthwise kernels also with any number of CPU threads",
        "README.md",
        (
            *_per_op(
                "test_threads_do_not_change_the_bits",
                "upsample_add", "cross_entropy", "upsample_cross_entropy", "upsample_argmax",
            ),
            "tests/test_dilated_conv2d_cpu.py::"
            "test_threads_do_not_change_the_bits_of_a_depthwise_convolution",
        ),
        cuda=False,
    ),
    Promise(
        "No float atomics anywhere",
        "README.md",
        ("tests/test_layering.py::test_results_do_not_depend_on_the_order_of_threads",),
        cuda=False,
    ),
    Promise(
        "**No host synchronisation** in any op",
        "README.md",
        ("tests/test_cuda.py::test_never_waits_for_the_device",),
        cpu=False,
    ),
    Promise(
        "torch.compile, autograd, autocast, export and CUDA graphs all work",
        "docs/design.md",
        ("tests/test_cuda.py::test_can_be_captured_in_a_graph",),
        cpu=False,
    ),
    Promise(
        "works under `torch.compile`, autocast and double backward",
        "README.md",
        (
            "tests/test_compile.py::test_network_in_one_graph",
            "tests/test_compile.py::test_network_under_autocast",
            *_per_op("test_gradients_of_first_and_second_order", *_DIFFERENTIABLE),
        ),
    ),
    Promise(
        "None of these makes logits at image size",
        "README.md",
        (
            "tests/test_models_scores.py::"
            "test_neither_training_nor_evaluation_makes_full_resolution_logits",
            "tests/test_peak_memory.py::test_the_fused_loss_needs_least_and_all_ways_agree",
        ),
        cuda=False,
    ),
    Promise(
        "tests hold the emulator's count of every access to 1.05 where maps are as large as the "
        "tiles",
        "docs/kernels/upsample_add.md",
        (
            "tests/test_upsample_add.py::test_emulated_forward_reads_little_twice",
            "tests/test_upsample_add.py::test_emulated_backward_reads_the_gradient_once",
        ),
        cuda=False,
    ),
    Promise(
        "Logits are read from memory once in each direction",
        "docs/kernels/cross_entropy.md",
        ("tests/test_cross_entropy.py::test_logits_are_read_once_and_gradients_written_once",),
        cuda=False,
    ),
    Promise(
        "That is 1.415 of the floor, as counted in the emulator",
        "docs/kernels/upsample_cross_entropy.md",
        ("tests/test_upsample_cross_entropy.py::test_no_logits_of_full_resolution_are_moved",),
        cuda=False,
    ),
    Promise(
        "Parameters, `state_dict` keys, hooks and optimisers stay as they are",
        "README.md",
        (
            "tests/test_swap.py::test_identity_parameters_hooks_and_optimisers_survive",
            "tests/test_swap.py::test_deeplab_keeps_state_outputs_and_a_training_step",
        ),
        cuda=False,
    ),
    Promise(
        "The curve is that of torch's deconvolution and loss within rounding",
        "docs/training.md",
        ("tests/test_train.py::test_the_fused_loss_trains_as_torchs_ops_do",),
        cuda=False,
    ),
    Promise(
        "ends with the same loss curve as an unbroken one",
        "README.md",
        ("tests/test_train.py::test_a_killed_training_resumes_to_the_same_curve",),
        cuda=False,
    ),
    Promise(
        "an ignored pixel sends no nan to the logits around it",
        "README.md",
        (
            "tests/test_upsample_cross_entropy.py::"
            "test_ignored_pixels_send_no_gradient_whatever_they_hold",
        ),
    ),
    Promise(
        "MiB of freed results that are kept for the next ones on the CPU, 256 by default",
        "README.md",
        ("tests/test_cpu_result_memory.py::test_the_limit_holds",),
        cuda=False,
    ),
)  # fmt: skip

STATEMENTS = (
    Statement(
        "One FCN-8s training step needs at its peak, beyond weights and images",
        "README.md",
        "python -m benchmarks.peak_memory",
    ),
    Statement(
        "Mean IoU over the 11 classes of all 233 test images at full size",
        "docs/training.md",
        "dilseg train, dilseg eval, as on that page",
    ),
    Statement(
        "from runs by hand of which no results file was kept",
        "docs/kernels/dilated_conv2d.md",
        "python -m pytest benchmarks --benchmark-only --device cpu -k dilated_conv2d",
    ),
    Statement(
        "Both must be 0, except for the arguments of a `printf`",
        "docs/kernels/resources.md",
        "make kernels",
    ),
)


def _cell(judged: Judgement) -> str:
    if not judged.measured:
        return PENDING
    return judged.value if judged.met else f"**{judged.value}, missed**"


def _goals(subject: Subject, found: Sequence[Source]) -> list[str]:
    """One set of goals: a line per goal, a column per machine, and what each column stands on."""
    goal_set = subject.goal_set
    assert goal_set is not None
    machines = dict.fromkeys(source.machine for source in found if source.device == goal_set.device)
    columns: dict[str, Source] = {}
    for machine in machines:
        source = subject.newest(source for source in found if source.machine == machine)
        if source is not None:
            columns[machine] = source
    judged = {name: comparison.judge(goal_set, source.results) for name, source in columns.items()}
    differ = [
        key
        for key in ("precision", "layout")
        if len({getattr(goal, key) for goal in goal_set.goals}) > 1
    ]
    lines = []
    for index, goal in enumerate(goal_set.goals):
        wanted = Judgement(goal, None, None, None).wanted
        values = [_cell(column[index]) for column in judged.values()] or [PENDING]
        lines.append(
            (f"`{goal.op}`", goal.case, goal.mode, *(getattr(goal, key) for key in differ),
             goal.kind, goal.rival, wanted, *values)
        )  # fmt: skip
    header = ("op", "case", "mode", *differ, "what", "against", "promised",
              *(columns or [DEVICES[goal_set.device]]))  # fmt: skip
    blocks = [f"### {subject.title}", f"> {goal_set.source}", table(header, lines)]
    notes = []
    for name, source in columns.items():
        met = sum(one.met for one in judged[name])
        where = f"[{source.name}](../benchmarks/results/{source.name})"
        text = f"- {met} of {len(judged[name])} goals met in {where}, by `{command(source)}`."
        note = other_threads(goal_set, source.results)
        notes.append(" ".join(filter(None, [text, note, comparison.caption(source.results)])))
    if not columns:
        notes.append(
            f"No results file of a {DEVICES[goal_set.device]} has any of these rows yet; "
            "`make gpu` measures them."
        )
    return [*blocks, "\n".join(notes)]


def _on_a_gpu(promise: Promise, found: Sequence[Source]) -> str:
    """What the newest run of the tests on a GPU says of a promise."""
    if not promise.cuda:
        return "-"
    ran = [
        source
        for source in found
        if source.device == "cuda" and source.results["tests"] is not None
    ]
    if not ran:
        return PENDING
    source = max(ran, key=lambda source: str(source.results["written"]))
    # As junit names them: tests.test_cuda::test_x[parameters].
    names = {test.replace(".py::", "::").replace("/", ".") for test in promise.tests}
    failures = source.results["tests"].get("failures", [])
    if any(failure["test"].split("[")[0] in names for failure in failures):
        return f"**failed** ([{source.name}](../benchmarks/results/{source.name}))"
    statuses = [step["status"] for step in source.results["steps"] if step["name"] == "test"]
    word = "passed" if statuses == ["passed"] else f"none failed, the run: {', '.join(statuses)}"
    return f"{word} ([{source.name}](../benchmarks/results/{source.name}))"


def _tests(promise: Promise) -> str:
    return ", ".join(
        f"[`{test.rsplit('::', 1)[1]}`](../{test.rsplit('::', 1)[0]})" for test in promise.tests
    )


def _link(document: str) -> str:
    """A document as a link from docs/."""
    inside = document.startswith("docs/")
    return f"[{document}]({document.removeprefix('docs/') if inside else '../' + document})"


def _trainings(found: Sequence[Source]) -> str:
    """The newest record of every machine, and a line for every kind of device without one."""
    lines = []
    for device, word in DEVICES.items():
        there = [source for source in found if source.device == device]
        for machine in dict.fromkeys(source.machine for source in there):
            source = newest_trainings(one for one in there if one.machine == machine)[device]
            where = f"[{source.name}](../benchmarks/results/{source.name})"
            lines += [(machine, *line, where) for line in training_record.lines(source.results)]
        if not there:
            lines.append((word, *(PENDING,) * len(training_record.HEADER), "-"))
    return table(("machine", *training_record.HEADER, "file"), lines)


def render(found: Folder) -> str:
    """The page, from the results files and the tables of this room."""
    blocks = [
        "# Ledger",
        "Written by `make report` from `benchmarks/ledger.py`, `benchmarks/goals.py` and "
        "`benchmarks/results/`; do not edit. Each promise of this project that can be measured, "
        "beside what measured it. **Pending**: no results file shows it.",
        "## Speed and memory",
        "Held against the newest file of each machine "
        "([the rule](../benchmarks/results/README.md#which-file-is-shown)). Speed is how many "
        "times as fast as the rival, memory the share of the rival's peak; both sides are medians "
        "of one run.",
    ]
    free = []
    for subject in subjects(found.files):
        if subject.goal_set is not None:
            blocks += _goals(subject, found.files)
            continue
        source = subject.newest(found.files)
        value = PENDING if source is None else comparison.summary(subject.comparisons(source))
        free.append((subject.title, value))
    if free:
        blocks += ["### Measured without goals", table(("what", "against the fastest rival"), free)]
    blocks += ["### Whole trainings", _trainings(found.trainings)]
    rows = [
        (f"\"{promise.text}\"", _link(promise.made_in), _tests(promise),
         "every change" if promise.cpu else "-", _on_a_gpu(promise, found.files))
        for promise in PROMISES
    ]  # fmt: skip
    blocks += [
        "## Held by tests",
        "`make test` runs them on the CPU and runs the kernels in the emulator, `make gpu` on the "
        "GPU.",
        table(("promise", "made in", "test", "CPU", "GPU"), rows),
        "## Measured by a command, kept in no results file",
        "The figures stand where they are made; whoever doubts one runs the command.",
        table(
            ("what", "stated in", "by"),
            [(f'"{one.text}"', _link(one.made_in), f"`{one.command}`") for one in STATEMENTS],
        ),
    ]
    return "\n\n".join(blocks) + "\n"
