"""What all commands share: torchrun's world, work shared out and read ahead, whole files, errors of one line.

A command started without torchrun is a world of one process and takes the same path.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import platform
import re
import sys
import tempfile
import threading
import time

import torch
import torch.distributed as dist


# ------------------------------------------------------------------------------------------------
# Errors.

class InputError(Exception):
    """Something the user gave is wrong: the message names the file, the value and the remedy."""


def check(ok, message):
    """Raise InputError with this message unless ok."""
    if not ok:
        raise InputError(message)


@contextlib.contextmanager
def utf8_path(path):
    """A name of a file that libraries can take which know UTF-8 alone: its own, or that of a link for now."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = pathlib.Path(folder, "file")
            link.symlink_to(os.path.abspath(path))
            yield link
    else:
        yield path


def check_ranges(args, **ranges):
    """Raise InputError for a flag that is given and not in its range {name: (lowest, highest or None)}."""
    for name, (low, high) in ranges.items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        right = f"be at least {low}" if high is None else f"lie in [{low}, {high}]"
        most = math.inf if high is None else high
        check(value is None or low <= value <= most, f"{flag} {value}: must {right}")


@contextlib.contextmanager
def reading(path, remedy):
    """Whatever fails inside is the fault of what is read: an InputError of one line that names path and
    remedy.

    Foreign files make numpy, torch, Pillow, zip, timm and the hub raise errors of every kind.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        fault = f"not readable ({type(error).__name__}: {reason})"
        if type(error) is FileNotFoundError:  # the hub raises subclasses of it when it is out of reach
            fault = "no such file"
        raise InputError(f"{path}: {fault}; {remedy}") from error


# ------------------------------------------------------------------------------------------------
# The world.

def _told(name):
    """A launcher's variable in the environment; "" where there is none."""
    return os.environ.get(name, "").strip()


def _number(name, default, least=0):
    """A launcher's whole number in the environment."""
    text = _told(name) or str(default)
    check(text.isdecimal() and int(text) >= least, f"{name}={text[:40]} in the environment: expected a whole "
          f"number from {least}; start the command with torchrun, or unset {name}")
    return int(text)


def _meet(backend):
    """Join the other processes. Raises InputError where they cannot be reached."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    told = f"still waiting for the other processes at {address}, of RANK and WORLD_SIZE in the environment"
    late = threading.Timer(30, print, [told], {"flush": True, "file": sys.stderr})
    late.daemon = True
    late.start()
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"MASTER_ADDR:MASTER_PORT {address}: the processes cannot meet there "
                         f"({type(error).__name__}: {reason}); start the command with torchrun") from error
    finally:
        late.cancel()


def setup():
    """Join the torchrun world, if there is one -> (rank, world size, torch.device).

    Raises InputError where the environment holds another launcher's variables, or the world cannot be joined.
    """
    rank, world, local = _number("RANK", 0), _number("WORLD_SIZE", 1, 1), _number("LOCAL_RANK", 0)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    said = " ".join(f"{name}={_told(name)}" for name in names if _told(name)) + " in the environment"
    lost = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if world > 1 and not _told(name)]
    remedy = "start the command with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK"
    check(not lost, f"{said}, without {' and '.join(lost)}: of another launcher; {remedy}")
    check(rank < world, f"{said}: RANK must be below WORLD_SIZE, which is {world}; {remedy}")
    if torch.cuda.is_available():
        check(local < torch.cuda.device_count(),
              f"{said}: this machine shows {torch.cuda.device_count()} GPUs; one process for each")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
        torch.backends.cudnn.allow_tf32 = False
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        threads = os.environ.get("OMP_NUM_THREADS")
        if threads is None or (world > 1 and threads == "1"):  # 1 is torchrun's own default
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(max(1, cores // _number("LOCAL_WORLD_SIZE", world, 1)))
    if world > 1:
        _meet("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def place():
    """(rank, world size) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor):
    """Sum over the processes, in place; returns the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """The values (picklable) of all processes, in the order of their ranks, on every process."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        with torch.inference_mode(False):  # torch 2.5 fills tensors of its own, outside of that mode
            dist.all_gather_object(values, value)
    return values


def say(line):
    """Print a line once, not on every process."""
    if place()[0] == 0:
        print(line, flush=True)


def autocast(device, precision):
    """The context of a forward pass: bf16 autocast for precision "bf16", nothing for "fp32"."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------
# Work.

def share(items, rank, world, size):
    """This process's batches of `size` items: the batches are the same whatever the number of processes."""
    batches = [items[start:start + size] for start in range(0, len(items), size)]
    return batches[rank::world]


def prefetch(function, jobs, threads=2, ahead=2):
    """Yield function(job) in the order of the jobs, up to `ahead` of them computed in threads beforehand."""
    jobs = iter(jobs)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque(pool.submit(function, job) for job in itertools.islice(jobs, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, job) for job in itertools.islice(jobs, 1))
            yield result


# ------------------------------------------------------------------------------------------------
# Files.

@functools.cache
def _leftovers(folder):
    """{what a temporary's name says of its file: such temporaries}, listed once for 50,000 pictures."""
    found = collections.defaultdict(list)
    for path in folder.glob(".*.tmp"):
        found[path.name[1:].rsplit(".", 2)[0]].append(path)
    return found


def alive(pid):
    """Whether a process of this host lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it lives, and is somebody else's
        pass
    return True


def temporary_of(path):
    """The neighbour of a file under which this process makes it; what dead processes of this host left of the
    same file is removed. Its name is short: the file's may be as long as the file system allows.
    """
    who = f"{path.name}/{platform.node()}"
    mark = hashlib.sha256(os.fsencode(who)).hexdigest()[:16]
    leftovers = _leftovers(path.parent)
    for left in leftovers.pop(mark, []) + leftovers.pop(path.name, []):  # the name: older versions'
        writer = left.name.split(".")[-2]
        if writer.isdecimal() and not alive(int(writer)):
            left.unlink(missing_ok=True)
    return path.with_name(f".{mark}.{os.getpid()}.tmp")


@contextlib.contextmanager
def whole_file(path):
    """Open a temporary neighbour of path for writing bytes; it takes the final name only when complete."""
    path = pathlib.Path(path)
    check(path.name, f"{str(path)!r}: is no name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
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


def write_json(path, value):
    """Write a result, whole; JSON has no NaN and no infinity: null stands for them."""
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return list(map(plain, value))
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with whole_file(path) as file:
        file.write(json.dumps(plain(value), indent=1, allow_nan=False).encode())


def sha256(path):
    """Hex digest of a file: weights are named by content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------
# What may be written.

def check_apart(outputs, inputs):
    """Raise InputError where a file to be written is a file that is read, or cannot be one; None is none."""
    for out in filter(None, outputs):
        check(not os.path.isdir(out), f"{out}: is a folder; give the name of a file to write")
        for above in pathlib.Path(out).parents:
            check(not above.is_file(), f"{out}: {above} is a file; give another name")
        real = os.path.realpath(out)
        for given in filter(None, inputs):
            same = os.path.realpath(given) == real
            if os.path.exists(real) and os.path.exists(given):
                same = os.path.samefile(real, given)  # hard links, too
            check(not same, f"{out}: would be overwritten, and is read ({given}); give another file")


def check_replaced(path, head, holds=b""):
    """Raise InputError where a result would replace a file of another kind than its own, which begins with
    the byte `head` and holds these bytes; path None is none.
    """
    if path and os.path.isfile(path):
        with open(path, "rb") as file:
            there = file.read(10 ** 7)
        check(there[:1] in (b"", head) and (not there or holds in there), f"{path}: is there, and no earlier "
              "result; give another file")


def check_read(parser, args, readers):
    """Raise InputError for a flag that is given to a --task that does not read it; readers {flag: tasks}."""
    for name, tasks in readers.items():
        given = getattr(args, name) != parser.get_default(name)
        check(args.task in tasks or not given, f"--{name.replace('_', '-')}: --task {args.task} does not "
              f"read it; it is of {', '.join(tasks)}")


def check_folder(out, walked, flag="--out"):
    """Raise InputError where a folder to be written equals, contains or lies in one whose pictures are
    read.
    """
    out = pathlib.Path(out).resolve()
    for folder in walked:
        inner = pathlib.Path(folder).resolve()
        apart = out != inner and out not in inner.parents and inner not in out.parents
        check(apart, f"{flag} {out}: is, holds or lies in {folder}, whose pictures are read; "
              "use another folder")


def bare(state):
    """A state dict with the names of the network's own: without DDP's "module." in front and torch.compile's
    "_orig_mod." anywhere.
    """
    names = {key: ".".join(part for part in key.split(".") if part != "_orig_mod") for key in state}
    return {re.sub(r"^(module\.)+", "", name): state[key] for key, name in names.items()}


# ------------------------------------------------------------------------------------------------
# Commands.

def command_parser(doc):
    """A parser of a command's flags whose --help shows the file's docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def with_row(words, flag, rows):
    """The words of a command, before them those that its flag stands for: the last of a flag counts.

    rows: {name: flags as one would write them}. An unknown name is left to the command's own parser.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(flag, nargs="?", dest="name")
    name = parser.parse_known_args(words)[0].name
    return [*rows.get(name, "").split(), *words]


def _one_line(error):
    """What a command says of an error that is not a fault of its own; None where it is one."""
    if isinstance(error, InputError):
        return str(error).replace("\n", "\\n")  # a name may hold one
    if isinstance(error, OSError):  # full disk, no permission, no such folder
        return f"{error.filename or 'output'}: {error.strerror or error}; check the path and the free space"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command continues, or starts again where nothing was kept"
    text = str(error).strip()
    if dist.is_initialized() and any(word in text.lower() for word in ("peer", "gloo", "nccl", "closed")):
        said = text.splitlines()[0]
        return f"another process has ended, and its own line says why; or they cannot talk: {said}"
    return None


def run(main):
    """Run a command's main: an InputError or a failing disk ends it with one line and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        main()
    except (InputError, OSError, RuntimeError, KeyboardInterrupt) as error:
        message = _one_line(error)
        if message is None or _told("MMGEN_TRACEBACK"):
            raise
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    if _told("RANK").isdecimal() and int(_told("RANK")) > 0:
        time.sleep(3)  # where all meet the same error, torchrun ends this one before it repeats the line
    print(f"{pathlib.Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2)  # a waiting collective of another process must not keep this one alive
