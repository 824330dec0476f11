"""Tables of text, and the one that train.py prints before a run."""


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
