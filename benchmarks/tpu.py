"""What the TPU's compiler says of a program, for the commands that run nothing."""

import re

from minillm_jax.planning.counting import Counter


def cycles(counts: Counter) -> int:
    """Those that the compiler expects of the longest body of a loop."""
    bodies = (
        counts.computations[i.called["body"][0]]
        for computation in counts.computations.values()
        for i in computation.values()
        if i.op == "while"
    )
    return max(
        sum(
            int(found[1])
            for i in body.values()
            if (found := re.search(r'"estimated_cycles":"(\d+)"', i.attributes))
        )
        for body in bodies
    )
