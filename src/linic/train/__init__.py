"""Recipe -> shards -> crops -> loss -> loop -> checkpoint -> export. Nothing that decoding needs.

    recipe.py      the recipe: TOML <-> frozen dataclasses, checked to the last key
    data.py        folders and tar shards -> uint8 pixels, decoded once -> random crops
    loss.py        rate and distortion of a batch, as one number for every quality
    perceptual.py  terms of MRT's loss for what the eye minds
    stage.py       what a step trains for instead, with networks of its own:
    codes.py         MRT's stage 1: tokens predict codes of patches
    critic.py        MRT's phase C: the decoder alone, against a critic
    gates.py       MRT: does the run do what such a run does?
    evaluate.py    hard rounding on validation pictures
    checkpoint.py  weights and state on disk, whole or not at all
    machine.py     cores, signals, torch's global switches
    ranks.py       several processes as one run
    flops.py       operations of a step, peak of a device
    plain.py       the same model in plain torch, to compare with
    loop.py        READ FIRST: the run, planned from a wall-clock budget
    command.py     `linic train` and `python -m linic.train`
    export.py      the only door to shipping

The loop runs from a source tree with torch, numpy, pillow and safetensors alone.
"""

import os

# Before torch is imported anywhere: libgomp's threads spin at every barrier, thousands a step. Beside one busy
# stranger on two cores that took the step from 0.14 s to 11 s; after a short spin they now sleep (0.31 s).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
