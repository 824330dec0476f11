"""Tables of text, and what train.py prints before and after a run."""

import os


def table(head, rows, markdown: bool = False) -> str:
    """`head` and `rows`: lists of cells. Aligned, the first column to the left, or as Markdown."""
    lines = [[str(cell) for cell in line] for line in [head, *rows]]
    if markdown:
        lines.insert(1, ["---"] * len(head))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines)]

    def aligned(line):
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        return "  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip()

    return "\n".join(map(aligned, lines))


def optimizer_table(optimizers) -> str:
    """A line for each group of parameters, to check before a run who trains what."""
    rows = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            n = sum(p.numel() for p in group["params"])
            rates = f"{group['peak_lr']:.2g}", f"{group['weight_decay']:.2g}"
            name = type(optimizer).__name__
            rows.append([group["role"], name, *rates, len(group["params"]), f"{n:,}"])
    return table(["role", "optimizer", "lr", "decay", "tensors", "parameters"], rows)


def run_summary(r: dict, is_osp: bool) -> str:
    """The last lines of a run, from the result of train()."""
    bits = f" = {r['bits_per_byte']:.4f} bits per byte" if r["bits_per_byte"] else ""
    rtn, had = (r["quantized"]["4-4-4"][method]["val_loss"] for method in ("rtn", "had"))
    lines = {
        "validation loss": f"{r['val_loss']:.4f} nats per token{bits}",
        "excess kurtosis": f"{r['kurtosis']:.3f} (perfectly Gaussian activations: "
                           f"{r['kurtosis_floor']:.3f})",
        "loss at 4-4-4 bits": f"{rtn:.4f} rounded to nearest, {had:.4f} with a Hadamard in the "
                              "FFN (quantize.py)",
        "speed": f"{r['tokens_per_s']:,.0f} tokens/s in training, {r['wall_s']:.0f} s in all",
        "peak memory": f"{r['peak_memory_gib']:.2f} GiB",
        "run directory": os.path.relpath(r["run"]),
        "to compare": "the same command, " + ("without --osp: plain Adam" if is_osp else "with --osp"),
    }
    return "\n".join(["", *(f"{name:<19}{text}" for name, text in lines.items())])
