"""What torch's own tests ask of torch's optimizers, asked of AdamMini.

torch describes its optimizers as `OptimizerInfo` and runs the class `TestOptimRenewed` of its test/test_optim.py over
them. The descriptions are shipped with torch, the tests are not: here are checks of the same properties, each with the
names of the tests that it stands for. `subject` describes AdamMini, `registry` runs the checks and writes the table.
"""
