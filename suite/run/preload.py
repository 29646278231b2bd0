"""What the fork server imports once, so that every worker starts with it."""

import threading

from tqdm import tqdm

import suite.evaluate.model
import suite.run.worker  # noqa: F401

# tqdm's default lock is a semaphore of the operating system, which a worker that is killed would leak.
tqdm.set_lock(threading.RLock())
