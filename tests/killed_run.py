"""`minillm_jax.main`, killed without warning once a checkpoint is whole: `KILL_AT=distill/2`.

`TERM_AT` sends SIGTERM then. With `RANK` only that process gets either.

KILL_AT=distill/2 python -m tests.killed_run --config ... --workdir ...
"""

import os
import signal
import time

import jax

from minillm_jax import hosts, main, program, stopping
from minillm_jax.checkpoint import Checkpoints

_save = Checkpoints.save


def _save_and_die(self, step, *args, **options):
    saved = _save(self, step, *args, **options)
    here = f"{self.directory.parent.name}/{step}"
    hit = os.environ.get("RANK", str(jax.process_index())) == str(jax.process_index())
    for name, number in (("KILL_AT", signal.SIGKILL), ("TERM_AT", signal.SIGTERM)):
        if os.environ.get(name) == here:
            self.wait()
            hosts.barrier("all have written")
            if hit:
                os.kill(os.getpid(), number)
                time.sleep(0.1)  # until the thread that listens has heard it
    return saved


if __name__ == "__main__":
    stopping.listen()
    Checkpoints.save = _save_and_die
    program.run(main.main, main.FLAGS)
