"""torchrun helpers and the two habits all commands share: clear input errors and whole files.

A command started without torchrun is a world of one process and takes the same path.
"""
import collections
import contextlib
import datetime
import errno
import functools
import os
import pathlib
import sys
import time

import torch
import torch.distributed as dist


class InputError(Exception):
    """Something the user gave is wrong: the message names the file, the value and the remedy."""


def setup():
    """Join the torchrun world, if there is one -> (rank, world size, torch.device)."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    mps = not cuda and torch.backends.mps.is_available()
    device = torch.device(f"cuda:{local}" if cuda else "mps" if mps else "cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    elif "OMP_NUM_THREADS" not in os.environ or (world > 1 and os.environ["OMP_NUM_THREADS"] == "1"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world))))  # torchrun's own default is 1
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
    return rank, world, device


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor):
    """Sum over the processes, in place; returns the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def autocast(device, precision):
    """The context of a forward pass: bf16 autocast for precision "bf16", nothing for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


@functools.cache
def leftovers(folder):
    """{file name: temporaries of it that killed processes left} of a folder, listed once: it may hold 50,000 pictures."""
    found = collections.defaultdict(list)
    for path in folder.glob(".*.tmp"):
        found[path.name[1:].rsplit(".", 2)[0]].append(path)
    return found


@contextlib.contextmanager
def whole_file(path):
    """Open a temporary neighbour of path for writing bytes; it takes the final name only when complete.

    Neighbours that a killed process left of the same file are removed.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in leftovers(path.parent).pop(path.name, ()):
        stale.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save ends so when the disk is full
        if "unexpected pos" not in str(error) and "write" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "could not be written whole", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def run(main):
    """Run a command's main: an InputError or a failing disk ends it with one line and exit code 2."""
    try:
        main()
    except InputError as error:
        message = str(error)
    except OSError as error:  # full disk, no permission, no such folder
        message = f"{error.filename or 'output'}: {error.strerror or error}; check the path and the free space"
    except RuntimeError as error:
        if not dist.is_initialized() or not any(word in str(error).lower() for word in ("peer", "gloo", "nccl", "closed")):
            raise
        message = f"another process has ended, and its own line says why; or they cannot talk: {str(error).strip().splitlines()[0]}"
    except KeyboardInterrupt:
        message = "interrupted; the same command continues, or starts again where nothing was kept"
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(3)  # when all processes meet the same error, torchrun ends this one before it repeats the line
    print(f"{pathlib.Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2)  # a waiting collective of another process must not keep this one alive
