"""The paper's claims, each an experiment that says in one line whether the claim held.

    python -m examples.paper quadratic          # one of them; --help after its name shows its flags
    python -m examples.paper all                # all of them at their default sizes
    python -m examples.paper table              # nothing but the table, from what is there

Figures, pictures and the table go to ``runs/paper/``, or where ``--output-dir`` says. What is measured is kept
case by case: a run that was stopped goes on where it stopped. Cases are measured side by side, ``--jobs`` at a time.
"""
