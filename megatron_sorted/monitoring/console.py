"""Reports as lines for people."""

from megatron_sorted.monitoring.report import EvaluationReport, StepReport


def duration(seconds: float) -> str:
    """Returns a duration such as 42s, 3m10s or 2h05m."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def step_line(report: StepReport) -> str:
    """Returns one line: progress, loss of every trained exit (exit@depth), rate and time left."""
    width = len(str(report.total_steps))
    losses = "  ".join(f"@{depth} {exit_.loss:.3f}" for depth, exit_ in sorted(report.exits.items()))
    scale = f"  scale {report.loss_scale:g}" if report.loss_scale != 1 else ""
    skipped = f"  {report.skipped} skipped" if report.skipped else ""
    return (f"step {report.step:{width}}/{report.total_steps}  loss {losses}  lr {report.learning_rate:.2e}  "
            f"grad norm {report.grad_norm:.2f}{scale}{skipped}  {report.step_seconds * 1000:.0f} ms/step  "
            f"{report.tokens_per_second:,.0f} tokens/s  {duration(report.seconds_left)} left")


def evaluation_lines(report: EvaluationReport) -> str:
    """Returns a small table: loss, share of tokens right and exact match of every exit."""
    rows = [f"evaluation of {report.name!r} at step {report.step}: {report.num_tokens:,} tokens, {duration(report.seconds)}",
            "   exit    loss  tokens right  exact match"]
    for depth, exit_ in sorted(report.exits.items()):
        match = "-" if exit_.exact_match is None else f"{100 * exit_.exact_match:.1f} %"
        rows.append(f"  {depth:5d}  {exit_.loss:6.3f}  {100 * exit_.token_accuracy:10.1f} %  {match:>11}")
    return "\n".join(rows)
