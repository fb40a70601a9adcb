"""What an experiment needs on a machine that is not here: its programs compiled, and counted.

`targets` names the machine, `shapes` the models, `programs` what is compiled; `hlo` counts a
compiled program, `estimate` turns counts into seconds, `search` tries other settings, `table`
writes it down. Nothing is run and no weight is read.
"""
