"""How good and how fast: measures on whole files, rivals' curves, BD-rate, reports. Extra `linic[bench]`.

`evaluate` runs the codec over a folder; `anchors` are the curves we compare with; `report` writes what people read.
"""
