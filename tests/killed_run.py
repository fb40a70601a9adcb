"""`minillm_jax.main`, killed without warning once a checkpoint is whole: `KILL_AT=distill/2`.

KILL_AT=distill/2 python -m tests.killed_run --config ... --workdir ...
"""

import os
import signal

from minillm_jax import hosts, main, program, stopping
from minillm_jax.checkpoint import Checkpoints

_save = Checkpoints.save


def _save_and_die(self, step, *args, **options):
    saved = _save(self, step, *args, **options)
    stage = self.directory.parent.name
    if os.environ.get("KILL_AT") == f"{stage}/{step}":
        self.wait()
        hosts.barrier("all have written")
        os.kill(os.getpid(), signal.SIGKILL)
    return saved


if __name__ == "__main__":
    stopping.listen()
    Checkpoints.save = _save_and_die
    program.run(main.main, main.FLAGS)
