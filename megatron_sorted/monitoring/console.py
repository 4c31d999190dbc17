"""Reports as lines of text for the console."""

from megatron_sorted.monitoring.report import EvaluationReport, ExitNumbers, StepReport


def duration(seconds: float) -> str:
    """Return a duration as text.

    >>> [duration(seconds) for seconds in (42, 190, 7500)]
    ['42s', '3m10s', '2h05m']
    """
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def step_line(report: StepReport) -> str:
    """Return a line with progress, the loss of every trained exit (@depth), speed and time left.

    Then follow the device's throughput, utilization and memory as far as they are known.
    """
    width = len(str(report.total_steps))
    losses = "  ".join(f"@{depth} {_loss(exit_)}" for depth, exit_ in sorted(report.exits.items()))
    scale = f"  scale {report.loss_scale:g}" if report.loss_scale != 1 else ""
    skipped = f"  {report.skipped} skipped" if report.skipped else ""
    skipped += f" ({report.nonfinite} not finite)" if report.nonfinite else ""
    device = f"  {report.tflops_per_device:.3g} TFLOP/s" if report.tflops_per_device > 0 else ""
    device += f"  MFU {100 * report.mfu:.1f} %" if report.mfu is not None else ""
    device += f"  {report.memory_bytes / 2**30:.1f} GiB" if report.memory_bytes > 0 else ""
    return (
        f"step {report.step:{width}}/{report.total_steps}  loss {losses}  "
        f"lr {report.learning_rate:.2e}  grad norm {report.grad_norm:.2f}{scale}{skipped}  "
        f"{report.step_seconds * 1000:.0f} ms/step  {report.tokens_per_second:,.0f} tokens/s  "
        f"{duration(report.seconds_left)} left{device}"
    )


def evaluation_lines(report: EvaluationReport) -> str:
    """Return a table of the exits: loss, share of correct tokens, exact match.

    Agreement, accept length and the loss of averaged weights are added where they were measured.
    """
    exits = sorted(report.exits.items())
    agreement = any(exit_.agreement is not None for _, exit_ in exits)
    drafts = any(exit_.accept_length is not None for _, exit_ in exits)
    rows = [
        f"evaluation of {report.name!r} at step {report.step}: {report.num_tokens:,} tokens, "
        f"{duration(report.seconds)}",
        "   exit    loss  tokens right  exact match"
        + "  agreement" * agreement
        + "  accept length" * drafts
        + "  averaged: loss  tokens right" * bool(report.averaged),
    ]
    for depth, exit_ in exits:
        row = f"  {depth:5d}  {_loss(exit_):>6}  {_percent(exit_.token_accuracy):>12}"
        row += f"  {_percent(exit_.exact_match):>11}"
        row += f"  {_percent(exit_.agreement):>9}" if agreement else ""
        row += (
            f"  {'-' if exit_.accept_length is None else format(exit_.accept_length, '.2f'):>13}"
            if drafts
            else ""
        )
        if report.averaged:
            averaged = report.averaged[depth]
            row += f"  {_loss(averaged):>14}  {_percent(averaged.token_accuracy):>12}"
        rows.append(row)
    return "\n".join(rows)


def _loss(exit_: ExitNumbers) -> str:
    return "none" if exit_.loss is None else f"{exit_.loss:.3f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
