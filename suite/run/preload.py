"""What the fork server imports once, so that every worker starts with it."""

import signal
import threading

# The fork server outlives a Ctrl-C in the terminal and a batch system's SIGTERM, as its workers do.
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)

from tqdm import tqdm  # noqa: E402

import suite.evaluate.model  # noqa: E402
import suite.run.worker  # noqa: E402, F401

# tqdm's default lock is a semaphore of the operating system, which a worker that is killed would leak.
tqdm.set_lock(threading.RLock())
