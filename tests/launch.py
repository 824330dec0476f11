"""Runs train.py in child processes, alone or as several ranks, without paying for `import torch` each time.

A fork server imports once what the children need; each child is forked from it within milliseconds.
"""

import contextlib
import multiprocessing
import os
import socket
import sys

context = multiprocessing.get_context("forkserver")
# pytest: each child imports the program that started it. torch._dynamo: hooks need it
context.set_forkserver_preload(["pytest", "train", "quantize", "tools.ablation", "torch._dynamo"])


def _child(argv, environment, output):
    os.environ.update(environment)
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        import torch

        torch.set_num_threads(1)
        with _exit_code():
            train_py([str(a) for a in argv])


def train_py(argv):
    """What `python train.py ARGV` runs, in this process."""
    import train
    from tools import ablation, bench, dry_run

    tools = {"--ablation": ablation, "--dry-run": dry_run, "--bench": bench}
    main = next((tool.main for option, tool in tools.items() if option in argv), train.main)
    main(argv)


def torchrun_environments(world):
    """The environment variables that torchrun gives to each of `world` ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [dict(common, RANK=str(r), LOCAL_RANK=str(r)) for r in range(world)]


def start(argv, tmp_path, world=1):
    """Start train.py with `argv` in `world` ranks. Returns the processes; rank r prints to tmp_path/rank<r>.txt."""
    environments = torchrun_environments(world) if world > 1 else [{}]
    processes = [
        context.Process(target=_child, args=(argv, e, tmp_path / f"rank{r}.txt"), daemon=True) for r, e in enumerate(environments)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes, tmp_path, timeout=60):
    """Wait for the processes; returns (exit code of rank 0, what rank 0 printed)."""
    for process in processes:
        process.join(timeout)
        assert process.exitcode is not None, f"no end after {timeout} s: " + (tmp_path / "rank0.txt").read_text()
    return processes[0].exitcode, (tmp_path / "rank0.txt").read_text()


def run(argv, tmp_path, world=1):
    return finish(start(argv, tmp_path, world), tmp_path)


def run_side_by_side(jobs, tmp_path):
    """run() for each (argv, world) at once; a list of what each returns."""
    folders = [tmp_path / f"output-{i}" for i in range(len(jobs))]
    for folder in folders:
        folder.mkdir()
    started = [start(argv, folder, world) for (argv, world), folder in zip(jobs, folders)]
    return [finish(processes, folder) for processes, folder in zip(started, folders)]


def fork(function, *arguments, output):
    """function(*arguments) in a child whose stdout and stderr, also what is written past Python, go to the file `output`.
    Returns the exit code."""
    process = context.Process(target=_redirected, args=(function, arguments, output))
    process.start()
    process.join()
    return process.exitcode


def _redirected(function, arguments, output):
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with _exit_code():
        function(*arguments)


@contextlib.contextmanager
def _exit_code():
    """sys.exit("message") prints and becomes a 1, which multiprocessing would not do."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        raise SystemExit(1 if isinstance(error.code, str) else error.code) from None
