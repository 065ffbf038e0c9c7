"""A folder has one writer: two commands into one would mix their files."""
import contextlib
import os
import pathlib
import platform
import threading
import time

from distributed import InputError, alive, place

STALE = 120  # seconds without a heartbeat after which a writer counts as dead


def _kernel_lock(path):
    """Lock a file -> its descriptor, None where another process holds it. OSError where the file system has
    no locks.
    """
    import fcntl  # not on every system
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder has removed it meanwhile


def _heartbeat(path):
    """Take a file that says by its time that its writer lives -> an event that ends it, None where another
    one's is fresh.
    """
    if path.exists() and path.stat().st_size and time.time() - path.stat().st_mtime < STALE:
        words = path.read_text(errors="replace").split()
        here = words[-1:] == [platform.node()] and words[1:2] and words[1].isdecimal()
        if not here or alive(int(words[1])):
            return None
    path.touch()
    ended = threading.Event()

    def beat():
        while not ended.wait(STALE / 6):
            path.touch()
    threading.Thread(target=beat, daemon=True).start()
    return ended


@contextlib.contextmanager
def only_writer(folder):
    """Hold a folder as the only command that writes into it, for all its processes; released by death.

    Raises InputError, naming the other one's process and host, where it is held.
    """
    folder = pathlib.Path(folder)
    path = folder / ".writer"
    folder.mkdir(parents=True, exist_ok=True)
    if place()[0] > 0:
        yield
        return
    try:
        held, release = _kernel_lock(path), os.close
    except (ImportError, OSError):
        held, release = _heartbeat(path), threading.Event.set
    if held is None:
        other = path.read_text(errors="replace").strip() or "another process"
        raise InputError(f"{folder}: {other} is writing into it; wait for its end, or use another folder")
    try:
        path.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        path.unlink(missing_ok=True)
        release(held)
        with contextlib.suppress(OSError):
            folder.rmdir()  # where nothing was written
